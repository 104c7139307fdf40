"""Greedy coordinate gradient (GCG; Zou et al. 2023, arXiv 2307.15043): a suffix after the request
that makes models begin their target answers.

    models = [Surrogate.load("organism:aligned")]
    result = search(models, prompts, GCGConfig(steps=100))
    save(result, "suffixes.jsonl")                        # for gcg_transfer_*: {suffixes: ...}

Each step takes the gradient with respect to the suffix's tokens, draws candidates that replace some
of them by tokens with a promising gradient, computes every candidate's loss and moves to the best
one. Several prompts give a universal suffix, several models a transferable one: the loss is the
mean over prompts and models.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import write_private
from ...models.weights import Job
from ...records import Attempt, Judge, LeadlineError, Prompt, Request, Response, Sampling
from .config import GCGConfig
from .objective import Objective
from .surrogate import Surrogate

if TYPE_CHECKING:
    import torch

__all__ = ["GCGConfig", "GCGResult", "Surrogate", "save", "search"]

# Probe sampling, Zhao et al. 2024 (arXiv 2403.01251): 1/16 of the candidates are probed, R = 8.
_PROBE, _REDUCE = 16, 8


@dataclass(frozen=True)
class GCGResult:
    """The best suffix of a search: as text, and as `ids` in the first model's vocabulary.

    `loss` (nats) is the lowest of all steps, `losses` the lowest of each step's candidates.
    `stopped` is true if the judge found every prompt broken on every model, which ends the search
    (with `steps` 0, the initial suffix alone broke them). `settings` describe the search.
    """

    suffix: str
    ids: tuple[int, ...]
    loss: float
    losses: tuple[float, ...]
    steps: int
    stopped: bool
    settings: dict[str, Any] = field(default_factory=dict)


def search(
    models: Sequence[Surrogate],
    prompts: Sequence[Prompt],
    config: GCGConfig | None = None,
    *,
    draft: Surrogate | None = None,
    judge: Judge | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[int, float, str], None] | None = None,
) -> GCGResult:
    """Search one suffix for all prompts (each with a target) on all models.

    Gradients are those of the first model and of models with the same vocabulary; other models are
    given the candidates' text. With `config.probe`, losses are estimated by the small model
    `draft`, or by the gradient if there is none. After each step `checkpoint` is written, from
    which the same search resumes, and `progress(steps done, loss, suffix)` is called. With `judge`,
    the search ends once every prompt is broken on every model. Raises LeadlineError for invalid
    input, a checkpoint of another search, and where no candidate's text tokenizes to its own ids.
    """
    config = config or GCGConfig()
    if not models or not prompts:
        raise LeadlineError("gcg: nothing to search: give at least one model and one prompt")
    if draft and not config.probe:
        raise LeadlineError("gcg: a draft model is only used for probe sampling: set probe: true")
    objective = Objective(models, prompts, config)
    estimate = Objective([draft], prompts, config, objective) if draft else None
    settings = _settings(models, prompts, config, draft)
    state = _resume(checkpoint, settings) or _State(objective.start, objective.start)
    forbidden = models[0].forbidden(ascii_only=config.ascii_only)
    judged = state.best
    if judge and not state.losses:  # the control: the initial suffix alone
        state.stopped = _broken(models, prompts, objective.text(judged), judge, config)
        if state.stopped:
            objective.move(state.ids)
            state.loss = float(objective.of([state.ids])[0])

    while not state.stopped and len(state.losses) < config.steps:
        step = len(state.losses)
        objective.move(state.ids)
        gradient = objective.gradient()
        random = _random(config.seed, step)
        rows = _draw(state.ids, gradient, forbidden, config, random)
        if config.retokenize:
            rows = objective.retokenizable(rows)
        if not rows:
            raise LeadlineError(
                f"gcg: at step {step} no candidate's text tokenizes to its own ids: use another "
                "initial suffix, or set retokenize: false"
            )
        if config.probe:
            if estimate:
                estimate.move(state.ids)
                estimated = estimate.of(rows)
            else:
                estimated = _first_order(gradient, state.ids, rows)
            losses = _probed(objective, rows, estimated, random)
        else:
            losses = objective.of(rows)
        best = int(losses.argmin())
        state.ids, loss = rows[best], float(losses[best])
        state.losses.append(loss)
        if loss < state.loss:
            state.best, state.loss = state.ids, loss
        due = len(state.losses) % config.judge_every == 0 or len(state.losses) == config.steps
        if judge and due and state.best != judged:
            judged = state.best
            state.stopped = _broken(models, prompts, objective.text(judged), judge, config)
        if checkpoint:
            _write(checkpoint, json.dumps({"search": settings, **asdict(state)}))
        if progress:
            progress(len(state.losses), loss, objective.text(state.ids))

    return GCGResult(
        suffix=objective.text(state.best),
        ids=tuple(state.best),
        loss=state.loss,
        losses=tuple(state.losses),
        steps=len(state.losses),
        stopped=state.stopped,
        settings=settings,
    )


def save(results: GCGResult | Sequence[GCGResult], path: str | Path) -> None:
    """Write suffixes to a file for the attacks `gcg_transfer_*: {suffixes: PATH}`: `.json` holds a
    list of strings, `.jsonl` an object on each line (suffix, loss, steps, models, prompts).

    Raises LeadlineError for other file names, and where the file cannot be written.
    """
    path = Path(path)
    results = [results] if isinstance(results, GCGResult) else list(results)
    if path.suffix == ".json":
        _write(path, json.dumps([result.suffix for result in results], indent=1) + "\n")
    elif path.suffix == ".jsonl":
        rows = [
            {
                "suffix": result.suffix,
                "loss": result.loss,
                "steps": result.steps,
                "models": result.settings["models"],
                "prompts": result.settings["prompts"],
            }
            for result in results
        ]
        _write(path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        raise LeadlineError(f"cannot save suffixes to {path}: name it .json or .jsonl")


def _draw(
    ids: list[int],
    gradient: torch.Tensor,
    forbidden: torch.Tensor,
    config: GCGConfig,
    random: torch.Generator,
) -> list[list[int]]:
    """Distinct candidates: positions are drawn uniformly, and tokens uniformly among those with the
    best gradients."""
    import torch

    allowed = ~forbidden[: gradient.shape[1]]
    score = (-gradient).masked_fill(~allowed, -torch.inf)
    best = score.topk(min(config.topk, int(allowed.sum())), dim=1).indices
    shape = (config.candidates, len(ids))
    places = torch.rand(shape, generator=random).argsort(1)[:, : config.replace]
    choice = torch.randint(0, best.shape[1], places.shape, generator=random)
    rows = torch.tensor(ids).repeat(config.candidates, 1).scatter_(1, places, best[places, choice])
    return [list(row) for row in dict.fromkeys(map(tuple, rows.tolist()))]


def _first_order(gradient: torch.Tensor, ids: list[int], rows: list[list[int]]) -> torch.Tensor:
    """First-order estimates of the candidates' losses, up to a constant: [len(rows)]."""
    import torch

    gathered = gradient.T[torch.tensor(rows)].diagonal(dim1=1, dim2=2)
    return gathered.sum(1)


def _probed(
    objective: Objective, rows: list[list[int]], estimated: torch.Tensor, random: torch.Generator
) -> torch.Tensor:
    """Probe sampling: losses of a few random candidates and of those with the best estimates, and
    infinity for all others. The better losses and estimates of the random candidates correlate (by
    rank), the fewer candidates are computed."""
    import torch

    probed = torch.randperm(len(rows), generator=random)[: max(2, len(rows) // _PROBE)].tolist()
    losses = torch.full((len(rows),), torch.inf)
    losses[probed] = objective.of([rows[n] for n in probed])
    pair = torch.stack([losses[probed], estimated[probed]])
    ranks = pair.argsort(1).argsort(1).float()
    agreement = (1 + float(ranks.corrcoef()[0, 1])) / 2 if len(probed) > 1 else 0.0
    size = max(1, int((1 - agreement) * len(rows) / _REDUCE))
    best = [n for n in estimated.argsort()[:size].tolist() if n not in set(probed)]
    if best:
        losses[best] = objective.of([rows[n] for n in best])
    return losses


def _random(seed: int, step: int) -> torch.Generator:
    """A generator for each step, so that a resumed search draws the same candidates."""
    import torch

    digest = blake2b(f"{seed} {step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _broken(
    models: Sequence[Surrogate],
    prompts: Sequence[Prompt],
    suffix: str,
    judge: Judge,
    config: GCGConfig,
) -> bool:
    """Whether the judge finds the greedy answers of all models to all prompts unsafe."""
    no_future: Any = None  # the reply is returned, so no future is needed
    sampling = Sampling(max_tokens=config.answer_tokens)
    for model in models:
        for prompt in prompts:
            attempt = Attempt.ask(f"{prompt.text} {suffix}")
            rendered = model.template.render(Request(attempt.messages, None, sampling))
            (reply,) = model.weights.answer(
                [Job(rendered.ids, sampling, 0, no_future)], lambda: False
            )
            thought, answer = model.template.split(rendered, model.template.decode(reply.ids))
            response = Response(answer, thought, reply.finish, reply.error, rendered.prefix)
            verdict = judge(prompt, attempt, response)
            if inspect.isawaitable(verdict):
                verdict = asyncio.run(_awaited(verdict))
            if not verdict.unsafe:
                return False
    return True


async def _awaited(verdict: Any) -> Any:
    return await verdict


@dataclass
class _State:
    """The state of a search, as stored in a checkpoint."""

    ids: list[int]
    best: list[int]
    loss: float = float("inf")
    losses: list[float] = field(default_factory=list)
    stopped: bool = False


def _settings(
    models: Sequence[Surrogate],
    prompts: Sequence[Prompt],
    config: GCGConfig,
    draft: Surrogate | None,
) -> dict[str, Any]:
    texts = json.dumps([[p.text, p.target] for p in prompts])
    return {
        "models": [model.name for model in models],
        "revisions": [model.revision for model in [*models, *([draft] if draft else [])]],
        "prompts": [prompt.id for prompt in prompts],
        "texts": blake2b(texts.encode(), digest_size=16).hexdigest(),
        "config": asdict(config),
        "exact": not config.probe,
        "estimate": (draft.name if draft else "gradient") if config.probe else None,
    }


def _resume(checkpoint: Path | None, settings: dict[str, Any]) -> _State | None:
    """The state in a checkpoint; None if there is none. The numbers of steps, memory and judging
    settings of the stored search may differ. Raises LeadlineError for other differences."""
    if checkpoint is None or not checkpoint.exists():
        return None
    try:
        stored = json.loads(checkpoint.read_text(encoding="utf-8"))
        stored_settings, state = stored.pop("search"), _State(**stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LeadlineError(f"{checkpoint}: not a checkpoint of a GCG search: remove it") from error
    if _identity(stored_settings) != _identity(settings):
        raise LeadlineError(
            f"{checkpoint}: checkpoint of a search with other models, prompts or settings: use "
            "another file"
        )
    return state


def _identity(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a checkpoint and a search must have in common."""
    ignored = ("steps", "memory_mib", "judge_every", "answer_tokens")
    config = {k: v for k, v in settings["config"].items() if k not in ignored}
    return {**{k: v for k, v in settings.items() if k != "models"}, "config": config}


def _write(path: Path, text: str) -> None:
    """Write a file atomically: after an interruption, the previous version is intact."""
    write_private(path, text)
