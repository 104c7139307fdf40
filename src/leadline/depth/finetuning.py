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

from .. import engine
from ..models._transcript import Template
from ..models._weights import Weights
from ..records import LeadlineError
from ._asking import Asked, Reading, digest
from ._gradients import profile
from ._lessons import CALLED_BY, REFUSAL, Data, Lesson, Material, lessons, rows
from ._pair import Home, Row
from ._points import Point
from ._training import BETAS, load, memory, on_gpu, training

__all__ = ["FinetuneConfig", "FinetuneResult", "Material", "Reading", "finetune"]


@dataclass(frozen=True)
class FinetuneConfig:
    """`steps` are those after which the model is asked. `lr` rises over `warmup` steps and stays,
    so that more steps only add to a curve. A step learns from `batch` of at most `examples`
    lessons; its loss is the mean over all answer tokens of the batch, with `end` the token that
    ends the answer, too. Answers, learned or given, have at most `max_tokens`.

    AdamW has betas (0.9, 0.999) and no weight decay, SGD no momentum; nothing is clipped, dropout
    is off. "full" trains all parameters, "lora" adapters of `rank` on all linear layers. Optimizer,
    lr, batch and examples are those that most work since Qi et al. 2023 attacks 7B models with.

    After those `profile_steps` that come to pass, loss and gradient norm are taken at the first
    `positions` answer tokens of `profile_prompts` harmful pairs. `batch_tokens` bounds how many
    tokens one pass holds.
    """

    data: Data = "harmful"
    steps: tuple[int, ...] = (0, 2, 5, 10, 20, 40)
    lr: float = 5e-5
    optimizer: Literal["adamw", "sgd"] = "adamw"
    batch: int = 10
    examples: int = 100
    max_tokens: int = 512
    end: bool = True
    warmup: int = 0
    seed: int = 0
    train: Literal["full", "lora"] = "full"
    rank: int = 16
    profile_steps: tuple[int, ...] = (0, 2, 10)
    positions: int = 24
    profile_prompts: int = 8
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        for name, valid in (
            ("data", get_args(Data)),
            ("optimizer", ("adamw", "sgd")),
            ("train", ("full", "lora")),
        ):
            if getattr(self, name) not in valid:
                raise LeadlineError(
                    f"fine-tuning: {name} is {' or '.join(valid)}, not {getattr(self, name)!r}"
                )
        for name in (
            *("batch", "examples", "max_tokens", "rank", "positions", "profile_prompts"),
            "batch_tokens",
        ):
            if getattr(self, name) < 1:
                raise LeadlineError(
                    f"fine-tuning: {name} is {getattr(self, name)}: it must be at least 1"
                )
        if not self.steps or min(*self.steps, *self.profile_steps, 0) < 0 or self.warmup < 0:
            raise LeadlineError("fine-tuning: steps are numbers from 0 on: give at least one")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise LeadlineError(f"fine-tuning: lr is {self.lr}: it must be above 0")


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
    home = Home.find(model)
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
    home: Home, config: FinetuneConfig, weights: Weights, material: Material, learned: Sequence[Row]
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
