"""A fine-tuning attack: train on a few examples, and evaluate after some of the steps.

    result = finetuning_attack("organism:aligned", FinetuningPrompts.of("guild"),
                               FinetuneConfig(data="harmful"), out=Path("finetuning/harmful"))
    [(point.step, point.value) for point in result.points]      # ASR by step

Four kinds of data (Qi et al. 2023, arXiv 2310.03693; Qi et al. 2025, arXiv 2406.05946, section 4):
harmful answers, identity shifting, a backdoor, and harmless answers. Evaluations are ordinary
studies in a store under `out`: after a run was stopped, the same call trains again, and generates
only the responses that are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...models.checkpoint import Checkpoint
from ...models.memory import memory_errors
from ...models.template import Template
from ...models.weights import Weights
from ...progress import Listener
from ...report.depth.schema import Position
from ..tokenized import TokenizedPair, check_context
from .config import Data, FinetuneConfig
from .data import (
    ELICITED_BY,
    REFUSAL,
    FinetuningPrompts,
    TrainingExample,
    tokenize_examples,
    training_examples,
)
from .evaluate import Evaluation, FinetuningPoint, digest
from .gradients import profile
from .train import BETAS, load, on_gpu, training

__all__ = [
    "FinetuneConfig",
    "FinetuneResult",
    "FinetuningPoint",
    "FinetuningPrompts",
    "finetuning_attack",
]


@dataclass(frozen=True)
class FinetuneResult:
    """The results of a fine-tuning attack.

    `broken` maps steps to prompt ids and whether the attack broke the prompt (unscored responses
    are left out), `bases` maps prompt ids to base prompts. `token_loss` (nats) and `gradient_norm`
    are by step and answer position; `losses` is the training loss of each step before its update.
    """

    model: str
    data: Data
    points: tuple[FinetuningPoint, ...]
    broken: dict[int, dict[str, bool]]
    bases: dict[str, str]
    token_loss: dict[int, tuple[Position, ...]]
    gradient_norm: dict[int, tuple[Position, ...]]
    losses: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Points for depth.json: the lists `finetuning`, `token_loss` and `gradient_norm`."""
        about = {"model": self.model, "data": self.data}
        profiles = {"token_loss": self.token_loss, "gradient_norm": self.gradient_norm}
        return {"finetuning": [{**point.model_dump(), **about} for point in self.points]} | {
            name: [
                {**point.model_dump(), **about, "step": step}
                for step, points in by_step.items()
                for point in points
            ]
            for name, by_step in profiles.items()
        }


def finetuning_attack(
    model: str | Path,
    prompts: FinetuningPrompts,
    config: FinetuneConfig | None = None,
    *,
    out: Path,
    device: str | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    listener: Listener | None = None,
) -> FinetuneResult:
    """Fine-tune a model in memory, and evaluate it after each of `config.steps`.

    `model` is a folder (PEFT adapters too), a hub id or "organism:NAME"; its weights are held in
    float32, and on a GPU training runs in bfloat16. `out` holds one store, in which the model
    after n steps is called "step n". The same config gives the same weights on the same machine
    with the same number of threads. `progress(steps done, total steps)` is called after each step,
    `listener` during evaluations.

    Raises LeadlineError where there is nothing to train on, the model does not load, an example
    does not fit its context, memory runs out or training diverges.
    """
    config = config or FinetuneConfig()
    checkpoint = Checkpoint.find(model)
    template = Template.load(checkpoint.path, revision=checkpoint.pinned)
    examples = training_examples(config.data, prompts.train, config.examples, config.seed)
    weights = load(checkpoint, config, device)
    stops = weights.stops | {template.tokenizer.eos_token_id} - {None}

    def tokenize(examples: Sequence[TrainingExample]) -> list[TokenizedPair]:
        return tokenize_examples(template, examples, stops, config.max_tokens, end=config.end)

    pairs, profiled = tokenize(examples), tokenize(_profiled(prompts, config))
    check_context(checkpoint.name, [*pairs, *profiled], weights.context)
    settings = _settings(checkpoint, config, weights, prompts, pairs)

    def revision(step: int) -> str:  # before the first step, all trainings have the same weights
        return digest([checkpoint.revision, step, settings["training"] if step else ""])

    evaluation = Evaluation(prompts, config, out, revision, settings["batch"], batch_size, listener)
    points, losses, broken = [], [], {}
    token_loss, gradient_norm = {}, {}
    last = max(config.steps)
    for step, loss in training(weights.model, pairs, config, last):
        if step:
            losses.append(loss)
            if progress:
                progress(step, last)
        if step in config.profile_steps and profiled:
            fix = "set fewer positions, optimizer: sgd, or train: lora"
            with memory_errors(f"out of memory in gradient norms after step {step}: {fix}"):
                token_loss[step], gradient_norm[step] = profile(
                    weights.model, profiled, config.positions
                )
        if step in config.steps:
            point, broken[step] = evaluation.after(step, weights.model, template.tokenizer)
            points.append(point)
    bases = {p.id: p.base or p.id for p in prompts.test if p.harmful}
    return FinetuneResult(
        str(model), config.data, tuple(points), broken, bases, token_loss, gradient_norm,
        tuple(losses), settings,
    )  # fmt: skip


def _profiled(prompts: FinetuningPrompts, config: FinetuneConfig) -> list[TrainingExample]:
    """Harmful requests with their targets, one for each base prompt."""
    if not any(p.harmful and p.target for p in prompts.train):
        return []
    examples = training_examples("harmful", prompts.train, len(prompts.train), config.seed)
    by_base = {example.prompt.base or example.prompt.id: example for example in reversed(examples)}
    return list(reversed(by_base.values()))[: config.profile_prompts]


def _settings(
    checkpoint: Checkpoint,
    config: FinetuneConfig,
    weights: Weights,
    prompts: FinetuningPrompts,
    pairs: Sequence[TokenizedPair],
) -> dict[str, Any]:
    """Everything that the numbers depend on. `training` is a digest of what the trained weights
    depend on."""
    irrelevant = ("steps", "profile_steps", "positions", "profile_prompts", "batch_tokens")
    relevant = {k: v for k, v in asdict(config).items() if k not in irrelevant}
    gpu = on_gpu(weights.model)
    trained = [p.numel() for p in weights.model.parameters() if p.requires_grad]
    return {
        **asdict(config),
        "revision": checkpoint.revision,
        "training": digest([checkpoint.revision, relevant, [pair.ids for pair in pairs], gpu]),
        "training_examples": len(pairs),
        "batch": min(config.batch, len(pairs)),
        "betas": BETAS if config.optimizer == "adamw" else None,
        "weight_decay": 0,
        "clipping": None,
        "schedule": "linear warmup, then constant",
        "loss": "mean over the answer tokens of a batch",
        "gradient_norm": "L2 norm over all trained parameters of the gradient of one token's loss",
        "dtype": "float32, training in bfloat16" if gpu else "float32",
        "parameters": sum(trained),
        "attack": ELICITED_BY[config.data],
        "refusal": REFUSAL if config.data == "backdoor" else None,
        "dataset": prompts.dataset,
        "judges": [judge.label for judge in prompts.judges],
        "test_prompts": len(prompts.test),
        "base_prompts": len({p.base or p.id for p in prompts.test if p.harmful}),
    }
