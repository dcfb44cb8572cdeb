"""Records with one entry changed at random, and whether verify must find it."""

import copy
import json

JUNK = (
    None,
    "",
    "x",
    [],
    {},
    [None],
    {"a": 1},
    True,
    False,
    -1,
    0,
    7,
    1.5,
    -1e9,
    1e308,
    10**400,
    float("nan"),
    float("-inf"),
)
# what may change in a record without a chain and contradict nothing
FREE = (
    "cost",
    "provenance",
    "diagnostics.alignment_by_parameter",
    "diagnostics.decoder_by_parameter",
    "diagnostics.spectra",
)
# (of a result: what its metric does not follow from)
FREE += ("result.samples", "result.definitions", "result.all_metrics")
FREE_LEAVES = ("privacy.cross_checks.opacus_prv", "chain")


def leaves(value, way=()):
    """Paths of all entries, sections and lists themselves included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*way, key)
        yield from leaves(inner, (*way, key))


def mutated(record, rows, rng):
    """(record, rows, where, whether it must be found) with one entry replaced, retyped or taken out."""
    chained = record.get("chain") is not None
    record, rows = copy.deepcopy((record, rows))
    if rng.random() < 0.3:
        row = rng.choice(rows)
        name = rng.choice(list(row))
        if isinstance(old := row[name], str):
            row[name] = rng.choice(("", "0" * 32, 5, None))
        elif old is None or isinstance(old, int):
            row[name] = rng.choice((0, 3, -1, 10**6, None))
        else:
            row[name] = rng.choice((old + 0.5, -old - 1, float("nan"), float("inf"), None))
        return record, rows, ("curve", name), (chained or name not in ("loss", "snr")) and row[name] != old
    paths = [path for path in leaves(record) if path[0] != "diagnostics" or rng.random() < 0.02]
    *way, last = rng.choice(paths)
    inner = record
    for key in way:
        inner = inner[key]
    old = copy.deepcopy(inner[last])
    if isinstance(inner, dict) and rng.random() < 0.3:
        del inner[last]
        needed = way != ["result", "all_metrics"]
        needed = needed and (way != ["spec"] or last not in ("options", "delta", "eval_examples") and old is not None)
    else:
        inner[last] = rng.choice(JUNK)
        needed = json.dumps(inner[last]) != json.dumps(old)
    where = ".".join(map(str, (*way, last)))
    free = FREE if not chained else ("cost", "provenance", *FREE[2:5])
    free = () if where.endswith("_fingerprint") else free
    if where.startswith(free) or where in FREE_LEAVES or (way == ["spec"] and last not in inner):
        needed = False  # a field that is not there has its default, which may be what it held
    return record, rows, where, needed
