"""Where commands print, and how: nothing is cut that a file or a program reads, nothing of a name is taken for markup."""

import os
import sys

from rich.console import Console
from rich.text import Text

UNCUT = 1000  # columns, wider than any table


class _Console(Console):
    """One that goes quiet where nobody reads it any more (`mtrec train ... | head`): what the command does goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # also what is printed without this console, and the flush at the end
        os.close(nowhere)


def console() -> Console:
    """Where commands print: text as it is; lines are cut by a terminal's width, or by COLUMNS, whole for a file or a program."""
    columns = os.environ.get("COLUMNS", "")
    given = columns.isascii() and columns.isdigit() and int(columns) > 0
    if not given:
        os.environ.pop("COLUMNS", None)  # rich would trip over it, or print nothing
    to = _Console(highlight=False, markup=False, emoji=False)
    if not sys.stdout.isatty() and not given:
        to.width = UNCUT
    return to


def say(to: Console, text: str, *, word: str = "", style: str = "") -> None:
    """Prints a line as it is, never cut; `word:`, in this style, before it."""
    to.print(Text.assemble((f"{word}: ", style), text) if word else Text(text, style), soft_wrap=True)
