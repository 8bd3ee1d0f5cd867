"""Tables that commands print."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer


def show_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()
) -> None:
    """A table on a terminal; tab-separated lines, whole, where another program reads.

    Args:
        numbers: the headings of columns that are set flush right.
    """
    if not sys.stdout.isatty():
        for row in (heads, *rows):
            typer.echo("\t".join(row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for index, head in enumerate(heads):
        flush = "right" if head in numbers else "left"
        table.add_column(head, no_wrap=index == 0, justify=flush)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def show_records(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, short: int, numbers: Sequence[str] = ()
) -> None:
    """As `show_table`; where a terminal is too narrow, the long facts stand below the short ones.

    Args:
        short: how many of the columns, from the left, are short facts.
    """
    if not sys.stdout.isatty():
        show_table(heads, rows)
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console()
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
    if sum(widths) + 3 * len(widths) <= console.width:
        show_table(heads, rows, numbers=numbers)
        return
    if sum(widths[:short]) + 2 * short > console.width:  # not even those fit beside each other
        for row in rows:
            console.print(Text(row[0], style="bold"))
            for head, cell in zip(heads[1:], row[1:]):
                console.print(Padding(Text(f"{head}: {cell}"), (0, 0, 0, 4), expand=False))
        return
    for row in (tuple(heads), *rows):
        # A table per row, because its long facts stand below it; all have the same widths.
        line = Table.grid(padding=(0, 2, 0, 0))
        for head, width in list(zip(heads, widths))[:short]:
            flush = "right" if head in numbers else "left"
            line.add_column(no_wrap=True, min_width=width, justify=flush)  # type: ignore[arg-type]
        style = "underline" if row == tuple(heads) else ""
        line.add_row(
            *(
                Text(cell, style=style or ("" if i else "bold"))
                for i, cell in enumerate(row[:short])
            )
        )
        console.print(line)
        if not style:
            for cell in row[short:]:
                console.print(Padding(Text(cell, style="dim"), (0, 0, 0, 4), expand=False))
