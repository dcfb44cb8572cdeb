"""The training core: one run from its spec to its record."""
