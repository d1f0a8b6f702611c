"""How commands show figures: small tables, and numbers of three digits."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def print_line(console: Console, line: str) -> None:
    """Prints a line as it is: nothing in it is markup, and the terminal wraps it."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def show(console: Console, table: Table) -> None:
    """Prints a table at its own width: where a terminal or a pipe has less, lines wrap and no figure is cut short."""
    before = console.width
    own = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    console.width = max(own, before)  # print(width=) may only make it less
    console.print(table)
    console.width = before


def print_table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table whose columns but the first are numbers."""
    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    show(console, table)


def amount(value: float) -> str:
    """Three digits and k, M, B (thousand millions) or T."""
    return si(value).replace(" G", " B").replace(" ", "")


def si(value: float) -> str:
    """Three digits and a prefix of the metric system: 1.23 M."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "
