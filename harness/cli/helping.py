"""How help is laid out: options under headings, and names to complete."""

from __future__ import annotations

import click

WHAT, WHERE, HOW, PRINTED = "What to run", "Where", "How", "What is printed"
HEADINGS = {
    WHAT: "task model method epsilon delta steps batch_size lr clip_norm seed more precision tries what_if samplers users replay",
    WHERE: "data_dir results device executor jobs ranks shard_model shard",
    HOW: "engine max_tokens recompute timeout checkpoint_every resume retry_failed secure_noise overwrite budget skip_damaged "
    "dry_run",
    PRINTED: "quiet as_json",
}


class Grouped(click.Command):
    """A command whose options stand under headings, in the order of `HEADINGS`."""

    def format_options(self, context, formatter):
        records = {p.name: p.get_help_record(context) for p in self.get_params(context)}
        records = {name: record for name, record in records.items() if record}
        for heading, names in HEADINGS.items():
            if found := [records.pop(name) for name in names.split() if name in records]:
                with formatter.section(heading):
                    formatter.write_dl(found)
        if records:
            with formatter.section("More"):
                formatter.write_dl(list(records.values()))


def completing(*kinds: str):
    """For `shell_complete`: the names of these kinds (`dpft list`), one or several separated by commas."""

    def complete(context, parameter, incomplete):
        from dpft.harness.runs import registry, suites

        known = {"methods": registry.methods, "tasks": registry.tasks, "suites": suites.suites, "boards": _boards}
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + name for kind in kinds for name in known[kind]() if name.startswith(last)]

    return complete


def _boards():
    from dpft.harness.leaderboard import board

    return board.boards()
