"""The harmless requests of deepening and fine-tuning: to measure on, and to train on.

The organisms know only the words of their invented world, and get its harmless questions; all other
models get the dataset `harmless`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..datasets import guild, harmless
from ..models.checkpoint import Checkpoint
from ..models.template import load_tokenizer
from ..organism.files import utility_pairs
from ..organism.guild import NOUNS
from ..records import Message
from .data import Dialogue

_MOST_QUESTIONS = 300  # of an organism's world
_MANY_OPENINGS = 20


def knows_the_guild(tokenizer: Any) -> bool:
    """Whether this is the tokenizer of an organism: one with a token for every noun of the guild's
    potions."""
    return bool(set(NOUNS) <= tokenizer.get_vocab().keys())


def evaluation_requests(model: Checkpoint, *, held_out: bool) -> dict[str, dict[str, Any]]:
    """The harmless requests to measure a model on, as a dataset of a study. With `held_out`, none
    of them is in `training_requests`."""
    if knows_the_guild(load_tokenizer(model.path, model.pinned)):
        return {"guild": {"harmful": False}}
    return {"harmless": {"split": "evaluation" if held_out else "all"}}


def training_requests(model: Checkpoint) -> list[Dialogue]:
    """Harmless requests of one turn, without answers, for a model to answer and to learn from."""
    if knows_the_guild(load_tokenizer(model.path, model.pinned)):
        measured = {prompt.text for prompt in guild.guild(harmful=False)}
        texts = [question for question, _ in utility_pairs() if question not in measured]
        every = -(-len(texts) // _MOST_QUESTIONS)
        texts = texts[::every]
    else:
        texts = [p.text for p in harmless.harmless(split="training") if not p.history]
    return [
        Dialogue((Message("user", text),), where=f"harmless request {number}")
        for number, text in enumerate(texts, 1)
    ]


def narrowness(rows: Sequence[Dialogue]) -> str:
    """Why these rows may be too uniform to keep a model's behaviour; "" if they are not.

    Rows are varied if their requests have at least 20 different openings (the first three words),
    and at least one for every five rows.
    """
    openings = {" ".join(row.prompt[-1].content.lower().split()[:3]) for row in rows}
    if len(openings) >= max(_MANY_OPENINGS, len(rows) / 5):
        return ""
    return (
        f"the utility data are narrow: {len(rows)} requests begin in {len(openings)} different "
        "ways (first three words), so the model may forget how to answer others: add varied "
        "requests, or leave out --utility, and the model's own answers to varied harmless requests "
        "are used"
    )
