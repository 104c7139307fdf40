"""The command line: each command parses its options, calls the library and prints the result.

Slow imports (torch, pandas, ...) are inside the commands, so that `leadline --help` is fast.
"""

from __future__ import annotations

import logging
import sqlite3
import sys

from ..records import LeadlineError
from ..registry import plugin_package
from ..text import one_line

from . import study, compare, matters, depth, align, judges, organism  # isort: skip (the order of the help)
from ._app import EXIT_ERROR, app, warn

__all__ = ["align", "app", "compare", "depth", "judges", "main", "matters", "organism", "study"]


def main() -> None:
    """Run the `leadline` command. An error is printed as one line, and the exit status is 2.

    A LeadlineError says how to fix it, and so does the system's message about a file. Any other
    exception is a bug in Leadline; `--verbose` prints its traceback."""
    try:
        app()
    except LeadlineError as error:
        warn(str(error))
    except sqlite3.Error as error:
        _explain(f"the store cannot be read or written: {one_line(error)}: check the disk's space")
    except OSError as error:
        name = f" {str(error.filename)[:100]!r}" if error.filename else ""
        reason = error.strerror or one_line(error)
        _explain(f"cannot read or write{name}: {reason}: check that path and the disk's space")
    except Exception as error:
        if package := plugin_package(error):
            _explain(
                f"the plug-in package {package!r} raised {type(error).__name__}: "
                f"{one_line(error)}: report it to its authors, or uninstall it"
            )
            sys.exit(EXIT_ERROR)
        _explain(
            f"this is a bug in Leadline: {type(error).__name__}: {one_line(error)}; "
            "`leadline --verbose ...` shows the traceback to report"
        )
    else:
        return
    sys.exit(EXIT_ERROR)


def _explain(text: str) -> None:
    """Print one line about the exception that is being handled, after its traceback if `--verbose`
    is given."""
    logging.getLogger("leadline").debug("traceback", exc_info=True)
    warn(text)
