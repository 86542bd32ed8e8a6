"""Where commands print, and how: nothing is cut that a file or a program reads, nothing of a name is taken for markup."""

import os

from rich.console import Console
from rich.text import Text

UNCUT = 1000  # columns, wider than any table


def console() -> Console:
    """Where commands print: plain numbers; lines are cut by a terminal's width, whole for a file or a program."""
    to = Console(highlight=False)
    if not to.is_terminal and "COLUMNS" not in os.environ:
        to.width = UNCUT
    return to


def say(to: Console, text: str, *, word: str = "", style: str = "") -> None:
    """Prints a line as it is, never cut, names with brackets included; `word:`, in this style, before it."""
    to.print(Text.assemble((f"{word}: ", style), text) if word else Text(text, style), soft_wrap=True)
