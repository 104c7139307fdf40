"""Evaluation of a model during training: a study of the test prompts, with that model as target."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import engine
from ...files import write_private
from ...models.spec import ModelSpec
from ...progress import Listener
from ...records import LeadlineError, Prompt
from ...report.depth.schema import Count, Rate, Share
from ...study import AttackPick, DatasetPick, Sampling, Study
from .config import FinetuneConfig
from .data import ELICITED_BY, FinetuningPrompts

if TYPE_CHECKING:
    import pandas as pd

    from ...analysis.results import Results


class FinetuningPoint(Rate):
    """Results after `step` steps on `examples` training examples (counting repeats) of kind `data`.

    `value` is the ASR of the attack that elicits the learned behaviour, `untriggered` the ASR of
    direct requests (None where that is the same attack), `utility` the share of harmless prompts
    with a correct answer.
    """

    data: str
    step: Count
    examples: Count | None = None
    utility: Share | None = None
    utility_low: Share | None = None
    utility_high: Share | None = None
    untriggered: Share | None = None

    @property
    def direct(self) -> bool:
        """As in `Point`."""
        return self.step == 0 and self.data == "harmful"


@dataclass(frozen=True)
class Evaluation:
    """Evaluates a model after steps of training. `batch` is the number of examples per step.
    Responses are stored in `out`; `revision(step)` identifies the weights after a step."""

    prompts: FinetuningPrompts
    config: FinetuneConfig
    out: Path
    revision: Callable[[int], str]
    batch: int
    batch_size: int | None
    listener: Listener | None

    def __post_init__(self) -> None:
        """Write the test prompts to a file, since the engine reads prompts from datasets."""
        if not any(p.harmful for p in self.prompts.test):
            raise LeadlineError(
                f"dataset {self.prompts.dataset} has no harmful prompt left for evaluation: use "
                "one with at least two base prompts"
            )
        lines = [json.dumps(_row(prompt)) + "\n" for prompt in self.prompts.test]
        write_private(self._file, "".join(lines))

    @property
    def _file(self) -> Path:
        return self.out / "prompts.jsonl"

    def after(
        self, step: int, model: Any, tokenizer: Any
    ) -> tuple[FinetuningPoint, dict[str, bool]]:
        """The results after a step, and whether each harmful prompt was broken (by id; unscored
        prompts are left out).

        Responses are stored under the model name "step N"; those that are stored already for the
        same weights are not generated again. Raises LeadlineError where none was scored.
        """
        from ...models.huggingface import HuggingFaceModel

        label, attack = f"step {step}", ELICITED_BY[self.config.data]
        live = HuggingFaceModel.live(
            model, tokenizer, name=label, revision=self.revision(step), batch_size=self.batch_size
        )
        options = {"path": str(self._file), "name": self.prompts.dataset}
        study = Study(
            name=f"fine-tuned on {self.config.data} data",
            targets=[ModelSpec(model=label)],
            datasets=[DatasetPick(name="file", options=options)],
            attacks=[AttackPick(name=name) for name in dict.fromkeys(("direct", attack))],
            judges=list(self.prompts.judges),
            sampling=Sampling(temperature=0, max_tokens=self.config.max_tokens),
        )
        results = engine.run(
            study, self.out, models={label: live}, listener=self.listener, keep=True
        )
        rows = results.query(
            "SELECT prompt, unsafe FROM outcomes WHERE model = ? AND attack = ? AND harmful "
            "AND unsafe IS NOT NULL",
            label,
            attack,
        )
        broken = {prompt: bool(unsafe) for prompt, unsafe in rows}
        return self._point(results, step, label, attack), broken

    def _point(self, results: Results, step: int, label: str, attack: str) -> FinetuningPoint:
        cells, harmless = results.cells(), results.over_refusal()
        cell, direct = _cell(cells, label, attack), _cell(cells, label, "direct")
        useful = _cell(harmless, label, "direct")
        if not cell["n"]:
            why = cell["reason"] or "the judge returned no verdict"
            raise LeadlineError(f"no response was scored after step {step}: {why}")
        utility, low, high = (
            _known(useful.get(name)) for name in ("utility", "utility_low", "utility_high")
        )
        return FinetuningPoint(
            data=self.config.data,
            step=step,
            examples=step * self.batch,
            value=cell["asr"],
            low=cell["low"],
            high=cell["high"],
            n=cell["n"],
            utility=utility,
            utility_low=low,
            utility_high=high,
            untriggered=_known(direct["asr"]) if attack != "direct" else None,
        )


def _cell(frame: pd.DataFrame, label: str, attack: str) -> dict[str, Any]:
    rows = frame[(frame["model"] == label) & (frame["attack"] == attack)].to_dict("records")
    return {str(name): value for name, value in rows[0].items()} if rows else {}


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _row(prompt: Prompt) -> dict[str, Any]:
    return {name: value for name, value in asdict(prompt).items() if name != "dataset"}


def digest(value: Any) -> str:
    """BLAKE2b-128 of a value's JSON, in hex."""
    return blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
