"""How commands show figures."""

import io

from rich.console import Console

from mmgen.cli.tables import print_table


def test_no_figure_is_cut_short_where_lines_are_narrower_than_the_table() -> None:
    figures = [f"0.0091{number}" for number in range(9)]
    out = io.StringIO()
    print_table(Console(file=out, width=40), ("plan", *(f"column {n}" for n in range(9))), [("a", *figures)])
    header, row = (
        line.split() for line in out.getvalue().splitlines() if line.split()[:1] in (["plan"], ["a"])
    )
    assert row == ["a", *figures] and len(header) == 19
