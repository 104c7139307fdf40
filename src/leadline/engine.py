"""The main loop: trials -> responses -> verdicts, a stream, bounded in memory, resumable.

What the store holds is not asked again; equal requests are asked once and counted where they
belong; what failed is recorded as failed and tried again by the next run.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from . import judges, plan
from .analysis.judge_error import keep_check
from .assist import Assistance, Kept, ask, keep
from .models import connect
from .models.spec import ModelSpec
from .plan import Attack, Plan, Target
from .progress import Listener, Progress
from .records import (
    Attempt,
    AttemptFailed,
    Judge,
    LeadlineError,
    Model,
    NotApplicable,
    Prompt,
    Request,
    Response,
    Trial,
    Verdict,
)
from .store import Known, Place, Store
from .study import JudgePick, Study
from .version import __version__

if TYPE_CHECKING:
    from .analysis.results import Results

log = logging.getLogger("leadline")
_CHUNK = 512  # trials looked up in the store at once


def run(
    study: Study | str | Path,
    out: str | Path = "leadline-out",
    *,
    models: Mapping[str, Model] | None = None,
    limit: int | None = None,
    listener: Listener | None = None,
) -> Results:
    """Run a study into the folder `out`, or go on with it there. Blocks until it is done.

    `models` answer for the targets of those names, in place of what would be connected. `limit`
    takes at most that many prompts of each dataset. Raises LeadlineError for what the user can
    mend before anything is asked; what fails later is recorded in the results.
    """
    from .analysis.results import Results

    if not isinstance(study, Study):
        study = Study.load(study)
    ready = plan.load(study, limit)
    at_hand = models or {}
    connected = [
        (spec, at_hand.get(spec.label) or connect(spec, study.limits, study.locate))
        for spec in study.targets
    ]
    for _, model in connected:
        _ = model.identity  # a folder that is no model is named before anything is asked
    with Store(Path(out), write=True) as store:
        state = _Run(ready, store, listener or (lambda progress: None))
        drive(_everything(state, connected))
        progress = state.progress
    return Results(Path(out), progress)


def drive(main: Coroutine[Any, Any, None]) -> None:
    """Run to the end; from a notebook, which has a loop of its own running, in a thread.

    A run makes many small objects that soon go by themselves, and looking through the plan for
    garbage again and again costs more than it frees: the collector looks less often meanwhile.
    """
    often = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        uvloop.run(main)
    else:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(uvloop.run, main).result()
    finally:
        gc.set_threshold(*often)
        gc.unfreeze()


@dataclass(frozen=True)
class _Judge:
    """A judge of the study under its row in the store."""

    id: int
    name: str
    judge: Judge


@dataclass(slots=True)
class _Cell:
    """A trial that waits for its response. `recipe` is its key where an assisted attack makes the
    request; `stale`: its row stood for another request before; `again`: for the same one."""

    trial: Trial
    attack: Attack
    place: Place
    recipe: bytes
    stale: bool
    again: bool


@dataclass(slots=True)
class _Work:
    """One request to ask, or a stored response to judge, for the cells that wait for its key."""

    key: bytes
    request: Request
    response: Response | None


class _Run:
    """What the parts of one run share."""

    def __init__(self, plan: Plan, store: Store, listener: Listener) -> None:
        self.plan, self.store, self.listener = plan, store, listener
        self.progress = Progress()
        self.open: dict[bytes, list[_Cell]] = {}  # asked and not yet answered, by key
        self.attacker: Kept | None = None
        self.prompts: dict[tuple[str, str], int] = {}
        self.judges: dict[str, list[_Judge]] = {}  # by dataset
        self.attacks = plan.every_attack
        self._told = 0.0
        self.broken: set[str] = set()

    def tell(self, *, now: bool = False) -> None:
        if now or time.monotonic() - self._told > 0.1:
            self._told = time.monotonic()
            self.listener(self.progress)

    def note(self, text: str) -> None:
        log.warning("%s", text)
        self.progress.notes.append(text)


async def _everything(run: _Run, connected: list[tuple[ModelSpec, Model]]) -> None:
    """Endpoints side by side; local weights one after another, since they share one machine."""
    store, study = run.store, run.plan.study
    store.describe("leadline", __version__)
    store.describe("study", study.model_dump(mode="json"))
    families = {label: attack.plugin.family for label, attack in run.attacks.items()}
    store.describe("families", families)
    store.describe("started", store.description("started") or _now())
    store.describe("finished", None)
    run.prompts = store.prompt_ids(p for ps in run.plan.prompts.values() for p in ps)
    run.progress.total = plan.count(run.plan)
    run.progress.done = dict.fromkeys(run.progress.total, 0)
    run.tell(now=True)
    helping = _build_judges(run)
    if study.attacker and any(a.asks_attacker for a in run.attacks.values()):
        attacker = connect(study.attacker, study.limits, study.locate)
        helping["attacker"] = run.attacker = Kept(attacker, store)
    try:
        for role, model in helping.items():
            await _prepare_helper(role, model)
        remote = [_target(run, spec, model) for spec, model in connected if spec.url]
        local = [(spec, model) for spec, model in connected if not spec.url]

        async def one_by_one() -> None:
            for spec, model in local:
                await _target(run, spec, model)

        await asyncio.gather(one_by_one(), *remote)
    finally:
        for model in helping.values():
            await model.close()
    store.flush()
    store.describe("finished", _now())
    run.tell(now=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# -- judges -------------------------------------------------------------------------------------


def _build_judges(run: _Run) -> dict[str, Model]:
    """Fill run.judges; returns the models that judges ask, by what they are for."""
    asked: dict[str, Model] = {}
    built: dict[str, _Judge] = {}
    study, store = run.plan.study, run.store

    def kept(pick: JudgePick) -> Model:
        assert pick.spec
        role = f"judge {pick.label}"
        if role in asked:  # two judges of one name
            role += f" ({pick.spec.label}, {len(asked)})"
        asked[role] = connect(pick.spec, study.limits, study.locate)
        return Kept(asked[role], store)

    for dataset, picks in run.plan.judges.items():
        run.judges[dataset] = []
        for pick in picks:
            identity = pick.model_dump_json()
            if identity not in built:
                judge = pick.build(kept)
                id = store.judge_id(pick.label, pick.settings)
                keep_check(store, id, pick, study.locate)
                built[identity] = _Judge(id, pick.label, judge)
            run.judges[dataset].append(built[identity])
        store.primary_judge(dataset, run.judges[dataset][0].id)
    return asked


async def _prepare_helper(role: str, model: Model) -> None:
    try:
        await model.prepare(prefix=False)
    except LeadlineError as error:
        raise LeadlineError(f"{role}: {error}") from None


# -- one target ---------------------------------------------------------------------------------


async def _target(run: _Run, spec: ModelSpec, model: Model) -> None:
    """All trials of a target. A target that cannot be reached or loaded has failed trials; the
    others go on."""
    down, no_prefix = "", ""
    wants_prefix = any("response_prefix" in a.plugin.needs for a in run.attacks.values())
    target = Target(spec, model.identity)
    if not _all_known(run, target):
        try:
            no_prefix = await model.prepare(prefix=wants_prefix)
        except LeadlineError as error:
            down = str(error)
            run.note(down)
        run.store.describe(f"model:{spec.label}", _about(spec, model, no_prefix, down))
    if no_prefix:
        run.note(no_prefix)
    work = _missing(run, replace(target, no_prefix=no_prefix), down)
    kept = Kept(model, run.store)

    async def worker() -> None:
        for item in work:
            if item is None:
                await asyncio.sleep(0)  # a chunk was looked up: let replies in
            elif isinstance(item, _Work):
                await _trial(run, kept, item)
            else:
                await _make(run, kept, item)
            while run.store.behind:
                await asyncio.sleep(0.05)

    workers = [asyncio.create_task(worker()) for _ in range(model.concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await model.close()


def _all_known(run: _Run, target: Target) -> bool:
    """Whether a target has nothing left to ask, so that it need not even be loaded."""
    about = run.store.description(f"model:{target.spec.label}")
    if about is None or about["identity"] != dict(target.identity) or about["no_prefix"]:
        return False
    trials = plan.trials(run.plan, target)
    while chunk := list(islice(trials, _CHUNK)):
        places = [_place(run, trial) for trial in chunk]
        known = run.store.known(places)
        for trial, place in zip(chunk, places, strict=True):
            row = known.get(place)
            if row is None or row.key != trial.key or row.outcome == "failed":
                return False
    return True


def _about(spec: ModelSpec, model: Model, no_prefix: str, down: str) -> Mapping[str, object]:
    card = spec.described
    return {
        "card": asdict(card) if card else None,
        "identity": dict(model.identity),
        "prefix": getattr(model, "prefix_way", ""),
        "no_prefix": no_prefix,
        "down": down,
    }


def _place(run: _Run, trial: Trial) -> Place:
    dataset = trial.prompt.dataset
    pool = run.attacks[trial.attack].pool
    cell = run.store.cell_id(trial.model, trial.thinking, dataset, trial.attack, pool)
    return Place(cell, run.prompts[dataset, trial.prompt.id], trial.sample)


def _missing(run: _Run, target: Target, down: str) -> Iterator[_Work | _Cell | None]:
    """What is still to be done for a target: requests to ask or judge, and trials that an
    assisted attack has to make first. Trials of equal key become one piece of work; a whole chunk
    is claimed before the first of it is handed out, so nothing is asked twice."""
    store, label = run.store, target.spec.label
    trials = plan.trials(run.plan, target)
    while chunk := list(islice(trials, _CHUNK)):
        places = [_place(run, trial) for trial in chunk]
        known = store.known(places)
        answered = store.answered([trial.key for trial in chunk if trial.request])
        work: list[_Work | _Cell] = []
        for trial, place in zip(chunk, places, strict=True):
            row = known.get(place)
            same = row is not None and row.key == trial.key
            stale = row is not None and not same
            if trial.outcome:
                if not (same and row and row.outcome == trial.outcome):
                    store.put_trial(place, b"", trial.outcome, trial.reason, stale=stale)
                _count(run, label, trial.outcome)
                continue
            if same and row and _is_done(run, trial, row):
                run.progress.known += row.outcome != "not_applicable"
                _count(run, label, row.outcome)
                continue
            recipe = b"" if trial.request else trial.key
            if down and trial.key not in answered:
                store.put_trial(place, trial.key, "failed", down, recipe=recipe, stale=stale)
                _count(run, label, "failed")
                continue
            cell = _Cell(trial, run.attacks[trial.attack], place, recipe, stale, again=same)
            if trial.request is None:
                work.append(cell)
            elif trial.key in run.open:
                run.open[trial.key].append(cell)
            else:
                run.open[trial.key] = [cell]
                found = store.response(trial.key) if trial.key in answered else None
                work.append(_Work(trial.key, trial.request, found))
        run.tell()
        yield None
        yield from work


def _is_done(run: _Run, trial: Trial, row: Known) -> bool:
    """Whether nothing is left to ask or to judge of a trial whose request has not changed."""
    if row.outcome in ("failed", "not_applicable"):
        return row.outcome == "not_applicable"
    return row.judged >= {judge.id for judge in run.judges[trial.prompt.dataset]}


def _count(run: _Run, label: str, outcome: str) -> None:
    progress = run.progress
    progress.done[label] += 1
    progress.failed += outcome == "failed"
    progress.not_applicable += outcome == "not_applicable"


def _assist(run: _Run, target: Kept, trial: Trial) -> Assistance:
    study = run.plan.study
    sampling = study.sampling.record(study.seed)
    judge = run.judges[trial.prompt.dataset][0]

    def request(attempt: Attempt) -> Request:
        return plan.request_of(attempt, sampling, trial.thinking, trial.sample)

    async def judged(attempt: Attempt, response: Response) -> Verdict:
        return await _verdict(run, judge, trial.prompt, attempt, response)

    return Assistance(run.attacker, target, request, judged)


async def _make(run: _Run, target: Kept, cell: _Cell) -> None:
    """Let an assisted attack make its attempt, then ask it like any other."""
    trial, study = cell.trial, run.plan.study
    assist = _assist(run, target, trial)
    outcome, reason = "failed", ""
    try:
        attempt = await cell.attack.assisted_attempt(trial.prompt, study.seed, assist)
    except NotApplicable as why:
        outcome, reason = "not_applicable", str(why)
    except AttemptFailed as why:
        reason = f"{trial.attack}: {why}"
    except Exception as error:
        what = "" if isinstance(error, LeadlineError) else f" raised {type(error).__name__}"
        reason = f"the attack {trial.attack}{what}: {error}"
        if trial.attack not in run.broken:
            run.broken.add(trial.attack)
            run.note(reason)
    if reason:
        run.store.put_trial(cell.place, b"", outcome, reason, recipe=cell.recipe, stale=cell.stale)
        _count(run, trial.model, outcome)
        run.tell()
        return
    sampling = study.sampling.record(study.seed)
    request = plan.request_of(attempt, sampling, trial.thinking, trial.sample)
    key = plan.model_key(target.identity, request)
    cell.trial = replace(trial, attempt=attempt, request=request, key=key)
    if key in run.open:
        run.open[key].append(cell)
        return
    run.open[key] = [cell]
    await _trial(run, target, _Work(key, request, run.store.response(key)))


async def _trial(run: _Run, target: Kept, work: _Work) -> None:
    """Ask, store, judge: every trial that waits for this key."""
    response, store = work.response, run.store
    if response is None:
        response = await ask(target.model, work.request)
        run.progress.asked += 1
        keep(store, work.key, work.request, response)
    outcome = _outcome(response)
    for cell in run.open.pop(work.key):
        store.put_trial(
            cell.place, work.key, outcome, response.error, recipe=cell.recipe, stale=cell.stale
        )
        if outcome not in ("failed", "not_applicable"):
            await _judge(run, target, cell, response)
        _count(run, cell.trial.model, outcome)
    run.tell()


def _outcome(response: Response) -> str:
    """answered, truncated, empty, blocked, failed or not_applicable."""
    if response.finish == "error":
        return "failed"
    if response.finish in ("blocked", "not_applicable"):
        return response.finish
    if not response.answer.strip():
        return "empty"
    return "truncated" if response.finish == "length" else "answered"


async def _judge(run: _Run, target: Kept, cell: _Cell, response: Response) -> None:
    """Verdicts of every judge on a decoded response."""
    trial = cell.trial
    failure = ""
    if cell.attack.plugin.decode:
        try:
            assist = _assist(run, target, trial)
            answer = await cell.attack.decode(response.answer, assist)
            response = replace(response, answer=answer)
        except AttemptFailed as why:
            failure = f"the answer could not be decoded: {why}"
    for judge in run.judges[trial.prompt.dataset]:
        if failure:
            verdict = Verdict(unsafe=None, text=failure)
        else:
            verdict = await _verdict(run, judge, trial.prompt, trial.attempt, response)
        run.progress.unscored += verdict.unsafe is None
        run.store.put_verdict(cell.place, judge.id, verdict, again=cell.again)


async def _verdict(
    run: _Run, judge: _Judge, prompt: Prompt, attempt: Attempt, response: Response
) -> Verdict:
    verdict = await judges.ask(judge.name, judge.judge, prompt, attempt, response)
    if verdict.error and judge.name not in run.broken:
        run.broken.add(judge.name)
        run.note(verdict.text)
    return verdict
