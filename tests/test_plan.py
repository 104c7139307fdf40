"""The order of trials: the variants of a sweep are interleaved by prompt."""

from __future__ import annotations

from collections import Counter

from leadline import Study, plan
from leadline.plan import Target

SWEEP = ["direct", {"prefill": {"k": [1, 5, 10, 20]}}, "base64"]


def trials(attacks: list[object]) -> list[tuple[str, str]]:
    study = Study(targets=["t"], datasets=["guild"], attacks=attacks)
    found = plan.trials(plan.load(study), Target(study.targets[0], {"model": "t"}))
    return [(trial.attack, trial.prompt.id) for trial in found]


def test_the_variants_of_a_sweep_are_interleaved():
    order = trials(SWEEP)
    assert Counter(order).most_common(1)[0][1] == 1  # each once
    sweep = [pair for pair in order if pair[0].startswith("prefill")]
    assert len(sweep) == 4 * 48
    for start in range(0, len(sweep), 64):  # the default batch of a local model
        batch = sweep[start : start + 64]
        assert set(Counter(prompt for _, prompt in batch).values()) == {4}


def test_the_order_is_deterministic_and_loses_no_trial():
    apart = [pair for attack in SWEEP for pair in trials([attack])]
    assert sorted(trials(SWEEP)) == sorted(apart)
    assert trials(SWEEP) == trials(SWEEP)
