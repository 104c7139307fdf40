"""The command line: parse, call, print. Heavy imports are inside of the commands, so that
`leadline --help` is fast."""

from __future__ import annotations

import sys

from ..records import LeadlineError

from . import study, depth, align, judges, organism  # isort: skip (the order of the help)
from ._app import WRONG, app

__all__ = ["align", "app", "depth", "judges", "main", "organism", "study"]


def main() -> None:
    """The `leadline` command: an error that the user can fix is one line on standard error."""
    try:
        app()
    except LeadlineError as error:
        print(f"leadline: {error}", file=sys.stderr)
        sys.exit(WRONG)
