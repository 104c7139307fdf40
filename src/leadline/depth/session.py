"""One run of `measure_depth`: its models, prompts and budget, and the results so far."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import ValidationError

from .. import engine, plan
from ..analysis.results import Results
from ..files import write_private
from ..judges import ask
from ..models import close, connect, prepare
from ..models.checkpoint import Checkpoint
from ..models.spec import Limits
from ..models.template import load_tokenizer
from ..progress import CombinedProgress, Listener, Progress
from ..records import Attempt, Judge, LeadlineError, Model, Prompt, Response, Verdict
from ..registry import Work
from ..report.depth.schema import D50, Point
from ..study import JudgePick, Study
from ..version import __version__
from .budgets import Budget, duration

log = logging.getLogger("leadline")
_WORTH_SAYING = 60.0  # seconds of a part, from which on its time is announced
_SETTLED = 5.0  # seconds after which the rate of a part is known


class Session:
    """The inputs of the measures, and the methods that record their results.

    `models` and `base` are names, `prompts` the harmful prompts, `targeted` those with a target
    answer, `budget` the limits of the current measure (set by `use`), `answered` the number of
    prompts, harmless ones included; `source` identifies dataset and judge. A measure records its
    results with `add` and `add_d50`, in `settings` (by measure, everything that the numbers depend
    on) and in `skipped` (by measure, the reason why it was not measured).

    Raises LeadlineError where the dataset or judge cannot be loaded, or no prompt is harmful.
    """

    def __init__(
        self,
        models: list[str],
        base: str | None,
        dataset: Any,
        judge: Any,
        out: Path,
        budget: Budget,
        listener: Listener | None,
    ) -> None:
        self.models, self.base, self.out = models, base, out
        self.budget = budget  # `_study` reads it
        self.dataset = dataset
        self.progress = CombinedProgress(listener)
        self.points: dict[str, list[dict[str, Any]]] = {}
        self.d50: dict[str, dict[str, Any]] = {}
        self.settings: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self._judges = [] if judge is None else [judge]
        loaded = plan.load(self._study(models, ["direct"]))
        ((self.dataset_name, self._prompts),) = loaded.prompts.items()
        self.judge: JudgePick = loaded.judges[self.dataset_name][0]
        self.source = folder_name(
            self.dataset_name, json.dumps([*texts(self._prompts), self.judge.model_dump_json()])
        )
        self._lengths: tuple[int, int] | None = None
        self._limited: dict[int, tuple[Prompt, ...]] = {}
        self.use(budget)
        if not self.prompts:
            raise LeadlineError(
                f"depth: dataset {self.dataset_name} has no harmful prompts: use another dataset"
            )

    def use(self, budget: Budget) -> None:
        """Make `budget` the limits of the measures that follow."""
        self.budget, prompts = budget, self._prompts
        # Limits harmful and harmless prompts together, to leave `budget.prompts` harmful ones.
        self._limit: int | None = None
        if budget.prompts is not None and budget.prompts < self.harmful:
            self._limit = round(budget.prompts * len(prompts) / self.harmful)
            if self._limit not in self._limited:
                loaded = plan.load(self._study(self.models, ["direct"]), self._limit)
                self._limited[self._limit] = loaded.prompts[self.dataset_name]
            prompts = self._limited[self._limit]
        self.answered = len(prompts)
        self.prompts = [p for p in prompts if p.harmful]
        self.targeted = [p for p in self.prompts if p.target]
        # Calls with other prompts, judges or answer lengths must not share a store.
        key = [*texts(prompts), self.judge.model_dump_json(), str(budget.max_tokens)]
        self.trials = self.out / "trials" / folder_name(self.dataset_name, json.dumps(key))

    @property
    def harmful(self) -> int:
        """The number of harmful prompts of the dataset."""
        return sum(p.harmful for p in self._prompts)

    @property
    def has_judge(self) -> bool:
        """Whether the caller chose the judge (otherwise it is the dataset's own)."""
        return bool(self._judges)

    @property
    def names(self) -> list[str]:
        """The models and the base."""
        return list(dict.fromkeys([*self.models, *([] if self.base is None else [self.base])]))

    # -- results ----------------------------------------------------------------------------------

    def add(self, name: str, model: str, points: Iterable[Mapping[str, Any] | Point]) -> None:
        """Add points of a model to one of the lists of depth.json. Values that are not finite
        become None."""
        rows = self.points.setdefault(name, [])
        for point in points:
            fields = point.model_dump() if isinstance(point, Point) else dict(point)
            rows.append({k: _finite(v) for k, v in {**fields, "model": model}.items()})

    def add_d50(self, measure: str, model: str, value: D50) -> None:
        """Set a model's D50 of a measure, or of "measure:kind"."""
        self.d50.setdefault(model, {})[measure] = value.model_dump()

    def for_each(
        self, measure: str, function: Callable[[str], None], models: Iterable[str] | None = None
    ) -> None:
        """Call `function(model)` for each model (default: those of the session). A LeadlineError
        for one model is recorded in `skipped`, and the other models continue."""
        for model in self.models if models is None else models:
            self.attempt(measure, model, partial(function, model))

    def attempt(self, measure: str, model: str, function: Callable[[], None]) -> None:
        """Call `function()`; a LeadlineError is recorded in `skipped` as the model's reason."""
        try:
            function()
        except LeadlineError as error:
            reason = f"{model}: {str(error).removeprefix(f'model {model}: ')}"
            earlier = self.skipped.get(measure)
            self.skipped[measure] = f"{earlier}; {reason}" if earlier else reason

    # -- work -------------------------------------------------------------------------------------

    def answers(self, count: int) -> Work:
        """The work of generating that many answers."""
        tokens = self.budget.max_tokens
        text = f"{count:,} answers of at most {tokens} tokens"
        return Work(text, answers=count, max_tokens=tokens)

    def lengths(self) -> tuple[int, int]:
        """The mean numbers of tokens of a prompt and of a target answer, for the first model."""
        if self._lengths is None:
            tokenizer, some = tokenizer_of(self.models[0]), self._prompts[:50]
            of = [
                [len(ids) for ids in tokenizer(list(filter(None, each)) or [" "])["input_ids"]]
                for each in ([p.text for p in some], [p.target for p in some])
            ]
            self._lengths = round(mean(of[0])) + 20, round(mean(of[1]))  # 20: the chat template
        return self._lengths

    # -- progress ---------------------------------------------------------------------------------

    def counter(self, part: str, unit: str) -> Callable[[int, int], None]:
        """A callback `(done, total)` that updates the progress of a part. After some seconds
        it announces the time that the part takes in total, if that is a minute or more."""
        update, announce = self.progress.counter(part), TimeNotice(part, unit)

        def listen(done: int, total: int) -> None:
            announce(done, total)
            update(done, total)

        return listen

    # -- trials -----------------------------------------------------------------------------------

    def _study(self, targets: Sequence[Any], attacks: Sequence[Any], name: str = "") -> Study:
        fields = {
            "name": f"depth: {name}",
            "targets": list(targets),
            "datasets": [self.dataset],
            "attacks": list(attacks),
            "judges": self._judges,
            "sampling": {"max_tokens": self.budget.max_tokens},
        }
        try:
            return Study.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = first["loc"][0] if first["loc"] else "study"
            raise LeadlineError(f"depth: {where}: {first['msg']}") from None

    def run(
        self,
        measure: str,
        targets: Sequence[Any],
        attacks: Sequence[Any],
        temperature: float | str = 0,
    ) -> Results:
        """Run ordinary trials on the session's dataset, and record their settings.

        `targets` and `attacks` are written as in a study file. The temperature is 0 unless an
        attack sets it; `temperature` is the value to record.
        """
        self.settings[measure] = {
            "attacks": list(attacks),
            "prompts": len(self.prompts),
            "max_tokens": self.budget.max_tokens,
            "temperature": temperature,
        }
        label = measure.replace("_", " ")
        update = self.progress.study(lambda target: f"{target}: {label}")
        announce = TimeNotice(label, "answers")

        def listen(progress: Progress) -> None:
            done, total = sum(progress.done.values()), sum(progress.total.values())
            announce(done - progress.known, total - progress.known)
            update(progress)

        return engine.run(
            self._study(targets, attacks, measure),
            self.trials / measure,
            limit=self._limit,
            keep=True,  # other models may have been measured in this folder
            listener=listen,
        )

    def judge_function(self) -> Judge:
        """The session's judge as a function for use outside of the engine. A judge that queries a
        model opens a new connection for each verdict, since every verdict may run in another event
        loop."""

        async def judge(prompt: Prompt, attempt: Attempt, response: Response) -> Verdict:
            models: list[Model] = []

            def connected(pick: JudgePick) -> Model:
                assert pick.spec
                models.append(connect(pick.spec, Limits()))
                return models[-1]

            built = self.judge.build(connected)
            try:
                for model in models:
                    await prepare(model)
                return await ask(self.judge.label, built, prompt, attempt, response)
            finally:
                for model in models:
                    await close(model)

        return judge

    # -- files ------------------------------------------------------------------------------------

    @property
    def parts(self) -> Path:
        """The folder of intermediate results and checkpoints."""
        return self.out / "parts"

    def cached(self, key: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `compute()`, stored in `parts`. `key` is everything that it depends on, as
        JSON values; a later call with the same key reads the stored result."""
        name = blake2b(json.dumps([__version__, key]).encode(), digest_size=8).hexdigest()
        file = self.parts / f"{name}.json"
        with suppress(OSError, ValueError):  # missing, or truncated by a kill
            return dict(json.loads(file.read_text(encoding="utf-8")))
        result = compute()
        write_private(file, json.dumps(result))
        return result


class TimeNotice:
    """Logs how long a part of the work takes in total, once its rate is known."""

    def __init__(self, part: str, unit: str) -> None:
        self.part, self.unit = part, unit
        self._began, self._announced = time.perf_counter(), False

    def __call__(self, done: int, total: int) -> None:
        """Called with the numbers of units that are complete and of all units. The first units of a
        batch say little, so that the first seconds are waited for."""
        seconds = time.perf_counter() - self._began
        if self._announced or done < 1 or seconds < _SETTLED:
            return
        self._announced = True
        each = seconds / done
        if each * total >= _WORTH_SAYING:
            log.warning(
                "%s: about %s for %s %s (%s each)",
                self.part, duration(each * total), f"{total:,}",
                self.unit, f"{each:.1f} s" if each >= 0.1 else f"{1000 * each:.0f} ms",
            )  # fmt: skip


def check_scored(results: Results, model: str) -> None:
    """Raises LeadlineError with the reason where no response of a model was scored, for instance
    because the model does not load."""
    cells = results.cells()
    mine = cells[cells["model"] == model]
    if not (mine["n"] > 0).any():
        why = next(filter(None, mine["reason"]), "the judge returned no verdict")
        raise LeadlineError(f"no response was scored: {why}")


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a folder, hub id or organism. Raises LeadlineError if it does not load."""
    checkpoint = Checkpoint.find(model)
    return load_tokenizer(checkpoint.path, checkpoint.pinned)


def folder_name(name: str, key: str = "") -> str:
    """A readable and unique folder name: the end of `name`, and a digest of `key` (or `name`)."""
    digest = blake2b((key or name).encode(), digest_size=4).hexdigest()
    return f"{''.join(c if c.isalnum() else '-' for c in name)[-40:]} {digest}"


def texts(prompts: Iterable[Prompt]) -> list[str]:
    """Ids, texts and targets of prompts: the parts of prompts that results depend on."""
    return [text for prompt in prompts for text in (prompt.id, prompt.text, prompt.target)]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
