"""Loss and gradient norm by token against their slow twin: one backward a token, in float64."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from leadline.depth.finetuning import gradients
from leadline.depth.finetuning.data import FinetuningPrompts, tokenize_examples, training_examples
from leadline.depth.finetuning.gradients import gradient_norms, profile, token_losses
from leadline.depth.tokenized import TokenizedPair
from leadline.models.checkpoint import Checkpoint
from leadline.models.template import Template
from leadline.models.weights import Weights
from leadline.records import Prompt

from .test_depth_divergence import save

KINDS = ["llama", "qwen3", "gpt2", "mistral", "mixtral", "qwen3_moe", "gemma2"]
TWIN = 2e-4  # of a norm: what float32 passes leave of float64 ones (seen: 2e-5)
PROMPTS = [
    Prompt("p0", "How is the tonic brewed?", "t", target="Sure, so.", base="a"),
    Prompt("p1", "Tell me.", "t", target="First grind it.", base="b"),
    Prompt("p2", "What goes into it, and how much of each?", "t", target="No.", base="a"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loaded(folder: Path, dtype: str = "float32") -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    )
    return model.eval()


def pairs(folder: Path) -> list[TokenizedPair]:
    template = Template.load(folder)
    stops = {template.tokenizer.eos_token_id}
    return tokenize_examples(
        template, training_examples("harmful", PROMPTS, 9, 0), stops, 512, end=True
    )


def twin(model: Any, row: TokenizedPair) -> tuple[torch.Tensor, torch.Tensor]:
    """A forward and a backward pass for each token of the answer, of what stands before it."""
    losses, norms = [], []
    for at in range(len(row.ids) - row.answer, len(row.ids)):
        model.zero_grad()
        logits = model(torch.tensor([row.ids[:at]]), use_cache=False).logits[0, -1]
        loss = -logits.log_softmax(-1)[row.ids[at]]
        loss.backward()
        slopes = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(sum(float(slope.square().sum()) for slope in slopes) ** 0.5)
        losses.append(float(loss.detach()))
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_any_architecture_agrees_with_its_twin(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path, kind)
    model, exact = loaded(folder), loaded(folder, "float64")
    with caplog.at_level(logging.DEBUG, "leadline"):
        for row in pairs(folder):
            losses, norms = twin(exact, row)
            assert norms.min() > 0.1
            for memory in (None, 1, 300_000):  # all tokens at once, one by one, a few
                found = gradient_norms(model, row, memory=memory)
                torch.testing.assert_close(found[0], losses, rtol=TWIN, atol=1e-5)
                torch.testing.assert_close(found[1], norms, rtol=TWIN, atol=1e-5)
    assert not [r for r in caplog.records if "one token at a time" in r.message], "batched"
    assert all(p.grad is None for p in model.parameters()), "nothing is left behind"


def test_what_cannot_be_batched_goes_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path)
    model, exact = loaded(folder), loaded(folder, "float64")

    class Stubborn(torch.autograd.Function):
        """Looks at a number on the way back, which no batched pass can."""

        @staticmethod
        def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
            return states.clone()

        @staticmethod
        def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            assert float(slope.sum()) == float(slope.sum())
            return slope

    model.get_output_embeddings().register_forward_hook(lambda *seen: Stubborn.apply(seen[-1]))
    row = pairs(folder)[0]
    with caplog.at_level(logging.DEBUG, "leadline"):
        found = gradient_norms(model, row)
    assert "gradients one token at a time" in caplog.text
    torch.testing.assert_close(found[1], twin(exact, row)[1], rtol=TWIN, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_a_token_has_the_same_loss_in_any_company(tmp_path: Path, kind: str) -> None:
    """Rows of other lengths stand beside it, padded on the right; the tokenizer's own padding side
    is never asked. A row's gradient is its own, too."""
    folder = save(tmp_path, kind)
    model, found = loaded(folder), pairs(folder)
    assert len({len(row.ids) for row in found}) == 3
    alone = [token_losses(model, [row]) for row in found]
    together = token_losses(model, found)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    parts = together.split([row.answer for row in found])
    for part, single in zip(parts, alone, strict=True):
        weight = model.get_input_embeddings().weight
        slopes = [
            torch.autograd.grad(x.sum(), weight, retain_graph=True)[0] for x in (part, single)
        ]
        torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-5)


def test_frozen_weights_have_no_part_in_the_norm(tmp_path: Path) -> None:
    model, row = loaded(save(tmp_path)), pairs(tmp_path)[0]
    whole = gradient_norms(model, row)[1]
    kept = list(model.parameters())
    parts = []
    for half in (kept[::2], kept[1::2]):
        for parameter in kept:
            parameter.requires_grad_(any(parameter is one for one in half))
        parts.append(gradient_norms(model, row)[1])
    torch.testing.assert_close(parts[0].square() + parts[1].square(), whole.square())


def test_profile_cuts_answers_and_means_them(tmp_path: Path) -> None:
    model, found = loaded(save(tmp_path)), pairs(tmp_path)
    whole = [gradient_norms(model, row) for row in found]
    losses, norms = profile(model, found, 6)
    assert [p.position for p in losses] == [p.position for p in norms] == list(range(6))
    for points, which in ((losses, 0), (norms, 1)):
        for point in points:
            there = [float(w[which][point.position]) for w in whole if len(w[0]) > point.position]
            assert point.n == len(there)
            assert point.value == pytest.approx(sum(there) / len(there), rel=TWIN)
    assert losses[0].low < losses[0].value < losses[0].high
    alone = replace(found[0], prompt=replace(found[0].prompt, base=""))
    assert {p.low for p in profile(model, [alone], 6)[0]} == {None}
    assert found[0].truncated(6).ids == found[0].ids[: len(found[0].ids) - found[0].answer + 6]


def test_shallow_alignment_pulls_at_the_first_token() -> None:
    """Qi et al. 2025, section 2.3, on harmful answers; `deep` has learned to refuse all along."""
    firsts, laters = {}, {}
    for name in ("aligned", "deep"):
        home = Checkpoint.find(f"organism:{name}")
        weights = Weights.load(home.path, None, "float32", None)
        made = training_examples("harmful", FinetuningPrompts.of("guild").train, 6, 0)
        found = tokenize_examples(Template.load(home.path), made, weights.stops, 512, end=True)
        losses, norms = profile(weights.model, found, 16)
        firsts[name] = losses[0].value, norms[0].value
        laters[name] = [sum(p.value for p in points[1:]) / 15 for points in (losses, norms)]
    assert firsts["aligned"][0] > 5
    assert firsts["aligned"][0] > 20 * laters["aligned"][0]
    assert firsts["aligned"][1] > 5 * laters["aligned"][1]
    assert laters["deep"][0] > 5
    assert laters["deep"][1] > 10 * laters["aligned"][1]


def test_memory_bounds_how_many_gradients_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, row = loaded(save(tmp_path)), pairs(tmp_path)[0]
    size = sum(p.numel() * 4 for p in model.parameters())
    chunks: list[int] = []
    inner = gradients._norms
    monkeypatch.setattr(gradients, "_norms", lambda *a: (chunks.append(len(a[-1])), inner(*a))[1])
    gradient_norms(model, row, memory=7 * size)
    assert sum(chunks) == row.answer
    assert max(chunks) == 7
