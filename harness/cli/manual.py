"""The help of all commands as one markdown page, docs/commands.md."""

from __future__ import annotations

import click

from dpft.harness.cli.options import Where, put


def reference(group: click.Group) -> str:
    """Every command of `group` with its help as `dpft COMMAND --help` prints it, as markdown."""
    parent = click.Context(group, info_name="dpft", **group.context_settings)
    parts = []
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        if not command.hidden:
            inside = click.Context(command, parent, info_name=name, terminal_width=100, **group.context_settings)
            parts.append(f"## {name}\n\n```\n{command.get_help(inside)}\n```")
    return "\n\n".join(parts)


@click.command(hidden=True)
@click.option("-o", "output", type=Where(dir_okay=False), required=True, help="Markdown file with markers.")
@click.option("--check", is_flag=True, help="Write nothing; exit 1 when the file is not up to date.")
def commands(output, check):
    """Write the reference of all commands between the markers of a markdown file."""
    from dpft.harness.report import markers

    root = click.get_current_context().find_root().command
    fresh = put(reference(root), output, check, markers("commands"))
    return 1 if check and not fresh else 0
