"""What training kept of a model, measured without a judge: by teacher forcing on given answers.

The KL divergence KL(initial || trained) is over the initial model's own answers to harmless
requests, the perplexity over rows of data. Logits are computed block by block, from hidden states.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..analysis.intervals import Interval, ratio_of_sums
from ..depth.kl.divergence import compare
from ..depth.kl.head import SplitModel
from ..depth.tokenized import TokenizedPair, batches, tokenize_pairs
from ..models.checkpoint import Checkpoint
from ..models.template import Template
from ..records import LeadlineError, Prompt
from .data import Dialogue, encode
from .turns import TurnFormat

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]

_MOST_ROWS = 100  # rows that perplexity is measured on
_POSITIONS = 64  # positions whose logits are in memory at once


@dataclass(frozen=True)
class Preservation:
    """What the trained model kept, with 95% intervals clustered by prompt.

    `kl` is KL(initial || trained) in nats, the mean over the tokens of the answers to `answers`
    requests; `perplexity` the perplexities of both models on `rows` rows. None where there was
    nothing to measure on.
    """

    kl: Interval | None = None
    answers: int = 0
    perplexity: tuple[Interval, Interval] | None = None
    rows: int = 0


def preservation(
    before: Checkpoint,
    after: Checkpoint,
    replies: Sequence[Prompt],
    rows: Sequence[Dialogue],
    *,
    max_length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Preservation:
    """Compare the initial and the trained model.

    The `target` of each of `replies` is the initial model's answer to it; `rows` are those whose
    answers' perplexity is measured (100 of them at most, evenly spread). Both models are in memory
    at once. Raises LeadlineError where a row has more than `max_length` tokens, or a model's logits
    are not finite.
    """
    import numpy as np

    most = min(len(rows), _MOST_ROWS)
    chosen = [rows[i * len(rows) // most] for i in range(most)]
    pairs, shared = tokenize_pairs(before, after, replies, None) if replies else ([], None)
    row_pairs = list(_row_pairs(before, chosen, max_length))
    if not (pairs or row_pairs):
        return Preservation()
    total = len(pairs) + 2 * len(row_pairs)
    report = progress or (lambda done, total: None)
    initial, trained = (
        SplitModel.load(each, [*pairs, *row_pairs], None, None).limited(shared)
        for each in (before, after)
    )
    kl = None
    if pairs:
        found = compare(pairs, initial, trained, progress=lambda done, _: report(done, total))
        kl = _clustered((pair.base, values) for pair, values in found)
    perplexities = []
    for number, model in enumerate((initial, trained) if row_pairs else ()):
        losses = _losses(model, row_pairs)
        mean = _clustered((pair.base, losses[pair.index]) for pair in row_pairs)
        if not np.isfinite(mean.value):
            raise LeadlineError(
                f"{(before, after)[number].name}: its logits on the training rows are not finite, "
                "so that its perplexity is not defined: leave out perplexity with --only"
            )
        perplexities.append(Interval(*(math.exp(min(nats, 700.0)) for nats in mean)))
        report(len(pairs) + (number + 1) * len(row_pairs), total)
    pair_of = (perplexities[0], perplexities[1]) if perplexities else None
    return Preservation(kl, len(pairs), pair_of, len(row_pairs))


def _clustered(parts: Iterable[tuple[str, Floats]]) -> Interval:
    """The mean over all tokens, clustered by base prompt."""
    import numpy as np

    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for base, values in parts:
        sums[base][0] += float(values.sum())
        sums[base][1] += len(values)
    total, n = np.array(list(sums.values())).T
    return ratio_of_sums(total, n)


def _row_pairs(
    model: Checkpoint, rows: Sequence[Dialogue], max_length: int | None
) -> Iterable[TokenizedPair]:
    """The rows as token ids in the model's chat template, their answers with the end of turn."""
    if not rows:
        return
    turns = TurnFormat.of(Template.load(model.path, revision=model.pinned))
    for index, row in enumerate(rows):
        context, _, answer = encode(row, turns, max_length)
        text = row.prompt[-1].content
        prompt = Prompt(row.where or str(index), text, "rows", harmful=False, base=text)
        yield TokenizedPair(index, prompt, context + answer, len(answer))


def _losses(model: SplitModel, pairs: Sequence[TokenizedPair]) -> Mapping[int, Floats]:
    """Minus log-probability in nats of each answer token, by the index of the pair."""
    import torch

    losses: dict[int, Floats] = {}
    size = model.head.size
    with torch.inference_mode():
        for batch in batches(pairs, 8192 if model.streams else 0):
            labels = torch.tensor([id for pair in batch for id in pair.ids[-pair.answer :]])
            parts = [
                torch.nn.functional.cross_entropy(
                    model.head.logits(hidden, 0, size), ids.to(hidden.device), reduction="none"
                )
                for hidden, ids in zip(
                    model.hidden(batch).split(_POSITIONS), labels.split(_POSITIONS), strict=True
                )
            ]
            values = torch.cat(parts).double().cpu().split([pair.answer for pair in batch])
            losses |= {pair.index: v.numpy() for pair, v in zip(batch, values, strict=True)}
    return losses
