"""The engine: runs a study's trials, stores the responses and judges them.

Trials are streamed, so memory is bounded. Trials that are in the store already are not run again.
Equal requests are sent once, and the response counts for every trial that needs it. A failure is
stored as failed and retried by the next run.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from . import judges, plan
from .analysis import completeness
from .analysis.judge_error import store_check
from .assist import Assistance, CachedModel, respond, store_response
from .judge_choice import choices
from .models import checked, close, connect, prepare
from .models.spec import ModelSpec
from .plan import Attack, Plan, Target
from .progress import SAME, Failures, Listener, Progress
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
from .secret import hide, scrub
from .store import Place, Store, StoredTrial
from .study import UNNAMED, JudgePick, Study
from .text import visible
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
    keep: bool = False,
) -> Results:
    """Run a study, or resume it, with the results in the folder `out`. Blocks until it is done.

    `study` is a Study or the path of a study file. `models` maps names of targets to models that
    answer for them, e.g. models in memory; the other targets are connected as the study says.
    `limit` is the maximum number of prompts per dataset. `listener` receives the progress. The
    results are those of this study alone: trials of an earlier form of it (other prompts, attacks
    or targets) are set aside in the store, unless `keep`, which joins several studies. Returns the
    results. Raises LeadlineError for an error in the study, or a folder of another study, before
    any request is sent; later failures are stored in the results.
    """
    from .analysis.results import Results

    if not isinstance(study, Study):
        study = Study.load(study)
    loaded_plan = plan.load(study, limit)
    # Reading their identities raises for a folder without a model, before any request is sent.
    targets = [(spec, _connected(study, spec, models or {})) for spec in study.targets]
    with Store(Path(out), write=True) as store:
        if not keep:
            _check_same_study(store, loaded_plan)
        state = _Run(loaded_plan, store, listener or (lambda progress: None))
        run_to_completion(_run_study(state, targets, limit, keep=keep))
        progress = state.progress
    return Results(Path(out), progress)


def _connected(study: Study, spec: ModelSpec, in_memory: Mapping[str, Model]) -> Model:
    if model := in_memory.get(spec.label):
        return checked(model, f"the model {spec.label}")
    return connect(spec, study.limits, study.locate)


def _check_same_study(store: Store, plan: Plan) -> None:
    """Raise LeadlineError if the store holds another study: one with another name, or one that
    shares no target or no dataset with this one."""
    stored = store.description("study")
    if not stored or not store.query("SELECT 1 FROM trials LIMIT 1"):
        return
    study = plan.study
    names = (stored["name"], study.name)
    targets = {target["name"] or target["model"] for target in stored["targets"]}
    datasets = {dataset for (dataset,) in store.query("SELECT DISTINCT dataset FROM prompts")}
    if names[0] != names[1] and UNNAMED not in names:
        difference = f"its name is {names[0]!r}, not {names[1]!r}"
    elif targets.isdisjoint(target.label for target in study.targets):
        difference = f"its targets are {', '.join(sorted(targets))}"
    elif datasets.isdisjoint(plan.prompts):
        difference = f"its datasets are {', '.join(sorted(datasets))}"
    else:
        return
    raise LeadlineError(
        f"{store.folder} holds another study ({difference}): to continue that one, run its own "
        "study file; for this one, give another folder as --out"
    )


def run_to_completion(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in an event loop of its own; in a thread if a loop is already running, as in
    a notebook.

    The garbage collector runs less often meanwhile: a run makes many short-lived objects that
    reference counting frees, and repeated scans of the plan cost more than they free.
    """
    thresholds = gc.get_threshold()
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
        gc.set_threshold(*thresholds)
        gc.unfreeze()


@dataclass(frozen=True)
class _Judge:
    """A judge of the study with its row id in the store."""

    id: int
    name: str
    judge: Judge


@dataclass(slots=True)
class _OpenTrial:
    """A trial that needs a response or a verdict.

    `recipe` is its key if a model-assisted attack makes the request, else empty. `stale`: its
    stored row belongs to another request. `again`: its stored row belongs to the same request,
    which failed or was not scored by every judge."""

    trial: Trial
    attack: Attack
    place: Place
    recipe: bytes
    stale: bool
    again: bool


@dataclass(slots=True)
class _Work:
    """A request to send, or a stored response to judge, for the open trials with this key."""

    key: bytes
    request: Request
    response: Response | None


class _Run:
    """The state of one run."""

    def __init__(self, plan: Plan, store: Store, listener: Listener) -> None:
        self.plan, self.store, self.listener = plan, store, listener
        self.progress = Progress()
        self.open: dict[bytes, list[_OpenTrial]] = {}  # trials that wait for a response, by key
        self.attacker: CachedModel | None = None
        self.prompts: dict[tuple[str, str], int] = {}  # row ids, by dataset and prompt id
        self.judges: dict[str, list[_Judge]] = {}  # by dataset
        self.attacks = plan.every_attack
        self._reported = 0.0  # when the listener was last called
        self.crashed: set[str] = set()  # plug-ins whose crash is in the notes
        self.planned: dict[int, int] = {}  # numbers of trials, by cell id

    def report_progress(self, *, now: bool = False) -> None:
        """Call the listener, at most ten times per second unless `now`."""
        if now or time.monotonic() - self._reported > 0.1:
            self._reported = time.monotonic()
            self.listener(self.progress)

    def note(self, text: str) -> None:
        """Log a warning and add it to the progress notes."""
        text = scrub(text)
        log.warning("%s", text)
        self.progress.notes.append(text)


async def _run_study(
    run: _Run, targets: list[tuple[ModelSpec, Model]], limit: int | None, *, keep: bool
) -> None:
    """Run all targets: endpoints concurrently, local models one after another, since they share
    this machine's memory."""
    store, study = run.store, run.plan.study
    earlier = store.description("study") or {}
    store.describe("leadline", __version__)
    store.describe("study", study.description)
    store.describe("judge_choices", {d: str(c) for d, c in choices(study).items()})
    families = {label: attack.plugin.family for label, attack in run.attacks.items()}
    store.describe("families", families)
    store.describe("started", store.description("started") or _now())
    store.describe("finished", None)
    cells = None if keep else [store.cell_id(*cell) for cell in plan.cells(run.plan)]
    run.prompts = store.prompt_ids((p for ps in run.plan.prompts.values() for p in ps), cells)
    samples = study.sampling.samples
    if not keep and earlier.get("sampling", {}).get("samples", 1) > samples:
        store.drop_samples(samples)  # what is needed of them is judged again, without a request
    run.progress.total = plan.count(run.plan)
    run.progress.done = dict.fromkeys(run.progress.total, 0)
    run.progress.failures = {label: Failures() for label in run.progress.total}
    for (*names, attack), trials in plan.count_cells(run.plan).items():
        cell = store.cell_id(names[0], names[1], names[2], attack, run.attacks[attack].pool)
        run.planned[cell] = trials
    aside: dict[str, str] = {}
    if keep:
        run.planned = completeness.planned(store) | run.planned
        aside = store.description("set_aside", {})
    store.describe("set_aside", {k: v for k, v in aside.items() if k not in run.progress.total})
    completeness.describe(store, run.planned, limit)
    auxiliary = _build_judges(run)
    if study.attacker and any(a.asks_attacker for a in run.attacks.values()):
        attacker = connect(study.attacker, study.limits, study.locate)
        auxiliary["attacker"] = run.attacker = CachedModel(attacker, store)
    run.report_progress(now=True)
    try:
        for role, model in auxiliary.items():
            await _prepare_auxiliary(role, model)
        remote = [_run_target(run, spec, model) for spec, model in targets if spec.url]
        local = [(spec, model) for spec, model in targets if not spec.url]

        async def run_local() -> None:
            for spec, model in local:
                await _run_target(run, spec, model)

        await asyncio.gather(run_local(), *remote)
    finally:
        for model in auxiliary.values():
            await close(model)
    store.flush()
    completeness.describe(store, run.planned, limit)
    store.describe("finished", _now())
    run.report_progress(now=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# -- judges -------------------------------------------------------------------------------------


def _build_judges(run: _Run) -> dict[str, Model]:
    """Fill run.judges; returns the models that judges call, by role (for error messages)."""
    judge_models: dict[str, Model] = {}
    built: dict[str, _Judge] = {}
    study, store = run.plan.study, run.store

    def connect_cached(pick: JudgePick) -> Model:
        assert pick.spec
        role = f"judge {pick.label}"
        if role in judge_models:  # two judges with the same name
            role += f" ({pick.spec.label}, {len(judge_models)})"
        judge_models[role] = connect(pick.spec, study.limits, study.locate)

        def note_first_failure(reason: str) -> None:
            if role not in run.crashed:
                run.crashed.add(role)
                run.note(f"{role} failed, which leaves answers unscored: {reason}")

        return CachedModel(judge_models[role], store, note_first_failure)

    for dataset, picks in run.plan.judges.items():
        run.judges[dataset] = []
        for pick in picks:
            identity = pick.model_dump_json()
            if identity not in built:
                judge = pick.build(connect_cached)
                id = store.judge_id(pick.label, pick.settings, pick.caution)
                store_check(store, id, pick, study.locate)
                built[identity] = _Judge(id, pick.label, judge)
            run.judges[dataset].append(built[identity])
        store.primary_judge(dataset, run.judges[dataset][0].id)
    return judge_models


async def _prepare_auxiliary(role: str, model: Model) -> None:
    try:
        await prepare(model)
    except LeadlineError as error:
        raise LeadlineError(f"{role}: {error}") from None


# -- one target ---------------------------------------------------------------------------------


async def _run_target(run: _Run, spec: ModelSpec, model: Model) -> None:
    """Run all trials of a target. If it cannot be reached or loaded, its trials are stored as
    failed; the other targets continue."""
    unavailable, no_prefix = "", ""
    wants_prefix = any("response_prefix" in a.plugin.needs for a in run.attacks.values())
    target = Target(spec, model.identity)
    if not _all_stored(run, target):
        try:
            no_prefix = await prepare(model, prefix=wants_prefix)
        except LeadlineError as error:  # the other targets continue
            unavailable = visible(str(error))
            run.note(unavailable)
        run.store.describe(
            f"model:{spec.label}", _model_metadata(spec, model, no_prefix, unavailable)
        )
    if no_prefix:
        run.note(no_prefix)
    work = _missing(run, replace(target, no_prefix=no_prefix), unavailable)
    cached = CachedModel(model, run.store)

    async def worker() -> None:
        for item in work:
            if item is None:
                await asyncio.sleep(0)  # a chunk was looked up: let the event loop read replies
            elif _left_unasked(run, spec.label, item):
                continue
            elif isinstance(item, _Work):
                await _respond_and_judge(run, cached, item)
            else:
                await _make_assisted_attempt(run, cached, item)
            while run.store.behind:
                await asyncio.sleep(0.05)

    workers = [asyncio.create_task(worker()) for _ in range(model.concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await close(model)


def _left_unasked(run: _Run, label: str, item: _Work | _OpenTrial) -> bool:
    """Whether an item is left for a later run, since its target fails in the same way every time.
    Stored responses are judged all the same."""
    failures = run.progress.failures[label]
    trials = run.open[item.key] if isinstance(item, _Work) else [item]
    asks = not isinstance(item, _Work) or item.response is None
    if not asks or not all(failures.set_aside(trial.attack.label) for trial in trials):
        return False
    if isinstance(item, _Work):
        del run.open[item.key]
    if not failures.left:
        reasons = run.store.description("set_aside", {}) | {label: failures.reason}
        run.store.describe("set_aside", reasons)
        run.note(
            f"{label} failed {SAME} times in the same way: its other trials are left for a later "
            f"run: {visible(failures.reason)}"
        )
    failures.left += len(trials)
    return True


def _all_stored(run: _Run, target: Target) -> bool:
    """Whether the store has all responses of a target, so that it need not be loaded."""
    metadata = run.store.description(f"model:{target.spec.label}")
    if metadata is None or metadata["identity"] != dict(target.identity) or metadata["no_prefix"]:
        return False
    trials = plan.trials(run.plan, target)
    while chunk := list(islice(trials, _CHUNK)):
        places = [_place(run, trial) for trial in chunk]
        stored = run.store.stored(places)
        for trial, place in zip(chunk, places, strict=True):
            row = stored.get(place)
            if row is None or row.key != trial.key or row.outcome == "failed":
                return False
    return True


def _model_metadata(
    spec: ModelSpec, model: Model, no_prefix: str, unavailable: str
) -> Mapping[str, object]:
    card = spec.described
    return {
        "card": asdict(card) if card else None,
        "identity": dict(model.identity),
        "prefix": str(getattr(model, "prefix_way", "")),
        "no_prefix": no_prefix,
        "down": unavailable,
    }


def _place(run: _Run, trial: Trial) -> Place:
    dataset = trial.prompt.dataset
    pool = run.attacks[trial.attack].pool
    cell = run.store.cell_id(trial.model, trial.thinking, dataset, trial.attack, pool)
    return Place(cell, run.prompts[dataset, trial.prompt.id], trial.sample)


def _missing(run: _Run, target: Target, unavailable: str) -> Iterator[_Work | _OpenTrial | None]:
    """Yield the remaining work of a target: requests to send, responses to judge, and trials whose
    attempt a model-assisted attack has to make first; None after each look-up in the store.

    Trials with the same key become one piece of work. A whole chunk is entered into `run.open`
    before its first item is yielded, so that no request is sent twice."""
    store, label = run.store, target.spec.label
    trials = plan.trials(run.plan, target)
    samples: dict[int, int] = {}  # by cell
    planned: Counter[int] = Counter()  # by cell
    while chunk := list(islice(trials, _CHUNK)):
        places = [_place(run, trial) for trial in chunk]
        planned.update(place.cell for place in places)
        for place in places:
            samples[place.cell] = max(place.sample + 1, samples.get(place.cell, 0))
        stored = store.stored(places)
        answered = store.answered([trial.key for trial in chunk if trial.request])
        work: list[_Work | _OpenTrial] = []
        for trial, place in zip(chunk, places, strict=True):
            row = stored.get(place)
            same = row is not None and row.key == trial.key
            stale = row is not None and not same
            if trial.outcome:
                if not (same and row and row.outcome == trial.outcome):
                    store.put_trial(place, b"", trial.outcome, trial.reason, stale=stale)
                _count(run, label, trial.outcome, trial.reason)
                continue
            if same and row and _is_done(run, trial, row):
                run.progress.known += row.outcome != "not_applicable"
                _count(run, label, row.outcome)
                continue
            recipe = b"" if trial.request else trial.key
            if unavailable and trial.key not in answered:
                store.put_trial(place, trial.key, "failed", unavailable, recipe=recipe, stale=stale)
                _count(run, label, "failed", unavailable)
                continue
            attack = run.attacks[trial.attack]
            open_trial = _OpenTrial(trial, attack, place, recipe, stale, again=same)
            if trial.request is None:
                work.append(open_trial)
            elif trial.key in run.open:
                run.open[trial.key].append(open_trial)
            else:
                run.open[trial.key] = [open_trial]
                response = store.response(trial.key) if trial.key in answered else None
                work.append(_Work(trial.key, trial.request, response))
        run.report_progress()
        yield None
        yield from work
    run.planned.update(planned)  # exact now
    for cell, number in samples.items():  # attempts that the attack no longer makes
        if store.query("SELECT 1 FROM trials WHERE cell = ? AND sample >= ?", (cell, number)):
            store.drop_samples(number, cell)


def _is_done(run: _Run, trial: Trial, row: StoredTrial) -> bool:
    """Whether a trial whose request has not changed has its response and all its verdicts."""
    if row.outcome in ("failed", "not_applicable"):
        return row.outcome == "not_applicable"
    return row.judged >= {judge.id for judge in run.judges[trial.prompt.dataset]}


def _count(run: _Run, label: str, outcome: str, reason: str = "") -> None:
    progress = run.progress
    progress.done[label] += 1
    if outcome == "failed":
        progress.failed += 1
        progress.failures[label].count(reason)
    progress.not_applicable += outcome == "not_applicable"


def _assist(run: _Run, target: CachedModel, trial: Trial) -> Assistance:
    study = run.plan.study
    sampling = study.sampling.record(study.seed)
    judge = run.judges[trial.prompt.dataset][0]

    def build_request(attempt: Attempt) -> Request:
        return plan.request_of(trial.prompt, attempt, sampling, trial.thinking, trial.sample)

    async def first_verdict(attempt: Attempt, response: Response) -> Verdict:
        return await _verdict(run, judge, trial.prompt, attempt, response)

    return Assistance(run.attacker, target, build_request, first_verdict)


async def _make_assisted_attempt(run: _Run, target: CachedModel, open_trial: _OpenTrial) -> None:
    """Let a model-assisted attack make its attempt, then send it like any other."""
    trial, study = open_trial.trial, run.plan.study
    assist = _assist(run, target, trial)
    outcome, reason = "failed", ""
    try:
        attempt = await open_trial.attack.assisted_attempt(trial.prompt, study.seed, assist)
    except NotApplicable as why:
        outcome, reason = "not_applicable", str(why)
    except AttemptFailed as why:
        reason = f"{trial.attack}: {why}"
    except Exception as error:
        raised = "" if isinstance(error, LeadlineError) else f" raised {type(error).__name__}"
        prompt = trial.prompt
        message = hide(scrub(str(error)), prompt.text, prompt.context, prompt.target)
        reason = f"the attack {trial.attack}{raised}: {message}"
        if trial.attack not in run.crashed:
            run.crashed.add(trial.attack)
            run.note(reason)
    if reason:
        run.store.put_trial(
            open_trial.place, b"", outcome, reason,
            recipe=open_trial.recipe, stale=open_trial.stale,
        )  # fmt: skip
        _count(run, trial.model, outcome, reason)
        run.report_progress()
        return
    sampling = study.sampling.record(study.seed)
    request = plan.request_of(trial.prompt, attempt, sampling, trial.thinking, trial.sample)
    key = plan.model_key(target.identity, request)
    open_trial.trial = replace(trial, attempt=attempt, request=request, key=key)
    if key in run.open:
        run.open[key].append(open_trial)
        return
    run.open[key] = [open_trial]
    await _respond_and_judge(run, target, _Work(key, request, run.store.response(key)))


async def _respond_and_judge(run: _Run, target: CachedModel, work: _Work) -> None:
    """Get and store the response to a request, and judge it for every trial with its key."""
    response, store = work.response, run.store
    asked = response is None
    if response is None:
        response = await respond(target.model, work.request)
        run.progress.asked += 1
        store_response(store, work.key, work.request, response)
    outcome = _outcome(response)
    open_trials = run.open.pop(work.key)
    if asked and outcome != "not_applicable":
        first = open_trials[0]
        reason = response.error or "no reason given" if outcome == "failed" else ""
        run.progress.failures[first.trial.model].note(first.attack.label, reason)
    for open_trial in open_trials:
        store.put_trial(
            open_trial.place, work.key, outcome, response.error,
            recipe=open_trial.recipe, stale=open_trial.stale,
        )  # fmt: skip
        if outcome not in ("failed", "not_applicable"):
            await _judge(run, target, open_trial, response)
        _count(run, open_trial.trial.model, outcome, response.error)
    run.report_progress()


def _outcome(response: Response) -> str:
    """The outcome of a trial: answered, truncated, empty, blocked, failed or not_applicable."""
    if response.finish in ("blocked", "not_applicable"):
        return response.finish
    if response.finish not in ("stop", "length"):
        return "failed"
    if not response.answer.strip():
        return "empty"
    return "truncated" if response.finish == "length" else "answered"


async def _judge(
    run: _Run, target: CachedModel, open_trial: _OpenTrial, response: Response
) -> None:
    """Decode a response if its attack requires it, and store the verdict of every judge."""
    trial = open_trial.trial
    failure = ""
    if open_trial.attack.plugin.decode:
        try:
            assist = _assist(run, target, trial)
            answer = await open_trial.attack.decode(response.answer, assist)
            response = replace(response, answer=answer)
        except AttemptFailed as why:
            failure = f"the answer could not be decoded: {why}"
        except Exception as error:
            failure = f"the decoder of {trial.attack} raised {type(error).__name__}"
            if failure not in run.crashed:
                run.crashed.add(failure)
                run.note(failure)
    unscored = False
    for judge in run.judges[trial.prompt.dataset]:
        if failure:
            verdict = Verdict(unsafe=None, text=failure)
        else:
            verdict = await _verdict(run, judge, trial.prompt, trial.attempt, response)
        unscored = unscored or verdict.unsafe is None
        run.store.put_verdict(open_trial.place, judge.id, verdict, again=open_trial.again)
    run.progress.unscored += unscored


async def _verdict(
    run: _Run, judge: _Judge, prompt: Prompt, attempt: Attempt, response: Response
) -> Verdict:
    """A judge's verdict; the first crash of each judge is added to the progress notes."""
    verdict = await judges.ask(judge.name, judge.judge, prompt, attempt, response)
    if verdict.error and judge.name not in run.crashed:
        run.crashed.add(judge.name)
        run.note(verdict.text)
    return verdict
