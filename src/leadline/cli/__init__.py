"""The command line: parse, call, print. Heavy imports stand inside the commands, so that
`leadline --help` answers at once."""

from __future__ import annotations

import sys

from ..records import LeadlineError

from . import study, depth, align, judges, organism  # isort: skip (the order of the help)
from ._app import WRONG, app

__all__ = ["align", "app", "depth", "judges", "main", "organism", "study"]


def main() -> None:
    """The `leadline` command: every error that the user can mend is one line."""
    try:
        app()
    except LeadlineError as error:
        print(f"leadline: {error}", file=sys.stderr)
        sys.exit(WRONG)
