"""The border: everything that comes from outside is read here, and is valid or one sentence says what is wrong with it.

`files` opens (regular files alone, of a sensible size), `values` says which numbers, texts and names there are, `documents` turns
JSON, TOML and settings into typed values (msgspec) and what does not fit into a sentence. The types of a subject are where the
subject is: a run's in `harness/runs/spec.py`, a record's in `harness/records/schema.py`, a baseline's in `harness/regression/`.
"""
