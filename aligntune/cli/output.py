"""Tables and units for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """A table on stdout: drawn by rich, every cell as it stands (no markup), wrapped to the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        drawn.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    console = Console()
    # In a file or a pipe nothing is cut or wrapped at 80 columns.
    (console if console.is_terminal else Console(width=200)).print(drawn)


def gib(size: float | None) -> str:
    """Bytes as GiB."""
    return "" if size is None else f"{size / 2**30:.2f} GiB"


def number(value: float | None, digits: str = ".4g") -> str:
    return "" if value is None else format(value, digits)
