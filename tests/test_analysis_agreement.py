"""Kappa and agreement, by hand, by simulation and from a store."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leadline.analysis.agreement import Table, agree, kappa
from leadline.records import LeadlineError, Verdict
from leadline.store import Place, Store

from .stores import Row, write_store

steadily = settings(derandomize=True, deadline=None)
ONE = {"both": (1, 0, 0, 0), "first": (0, 1, 0, 0), "second": (0, 0, 1, 0), "none": (0, 0, 0, 1)}


def spread(table):
    """One cluster per answer."""
    return [one for one, times in zip(ONE.values(), table, strict=True) for _ in range(times)]


def test_kappa_by_hand():
    """20 and 15 agreements, 5 and 10 disagreements: kappa is 0.4."""
    value, low, high = kappa(spread((20, 5, 10, 15)))
    assert value == pytest.approx(0.4)
    assert 0.1 < low < 0.2
    assert 0.6 < high < 0.7


def test_the_kappa_interval_has_its_nominal_coverage():
    rng = np.random.default_rng(3)
    shares = np.array([0.35, 0.08, 0.12, 0.45])
    chance = 0.43 * 0.47 + 0.57 * 0.53
    true = (0.8 - chance) / (1 - chance)
    held = 0
    for _ in range(300):
        _, low, high = kappa(spread(map(int, rng.multinomial(150, shares))))
        held += low <= true <= high
    assert 0.92 <= held / 300 <= 0.98


def test_answers_to_one_prompt_count_as_one_cluster():
    tables = [ONE[kind] for kind in ["both"] * 10 + ["none"] * 10 + ["first"] * 4 + ["second"] * 2]
    once = kappa(tables)
    tenfold = kappa([tuple(10 * count for count in table) for table in tables])
    assert tenfold == pytest.approx(once)
    apart = kappa([table for table in tables for _ in range(10)])
    assert apart.high - apart.low < 0.5 * (once.high - once.low)


def test_intervals_of_perfect_agreement_and_of_constant_verdicts():
    value, low, high = kappa(spread((10, 0, 0, 10)))
    assert (value, high) == (1, 1)
    assert 0.5 < low < 0.9
    assert all(math.isnan(x) for x in kappa(spread((0, 0, 0, 20))))
    assert all(math.isnan(x) for x in kappa([]))


@steadily
@given(st.lists(st.tuples(*[st.integers(0, 5)] * 4), max_size=30))
def test_kappa_lies_in_its_interval_and_below_one(tables):
    value, low, high = kappa(t for t in tables if sum(t))
    if not math.isnan(value):
        assert low <= value <= high <= 1


def two_judges(folder, pairs):
    """A store with these verdicts of the judges a and b."""
    write_store(folder, [Row(f"p{n}", a, judge="a") for n, (a, _) in enumerate(pairs)]).close()
    with Store(folder, write=True) as store:
        b = store.judge_id("b", {})
        for n, (_, unsafe) in enumerate(pairs):
            store.put_verdict(Place(1, n + 1, 0), b, Verdict(unsafe))


def test_two_judges_of_a_store(tmp_path):
    pairs = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10
    pairs += [(False, False)] * 15 + [(None, True), (False, None)]
    two_judges(tmp_path / "out", pairs)
    with Store(tmp_path / "out") as store:
        found = agree(store, "a", "b")
        assert found.table == Table(20, 5, 10, 15)
        assert found.unscored == 2
        assert found.agreement.value == pytest.approx(35 / 50)
        assert found.agreement.low < 0.7 < found.agreement.high
        assert found.kappa == pytest.approx(kappa(spread((20, 5, 10, 15))))
        turned = agree(store, "b", "a")
        assert turned.table == Table(20, 10, 5, 15)
        assert turned.kappa.value == pytest.approx(found.kappa.value)
        assert found.to_json()["table"]["unsafe_safe"] == 5
        with pytest.raises(LeadlineError, match="unknown judge 'c': valid names are a, b"):
            agree(store, "a", "c")


def test_judges_without_a_common_answer_are_an_error(tmp_path):
    two_judges(tmp_path / "out", [(True, None), (None, False)])
    with (
        Store(tmp_path / "out") as store,
        pytest.raises(LeadlineError, match="no answer was scored by both"),
    ):
        agree(store, "a", "b")


def test_harmless_prompts_and_failed_trials_are_left_out(tmp_path):
    rows = [Row("p", True), Row("q"), Row("h", harmful=False), Row("f", outcome="failed")]
    write_store(tmp_path / "out", rows).close()
    with Store(tmp_path / "out") as store:
        assert agree(store, "guild", "guild").table == Table(1, 0, 0, 1)
