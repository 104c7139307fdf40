"""The typer application, and what its commands share: options, progress bars, tables."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from ..secret import scrub
from ..text import shown, visible
from ..version import __version__

if TYPE_CHECKING:
    from ..progress import Progress

EXIT_FAILED, EXIT_ERROR, EXIT_BOUND, EXIT_INTERRUPTED = 1, 2, 3, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Measure how deep a language model's safety alignment goes, and make it deeper.\n\n"
    "Start with [bold]leadline demo[/bold]: it attacks tiny language models that ship with "
    "Leadline, and needs no server, no download and no GPU.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Reveal = Annotated[bool, typer.Option("--reveal", help="Show unsafe text in the report.")]


def _version(value: bool) -> None:
    if value:
        print(f"leadline {__version__}")
        raise typer.Exit


class _Formatter(logging.Formatter):
    """Formats log messages without secrets and terminal escapes."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, and the traceback if there is one."""
        return visible(scrub(super().format(record)))


def say(text: object) -> None:
    """Print one line to stdout."""
    print(shown(text))


def warn(text: object) -> None:
    """Print one line to stderr, after the program's name."""
    print(f"leadline: {shown(text)}", file=sys.stderr)


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print debug messages.")] = False,
) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("leadline: %(message)s"))
    log = logging.getLogger("leadline")
    log.handlers = [handler]
    log.setLevel(logging.DEBUG if verbose else logging.WARNING)


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """A listener that shows progress on stderr: a bar per target (or part of the work) in a
    terminal, elsewhere a line every 30 s."""
    from . import _progress

    log = logging.getLogger("leadline")
    previous_handlers = log.handlers
    show = _progress.show_bars if sys.stderr.isatty() else _progress.show_lines
    try:
        with show(_Formatter("%(message)s")) as listen:
            yield listen
    finally:
        log.handlers = previous_handlers


def print_table(headers: tuple[str, ...], rows: list[list[str]]) -> None:
    """Print a table to stdout, 200 columns wide if stdout is not a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, header in enumerate(headers):
        table.add_column(Text(shown(header)), overflow="fold", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:  # unbroken lines for grep
        console.width = 200
    console.print(table)


@contextmanager
def stoppable() -> Iterator[None]:
    """Exit with status 130 and one line on Ctrl-C or SIGTERM: the same command resumes the work."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    if on_main_thread:  # elsewhere, Python does not allow to set a handler
        # Not an exception here: asyncio has its own handler of SIGINT, which cancels its tasks.
        earlier = signal.signal(
            signal.SIGTERM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT)
        )
        # A shell without job control starts background jobs with SIGINT ignored.
        earlier_interrupt = signal.getsignal(signal.SIGINT)
        if earlier_interrupt is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        warn("interrupted; run the same command again to resume")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        if on_main_thread:
            signal.signal(signal.SIGTERM, earlier)
            if earlier_interrupt is signal.SIG_IGN:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
