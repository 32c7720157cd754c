"""Output to stdout: styled if it is a terminal and rich is installed, else plain aligned text."""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Collection, Sequence
from importlib.util import find_spec

# Styles of lines and cells, by their first word.
_STYLES = {
    "ok": "green",
    "yes": "green",
    "supported": "green",
    "chosen": "green",
    "no": "red",
    "failed": "red",
    "unavailable": "yellow",
    "refused": "yellow",
}


class Terminal:
    """Plain text in columns, one record per line, without escape codes."""

    def heading(self, text: str) -> None:
        """Print a heading."""
        self.line(text)

    def line(self, text: str = "", style: str = "") -> None:
        """Print a line and flush it, so that the reader of a pipe sees each packet at once."""
        print(escaped(text).rstrip(), flush=True)

    def table(
        self, titles: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str] = ()
    ) -> None:
        """Print rows in columns as wide as their widest cell. `titles` may be empty. Columns named in `numbers` align right."""
        lines = [titles, *rows] if titles else rows
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        right = [title in numbers for title in titles] or [False] * len(widths)
        for cells in lines:
            columns = zip(cells, widths, right, strict=True)
            self.line(
                "  ".join(cell.rjust(width) if flush else cell.ljust(width) for cell, width, flush in columns)
            )


class RichTerminal(Terminal):
    """The same content through rich, with colours. Long sentences fold inside their column."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)

    def heading(self, text: str) -> None:
        """Print a heading in bold."""
        self.line(text, "bold")

    def line(self, text: str = "", style: str = "") -> None:
        """Print a line in `style`, or in the style of its first word."""
        from rich.text import Text

        # Text, because rich would read brackets in a string as markup.
        self._console.print(Text(escaped(text).rstrip(), style or _style(text)), soft_wrap=True)

    def table(
        self, titles: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str] = ()
    ) -> None:
        """Print a table. Only the last column folds, because the others hold names and numbers."""
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=None, show_header=bool(titles), header_style="bold", pad_edge=False, padding=(0, 2, 0, 0)
        )
        for index, title in enumerate(titles or rows[0]):
            table.add_column(
                title if titles else "",
                justify="right" if titles and title in numbers else "left",
                no_wrap=index + 1 < len(titles or rows[0]),
            )
        for cells in rows:
            table.add_row(*(Text(escaped(cell), _style(cell)) for cell in cells))
        self._console.print(table)


def on_stdout() -> Terminal:
    """The terminal for stdout. Names of interfaces may be any bytes, and are printed unchanged but for control characters."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=ENCODING_ERRORS)
    return RichTerminal() if sys.stdout.isatty() and find_spec("rich") else Terminal()


def _bytes_or_escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode a byte that is no UTF-8 as that byte, and a character that the encoding does not have as an escape."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


ENCODING_ERRORS = "linkrx.bytes_or_escape"
codecs.register_error(ENCODING_ERRORS, _bytes_or_escape)


def escaped(text: str) -> str:
    """The text with each control character as an escape, because a terminal would obey it. Line feeds stay."""
    if text.isprintable():
        return text
    return "".join(
        letter
        if letter.isprintable() or letter == "\n" or "\udc80" <= letter <= "\udcff"
        else repr(letter)[1:-1]
        for letter in text
    )


def report(text: str) -> None:
    """Print a sentence on standard error."""
    print(f"linkrx: {escaped(text)}", file=sys.stderr, flush=True)


def sentence(error: Exception) -> str:
    """The text of an error without Python's "[Errno 1]"."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename!r}: {error.strerror}"


def _style(text: str) -> str:
    return _STYLES.get(text.partition(" ")[0].rstrip(":,;"), "")
