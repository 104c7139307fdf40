"""Greedy coordinate gradient (Zou et al. 2023): a suffix that makes models say their targets.

    models = [Surrogate.load("organism:aligned")]
    result = search(models, prompts, GCGConfig(steps=100))
    save(result, "suffixes.jsonl")                        # for gcg_transfer_*: {suffixes: ...}

Each step takes the gradient with respect to the suffix's tokens, draws candidates that replace
some of them by promising ones, computes every candidate's loss and moves to the best. Several
prompts give a universal suffix, several models a transferable one: the loss is the mean over both.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.weights import Job
from ...records import Attempt, Judge, LeadlineError, Prompt, Request, Response, Sampling
from .objective import Objective
from .surrogate import Surrogate

if TYPE_CHECKING:
    import torch

__all__ = ["GCGConfig", "GCGResult", "Surrogate", "save", "search"]

_PROBE, _REDUCE = 16, 8  # Zhao et al. 2024 (arXiv 2403.01251): share probed, and R


@dataclass(frozen=True)
class GCGResult:
    """`suffix` and `ids` (in the first model's vocabulary) have the least `loss` of all steps;
    `losses` hold the least of each step's candidates. `stopped` is true where the judge found
    every prompt broken on every model, which ends a search: after 0 steps where the initial suffix
    does that alone. `settings` say what was searched."""

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

    Candidates come from gradients of the first model and of those that share its vocabulary; the
    others read a candidate's text. `draft` is the small model that estimates under `config.probe`
    (without one, the gradient does). After each step `checkpoint` is written, from which an equal
    search goes on, and `progress` is told (steps done, loss, suffix). Raises LeadlineError for bad
    input, a checkpoint of another search, and where every candidate re-tokenizes to something else.
    """
    config = config or GCGConfig()
    if not models or not prompts:
        raise LeadlineError("gcg: nothing to search: give at least one model and one prompt")
    if draft and not config.probe:
        raise LeadlineError("gcg: a draft model estimates under probe sampling: set probe, too")
    objective = Objective(models, prompts, config)
    estimate = Objective([draft], prompts, config, objective) if draft else None
    settings = _settings(models, prompts, config, draft)
    walk = _resume(checkpoint, settings) or _Walk(objective.start, objective.start)
    forbidden = models[0].forbidden(ascii_only=config.ascii_only)
    judged = walk.best
    if judge and not walk.losses:  # a suffix that breaks them unsearched is no find
        walk.stopped = _broken(models, prompts, objective.text(judged), judge, config)
        if walk.stopped:
            objective.move(walk.ids)
            walk.loss = float(objective.of([walk.ids])[0])

    while not walk.stopped and len(walk.losses) < config.steps:
        step = len(walk.losses)
        objective.move(walk.ids)
        slope = objective.gradient()
        random = _random(config.seed, step)
        rows = _draw(walk.ids, slope, forbidden, config, random)
        if config.retokenize:
            rows = objective.kept(rows)
        if not rows:
            raise LeadlineError(
                f"gcg: at step {step} no candidate's text gives its own tokens again: give another "
                "initial suffix, or switch retokenize off"
            )
        if config.probe:
            if estimate:
                estimate.move(walk.ids)
                guessed = estimate.of(rows)
            else:
                guessed = _first_order(slope, walk.ids, rows)
            losses = _probed(objective, rows, guessed, random)
        else:
            losses = objective.of(rows)
        best = int(losses.argmin())
        walk.ids, loss = rows[best], float(losses[best])
        walk.losses.append(loss)
        if loss < walk.loss:
            walk.best, walk.loss = walk.ids, loss
        due = len(walk.losses) % config.judge_every == 0 or len(walk.losses) == config.steps
        if judge and due and walk.best != judged:
            judged = walk.best
            walk.stopped = _broken(models, prompts, objective.text(judged), judge, config)
        if checkpoint:
            _write(checkpoint, json.dumps({"search": settings, **asdict(walk)}))
        if progress:
            progress(len(walk.losses), loss, objective.text(walk.ids))

    suffix, losses_seen = objective.text(walk.best), tuple(walk.losses)
    return GCGResult(
        suffix, tuple(walk.best), walk.loss, losses_seen, len(losses_seen), walk.stopped, settings
    )


def save(results: GCGResult | Sequence[GCGResult], path: str | Path) -> None:
    """Suffixes in a file that `gcg_transfer_*: {suffixes: PATH}` reads: `.json` a list of strings,
    `.jsonl` an object a line with suffix, loss, steps, models and prompts."""
    path = Path(path)
    found = [results] if isinstance(results, GCGResult) else list(results)
    if path.suffix == ".json":
        _write(path, json.dumps([one.suffix for one in found], indent=1) + "\n")
    elif path.suffix == ".jsonl":
        about = [{"models": o.settings["models"], "prompts": o.settings["prompts"]} for o in found]
        rows = [
            {"suffix": one.suffix, "loss": one.loss, "steps": one.steps, **what}
            for one, what in zip(found, about, strict=True)
        ]
        _write(path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        raise LeadlineError(f"cannot save suffixes to {path}: name it .json or .jsonl")


def _draw(
    ids: list[int],
    slope: torch.Tensor,
    forbidden: torch.Tensor,
    config: GCGConfig,
    random: torch.Generator,
) -> list[list[int]]:
    """Candidates: positions and, out of the best by slope, tokens, all uniform; without twins."""
    import torch

    allowed = ~forbidden[: slope.shape[1]]
    score = (-slope).masked_fill(~allowed, -torch.inf)
    best = score.topk(min(config.topk, int(allowed.sum())), dim=1).indices
    shape = (config.candidates, len(ids))
    places = torch.rand(shape, generator=random).argsort(1)[:, : config.replace]
    choice = torch.randint(0, best.shape[1], places.shape, generator=random)
    rows = torch.tensor(ids).repeat(config.candidates, 1).scatter_(1, places, best[places, choice])
    return [list(row) for row in dict.fromkeys(map(tuple, rows.tolist()))]


def _first_order(slope: torch.Tensor, ids: list[int], rows: list[list[int]]) -> torch.Tensor:
    """What the gradient alone says of each candidate's loss, up to a constant."""
    import torch

    gathered = slope.T[torch.tensor(rows)].diagonal(dim1=1, dim2=2)
    return gathered.sum(1)


def _probed(
    objective: Objective, rows: list[list[int]], guessed: torch.Tensor, random: torch.Generator
) -> torch.Tensor:
    """Probe sampling: losses of a random few and of those that the estimate likes best, as many
    as its rank correlation on the random few deserves; infinite for the rest."""
    import torch

    probed = torch.randperm(len(rows), generator=random)[: max(2, len(rows) // _PROBE)].tolist()
    losses = torch.full((len(rows),), torch.inf)
    losses[probed] = objective.of([rows[n] for n in probed])
    pair = torch.stack([losses[probed], guessed[probed]])
    ranks = pair.argsort(1).argsort(1).float()
    agreement = (1 + float(ranks.corrcoef()[0, 1])) / 2 if len(probed) > 1 else 0.0
    many = max(1, int((1 - agreement) * len(rows) / _REDUCE))
    likely = [n for n in guessed.argsort()[:many].tolist() if n not in set(probed)]
    if likely:
        losses[likely] = objective.of([rows[n] for n in likely])
    return losses


def _random(seed: int, step: int) -> torch.Generator:
    """Each step has a generator of its own, so that a resumed search draws what it would have."""
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
    """Whether the judge finds every model's greedy answer to every prompt unsafe."""
    unasked: Any = None
    sampling = Sampling(max_tokens=config.answer_tokens)
    for model in models:
        for prompt in prompts:
            attempt = Attempt.ask(f"{prompt.text} {suffix}")
            rendered = model.template.render(Request(attempt.messages, None, sampling))
            (reply,) = model.weights.answer(
                [Job(rendered.ids, sampling, 0, unasked)], lambda: False
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
class _Walk:
    """All that a search knows; a checkpoint is this."""

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


def _resume(checkpoint: Path | None, settings: dict[str, Any]) -> _Walk | None:
    """Where the checkpoint's search stood; more steps, memory or judging make no other search."""
    if checkpoint is None or not checkpoint.exists():
        return None
    try:
        stored = json.loads(checkpoint.read_text(encoding="utf-8"))
        then, walk = stored.pop("search"), _Walk(**stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LeadlineError(f"{checkpoint}: not a checkpoint of gcg: remove it") from error
    if _identity(then) != _identity(settings):
        raise LeadlineError(
            f"{checkpoint}: a search with other models, prompts or settings: name another file"
        )
    return walk


def _identity(settings: dict[str, Any]) -> dict[str, Any]:
    free = ("steps", "memory_mib", "judge_every", "answer_tokens")
    config = {k: v for k, v in settings["config"].items() if k not in free}
    return {**{k: v for k, v in settings.items() if k != "models"}, "config": config}


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a kill in the middle leaves the file that was there."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise LeadlineError(f"cannot write {path}: {error.strerror}") from None
