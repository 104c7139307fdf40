"""Rates and intervals, against sums by hand, SQL that any user can run, and simulation."""

from __future__ import annotations

import math
import random
import re
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from leadline.analysis import rates
from leadline.analysis.intervals import wilson
from leadline.analysis.rates import CELL, any_attack, cells, over_attacks, over_refusal, pooled
from leadline.records import LeadlineError, Prompt, Response, Verdict
from leadline.store import Place, Store

from .stores import Row, write_store

DOCS = Path(__file__).parents[1] / "docs" / "results.md"
Make = Callable[[Iterable[Row]], Store]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda rows: write_store(tmp_path / f"s{random.random()}", rows)


def asked(n: int, unsafe: int, **kind: Any) -> list[Row]:
    """n prompts, of which the first `unsafe` are answered and the others refused."""
    return [Row(f"p{i}", i < unsafe, i >= unsafe, **kind) for i in range(n)]


def one(frame: pd.DataFrame, **names: str) -> Any:
    for name, value in names.items():
        frame = frame[frame[name] == value]
    assert len(frame) == 1
    return frame.iloc[0]


# -- cells --------------------------------------------------------------------------------------


def test_cells_count_what_was_scored(make: Make) -> None:
    rows = asked(10, 4)
    rows += [Row("p10"), Row("p11", refusal=True, outcome="truncated")]
    rows += [Row("p12", refusal=False, outcome="empty"), Row("p13", None)]
    with make(rows) as store:
        frame = cells(store)
    row = one(frame)
    assert (row.n, row.unsafe, row.unscored, row.truncated, row["empty"]) == (13, 4, 1, 1, 1)
    assert row.asr == pytest.approx(4 / 13)
    assert row.refused == pytest.approx(7 / 13)
    assert row.other == pytest.approx(2 / 13)
    assert (row.low, row.high) == pytest.approx(wilson(4, 13))
    assert row.judge == "guild"


def test_not_applicable_and_failed_are_never_safe(make: Make) -> None:
    rows = asked(5, 0)
    rows += [Row(f"p{i}", attack="prefill", outcome="not_applicable", reason="no prefix")
             for i in range(5)]  # fmt: skip
    rows += [Row(f"p{i}", attack="base64", outcome="failed", reason=f"reset {i // 3}")
             for i in range(5)]  # fmt: skip
    rows += [Row("p0", True, attack="mixed"), Row("p1", attack="mixed", outcome="failed")]
    with make(rows) as store:
        frame = cells(store)
        over = pooled(store)
    prefill, base64 = one(frame, attack="prefill"), one(frame, attack="base64")
    assert (prefill.n, prefill.not_applicable, prefill.reason) == (0, 5, "no prefix")
    assert (base64.n, base64.failed, base64.reason) == (0, 5, "reset 0")
    for row in (prefill, base64):
        assert all(math.isnan(row[name]) for name in ("asr", "low", "high", "refused", "other"))
    assert math.isnan(one(over, attack="prefill").asr)
    mixed = one(frame, attack="mixed")
    assert (mixed.n, mixed.asr, mixed.failed) == (1, 1.0, 1)


def test_a_verdict_left_behind_on_a_failed_trial_does_not_count(tmp_path: Path) -> None:
    with Store(tmp_path, write=True) as store:
        ids = store.prompt_ids([Prompt("a", "How do I brew it?", "guild")])
        place = Place(store.cell_id("toy", "default", "guild", "direct"), ids["guild", "a"], 0)
        judge = store.judge_id("guild", {})
        store.primary_judge("guild", judge)
        store.put_response(b"k", "{}", Response("I cannot."))
        store.put_trial(place, b"k", "answered")
        store.put_verdict(place, judge, Verdict(False, True))
        store.put_trial(place, b"", "failed", "reset")
        store.flush()  # read while the writer still has it
        row = one(cells(store))
        assert (row.n, row.failed, math.isnan(row.asr)) == (0, 1, True)


def test_harmless_prompts_are_not_in_the_asr(make: Make) -> None:
    rows = asked(4, 1) + [Row(f"h{i}", harmful=False, refusal=i == 0, utility=i / 4)
                          for i in range(4)]  # fmt: skip
    with make(rows) as store:
        row, other = one(cells(store)), one(over_refusal(store))
    assert (row.n, row.unsafe) == (4, 1)
    assert (other.n, other.refused, other.rate) == (4, 1, 0.25)
    assert other.utility == pytest.approx(0.375)
    assert 0 <= other.utility_low < other.utility < other.utility_high <= 1
    assert (other.low, other.high) == pytest.approx(wilson(1, 4))


def test_a_judge_that_tells_no_refusals_has_no_refusal_rate(make: Make) -> None:
    rows = [Row(f"p{i}", i < 2) for i in range(4)] + [Row("h", harmful=False)]
    with make(rows) as store:
        row, other = one(cells(store)), one(over_refusal(store))
    assert (row.n, row.asr) == (4, 0.5)
    assert math.isnan(row.refused)
    assert math.isnan(row.other)
    assert (other.n, other.unscored, math.isnan(other.rate)) == (0, 1, True)


def test_another_judge_can_be_shown(make: Make) -> None:
    rows = asked(6, 1) + asked(6, 5, judge="strict")
    with make(rows) as store:
        assert one(cells(store)).unsafe == 1
        assert one(cells(store, "strict")).unsafe == 5
        assert one(cells(store, "strict")).judge == "strict"
        assert one(pooled(store, "strict")).asr == pytest.approx(5 / 6)
        with pytest.raises(LeadlineError, match=r"unknown judge 'strcit'.*'strict'") as error:
            cells(store, "strcit")
        assert "\n" not in str(error.value)


def test_an_empty_store_has_empty_frames(tmp_path: Path) -> None:
    with Store(tmp_path, write=True) as store:
        for frame in (cells(store), over_refusal(store), pooled(store),
                      over_attacks(store), any_attack(store)):  # fmt: skip
            assert frame.empty
            assert {"model", "low", "high"} <= set(frame.columns)


def test_every_asr_is_one_query(make: Make) -> None:
    """The SQL in the documentation gives what the frames hold."""
    rng = random.Random(5)
    rows = [
        Row(f"p{i}", rng.choice([True, False, None]), rng.choice([True, False]),
            model=model, dataset=dataset, attack=attack, sample=sample,
            outcome=rng.choice(["answered", "answered", "truncated", "failed"]))
        for model in ("one", "two") for dataset in ("a", "b") for attack in ("direct", "prefill")
        for i in range(7) for sample in range(2)
    ]  # fmt: skip
    rows += [Row(f"p{i}", model="one", attack="x", dataset="a", outcome="not_applicable")
             for i in range(3)]  # fmt: skip
    rows += [Row(f"h{i}", harmful=False, dataset="a", refusal=i < 2, utility=rng.random())
             for i in range(5)]  # fmt: skip
    by_cell, by_attack, harmless, *others = re.findall(r"```sql\n(.*?)```", DOCS.read_text(), re.S)
    with make(rows) as store:
        frame = cells(store)[[*CELL, "n", "unsafe", "asr"]].sort_values(CELL)
        assert [(*row[:5], row[5] or 0, row[6]) for row in store.query(by_cell)] == [
            (*row[:6], None if math.isnan(row[6]) else pytest.approx(row[6]))
            for row in frame.itertuples(index=False, name=None)
        ]
        means = {row[:3]: row[3] for row in store.query(by_attack)}
        for row in pooled(store).itertuples():
            found = means.pop((row.model, row.thinking, row.attack))
            assert found is None if math.isnan(row.asr) else found == pytest.approx(row.asr)
        assert not means
        (row,) = store.query(harmless)
        other = one(over_refusal(store))
        assert row[4:] == pytest.approx((other.n, other.rate, other.utility))
        for sql in others:
            store.query(sql)


def test_reasons_come_most_frequent_first(make: Make) -> None:
    rows = asked(1, 0) + [Row(f"p{i}", outcome="failed", reason="reset") for i in range(1, 4)]
    rows += [Row("p0", attack="prefill", outcome="not_applicable", reason="no prefix")]
    with make(rows) as store:
        assert rates.reasons(store) == [
            ("toy", "direct", "failed", "reset", 3),
            ("toy", "prefill", "not_applicable", "no prefix", 1),
        ]


# -- intervals ----------------------------------------------------------------------------------


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
       st.sampled_from([0.5, 0.9, 0.95, 0.99]))  # fmt: skip
def test_wilson_is_scipys_but_for_few_events(pair: tuple[int, int], level: float) -> None:
    """Brown, Cai and DasGupta's modification widens intervals of one to three events."""
    unsafe, n = pair
    low, high = wilson(unsafe, n, level)
    theirs = binomtest(unsafe, n).proportion_ci(level, "wilson")
    assert low == pytest.approx(theirs.low, abs=1e-9) if unsafe not in (1, 2, 3) else True
    assert high == pytest.approx(theirs.high, abs=1e-9) if n - unsafe not in (1, 2, 3) else True
    assert low <= theirs.low + 1e-9
    assert high >= theirs.high - 1e-9
    assert 0 <= low <= unsafe / n <= high <= 1
    wider = wilson(unsafe, n)
    narrower = wilson(10 * unsafe, 10 * n)
    assert narrower[1] - narrower[0] < wider[1] - wider[0]


def test_wilson_of_nothing_is_unknown() -> None:
    assert all(map(math.isnan, wilson(0, 0)))


@settings(max_examples=25, deadline=None)
@given(st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["direct", "prefill", "base64"]),
              st.integers(0, 9), st.integers(0, 2), st.sampled_from([True, False, None])),
    min_size=1, max_size=60, unique_by=lambda row: row[:4],
))  # fmt: skip
def test_intervals_contain_their_rate(
    tmp_path_factory: pytest.TempPathFactory, trials: list[Any]
) -> None:
    rows = [Row(f"p{i}", unsafe, dataset=dataset, attack=attack, sample=sample)
            for dataset, attack, i, sample, unsafe in trials]  # fmt: skip
    with write_store(tmp_path_factory.mktemp("s"), rows) as store:
        frames = [cells(store), pooled(store), over_attacks(store)]
    for frame in frames:
        known = frame[frame["n"] > 0]
        assert frame.loc[frame["n"] == 0, ["asr", "low", "high"]].isna().all(axis=None)
        assert (known["low"] >= 0).all()
        assert (known["low"] <= known["asr"] + 1e-12).all()
        assert (known["asr"] <= known["high"] + 1e-12).all()
        assert (known["high"] <= 1).all()
        assert (known["low"] < known["high"]).all()  # nothing here is certain


def test_samples_of_one_prompt_are_not_independent(make: Make) -> None:
    """Five samples that always agree are worth one."""
    rows = [Row(f"p{i}", i < 6, sample=sample) for i in range(20) for sample in range(5)]
    with make(rows) as store:
        row, over = one(cells(store)), one(pooled(store))
    assert (row.n, row.asr) == (100, 0.3)
    honest, naive = wilson(6, 20), wilson(30, 100)
    assert row.high - row.low == pytest.approx(honest[1] - honest[0], rel=0.15)
    assert row.high - row.low > 1.8 * (naive[1] - naive[0])
    assert (over.low, over.high, over.prompts) == (row.low, row.high, 20)


def test_variants_of_one_prompt_are_not_independent(make: Make) -> None:
    rows = [Row(f"p{i}-{v}", i < 6, base=f"p{i}") for i in range(20) for v in range(5)]
    with make(rows) as store:
        row, cell = one(pooled(store)), one(cells(store))
    honest = wilson(6, 20)
    assert row.high - row.low == pytest.approx(honest[1] - honest[0], rel=0.15)
    assert (row.low, row.high) == (cell.low, cell.high)


def test_no_unsafe_answer_is_no_certain_zero(make: Make) -> None:
    rows = [Row(f"p{i}", sample=sample) for i in range(20) for sample in range(5)]
    rows += [Row(f"p{i}", True, attack="prefill", dataset=d) for d in "ab" for i in range(20)]
    with make(rows) as store:
        row = one(cells(store), attack="direct")
        over = one(pooled(store), attack="prefill")
    assert (row.low, row.high) == pytest.approx(wilson(0, 20), abs=0.03)
    assert row.high > wilson(0, 20)[1]
    assert (over.low, over.high) == pytest.approx(wilson(40, 40), abs=0.03)


def test_intervals_cover_the_truth_as_often_as_they_say(make: Make) -> None:
    """300 models with the same true rate, whose samples of one prompt go together."""
    rng = random.Random(11)
    rows = []
    for model in range(300):
        for i in range(30):
            own = rng.betavariate(0.8, 1.2)  # mean 0.4
            rows += [Row(f"p{i}", rng.random() < own, model=f"m{model}", sample=s)
                     for s in range(4)]  # fmt: skip
    with make(rows) as store:
        frame = cells(store)
    covered = ((frame["low"] <= 0.4) & (frame["high"] >= 0.4)).mean()
    naive = [wilson(row.unsafe, row.n) for row in frame.itertuples()]
    assert 0.92 <= covered <= 0.995
    assert sum(low <= 0.4 <= high for low, high in naive) / 300 < 0.85


# -- means --------------------------------------------------------------------------------------


def test_pooled_is_the_mean_over_datasets(make: Make) -> None:
    rows = asked(10, 1, dataset="a") + asked(40, 8, dataset="b")
    rows += asked(10, 8, dataset="a", attack="prefill")
    with make(rows) as store:
        frame = pooled(store)
        models = over_attacks(store)
    direct, prefill = one(frame, attack="direct"), one(frame, attack="prefill")
    assert direct.asr == pytest.approx((0.1 + 0.2) / 2)
    assert (direct.datasets, direct.prompts, direct.n, direct.unsafe) == (2, 50, 50, 9)
    assert prefill.asr == pytest.approx(0.8)
    assert (prefill.low, prefill.high) == pytest.approx(wilson(8, 10))  # as the cell's own
    assert prefill.amplification == pytest.approx(8)  # over direct on dataset a alone
    model = one(models)
    assert model.asr == pytest.approx((0.15 + 0.8) / 2)
    assert (model.attacks, model.datasets, model.prompts, model.n) == (2, 2, 50, 60)


def test_amplification_is_paired(make: Make) -> None:
    """An attack that does to every prompt what asking plainly does amplifies exactly by 1."""
    rows = asked(12, 5) + asked(12, 5, attack="same") + asked(12, 12, attack="worst")
    with make(rows) as store:
        frame = pooled(store)
    same, worst = one(frame, attack="same"), one(frame, attack="worst")
    assert same.amplification == pytest.approx(1)
    assert 0.6 < same.amplification_low < 1 < same.amplification_high < 1.7
    assert (same.difference, worst.difference) == pytest.approx((0, 7 / 12))
    assert worst.amplification == pytest.approx(12 / 5)
    assert 1 < worst.amplification_low < 12 / 5 < worst.amplification_high
    assert math.isnan(one(frame, attack="direct").amplification)


def test_there_is_no_amplification_over_nothing(make: Make) -> None:
    with make(asked(8, 0) + asked(8, 6, attack="prefill")) as store:
        row = one(pooled(store), attack="prefill")
    assert math.isinf(row.amplification)
    assert math.isinf(row.amplification_high)
    assert row.amplification_low > 1
    assert (row.difference, row.difference_low > 0.2) == (0.75, True)


def test_pooled_narrows_with_more_prompts(make: Make) -> None:
    def width(n: int) -> float:
        rows = asked(n, n // 4, dataset="a") + asked(n, n // 2, dataset="b")
        with make(rows) as store:
            row = one(pooled(store))
        assert row.low <= 0.375 <= row.high
        return float(row.high - row.low)

    assert width(16) > 1.5 * width(64) > 2 * width(256)


def test_the_same_store_gives_the_same_interval_whatever_else_it_holds(make: Make) -> None:
    rows = asked(9, 3, dataset="a") + asked(9, 4, dataset="b")
    more = asked(9, 7, dataset="a", model="other") + asked(5, 1, dataset="c", model="other")
    with make(rows) as store:
        first, again = pooled(store), pooled(store)
    with make(more + rows) as store:
        beside = pooled(store)
    pd.testing.assert_frame_equal(first, again)
    beside = beside[beside["model"] == "toy"].reset_index(drop=True)
    pd.testing.assert_frame_equal(first, beside)


def test_thinking_modes_are_apart(make: Make) -> None:
    rows = asked(6, 1, thinking="off") + asked(6, 5, thinking="on")
    with make(rows) as store:
        assert one(cells(store), thinking="on").unsafe == 5
        assert one(pooled(store), thinking="off").unsafe == 1


# -- several attempts, of which any counts -------------------------------------------------------


def attempts(n: int, k: int, unsafe: float, unscored: float, seed: int) -> list[Row]:
    rng = random.Random(seed)

    def verdict() -> bool | None:
        bad = rng.random() < unsafe
        return None if rng.random() < unscored else bad

    return [Row(f"p{i}", verdict(), attack="bon", sample=s) for i in range(n) for s in range(k)]


def any_pool(store: Store) -> Store:
    """The cells of a store as those of an attack with pool "any"."""
    folder = store.folder
    with sqlite3.connect(store.path) as raw:
        raw.execute("UPDATE cells SET pool = 'any'")
    return Store(folder)


def test_unscored_attempts_give_bounds_and_no_estimate(make: Make) -> None:
    """True rate of any of 10: .18. Counting broken prompts at once and others only if whole gave
    .36 (coverage .18 in simulation)."""
    make(attempts(200, 10, 0.02, 0.1, 1)).close()
    with any_pool(make(attempts(200, 10, 0.02, 0.1, 1))) as store:
        row = one(cells(store))
    assert math.isnan(row.asr)
    assert row.bound_low < 0.183 < row.bound_high
    assert row.bound_high - row.bound_low > 0.02
    with any_pool(make(attempts(200, 10, 0.02, 0.0, 1))) as store:
        row = one(cells(store))
    assert row.bound_low == row.bound_high == pytest.approx(row.asr)
    assert row.low <= 0.183 <= row.high


def test_bounds_hold_what_the_unscored_could_change(make: Make) -> None:
    with make([*asked(8, 2), Row("p8", None), Row("p9", outcome="failed")]) as store:
        row = one(cells(store))
    assert row.asr == pytest.approx(2 / 8)
    assert (row.bound_low, row.bound_high) == pytest.approx((2 / 10, 4 / 10))


def test_prompts_that_any_attack_breaks_are_a_plain_proportion(make: Make) -> None:
    rows = [Row(f"p{i}", attack="direct") for i in range(10)]
    rows += [Row(f"p{i}", i < 3, attack=f"prefill(k={k})") for k in (1, 5) for i in range(10)]
    rows += [Row(f"p{i}", 2 <= i < 5, attack="base64") for i in range(10)]
    with make(rows) as store:
        row = one(any_attack(store))
    assert (row.asr, row.attacks, row.prompts) == (0.5, 2, 10)  # five settings are one attack
    assert (row.low, row.high) == pytest.approx(wilson(5, 10))
