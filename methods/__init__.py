"""Method adapters: one small file per family, found by being in this folder."""
