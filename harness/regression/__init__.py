"""The regression gate: exact traces of every method on a tiny task, and paired tests of finished runs against a baseline."""
