"""A judge outside a study's run, with the models that it asks."""

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
    keep: Callable[[Model], Model] = lambda model: model,
) -> AsyncIterator[tuple[Judge, int]]:  # fmt: skip
    """A judge with its models ready, and how many responses it may be given at once."""
    asked: list[tuple[str, Model]] = []

    def connect(member: JudgePick) -> Model:
        assert member.spec
        asked.append((member.label, models.connect(member.spec, limits, locate)))
        return keep(asked[-1][1])

    built = pick.build(connect)
    try:
        for label, model in asked:
            try:
                await model.prepare(prefix=False)
            except LeadlineError as error:
                raise LeadlineError(f"judge {label}: {error}") from None
        yield built, max((model.concurrency for _, model in asked), default=1)
    finally:
        for _, model in asked:
            await model.close()


async def run_concurrently(
    work: Iterator[Item], do: Callable[[Item], Awaitable[None]], workers: int
) -> None:
    """Do all the work, some of it at once."""

    async def worker() -> None:
        for number, item in enumerate(work):
            await do(item)
            if not number % 64:
                await asyncio.sleep(0)  # a judge that waits for nothing would not let Ctrl-C in

    tasks = [asyncio.create_task(worker()) for _ in range(workers)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
