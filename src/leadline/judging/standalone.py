"""Open a judge outside of a run, with the models that it calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from .. import models
from ..models.spec import Limits
from ..records import Judge, LeadlineError, Model
from ..study import JudgePick

Item = TypeVar("Item")


@asynccontextmanager
async def open_judge(
    pick: JudgePick, limits: Limits, locate: Callable[[str], Path],
    wrap: Callable[[Model], Model] = lambda model: model,
) -> AsyncIterator[tuple[Judge, int]]:  # fmt: skip
    """Build a judge and prepare its models; yields the judge and the number of responses that it
    can judge concurrently. `wrap` replaces each model, e.g. by one with a cache. Raises
    LeadlineError if a model cannot be reached."""
    connected: list[tuple[str, Model]] = []

    def connect(member: JudgePick) -> Model:
        assert member.spec
        connected.append((member.label, models.connect(member.spec, limits, locate)))
        return wrap(connected[-1][1])

    judge = pick.build(connect)
    try:
        for label, model in connected:
            try:
                await models.prepare(model)
            except LeadlineError as error:
                raise LeadlineError(f"judge {label}: {error}") from None
        yield judge, max((model.concurrency for _, model in connected), default=1)
    finally:
        for _, model in connected:
            await models.close(model)


async def run_concurrently(
    work: Iterator[Item], do: Callable[[Item], Awaitable[None]], workers: int
) -> None:
    """Await `do(item)` for every item, `workers` of them at a time."""

    async def worker() -> None:
        for number, item in enumerate(work):
            await do(item)
            if not number % 64:
                # A judge that never awaits anything would block the loop, and with it Ctrl-C.
                await asyncio.sleep(0)

    tasks = [asyncio.create_task(worker()) for _ in range(workers)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
