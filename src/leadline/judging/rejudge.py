"""Judge the stored responses of a study with another judge.

Nothing is generated: prompts, attempts and responses are read from the store, and only responses
without a scored verdict of this judge are judged.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from pydantic import ValidationError

from .. import judges, models, registry
from ..analysis.judge_error import store_check
from ..assist import Assistance, CachedModel
from ..engine import run_to_completion
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
_CHUNK = 256  # responses per query

_UNSCORED = """
FROM trials t JOIN responses r ON r.key = t.key
LEFT JOIN verdicts v ON v.cell = t.cell AND v.prompt = t.prompt AND v.sample = t.sample
                    AND v.judge = ?
JOIN cells c ON c.id = t.cell JOIN prompts p ON p.id = t.prompt
WHERE t.outcome NOT IN ('failed', 'not_applicable') AND v.unsafe IS NULL
"""
# The selected columns are the fields of _Row, in this order.
_SELECT_ROWS = f"""
SELECT t.cell, t.prompt, t.sample, v.cell IS NOT NULL AS has_verdict, c.attack,
       p.name, p.text, p.dataset, p.category, p.harmful, p.context, p.target, p.base,
       r.request, r.answer, r.thought, r.finish, r.error, r.prefix
{_UNSCORED} AND (t.cell, t.prompt, t.sample) > (?, ?, ?)
ORDER BY t.cell, t.prompt, t.sample LIMIT {_CHUNK}
"""


class _Row(NamedTuple):
    """A row of _SELECT_ROWS: a trial with its prompt, request and response."""

    cell: int
    prompt: int
    sample: int
    has_verdict: int  # 1 if the judge has an unscored verdict on it
    attack: str
    name: str
    text: str
    dataset: str
    category: str
    harmful: int
    context: str
    target: str
    base: str
    request: str  # JSON
    answer: str
    thought: str
    finish: Any
    error: str
    prefix: str


@dataclass(frozen=True, slots=True)
class _StoredResponse:
    """A stored response with all that a judge needs. `again`: the judge has an unscored verdict on
    it already."""

    place: Place
    again: bool
    attack: str
    prompt: Prompt
    attempt: Attempt
    response: Response


def rejudge(folder: str | Path, pick: JudgePick, listener: Listener | None = None) -> Progress:
    """Judge every response of the study in `folder` that the judge has not scored yet.

    Blocks until done. If it is interrupted, the next call resumes. Responses that the judge left
    unscored are judged again. Returns the final progress. Raises LeadlineError if the folder has no
    study, the study's plug-ins are not installed, or the judge's model cannot be reached.
    """
    Store(Path(folder)).close()  # raises if there is no study
    progress = Progress()
    with Store(Path(folder), write=True) as store:
        run_to_completion(_judge_all(store, pick, progress, listener or (lambda progress: None)))
    return progress


async def _judge_all(store: Store, pick: JudgePick, progress: Progress, listener: Listener) -> None:
    study = stored_study(store)
    locate = study.locate if study else Path
    limits = study.limits if study else Limits()
    async with open_judge(pick, limits, locate, lambda m: CachedModel(m, store)) as (
        judge,
        workers,
    ):
        id = store.judge_id(pick.label, pick.settings, pick.caution)
        store_check(store, id, pick, locate)
        ((unscored,),) = store.query(f"SELECT COUNT(*) {_UNSCORED}", (id,))
        progress.total, progress.done = {pick.label: unscored}, {pick.label: 0}
        listener(progress)
        reported = time.monotonic()
        async with _decoding(store, study) as decode:

            async def judge_one(stored: _StoredResponse) -> None:
                nonlocal reported
                try:
                    answer = await decode(stored.attack, stored.response.answer)
                    response = replace(stored.response, answer=answer)
                    verdict = await judges.ask(
                        pick.label, judge, stored.prompt, stored.attempt, response
                    )
                except AttemptFailed as why:
                    verdict = Verdict(None, text=f"the answer could not be decoded: {why}")
                store.put_verdict(stored.place, id, verdict, again=stored.again)
                progress.done[pick.label] += 1
                progress.unscored += verdict.unsafe is None
                if verdict.unsafe is None and not progress.notes:
                    reason = judges.why_unscored(verdict, stored.prompt, stored.response)
                    progress.notes.append(reason)
                if time.monotonic() - reported > 0.1:
                    reported = time.monotonic()
                    listener(progress)

            await run_concurrently(_unscored_responses(store, id), judge_one, workers)
    store.flush()
    listener(progress)


def stored_study(store: Store) -> Study | None:
    """The study that wrote the store; None if the store has none."""
    data = store.description("study")
    try:
        return Study.model_validate(data) if data else None
    except ValidationError as error:
        raise LeadlineError(
            f"the study in {store.folder} is not valid on this machine: "
            f"{error.errors()[0]['msg']}: install the plug-ins that it uses"
        ) from None


def _unscored_responses(store: Store, judge: int) -> Iterator[_StoredResponse]:
    """Yield the responses that a judge (by row id) has not scored, reading them in chunks."""
    last = Place(-1, -1, -1)
    while True:
        rows = [_Row(*values) for values in store.query(_SELECT_ROWS, (judge, *last))]
        for row in rows:
            yield _stored_response(row)
        if len(rows) < _CHUNK:
            return
        last = Place(rows[-1].cell, rows[-1].prompt, rows[-1].sample)


def _stored_response(row: _Row) -> _StoredResponse:
    request = orjson.loads(row.request)
    prefix = request.get("prefix")
    return _StoredResponse(
        place=Place(row.cell, row.prompt, row.sample),
        again=bool(row.has_verdict),
        attack=row.attack,
        prompt=Prompt(
            row.name, row.text, row.dataset, row.category, bool(row.harmful), row.context,
            row.target, row.base,
        ),
        attempt=Attempt(
            tuple(Message(**message) for message in request.get("messages", ())),
            ResponsePrefix(**prefix) if prefix else None,
        ),
        response=Response(row.answer, row.thought, row.finish, row.error, row.prefix),
    )  # fmt: skip


# -- decoding -----------------------------------------------------------------------------------


@asynccontextmanager
async def _decoding(
    store: Store, study: Study | None
) -> AsyncIterator[Callable[[str, str], Awaitable[str]]]:
    """Yield a function from (attack label, answer) to the text to judge. Decodings by the study's
    attacker model are read from the store if it has them."""
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
            await models.prepare(attacker)
        except LeadlineError as error:
            log.warning("attacker: %s; only answers that it has decoded before are judged", error)
    cached = CachedModel(attacker, store) if attacker else None

    def no_target(attempt: Attempt) -> Request:
        raise AttemptFailed("a decoder cannot call the target when answers are judged again")

    async def no_judge(attempt: Attempt, response: Response) -> Verdict:
        raise AttemptFailed("a decoder cannot call a judge")

    # The target is never called: no_target raises first.
    assist = Assistance(cached, cached, no_target, no_judge)  # type: ignore[arg-type]

    async def decode(attack: str, answer: str) -> str:
        if attack not in attacks:
            return answer
        return await attacks[attack].decode(answer, assist)

    try:
        yield decode
    finally:
        if attacker:
            await models.close(attacker)
