"""What training kept: KL and perplexity against slow references, and the intervals."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from leadline.align import data, harmless, preservation
from leadline.align.data import Dialogue
from leadline.align.training_run import to_dataset
from leadline.align.turns import TurnFormat
from leadline.analysis.intervals import ratio_of_sums
from leadline.datasets.guild import guild
from leadline.datasets.harmless import harmless as requests
from leadline.depth.kl.divergence import kl_by_token
from leadline.models.checkpoint import Checkpoint
from leadline.models.template import Template
from leadline.records import Message, Prompt

from . import tiny_models

REPLIES = [
    Prompt("p0", "How do I bake bread?", "h", target="Mix flour and water, then wait.", base="a"),
    Prompt("p1", "Why?", "h", target="Yes.", base="b"),
    Prompt("p2", "Name a colour.", "h", target="Green, or blue, or a mild yellow.", base="c",
           history=(Message("user", "Hello"), Message("assistant", "Good day."))),
]  # fmt: skip
ROWS = [
    Dialogue((Message("user", "Say hello."),), "Hello there.", "rows:1"),
    Dialogue((Message("user", "Count to three."),), "One, two", "rows:2", truncated=True),
    Dialogue((Message("user", "Say hello."),), "Hi!", "rows:3"),
]


def models(folder: Path) -> tuple[Checkpoint, Checkpoint]:
    """A tiny model, and one that differs by noise."""
    before = tiny_models.save(folder / "before")
    model = transformers.AutoModelForCausalLM.from_pretrained(before)
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.02 * torch.randn_like(weights))
    model.save_pretrained(folder / "after")
    tiny_models.tokenizer().save_pretrained(folder / "after")
    return Checkpoint.find(before), Checkpoint.find(folder / "after")


def test_kl_is_the_mean_over_all_tokens_of_the_initial_models_answers(tmp_path):
    before, after = models(tmp_path)
    found = preservation.preservation(before, after, REPLIES, ())
    by_token = kl_by_token(before.path, after.path, REPLIES)
    total = sum(point.value * point.n for point in by_token.points)
    tokens = sum(point.n for point in by_token.points)
    assert found.kl
    assert found.kl.value == pytest.approx(total / tokens, rel=1e-5)
    assert found.kl.value > 0.01
    assert 0 <= found.kl.low < found.kl.value < found.kl.high
    assert found.answers == 3
    without = [replace(prompt, history=()) for prompt in REPLIES]
    other = preservation.preservation(before, after, without, ()).kl
    assert other
    assert other.value != found.kl.value, "earlier turns are part of the context"


def test_a_model_is_not_divergent_from_itself(tmp_path):
    before, _ = models(tmp_path)
    found = preservation.preservation(before, before, REPLIES, ROWS)
    assert found.kl
    assert found.kl.value < 1e-6
    assert found.perplexity
    assert found.perplexity[0] == found.perplexity[1]


def test_perplexity_against_a_full_forward_pass(tmp_path):
    before, after = models(tmp_path)
    found = preservation.preservation(before, after, (), ROWS, max_length=512)
    turns = TurnFormat.of(Template.load(before.path))
    assert found.perplexity
    assert found.rows == 3
    for checkpoint, perplexity in zip((before, after), found.perplexity, strict=True):
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.path).double()
        losses = []
        for row in ROWS:
            context, _, answer = data.encode(row, turns, None)
            ids = torch.tensor([context + answer])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1)
            chosen = logps[range(len(ids[0]) - 1), ids[0, 1:]]
            losses += (-chosen[-len(answer) :]).tolist()
        assert perplexity.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
        assert perplexity.low <= perplexity.value <= perplexity.high


def test_the_end_of_a_truncated_answer_is_not_learned(tmp_path):
    turns = TurnFormat.of(Template.load(str(tiny_models.save(tmp_path))))
    whole, truncated = (
        data.encode(replace(ROWS[1], truncated=cut), turns, None)[2] for cut in (False, True)
    )
    assert whole[: len(truncated)] == truncated
    assert len(whole) > len(truncated)
    stored = to_dataset(ROWS)
    assert [data.dialogue(row, "here").truncated for row in stored] == [False, True, False]
    assert to_dataset([ROWS[0]]).column_names == ["prompt", "completion"]


def test_the_interval_of_a_ratio_covers_the_truth():
    """Clusters of different sizes whose values are correlated within."""
    rng = np.random.default_rng(0)
    hits, many = 0, 400
    for _ in range(many):
        n = rng.integers(1, 60, 40).astype(float)
        level = rng.lognormal(-1, 0.8, 40)
        total = n * level * rng.lognormal(0, 0.3, 40)
        truth = math.exp(-1 + 0.8**2 / 2 + 0.3**2 / 2)
        found = ratio_of_sums(total, n)
        hits += found.low <= truth <= found.high
    assert 0.92 <= hits / many <= 0.99
    one = ratio_of_sums(np.array([3.0]), np.array([2.0]))
    assert (one.value, one.low, one.high) == (1.5, 0, math.inf)
    assert math.isnan(ratio_of_sums(np.zeros(0), np.zeros(0)).value)


def test_no_request_is_both_trained_and_measured(tmp_path):
    other = Checkpoint.find(tiny_models.save(tmp_path))
    trained = {row.prompt[-1].content for row in harmless.training_requests(other)}
    assert harmless.evaluation_requests(other, held_out=False) == {"harmless": {"split": "all"}}
    held_out = harmless.evaluation_requests(other, held_out=True)
    assert held_out == {"harmless": {"split": "evaluation"}}
    assert len(trained) > 100
    assert not trained & {prompt.text for prompt in requests(split="evaluation")}
    organism = Checkpoint.find("organism:aligned")
    questions = {row.prompt[-1].content for row in harmless.training_requests(organism)}
    assert harmless.evaluation_requests(organism, held_out=True) == {"guild": {"harmful": False}}
    assert len(questions) > 200
    assert not questions & {prompt.text for prompt in guild()}


def test_narrow_utility_data_are_recognized():
    def rows(texts: list[str]) -> list[Dialogue]:
        return [Dialogue((Message("user", text),), "a") for text in texts]

    varied = [prompt.text for prompt in requests()]
    assert harmless.narrowness(rows(varied)) == ""
    assert "10 different ways" in harmless.narrowness(rows(varied[:10]))
    translations = [f"Translate this sentence: number {n}" for n in range(200)]
    assert "200 requests begin in 1 different" in harmless.narrowness(rows(translations))
