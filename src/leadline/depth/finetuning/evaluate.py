"""A model in training, asked as the target of a study, and what it says counted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import engine
from ...models.spec import ModelSpec
from ...records import LeadlineError, Prompt
from ...study import AttackPick, DatasetPick, Sampling, Study
from .data import CALLED_BY, Material

if TYPE_CHECKING:
    import pandas as pd

    from ...analysis.results import Results
    from .config import FinetuneConfig


@dataclass(frozen=True, slots=True)
class Reading:
    """The model after `step` steps over `examples` examples (`batch` each step, repeats counted).

    `value` is the ASR of the attack that calls up what was learned, over `n` scored prompts,
    `untriggered` that of the plain request where these differ; `utility` is how right answers to
    harmless prompts are. `low` and `high` bound them at 95%. None where there is nothing to tell.
    """

    step: int
    examples: int
    value: float
    low: float
    high: float
    n: int
    utility: float | None = None
    utility_low: float | None = None
    utility_high: float | None = None
    untriggered: float | None = None


@dataclass(frozen=True)
class Asked:
    """What a model is asked after some steps of `batch` examples, and the folder `out` where the
    answers lie. `revision` tells one step's weights from another's."""

    material: Material
    config: FinetuneConfig
    out: Path
    revision: Callable[[int], str]
    batch: int
    batch_size: int | None
    listener: engine.Listener | None

    def __post_init__(self) -> None:
        """The engine reads prompts from a dataset: they are written down as one."""
        if not any(p.harmful for p in self.material.asked):
            raise LeadlineError(
                f"dataset {self.material.dataset} has no harmful prompt left to ask: give one of "
                "more than one base prompt"
            )
        lines = [json.dumps(_row(prompt)) + "\n" for prompt in self.material.asked]
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._file.write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            raise LeadlineError(f"cannot write {self._file}: {error.strerror}") from None

    @property
    def _file(self) -> Path:
        return self.out / "prompts.jsonl"

    def after(self, step: int, model: Any, tokenizer: Any) -> tuple[Reading, dict[str, bool]]:
        """How the model stands, and which prompts were broken. Its answers are kept as those of
        "step n"; what the store holds of these very weights is not asked again."""
        from ...models.huggingface import HuggingFaceModel

        label, called = f"step {step}", CALLED_BY[self.config.data]
        live = HuggingFaceModel.live(
            model, tokenizer, name=label, revision=self.revision(step), batch_size=self.batch_size
        )
        options = {"path": str(self._file), "name": self.material.dataset}
        study = Study(
            name=f"fine-tuned on {self.config.data} data",
            targets=[ModelSpec(model=label)],
            datasets=[DatasetPick(name="file", options=options)],
            attacks=[AttackPick(name=name) for name in dict.fromkeys(("direct", called))],
            judges=list(self.material.judges),
            sampling=Sampling(temperature=0, max_tokens=self.config.max_tokens),
        )
        results = engine.run(study, self.out, models={label: live}, listener=self.listener)
        found = results.query(
            "SELECT prompt, unsafe FROM outcomes WHERE model = ? AND attack = ? AND harmful "
            "AND unsafe IS NOT NULL",
            label,
            called,
        )
        reading = _reading(results, step, step * self.batch, label, called)
        return reading, {name: bool(hit) for name, hit in found}


def _reading(results: Results, step: int, examples: int, label: str, called: str) -> Reading:
    cells, harmless = results.cells(), results.over_refusal()
    cell, plain = _cell(cells, label, called), _cell(cells, label, "direct")
    useful = _cell(harmless, label, "direct")
    if not cell["n"]:
        why = cell["reason"] or "the judge could score none"
        raise LeadlineError(f"no answer can be counted after step {step}: {why}")
    utility, low, high = (
        _known(useful.get(name)) for name in ("utility", "utility_low", "utility_high")
    )
    return Reading(
        step=step,
        examples=examples,
        value=cell["asr"],
        low=cell["low"],
        high=cell["high"],
        n=cell["n"],
        utility=utility,
        utility_low=low,
        utility_high=high,
        untriggered=_known(plain["asr"]) if called != "direct" else None,
    )


def _cell(frame: pd.DataFrame, label: str, attack: str) -> dict[str, Any]:
    found = frame[(frame["model"] == label) & (frame["attack"] == attack)].to_dict("records")
    return {str(name): value for name, value in found[0].items()} if found else {}


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _row(prompt: Prompt) -> dict[str, Any]:
    return {name: value for name, value in asdict(prompt).items() if name != "dataset"}


def digest(value: Any) -> str:
    return blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
