"""Bad documents: suites, records, baselines, golden traces, predictions, and what is no file at all."""

from __future__ import annotations

import copy
import json
import os
import random
from pathlib import Path
from typing import Any

from mutations import leaves

from .case import Case
from .values import JSON, NAMES, NESTED, at, other_type
from .world import BOARD, PREDICTION, ROOT, SUITE, World, document

SECTIONS = ("spec", "privacy", "result", "cost", "diagnostics", "provenance", "status", "run_id", "schema", "error")


def spoilt(value: Any, rng: random.Random, ways: list[tuple] | None = None) -> tuple[Any, str, bool]:
    """(a copy with one entry of another type, gone or renamed; in words; whether an entry that is there is of a wrong type)."""
    value = copy.deepcopy(value)
    *way, last = rng.choice(ways or list(leaves(value)))
    inner, where = at(value, tuple(way)), ".".join(map(str, (*way, last)))
    kind = rng.choice(("type", "type", "type", "any", "gone", "name"))
    if kind == "gone":
        del inner[last]
        return value, f"{where} is gone", False
    if kind == "name" and isinstance(inner, dict):
        inner[rng.choice(NAMES)] = inner.pop(last)
        return value, f"{where} has another name", False
    inner[last] = other_type(inner[last], rng) if kind == "type" else rng.choice(JSON)
    return value, f"{where} = {str(inner[last])[:40]!r}", kind == "type"


def suites(world: World, rng: random.Random) -> Case:
    """A suite file with a wrong entry."""
    tables, what, wrong = spoilt(SUITE, rng)
    path = world.folder / "suite.toml"
    path.write_text(document(tables))
    fine = not wrong or what.startswith(("small.description = ", "small.base = "))
    fine = fine or what.endswith(
        (".seed = '7'", ".lr = '7'", ".lr = '1.5'", ".seed = '0'", ".lr.0 = '1.5'", ".lr.1 = '1.5'")
    )  # one in place of several
    return Case("suites", what, ("plan", str(path), "--results", str(world.folder)), may_accept=fine)


def boards(world: World, rng: random.Random) -> Case:
    """A file of leaderboards with a wrong entry."""
    tables, what, wrong = spoilt(BOARD, rng)
    path = world.folder / "boards.toml"
    path.write_text(document(tables))
    world.contest(path)
    place = what.split(" = ")[0].removeprefix("small.")
    must = wrong and place.split(".")[0] in ("rules", "contests") and ".base." not in place
    must = must and not place.endswith((".method", ".name", ".title", ".0", ".1"))  # another text may be one, too
    return Case("boards", what, ("plan", "small", "--results", str(world.folder)), may_accept=not must)


def damage(text: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A file that is no file of its kind any more."""
    how = rng.choice(("cut", "empty", "binary", "nested", "latin", "list", "number"))
    new = {
        "cut": text[: rng.randrange(len(text) - 2)],
        "empty": b"",
        "binary": bytes(rng.randrange(256) for _ in range(200)),
        "nested": NESTED.encode(),
        "latin": b'"\xff\xfe"' + text,
        "list": b"[1, 2]",
        "number": b"7",
    }
    return new[how], how


def texts(world: World, rng: random.Random) -> Case:
    """Records, baselines, golden traces, suites and predictions that are cut, empty, binary, nested."""
    kind = rng.choice(("record", "baseline", "golden", "suite", "predictions", "boards"))
    if kind == "record":
        folder = world.copied()
        path = rng.choice(sorted(folder.glob("*.json")))
        path.write_bytes(content := damage(path.read_bytes(), rng)[0])
        return Case("texts", f"record {content[:30]!r}", reader(world, folder, rng))
    if kind == "suite":
        path = world.folder / "suite.toml"
        content, how = damage(document(SUITE).encode(), rng)
        path.write_bytes(content)
        return Case("texts", f"suite {how}", ("plan", str(path), "--results", str(world.folder)))
    if kind == "predictions":
        path = world.folder / "predictions.toml"
        content, how = damage(document({"prediction": [PREDICTION]}).encode(), rng)
        path.write_bytes(content)
        world.predict(path)
        return Case("texts", f"predictions {how}", ("report", str(world.results), "--predictions"))
    if kind == "boards":
        path = world.folder / "boards.toml"
        content, how = damage(document(BOARD).encode(), rng)
        path.write_bytes(content)
        world.contest(path)
        return Case("texts", f"boards {how}", ("plan", "small", "--results", str(world.folder)))
    source = world.blessed if kind == "baseline" else ROOT / "results/golden.json"
    path = world.folder / "b.json"
    content, how = damage(source.read_bytes(), rng)
    path.write_bytes(content)
    return Case("texts", f"{kind} {how}", checker(world, path, kind))


def reader(world: World, folder: Path, rng: random.Random) -> tuple[str, ...]:
    """A command that reads all records of a folder."""
    out = str(world.folder / "out")
    return rng.choice(
        (
            ("report", str(folder)),
            ("report", str(folder), "--curves", "--all-lr", "--view", "budget"),
            ("report", str(folder), "--methods"),
            ("report", str(folder), "--predictions"),
            ("report", str(folder), "--theory"),
            ("report", str(folder), "--html", out + ".html"),
            ("report", str(folder), "--csv", out + ".csv", "--latex", out + ".tex"),
            ("check", str(folder), "--baseline", str(world.blessed), "--time-margin", "0.1", "--memory-margin", "0.1"),
            ("check", str(folder), "--baseline", out + ".json", "--bless"),
            ("merge", str(folder), out),
            ("plan", "--task", "low-rank", "--model", "linear", "--method", "non-private", "--results", str(folder)),
        )
    )


def checker(world: World, path: Path, kind: str) -> tuple[str, ...]:
    golden = ("--golden",) if kind == "golden" else (str(world.results),)
    return ("check", *golden, "--baseline", str(path))


def records(world: World, rng: random.Random) -> Case:
    """A record with a section of another type, gone, null, or of a newer dpft."""
    folder = world.copied()
    path = rng.choice(sorted(folder.glob("*.json")))
    record = json.loads(path.read_text())
    ways = [(section,) for section in SECTIONS]
    if rng.random() < 0.6:
        ways = [way for way in leaves(record) if way[0] not in ("diagnostics", "chain") or rng.random() < 0.02]
    record, what, wrong = spoilt(record, rng, ways)
    if rng.random() < 0.1:
        record["schema"], what, wrong = 2, "schema = 2", True
    path.write_text(json.dumps(record))
    command = ("verify", str(folder)) if rng.random() < 0.1 else reader(world, folder, rng)
    # what is not asked for by a command need not be looked at by it; provenance and texts of other programs are free
    must = wrong and what.split(" = ")[0] in SECTIONS and not what.startswith(("privacy = ", "error = "))
    return Case(
        "records",
        f"{what} in {command[0]} {command[-1][:20]}",
        command,
        may_accept=not must,
        may_say_no=command[0] in ("check", "verify"),
    )


def baselines(world: World, rng: random.Random) -> Case:
    """A baseline with a wrong entry."""
    content, what, wrong = spoilt(json.loads(world.blessed.read_text()), rng)
    path = world.folder / "baseline.json"
    path.write_text(json.dumps(content))
    must = wrong and "environment" not in what and not what.endswith("step_s = 'None'")  # too few steps were timed
    return Case("baselines", what, checker(world, path, "baseline"), may_accept=not must, may_say_no=True)


def golden(world: World, rng: random.Random) -> Case:
    """Golden traces with a wrong entry."""
    source = json.loads((ROOT / "results/golden.json").read_text())
    name = rng.choice(sorted(source["traces"]))
    source["traces"] = {name: source["traces"][name]}
    content, what, wrong = spoilt(source, rng)
    path = world.folder / "golden.json"
    path.write_text(json.dumps(content))
    must = wrong and ".spec." not in what and "platform." not in what and not what.endswith("= 'None'")
    return Case("golden", what, checker(world, path, "golden"), may_accept=not must)


def predictions(world: World, rng: random.Random) -> Case:
    """Predictions with a wrong entry."""
    content, what, wrong = spoilt({"prediction": [PREDICTION]}, rng)
    path = world.folder / "predictions.toml"
    path.write_text(document(content))
    world.predict(path)
    must = wrong and not (".row." in what or ".against.0." in what)
    return Case("predictions", what, ("report", str(world.results), "--predictions"), may_accept=not must)


def no_files(world: World, rng: random.Random) -> Case:
    """FIFOs, folders, loops, missing and unreadable paths where a file is asked for."""
    kind = rng.choice(("fifo", "folder", "loop", "missing", "nul"))
    place = rng.choice(("suite", "record", "baseline", "plugin", "report", "predictions"))
    folder = world.copied()
    path = {"suite": world.folder / "s.toml", "record": folder / "00000000000000aa.json"}.get(place, world.folder / "f")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    named = f"{path}\x00" if kind == "nul" else str(path)
    if place == "predictions":
        world.predict(path)
    command = {
        "suite": ("plan", named.removesuffix("\x00") if kind != "nul" else f"{world.folder}/\x00.toml"),
        "record": reader(world, folder, rng),
        "baseline": ("check", str(world.results), "--baseline", named),
        "plugin": ("--plugin", named, "list", "methods"),
        "report": ("report", str(folder), "-o", named),
        "predictions": ("report", str(world.results), "--predictions"),
    }[place]
    fine = (place == "record" and kind in ("missing", "nul")) or (place == "predictions" and kind == "nul")
    return Case("no files", f"{kind} as {place}", command, may_accept=fine, may_say_no=fine)


FILES = {
    "suites": suites,
    "boards": boards,
    "texts": texts,
    "records": records,
    "baselines": baselines,
    "golden": golden,
    "predictions": predictions,
    "no files": no_files,
}
