"""Lines of cells as an aligned table for the terminal, or as an HTML table for a notebook, where all is escaped."""

import html
from collections.abc import Iterable, Sequence


def text_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """The lines under their head, columns two spaces apart. ValueError for a line that is longer or shorter."""
    all_lines = [head, *lines]
    widths = [max(map(len, column)) for column in zip(*all_lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in all_lines
    )


def html_table(caption: str, head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """The same lines as a `<table>` with its caption."""
    first = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in lines)
    body = "".join(f"<tr>{line}</tr>" for line in cells)
    return f"<table><caption>{html.escape(caption)}</caption><tr>{first}</tr>{body}</table>"
