"""Progress on stderr: bars in a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from ..text import shown

if TYPE_CHECKING:
    from ..progress import Progress

EVERY = 30.0  # seconds between two lines
_NAME, _REASON = 40, 60  # the largest numbers of characters of a name and of a reason
_LINES = 10  # the rate is that of the time since so many lines

Listener = Callable[["Progress"], None]


@contextmanager
def show_bars(formatter: logging.Formatter) -> Iterator[Listener]:
    """A listener that shows a bar for each target or part, with its own failures."""
    from rich.console import Console
    from rich.logging import RichHandler
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars
    from rich.table import Column

    console = Console(stderr=True)

    def fixed() -> Column:  # in a narrow terminal, only the text of failures wraps
        return Column(no_wrap=True)

    columns = (
        TextColumn("{task.description}", markup=False, table_column=fixed()),
        BarColumn(20, table_column=fixed()), MofNCompleteColumn(table_column=fixed()),
        TimeElapsedColumn(table_column=fixed()), TextColumn("left"),
        TimeRemainingColumn(table_column=fixed()),
        TextColumn("{task.fields[failures]}", markup=False, table_column=Column()),
    )  # fmt: skip
    bars = Bars(*columns, console=console, transient=False)
    tasks: dict[str, Any] = {}

    def listen(progress: Progress) -> None:
        if not tasks:  # not earlier: an error before the first report then leaves no empty bars
            bars.start()
        for name, total in progress.total.items():
            if name not in tasks:
                tasks[name] = bars.add_task(_name(name), total=total, failures="")
            done, failures = progress.done.get(name, 0), _failures(progress, name)
            bars.update(tasks[name], total=total, completed=done, failures=failures)

    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    handler.setFormatter(formatter)
    handler.addFilter(_Once())
    logging.getLogger("leadline").handlers = [handler]
    try:
        yield listen
    finally:
        if tasks:
            bars.stop()


@contextmanager
def show_lines(
    formatter: logging.Formatter, stream: TextIO | None = None, every: float = EVERY
) -> Iterator[Listener]:
    """A listener that writes a line to `stream` (default: stderr) every `every` seconds, and one at
    the end of work that took that long. Warnings are lines as well."""
    to = stream or sys.stderr
    handler = logging.StreamHandler(to)
    handler.setFormatter(_Prefixed(formatter))
    handler.addFilter(_Once())
    logging.getLogger("leadline").handlers = [handler]
    latest: list[Progress] = []
    stop = threading.Event()
    began = time.monotonic()
    seen: deque[tuple[float, int]] = deque(maxlen=_LINES)  # seconds and units done, by line

    def listen(progress: Progress) -> None:
        if not latest:
            seen.append((time.monotonic() - began, sum(progress.done.values())))
        latest[:] = [progress]

    def write() -> None:
        if latest:
            now = time.monotonic() - began
            print(f"leadline: {line(latest[0], now, seen)}", file=to, flush=True)
            seen.append((now, sum(latest[0].done.values())))

    def repeat() -> None:
        while not stop.wait(every):
            write()

    thread = threading.Thread(target=repeat, name="leadline-progress", daemon=True)
    thread.start()
    try:
        yield listen
    finally:
        stop.set()
        thread.join()
        if time.monotonic() - began >= every:
            write()


class _Once(logging.Filter):
    """Drops a message that was logged before, e.g. for a dataset that is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is new."""
        message = record.getMessage()
        known = message in self.seen
        self.seen.add(message)
        return not known


class _Prefixed(logging.Formatter):
    """Puts the program's name before a message."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return f"leadline: {self.inner.format(record)}"


def line(progress: Progress, seconds: float, seen: deque[tuple[float, int]]) -> str:
    """Progress as a line: `2:30 120 of 400 (30%), 4.0/s, 1:10 left; m: 3 failed: HTTP 500`.

    `seconds` is the time since the start, `seen` the earlier states (seconds, units done), from
    which the rate is computed."""
    done, total = sum(progress.done.values()), sum(progress.total.values())
    text = f"{_clock(seconds)} {done:,} of {total:,} ({done / max(total, 1):.0%})"
    if seen and done > seen[0][1] and seconds > seen[0][0]:
        rate = (done - seen[0][1]) / (seconds - seen[0][0])
        unit = f"{rate:.2g}/s" if rate >= 0.1 else f"{60 * rate:.2g}/min"
        text += f", {unit}"
        if done < total:
            text += f", {_clock((total - done) / rate)} left"
    open_parts = [name for name, many in progress.total.items() if progress.done[name] < many]
    if open_parts and len(progress.total) > 1:
        name = open_parts[0]
        more = f" and {len(open_parts) - 1} more" if len(open_parts) > 1 else ""
        text += f"; now {_name(name)}: {progress.done[name]:,} of {progress.total[name]:,}{more}"
    failing = [f"; {_name(name)}: {failed}" for name in progress.total
               if (failed := _failures(progress, name))]  # fmt: skip
    return text + "".join(failing)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _failures(progress: Progress, name: str) -> str:
    """The failures of a target as one line, with those that were left unasked."""
    failures = progress.failures.get(name)
    if not failures:
        return ""
    text = shown(failures.text())
    text = text if len(text) <= _REASON else f"{text[: _REASON - 1]}…"
    return f"{text}; {failures.left:,} not asked" if failures.left else text


def _name(name: str) -> str:
    """A name of at most `_NAME` characters: of a longer one, such as a path, its end."""
    text = shown(name)
    return text if len(text) <= _NAME else f"…{text[1 - _NAME :]}"
