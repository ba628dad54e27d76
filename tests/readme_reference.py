"""The README's command-line reference, made from the commands' own help. `make readme` runs this to update it."""

from collections.abc import Iterator
from pathlib import Path

import click

from sae_emotion_plugin.cli import main

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- command reference: begin -->\n", "<!-- command reference: end -->\n"


def commands(group: click.Group = main, prefix: str = "sae-emotion") -> Iterator[tuple[str, click.Command]]:
    """Every command that can be called, with its full name."""
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def reference() -> str:
    """The whole reference: a heading and the help text of each command."""
    blocks = []
    for name, command in commands():
        context = click.Context(command, info_name=name, max_content_width=100, terminal_width=100)
        context.help_option_names = ["-h", "--help"]
        blocks.append(f"### `{name}`\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n" + "\n".join(blocks) + "\n"


def updated(readme: str) -> str:
    """The README with the reference between its two marks."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + reference() + END + after


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
