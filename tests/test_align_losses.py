"""The constrained loss against its formula in numpy, and its gradient against the weight."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leadline.align.losses import (
    BETA,
    constrained_loss,
    gradient_weight,
    occurrences,
    positions,
    schedule,
)

LOGP = st.floats(-60, 0)
TOKENS = st.lists(st.tuples(LOGP, LOGP, st.floats(1e-3, 20), st.booleans()), min_size=1)


def columns(rows: list[tuple[float, float, float, bool]]) -> list[torch.Tensor]:
    logps, reference, beta, mask = zip(*rows, strict=True)
    return [torch.tensor([x], dtype=torch.float64) for x in (logps, reference, beta)] + [
        torch.tensor([mask])
    ]


@given(TOKENS)
def test_the_objective_is_the_formula(rows):
    logps, reference, beta, mask = columns(rows)
    d, b = (logps - reference).numpy(), beta.numpy()
    expected = 2 / b * np.logaddexp(0, -b * d) * mask.numpy()
    np.testing.assert_allclose(
        constrained_loss(logps, reference, beta, mask), expected, rtol=1e-12, atol=1e-300
    )


@given(TOKENS)
def test_its_gradient_is_the_weight_times_that_of_the_cross_entropy(rows):
    logps, reference, beta, mask = columns(rows)
    logps.requires_grad_()
    constrained_loss(logps, reference, beta, mask).sum().backward()
    x = (-beta * (logps - reference)).detach().numpy()
    expected = 2 * np.exp(-np.logaddexp(0, -x)) * mask.numpy()
    np.testing.assert_allclose(-logps.grad, expected, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(
        gradient_weight(logps, reference, beta, mask).detach(), expected, rtol=1e-12, atol=1e-300
    )


def test_the_weight_has_no_lower_bound():
    logps = torch.tensor([[-0.1]], dtype=torch.float64, requires_grad=True)
    mask, beta = torch.tensor([[True]]), torch.tensor([[2.0]])
    constrained_loss(logps, torch.tensor([[-20.0]]).double(), beta, mask).sum().backward()
    assert float(-logps.grad) == pytest.approx(2 / (1 + math.exp(39.8)), rel=1e-12)
    assert float(-logps.grad) < 1e-3


FLOORS = st.sampled_from([1e-3, 0.05, 0.5, 0.99])


@given(TOKENS, FLOORS)
def test_a_floor_bounds_the_weight_of_the_gradient(rows, floor):
    logps, reference, beta, mask = columns(rows)
    logps.requires_grad_()
    constrained_loss(logps, reference, beta, mask, floor).sum().backward()
    x = (-beta * (logps - reference)).detach().numpy()
    expected = np.maximum(2 * np.exp(-np.logaddexp(0, -x)), floor) * mask.numpy()
    np.testing.assert_allclose(-logps.grad, expected, rtol=1e-12, atol=1e-300)
    weight = gradient_weight(logps, reference, beta, mask, floor)
    np.testing.assert_allclose(weight.detach(), expected, rtol=1e-12, atol=1e-300)


@given(TOKENS, FLOORS)
def test_the_objective_with_a_floor_is_the_integral_of_its_gradient(rows, floor):
    """It is the plain objective up to where the weight reaches the floor, then a line."""
    logps, reference, beta, mask = columns(rows)
    d, b = (logps - reference).numpy(), beta.numpy()
    limit = np.log(2 / floor - 1) / b
    at_limit = 2 / b * np.logaddexp(0, -b * np.minimum(d, limit))
    expected = (at_limit - floor * np.maximum(d - limit, 0)) * mask.numpy()
    found = constrained_loss(logps, reference, beta, mask, floor)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


def test_a_floor_of_zero_and_a_beta_of_zero_change_nothing():
    logps, reference = torch.empty(2, 40).uniform_(-30, 0).double().unbind(0)
    logps, reference = logps[None], reference[None]
    mask, b = torch.ones(1, 40, dtype=torch.bool), torch.full((1, 40), 2.0)
    plain = constrained_loss(logps, reference, b, mask)
    assert torch.equal(constrained_loss(logps, reference, b, mask, 0.0), plain)
    zero = torch.zeros(1, 40)
    cross_entropy = constrained_loss(logps, reference, zero, mask)
    assert torch.equal(constrained_loss(logps, reference, zero, mask, 0.5), cross_entropy)
    assert gradient_weight(logps, reference, zero, mask, 0.5).eq(1).all()


def test_at_the_reference_the_loss_of_a_token_is_two_over_b_log_two():
    logps = torch.randn(2, 7)
    mask = torch.ones(2, 7, dtype=torch.bool)
    b = schedule(BETA, positions(mask))
    assert b[0].tolist() == pytest.approx([0.5, 2, 2, 2, 2, 0.1, 0.1])
    torch.testing.assert_close(constrained_loss(logps, logps, b, mask), 2 / b * math.log(2))
    assert gradient_weight(logps, logps, b, mask).eq(1).all()


@pytest.mark.parametrize("b", [0.0, 1e-6, 1e-3])
def test_a_vanishing_b_is_cross_entropy(b):
    logps = torch.empty(1, 50).uniform_(-12, 0).requires_grad_()
    reference, mask = torch.empty(1, 50).uniform_(-12, 0), torch.ones(1, 50, dtype=torch.bool)
    loss = constrained_loss(logps, reference, torch.full_like(reference, b), mask)
    loss.sum().backward()
    torch.testing.assert_close(logps.grad, torch.full_like(logps, -1), atol=12 * b, rtol=1e-6)
    constant = 2 / b * math.log(2) if b else 0.0
    # the loss without its constant, up to the precision of float32
    near = 1e-6 * constant + 12**2 * b / 4 + 1e-6
    torch.testing.assert_close(loss - constant, reference - logps, atol=near, rtol=0)


def test_masked_values_reach_neither_loss_nor_gradient():
    logps = torch.tensor([[-1.0, float("-inf"), float("nan")]], requires_grad=True)
    reference = torch.tensor([[-2.0, float("nan"), 0.0]])
    mask = torch.tensor([[True, False, False]])
    loss = constrained_loss(logps, reference, torch.tensor([[0.5, 0.0, 2.0]]), mask)
    loss.sum().backward()
    assert loss[0, 1:].tolist() == [0, 0]
    assert logps.grad[0, 1:].tolist() == [0, 0]
    assert math.isfinite(float(logps.grad[0, 0]))


def test_half_precision_is_converted_before_the_difference():
    exact, low = torch.tensor([[-8.0]]), torch.tensor([[-8.03]])
    mask, b = torch.tensor([[True]]), torch.tensor([[2.0]])
    assert constrained_loss(exact.bfloat16(), low, b, mask).dtype == torch.float32
    torch.testing.assert_close(
        constrained_loss(exact.bfloat16(), low, b, mask), constrained_loss(exact, low, b, mask)
    )


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4))
def test_positions_count_every_run_from_one(rows):
    expected = []
    for row in rows:
        count, counts = 0, []
        for inside in row:
            count = count + 1 if inside else 0
            counts.append(count)
        expected.append(counts)
    assert positions(torch.tensor(rows)).tolist() == expected


def test_the_last_value_of_a_schedule_applies_to_all_later_positions():
    assert schedule([3.0], torch.tensor([0, 1, 9])).tolist() == [3, 3, 3]
    assert schedule([3.0, 1.0], torch.tensor([0, 1, 2, 9])).tolist() == [3, 3, 1, 1]


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=12), st.lists(st.integers(0, 2), max_size=3)
)
def test_occurrences_of_a_pattern(ids, pattern):
    inside = [False] * len(ids)
    for at in range(len(ids)):
        if pattern and ids[at : at + len(pattern)] == pattern:
            inside[at : at + len(pattern)] = [True] * len(pattern)
    assert occurrences(torch.tensor([ids]), pattern)[0].tolist() == inside
