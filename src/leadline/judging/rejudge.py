"""One judge outside a run: over the responses that a store holds already.

Nothing is generated: prompts, attempts and responses are read from the store, and only what this
judge has not scored yet is put to it.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from .. import judges, models, registry
from ..analysis.judge_error import keep_check
from ..assist import Assistance, Kept
from ..engine import drive
from ..models.spec import Limits
from ..plan import Attack
from ..progress import Listener, Progress
from ..records import (
    Attempt,
    AttemptFailed,
    LeadlineError,
    Message,
    Model,
    Prompt,
    Request,
    Response,
    ResponsePrefix,
    Verdict,
)
from ..store import Place, Store
from ..study import JudgePick, Study
from .standalone import open_judge, run_concurrently

log = logging.getLogger("leadline")
_CHUNK = 256  # responses read at once

_TODO = """
FROM trials t JOIN responses r ON r.key = t.key
LEFT JOIN verdicts v ON v.cell = t.cell AND v.prompt = t.prompt AND v.sample = t.sample
                    AND v.judge = ?
JOIN cells c ON c.id = t.cell JOIN prompts p ON p.id = t.prompt
WHERE t.outcome NOT IN ('failed', 'not_applicable') AND v.unsafe IS NULL
"""
_ROWS = f"""
SELECT t.cell, t.prompt, t.sample, v.cell IS NOT NULL, c.attack,
       p.name, p.text, p.dataset, p.category, p.harmful, p.context, p.target, p.base,
       r.request, r.answer, r.thought, r.finish, r.error, r.prefix
{_TODO} AND (t.cell, t.prompt, t.sample) > (?, ?, ?)
ORDER BY t.cell, t.prompt, t.sample LIMIT {_CHUNK}
"""


@dataclass(frozen=True, slots=True)
class _Stored:
    """A response as a study left it. `again`: the judge left it unscored before."""

    place: Place
    again: bool
    attack: str
    prompt: Prompt
    attempt: Attempt
    response: Response


def rejudge(folder: str | Path, pick: JudgePick, listener: Listener | None = None) -> Progress:
    """Let a judge judge every response of the study in `folder` that it has not scored yet.

    Blocks until it is done. Stopped, it goes on where it was with the next call; what it left
    unscored is put to it again. Raises LeadlineError for what the user can mend.
    """
    Store(Path(folder)).close()  # says at once where there is no study
    progress = Progress()
    with Store(Path(folder), write=True) as store:
        drive(_judge_all(store, pick, progress, listener or (lambda progress: None)))
    return progress


async def _judge_all(store: Store, pick: JudgePick, progress: Progress, listener: Listener) -> None:
    study = _study(store)
    locate = study.locate if study else Path
    limits = study.limits if study else Limits()
    async with open_judge(pick, limits, locate, lambda m: Kept(m, store)) as (asked, workers):
        id = store.judge_id(pick.label, pick.settings)
        keep_check(store, id, pick, locate)
        ((todo,),) = store.query(f"SELECT COUNT(*) {_TODO}", (id,))
        progress.total, progress.done = {pick.label: todo}, {pick.label: 0}
        listener(progress)
        told = time.monotonic()
        async with _decoding(store, study) as decode:

            async def one(stored: _Stored) -> None:
                nonlocal told
                try:
                    answer = await decode(stored.attack, stored.response.answer)
                    response = replace(stored.response, answer=answer)
                    verdict = await judges.ask(
                        pick.label, asked, stored.prompt, stored.attempt, response
                    )
                except AttemptFailed as why:
                    verdict = Verdict(None, text=f"the answer could not be decoded: {why}")
                store.put_verdict(stored.place, id, verdict, again=stored.again)
                progress.done[pick.label] += 1
                progress.unscored += verdict.unsafe is None
                if verdict.unsafe is None and not progress.notes:
                    progress.notes.append(verdict.text)
                if time.monotonic() - told > 0.1:
                    told = time.monotonic()
                    listener(progress)

            await run_concurrently(_todo(store, id), one, workers)
    store.flush()
    listener(progress)


def _study(store: Store) -> Study | None:
    """The study that filled the store."""
    data = store.description("study")
    try:
        return Study.model_validate(data) if data else None
    except ValidationError as error:
        what = error.errors()[0]
        raise LeadlineError(
            f"the study in {store.folder} does not load here: {what['msg']}: install what it used"
        ) from None


def _todo(store: Store, judge: int) -> Iterator[_Stored]:
    at = Place(-1, -1, -1)
    while True:
        rows = store.query(_ROWS, (judge, *at))
        for row in rows:
            yield _stored(*row)
        if len(rows) < _CHUNK:
            return
        at = Place(*rows[-1][:3])


def _stored(
    cell: int, prompt: int, sample: int, again: int, attack: str,
    name: str, text: str, dataset: str, category: str, harmful: int, context: str, target: str,
    base: str, request: str, answer: str, thought: str, finish: Any, error: str, prefix: str,
) -> _Stored:  # fmt: skip
    told = orjson.loads(request)
    given = told.get("prefix")
    attempt = Attempt(
        tuple(Message(**message) for message in told.get("messages", ())),
        ResponsePrefix(**given) if given else None,
    )
    return _Stored(
        Place(cell, prompt, sample), bool(again), attack,
        Prompt(name, text, dataset, category, bool(harmful), context, target, base), attempt,
        Response(answer, thought, finish, error, prefix),
    )  # fmt: skip


# -- decoding -----------------------------------------------------------------------------------


@asynccontextmanager
async def _decoding(
    store: Store, study: Study | None
) -> AsyncIterator[Callable[[str, str], Awaitable[str]]]:
    """(attack, answer) -> the answer as text to judge. Where a model has to decode, what the
    study's attacker has said before is in the store."""
    plugins = {plugin.name: plugin for plugin in registry.plugins("attack")}
    labels = [label for (label,) in store.query("SELECT DISTINCT attack FROM cells")]
    attacks = {
        label: Attack(label, plugin, {})
        for label in labels
        if (plugin := plugins.get(label.partition("(")[0])) and plugin.decode
    }
    attacker: Model | None = None
    if study and study.attacker and any(
        inspect.iscoroutinefunction(attack.plugin.decode) for attack in attacks.values()
    ):  # fmt: skip
        attacker = models.connect(study.attacker, study.limits, study.locate)
        try:
            await attacker.prepare(prefix=False)
        except LeadlineError as error:
            log.warning("attacker: %s; only what it has decoded before can be judged", error)
    kept = Kept(attacker, store) if attacker else None

    def no_target(attempt: Attempt) -> Request:
        raise AttemptFailed("no target is asked when answers are judged again")

    async def no_judge(attempt: Attempt, response: Response) -> Verdict:
        raise AttemptFailed("no judge is asked for a decoding")

    assist = Assistance(kept, kept, no_target, no_judge)  # type: ignore[arg-type] # never asked

    async def decode(attack: str, answer: str) -> str:
        if attack not in attacks:
            return answer
        return await attacks[attack].decode(answer, assist)

    try:
        yield decode
    finally:
        if attacker:
            await attacker.close()
