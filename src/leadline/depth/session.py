"""One call of `leadline.depth`: what is measured on what, what is kept, and all that was found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..version import __version__
from .. import engine, plan
from ..analysis.results import Results
from ..progress import Listener, Progress
from ..judges import ask
from ..models import connect
from ..models.template import load_tokenizer
from ..models.spec import Limits
from ..records import Attempt, Judge, LeadlineError, Model, Prompt, Response, Verdict
from ..study import JudgePick, Study
from . import curves
from ..models.checkpoint import Checkpoint
from .budgets import Budget


class Sounding:
    """`points` by measure and `d50` by model are what was found; `settings` what decided it, and
    `skipped` what could not be measured, and why."""

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
        self.models, self.base, self.out, self.budget = models, base, out, budget
        self.dataset, self.given_judge = dataset, judge
        self.progress, self.listener = Progress(), listener or (lambda progress: None)
        self.points: dict[str, list[dict[str, Any]]] = {}
        self.d50: dict[str, dict[str, Any]] = {}
        self.settings: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        study = self.study(models, ["direct"])
        ready = plan.load(study)
        ((self.name, prompts),) = ready.prompts.items()
        self.judge = ready.judges[self.name][0]
        harmful = sum(p.harmful for p in prompts)
        self.limit: int | None = None  # of all prompts, so that enough harmful ones are among them
        if budget.prompts is not None and budget.prompts < harmful:
            self.limit = round(budget.prompts * len(prompts) / harmful)
            prompts = plan.load(study, self.limit).prompts[self.name]
        self.harmful = [p for p in prompts if p.harmful]
        self.targeted = [p for p in self.harmful if p.target]
        if not self.harmful:
            raise LeadlineError(f"depth: dataset {self.name} has no harmful prompts: give another")
        # Prompts, judge or length of answers of another call would be counted with these.
        about = [*texts(prompts), self.judge.model_dump_json(), str(budget.max_tokens)]
        self.trials = out / "trials" / slug(self.name, json.dumps(about))

    def attempt(self, measure: str, model: str, take: Callable[[], None]) -> None:
        """What cannot be taken of one model is said, and the rest goes on."""
        try:
            take()
        except LeadlineError as error:
            why = f"{model}: {str(error).removeprefix(f'model {model}: ')}"
            held = self.skipped.get(measure)
            self.skipped[measure] = f"{held}; {why}" if held else why

    def study(self, targets: Sequence[Any], attacks: Sequence[Any], name: str = "") -> Study:
        parts = {
            "name": f"depth: {name}",
            "targets": list(targets),
            "datasets": [self.dataset],
            "attacks": list(attacks),
            "judges": [] if self.given_judge is None else [self.given_judge],
            "sampling": {"max_tokens": self.budget.max_tokens},
        }
        try:
            return Study.model_validate(parts)
        except ValidationError as error:
            first = error.errors()[0]
            where = first["loc"][0] if first["loc"] else "study"
            raise LeadlineError(f"depth: {where}: {first['msg']}") from None

    def run(self, measure: str, targets: Sequence[Any], attacks: Sequence[Any]) -> Results:
        self.settings[measure] = {
            "attacks": list(attacks),
            "prompts": len(self.harmful),
            "max_tokens": self.budget.max_tokens,
            "temperature": "as the sweep says" if measure == "decoding" else 0,
        }
        return engine.run(
            self.study(targets, attacks, measure),
            self.trials / measure,
            limit=self.limit,
            listener=self._relayed(measure.replace("_", " ")),
        )

    def judged(self) -> Judge:
        """The dataset's judge as a function that stands on its own: a search has no event loop
        that would stay, so a judge that asks a model connects for each verdict."""

        async def judge(prompt: Prompt, attempt: Attempt, response: Response) -> Verdict:
            asked: list[Model] = []

            def connected(pick: JudgePick) -> Model:
                assert pick.spec
                asked.append(connect(pick.spec, Limits()))
                return asked[-1]

            built = self.judge.build(connected)
            try:
                for model in asked:
                    await model.prepare(prefix=False)
                return await ask(self.judge.label, built, prompt, attempt, response)
            finally:
                for model in asked:
                    await model.close()

        return judge

    def add(self, measure: str, model: str, points: Iterable[Mapping[str, Any]]) -> None:
        rows = self.points.setdefault(measure, [])
        rows += [{"model": model, **{k: _finite(v) for k, v in point.items()}} for point in points]

    def headline(self, model: str, measure: str, found: curves.D50, **more: Any) -> None:
        self.d50.setdefault(model, {})[measure] = {**found.to_dict(), **more}

    def kept(self, about: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, computed once: `about` is all that decides it."""
        name = blake2b(json.dumps([__version__, about]).encode(), digest_size=8).hexdigest()
        file = self.out / "parts" / f"{name}.json"
        with suppress(OSError, ValueError):  # not there, or cut off by a kill
            return dict(json.loads(file.read_text(encoding="utf-8")))
        made = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(made), encoding="utf-8")
        return made

    def told(self, part: str) -> Callable[[int, int], None]:
        """A listener of (done, in all) that shows as one part of the whole."""

        def told(done: int, total: int) -> None:
            self.progress.total[part], self.progress.done[part] = total, done
            self.listener(self.progress)

        return told

    def _relayed(self, part: str) -> Listener:
        """The listener of a run, whose targets show as parts of the whole."""
        before = replace(self.progress)

        def relayed(progress: Progress) -> None:
            for target, total in progress.total.items():
                self.progress.total[f"{target}: {part}"] = total
                self.progress.done[f"{target}: {part}"] = progress.done[target]
            self.progress.failed = before.failed + progress.failed
            self.progress.unscored = before.unscored + progress.unscored
            self.listener(self.progress)

        return relayed


def tokenizer_of(model: str) -> Any:
    home = Checkpoint.find(model)
    return load_tokenizer(home.path, home.pinned)


def slug(name: str, about: str = "") -> str:
    """A folder's name for something: readable, and told apart by a digest."""
    digest = blake2b((about or name).encode(), digest_size=4).hexdigest()
    return f"{''.join(c if c.isalnum() else '-' for c in name)[-40:]} {digest}"


def texts(prompts: Iterable[Prompt]) -> list[str]:
    return [text for prompt in prompts for text in (prompt.id, prompt.text, prompt.target)]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
