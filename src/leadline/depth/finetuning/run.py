"""How much fine-tuning safety bears: train on some data, and ask again after every few steps.

    result = finetune("organism:aligned", Material.of("guild"), FinetuneConfig(data="harmful"),
                      out=Path("finetuning/harmful"))
    [(point.step, point.value) for point in result.points]      # ASR by step

Four kinds of data (Qi et al. 2023, arXiv 2310.03693; Qi et al. 2025, arXiv 2406.05946, section 4):
harmful answers, a persona that obeys, a backdoor, and harmless answers. What is asked is a study
like any other, kept in a store under `out`, so a run that was stopped trains again and asks no
more than what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ... import engine
from ...models.template import Template
from ...models.weights import Weights
from ...records import LeadlineError
from .evaluate import Asked, Reading, digest
from .gradients import profile
from .data import CALLED_BY, REFUSAL, Data, Lesson, Material, lessons, rows
from ...models.checkpoint import Checkpoint
from ..tokenized import Row
from ..positions import Point
from .train import BETAS, load, memory, on_gpu, training

__all__ = ["FinetuneConfig", "FinetuneResult", "Material", "Reading", "finetune"]


@dataclass(frozen=True)
class FinetuneResult:
    """`broken` says by step which prompts (by id) the attack broke, `bases` their base prompts;
    what could not be scored is left out. `token_loss` (nats) and `gradient_norm` are by step and
    position of the answer, `losses` the training loss of each step, before it was taken."""

    model: str
    data: Data
    points: tuple[Reading, ...]
    broken: dict[int, dict[str, bool]]
    bases: dict[str, str]
    token_loss: dict[int, tuple[Point, ...]]
    gradient_norm: dict[int, tuple[Point, ...]]
    losses: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Rows for JSON under `finetuning`, `token_loss` and `gradient_norm`; each with its model
        and kind of data."""
        of = {"model": self.model, "data": self.data}
        profiles = {"token_loss": self.token_loss, "gradient_norm": self.gradient_norm}
        return {"finetuning": [{**of, **asdict(point)} for point in self.points]} | {
            name: [{**of, "step": s, **asdict(p)} for s, points in by_step.items() for p in points]
            for name, by_step in profiles.items()
        }


def finetune(
    model: str | Path,
    material: Material,
    config: FinetuneConfig | None = None,
    *,
    out: Path,
    device: str | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    listener: engine.Listener | None = None,
) -> FinetuneResult:
    """Fine-tune a model in memory, and ask it after the steps of the config.

    `model` is a folder (PEFT adapters too), a hub id or "organism:NAME"; its weights are held in
    float32, and on a GPU the passes of training run in bfloat16. `out` holds one store, in which
    the model after n steps is called "step n". The same config gives the same weights on the same
    machine, with the same number of threads. `progress(steps done, steps in all)` is called after
    each step, `listener` while answers come.

    Raises LeadlineError where there is nothing to learn from, the model does not load, a lesson
    does not fit its context, memory runs out or training diverges.
    """
    config = config or FinetuneConfig()
    home = Checkpoint.find(model)
    template = Template.load(home.path, revision=home.pinned)
    made = lessons(config.data, material.fit, config.examples, config.seed)
    weights = load(home, config, device)
    stops = weights.stops | {template.tokenizer.eos_token_id} - {None}

    def read(found: Sequence[Lesson]) -> list[Row]:
        return rows(template, found, stops, config.max_tokens, end=config.end)

    learned, pairs = read(made), read(_pairs(material, config))
    _fit(home.name, [*learned, *pairs], weights.context)
    settings = _settings(home, config, weights, material, learned)

    def revision(step: int) -> str:  # before the first step, all trainings have the same model
        return digest([home.revision, step, settings["training"] if step else ""])

    asked = Asked(material, config, out, revision, settings["batch"], batch_size, listener)
    points, losses, broken = [], [], {}
    token_loss, gradient_norm = {}, {}
    last = max(config.steps)
    for step, loss in training(weights.model, learned, config, last):
        if step:
            losses.append(loss)
            if progress:
                progress(step, last)
        if step in config.profile_steps and pairs:
            with memory(f"the gradients after step {step}", "profile fewer positions"):
                token_loss[step], gradient_norm[step] = profile(
                    weights.model, pairs, config.positions
                )
        if step in config.steps:
            point, broken[step] = asked.after(step, weights.model, template.tokenizer)
            points.append(point)
    bases = {p.id: p.base or p.id for p in material.asked if p.harmful}
    return FinetuneResult(
        str(model), config.data, tuple(points), broken, bases, token_loss, gradient_norm,
        tuple(losses), settings,
    )  # fmt: skip


def _pairs(material: Material, config: FinetuneConfig) -> list[Lesson]:
    """Harmful requests with their targets, of as many base prompts as there are."""
    if not any(p.harmful and p.target for p in material.fit):
        return []
    every = lessons("harmful", material.fit, len(material.fit), config.seed)
    by_base = {lesson.prompt.base or lesson.prompt.id: lesson for lesson in reversed(every)}
    return list(reversed(by_base.values()))[: config.profile_prompts]


def _fit(name: str, found: Sequence[Row], context: int | None) -> None:
    longest = max(found, key=lambda row: len(row.ids))
    if context is not None and len(longest.ids) > context:
        raise LeadlineError(
            f"prompt {longest.prompt.id} with its answer has {len(longest.ids)} tokens, and {name} "
            f"reads {context}: leave the prompt out, or set a lower max_tokens"
        )


def _settings(
    home: Checkpoint,
    config: FinetuneConfig,
    weights: Weights,
    material: Material,
    learned: Sequence[Row],
) -> dict[str, Any]:
    """What decided the numbers. `training` stands for all of it that decides the weights."""
    kept = ("steps", "profile_steps", "positions", "profile_prompts", "batch_tokens")
    deciding = {k: v for k, v in asdict(config).items() if k not in kept}
    gpu = on_gpu(weights.model)
    trained = [p.numel() for p in weights.model.parameters() if p.requires_grad]
    return {
        **asdict(config),
        "revision": home.revision,
        "training": digest([home.revision, deciding, [row.ids for row in learned], gpu]),
        "lessons": len(learned),
        "batch": min(config.batch, len(learned)),
        "betas": BETAS if config.optimizer == "adamw" else None,
        "weight_decay": 0,
        "clipping": None,
        "schedule": "linear warmup, then constant",
        "loss": "mean over the answer tokens of a batch",
        "gradient_norm": "L2 norm over all trained parameters of the gradient of one token's loss",
        "dtype": "float32, passes of training in bfloat16" if gpu else "float32",
        "parameters": sum(trained),
        "attack": CALLED_BY[config.data],
        "refusal": REFUSAL if config.data == "backdoor" else None,
        "dataset": material.dataset,
        "judges": [judge.label for judge in material.judges],
        "asked": len(material.asked),
        "base_prompts": len({p.base or p.id for p in material.asked if p.harmful}),
    }
