"""Loss and gradient norm by token against a slow reference: one backward pass for each token, in
float64."""

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
TOLERANCE = 2e-4  # relative error of a norm in float32 (largest measured: 2e-5)
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


def slow_norms(model: Any, row: TokenizedPair) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient norm of each answer token, with separate forward and backward passes."""
    losses, norms = [], []
    for at in range(len(row.ids) - row.answer, len(row.ids)):
        model.zero_grad()
        logits = model(torch.tensor([row.ids[:at]]), use_cache=False).logits[0, -1]
        loss = -logits.log_softmax(-1)[row.ids[at]]
        loss.backward()
        squares = [float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None]
        norms.append(sum(squares) ** 0.5)
        losses.append(float(loss.detach()))
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_agrees_with_the_slow_norms(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path, kind)
    model, exact = loaded(folder), loaded(folder, "float64")
    with caplog.at_level(logging.DEBUG, "leadline"):
        for row in pairs(folder):
            losses, norms = slow_norms(exact, row)
            assert norms.min() > 0.1
            for memory in (None, 1, 300_000):  # all tokens at once, one by one, a few
                found = gradient_norms(model, row, memory=memory)
                torch.testing.assert_close(found[0], losses, rtol=TOLERANCE, atol=1e-5)
                torch.testing.assert_close(found[1], norms, rtol=TOLERANCE, atol=1e-5)
    assert not [r for r in caplog.records if "one token at a time" in r.message], "batched"
    assert all(p.grad is None for p in model.parameters()), "parameters keep no gradient"


def test_operations_that_cannot_be_batched_run_token_by_token(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path)
    model, exact = loaded(folder), loaded(folder, "float64")

    class Unbatchable(torch.autograd.Function):
        """Reads a value of the gradient in backward, which a batched pass does not allow."""

        @staticmethod
        def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
            return states.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            assert float(gradient.sum()) == float(gradient.sum())
            return gradient

    model.get_output_embeddings().register_forward_hook(lambda *a: Unbatchable.apply(a[-1]))
    row = pairs(folder)[0]
    with caplog.at_level(logging.DEBUG, "leadline"):
        found = gradient_norms(model, row)
    assert "gradients one token at a time" in caplog.text
    torch.testing.assert_close(found[1], slow_norms(exact, row)[1], rtol=TOLERANCE, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_losses_and_gradients_do_not_depend_on_the_batch(tmp_path: Path, kind: str) -> None:
    """The batch has rows of other lengths, padded on the right whatever the tokenizer's padding
    side."""
    folder = save(tmp_path, kind)
    model, found = loaded(folder), pairs(folder)
    assert len({len(row.ids) for row in found}) == 3
    alone = [token_losses(model, [row]) for row in found]
    together = token_losses(model, found)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    parts = together.split([row.answer for row in found])
    for part, single in zip(parts, alone, strict=True):
        weight = model.get_input_embeddings().weight
        gradients = [
            torch.autograd.grad(x.sum(), weight, retain_graph=True)[0] for x in (part, single)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_frozen_weights_are_not_part_of_the_norm(tmp_path: Path) -> None:
    model, row = loaded(save(tmp_path)), pairs(tmp_path)[0]
    whole = gradient_norms(model, row)[1]
    parameters = list(model.parameters())
    parts = []
    for half in (parameters[::2], parameters[1::2]):
        for parameter in parameters:
            parameter.requires_grad_(any(parameter is one for one in half))
        parts.append(gradient_norms(model, row)[1])
    torch.testing.assert_close(parts[0].square() + parts[1].square(), whole.square())


def test_profile_truncates_answers_and_averages_by_position(tmp_path: Path) -> None:
    model, found = loaded(save(tmp_path)), pairs(tmp_path)
    whole = [gradient_norms(model, row) for row in found]
    losses, norms = profile(model, found, 6)
    assert [p.position for p in losses] == [p.position for p in norms] == list(range(6))
    for points, which in ((losses, 0), (norms, 1)):
        for point in points:
            values = [float(w[which][point.position]) for w in whole if len(w[0]) > point.position]
            assert point.n == len(values)
            assert point.value == pytest.approx(sum(values) / len(values), rel=TOLERANCE)
    assert losses[0].low < losses[0].value < losses[0].high
    alone = replace(found[0], prompt=replace(found[0].prompt, base=""))
    assert {p.low for p in profile(model, [alone], 6)[0]} == {None}
    assert found[0].truncated(6).ids == found[0].ids[: len(found[0].ids) - found[0].answer + 6]


def test_the_first_token_of_shallow_alignment_has_the_largest_gradient() -> None:
    """Qi et al. 2025, section 2.3, on harmful answers; `deep` was trained to refuse along the whole
    answer."""
    firsts, laters = {}, {}
    for name in ("aligned", "deep"):
        checkpoint = Checkpoint.find(f"organism:{name}")
        template = Template.load(checkpoint.path)
        weights = Weights.load(checkpoint.path, None, "float32", None)
        examples = training_examples("harmful", FinetuningPrompts.of("guild").train, 6, 0)
        tokenized = tokenize_examples(template, examples, weights.stops, 512, end=True)
        losses, norms = profile(weights.model, tokenized, 16)
        firsts[name] = losses[0].value, norms[0].value
        laters[name] = [sum(p.value for p in points[1:]) / 15 for points in (losses, norms)]
    assert firsts["aligned"][0] > 5
    assert firsts["aligned"][0] > 20 * laters["aligned"][0]
    assert firsts["aligned"][1] > 5 * laters["aligned"][1]
    assert laters["deep"][0] > 5
    assert laters["deep"][1] > 10 * laters["aligned"][1]


def test_memory_limits_the_gradients_of_a_batched_pass(
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
