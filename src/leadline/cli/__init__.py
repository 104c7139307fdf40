"""The command line: each command parses its options, calls the library and prints the result.

Slow imports (torch, pandas, ...) are inside the commands, so that `leadline --help` is fast.
"""

from __future__ import annotations

import sys

from ..records import LeadlineError

from . import study, depth, align, judges, organism  # isort: skip (the order of the help)
from ._app import EXIT_ERROR, app, warn

__all__ = ["align", "app", "depth", "judges", "main", "organism", "study"]


def main() -> None:
    """Run the `leadline` command. A LeadlineError is printed as one line; the exit status is 2."""
    try:
        app()
    except LeadlineError as error:
        warn(str(error))
        sys.exit(EXIT_ERROR)
