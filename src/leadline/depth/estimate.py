"""The work of a measure and the time that it takes, estimated before it starts; budgets by time.

A measure states its work in tokens (`Work`). A short trial on the first model (`measure_speed`)
gives the seconds of a token, and both together the time. A budget by time is divided over the
measures, and the limits of each are reduced until its work fits its share (`fit`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..models.checkpoint import Checkpoint
from ..models.template import Template
from ..models.weights import Job, Weights
from ..records import Message, Prompt, Request, Sampling
from ..registry import MeasurePlugin, Work
from .budgets import Budget, duration, reduced

if TYPE_CHECKING:
    from .session import Session

_ANSWER = 64  # tokens of the answers of the trial
_LEVELS = [round(0.9**n, 3) for n in range(45)]  # from 1 to 0.01


@dataclass(frozen=True)
class Speed:
    """Seconds per token: generated in a batch of 16, read, and trained (see `Work`). `length` is
    the mean length of an answer, infinite where many answers did not end in the trial."""

    generated: float
    read: float
    trained: float
    length: float

    def seconds(self, work: Work) -> float:
        """The time that the work takes."""
        generated = work.answers * min(work.max_tokens, self.length)
        return self.generated * generated + self.read * work.read + self.trained * work.trained


@dataclass(frozen=True)
class Share:
    """A measure's part of a budget: its limits, its work under them, the estimated seconds, and
    what was reduced (""  for nothing). `left_out` is the reason why it is not measured."""

    work: Work
    seconds: float
    budget: Budget
    reduced: str = ""
    left_out: str = ""


def measure_speed(model: str, prompts: Sequence[Prompt]) -> Speed:
    """Time a short generation, a forward pass and a training step of a model.

    `prompts` are rendered for the generation. Raises LeadlineError where the model does not load.
    """
    import torch

    checkpoint = Checkpoint.find(model)
    template = Template.load(checkpoint.path, revision=checkpoint.pinned)
    weights = Weights.load(checkpoint.path, checkpoint.pinned, None, None)
    sampling = Sampling(temperature=0, max_tokens=_ANSWER)
    future: Any = None  # the replies are returned, so no future is needed
    jobs = [
        Job(template.render(Request((Message("user", p.text),), None, sampling)).ids, sampling, n,
            future)
        for n, p in enumerate(prompts[:16])
    ]  # fmt: skip

    began = time.perf_counter()
    replies = weights.answer(jobs, lambda: False)
    seconds = time.perf_counter() - began
    lengths = [reply.tokens for reply in replies]
    ended = sum(reply.finish == "stop" for reply in replies) > 0.75 * len(replies)
    lm = weights.model
    rows = (torch.arange(512, device=lm.device) % 50 + 5).view(8, 64)

    def read() -> int:
        with torch.inference_mode():
            lm(input_ids=rows, use_cache=False)
        return int(rows.numel())

    def train() -> int:
        lm.requires_grad_(True)
        with torch.enable_grad():
            lm(input_ids=rows[:2], use_cache=False).logits.float().logsumexp(-1).mean().backward()
        lm.zero_grad()
        return int(rows[:2].numel())

    return Speed(
        generated=seconds / max(1, sum(lengths)),
        read=_seconds_per_token(read),
        trained=_seconds_per_token(train),
        length=sum(lengths) / len(lengths) if ended else 1e9,
    )


def _seconds_per_token(work: Callable[[], int]) -> float:
    """Measured on a second call, since the first one has other costs."""
    work()
    began = time.perf_counter()
    return (time.perf_counter() - began) / tokens if (tokens := work()) else 0.0


def fit(
    session: Session, measures: Sequence[MeasurePlugin], speed: Speed, seconds: float
) -> dict[str, Share]:
    """Divide a time over measures; the result is by name.

    A measure that needs less than its share leaves the rest to the others. One that does not fit
    its share even with the smallest meaningful limits is left out, and the others share its time.
    """
    full, left_out = session.budget, dict[str, Share]()

    def share(plugin: MeasurePlugin, budget: Budget) -> Share:
        session.use(budget)
        work = plugin.work(session)
        return Share(
            work,
            speed.seconds(work),
            budget,
            _differences(full, budget, plugin.limits, session.harmful),
        )

    try:
        levels = {
            plugin.name: [
                share(plugin, reduced(full, level, session.harmful))
                for level in (_LEVELS if plugin.limits else (1,))
            ]
            for plugin in measures
        }
    finally:
        session.use(full)
    while True:
        chosen = {name: found for name, found in levels.items() if name not in left_out}
        shares, rest = dict[str, Share](), seconds
        least = {}
        for number, name in enumerate(sorted(chosen, key=lambda name: chosen[name][0].seconds)):
            limit = rest / (len(chosen) - number)
            fitting = [each for each in chosen[name] if each.seconds <= limit]
            if fitting:
                shares[name] = fitting[0]
                rest -= fitting[0].seconds
            else:
                least[name] = chosen[name][-1].seconds, limit
        if not least:
            return {name: shares.get(name) or left_out[name] for name in levels}
        name = max(least, key=lambda name: least[name][0])
        needed, limit = least[name]
        smallest = levels[name][-1]
        reason = (
            f"left out: it needs at least {duration(needed)} ({smallest.work.text}), and its share "
            f"of the time is {duration(limit)}: give a larger --budget, or fewer measures"
        )
        left_out[name] = replace(smallest, left_out=reason)


def _differences(full: Budget, budget: Budget, limits: Sequence[str], prompts: int) -> str:
    """What was reduced of these limits, such as "prompts 40 instead of 100"."""

    def value(of: Budget, name: str) -> Any:
        part, _, field = name.partition(".")
        found = getattr(getattr(of, part), field) if field else getattr(of, part)
        if name in ("prompts", "kl_prompts", "gcg_prompts"):
            return min(found or prompts, prompts)
        return ", ".join(map(str, found)) if isinstance(found, tuple) else found

    texts = []
    for name in limits:
        old, new = value(full, name), value(budget, name)
        if old != new:
            label = name.replace("gcg.", "").replace("gcg_", "").replace("kl_", "")
            texts.append(f"{label.replace('_', ' ')} {new} instead of {old}")
    return "; ".join(texts)
