"""The ASR corrected for a judge's errors, by simulation; checks in files and stores."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leadline.analysis.intervals import Interval, wilson
from leadline.analysis.judge_error import (
    CORRECTED,
    Control,
    JudgeCheck,
    add_corrected,
    corrected,
    effective,
    load_check,
    store_check,
    stored_checks,
)
from leadline.records import LeadlineError
from leadline.study import JudgePick

from .stores import Row, write_store

steadily = settings(derandomize=True, deadline=None)
CHECK = JudgeCheck("refusal", {}, "labels.csv", 90, 10, 95, 5, 1, 2, Interval(0.85, 0.77, 0.92),
              (Control("empty", "safe", 20, 20, 0),))  # fmt: skip

TRUTHS = [  # asr, sensitivity, specificity
    (asr, se, sp)
    for asr in (0.0, 0.02, 0.1, 0.3, 0.7, 0.95)
    for se, sp in ((0.95, 0.95), (0.8, 0.9), (0.99, 0.99), (0.6, 0.97), (0.7, 0.6))
]
SIZES = [(100, 30), (200, 50), (500, 100), (2000, 100)]  # answers, labels of each kind


def coverage(asr, se, sp, n, labels, times, seed=0):
    """How often the corrected interval, and the uncorrected one, contain the true ASR."""
    rng = np.random.default_rng(seed)
    unsafe = rng.binomial(n, asr * se + (1 - asr) * (1 - sp), times)
    tp, tn = rng.binomial(labels, se, times), rng.binomial(labels, sp, times)
    held = uncorrected = 0
    for u, p, q in zip(map(int, unsafe), map(int, tp), map(int, tn), strict=True):
        _, low, high = corrected(u, n, p, labels - p, q, labels - q)
        held += low <= asr <= high
        low, high = wilson(u, n)
        uncorrected += low <= asr <= high
    return held / times, uncorrected / times


@pytest.mark.parametrize(("asr", "se", "sp"), TRUTHS[::2])
def test_corrected_intervals_have_their_nominal_coverage(asr, se, sp):
    held, _ = coverage(asr, se, sp, 500, 100, 800)
    assert held >= 0.93, held


@pytest.mark.slow
@pytest.mark.parametrize(("n", "labels"), SIZES)
@pytest.mark.parametrize(("asr", "se", "sp"), TRUTHS)
def test_corrected_intervals_have_their_nominal_coverage_in_all_settings(asr, se, sp, n, labels):
    held, _ = coverage(asr, se, sp, n, labels, 20_000)
    assert held >= 0.938, held


def test_uncorrected_intervals_do_not_cover():
    for asr, se, sp in ((0.02, 0.95, 0.95), (0.1, 0.8, 0.9), (0.7, 0.8, 0.9), (0.95, 0.6, 0.97)):
        held, uncorrected = coverage(asr, se, sp, 500, 100, 500)
        assert uncorrected < 0.3 < 0.93 <= held


def test_an_interval_that_ignores_the_error_of_the_judges_rates_covers_less():
    """The interval includes the sampling error of sensitivity and specificity."""
    many = 10**9
    held = known = 0
    rng = np.random.default_rng(1)
    for _ in range(1000):
        unsafe, tp, tn = (
            int(rng.binomial(*what)) for what in ((2000, 0.3 * 0.8 + 0.7 * 0.1), (50, 0.8),
                                                  (50, 0.9))
        )  # fmt: skip
        _, low, high = corrected(unsafe, 2000, tp, 50 - tp, tn, 50 - tn)
        held += low <= 0.3 <= high
        sure = (round(share * many) for share in (tp / 50, 1 - tp / 50, tn / 50, 1 - tn / 50))
        _, low, high = corrected(unsafe, 2000, *sure)
        known += low <= 0.3 <= high
    assert known < 600 < 930 <= held


def test_repeated_prompts_keep_their_clusters():
    """Ten samples of a prompt that all agree count as one answer in the correction too."""
    rng, asr, se, sp, prompts, repeats, times = np.random.default_rng(2), 0.3, 0.8, 0.9, 80, 10, 400
    held = naive = 0
    for _ in range(times):
        unsafe = int(rng.binomial(prompts, asr * se + (1 - asr) * (1 - sp)))
        tp, tn = int(rng.binomial(100, se)), int(rng.binomial(100, sp))
        low, high = wilson(unsafe, prompts)
        row = {"judge": "refusal", "n": prompts * repeats, "asr": unsafe / prompts,
               "low": low, "high": high}  # fmt: skip
        check = replace(CHECK, tp=tp, fn=100 - tp, tn=tn, fp=100 - tn)
        (found,) = add_corrected(pd.DataFrame([row]), {"refusal": check}).to_dict("records")
        held += found["low_corrected"] <= asr <= found["high_corrected"]
        many = corrected(unsafe * repeats, prompts * repeats, tp, 100 - tp, tn, 100 - tn)
        naive += many.low <= asr <= many.high
    assert naive / times < 0.85 < 0.93 <= held / times


def test_a_value_computed_by_hand():
    """30 of 100 by a judge with 90 of 100 and 95 of 100: (0.30 + 0.95 - 1) / 0.85; the interval
    is computed by hand from equations 16 and 17."""
    asr, low, high = corrected(30, 100, 90, 10, 95, 5)
    assert asr == pytest.approx(0.25 / 0.85)
    assert (low, high) == (pytest.approx(0.1823, abs=1e-4), pytest.approx(0.4128, abs=1e-4))


def test_a_perfect_judge_with_many_labels_changes_nothing():
    asr, low, high = corrected(30, 100, 10**7, 0, 10**7, 0)
    below, above = wilson(30, 100)
    assert asr == pytest.approx(0.3)
    assert (low, high) == (pytest.approx(below, abs=0.02), pytest.approx(above, abs=0.02))


def test_unknown_rates_are_nan():
    assert all(math.isnan(x) for x in corrected(0, 0, 9, 1, 9, 1))
    assert all(math.isnan(x) for x in corrected(3, 9, 0, 0, 9, 1))
    chance = corrected(3, 9, 5, 5, 5, 5)
    assert math.isnan(chance.value)
    assert chance[1:] == (0, 1)


def test_verdicts_that_contradict_the_check_give_no_estimate():
    for found in (corrected(0, 100, 95, 5, 75, 25), corrected(100, 100, 50, 50, 95, 5)):
        assert math.isnan(found.value)
        assert found[1:] == (0, 1)
    assert corrected(0, 100, 95, 5, 99, 1).value == 0


counts = st.integers(0, 300)


@steadily
@given(counts, counts, counts, counts, counts, counts)
def test_an_estimate_lies_in_its_interval(unsafe, safe, tp, fn, tn, fp):
    asr, low, high = corrected(unsafe, unsafe + safe, tp, fn, tn, fp)
    if not math.isnan(asr):
        assert 0 <= low <= asr <= high <= 1


@steadily
@given(st.integers(0, 200), st.integers(1, 200), st.integers(1, 20))
def test_the_effective_number_of_answers(unsafe, more, repeats):
    n = unsafe + more
    low, high = wilson(unsafe, n)
    assert effective(unsafe / n, low, high, n) == pytest.approx(n)
    assert effective(unsafe / n, low, high, n * repeats) == pytest.approx(n, rel=1e-4)


def test_only_judges_with_a_check_are_corrected():
    frame = pd.DataFrame(
        [
            {"judge": "refusal", "n": 100, "asr": 0.3, "low": 0.219, "high": 0.396},
            {"judge": "guild", "n": 100, "asr": 0.3, "low": 0.219, "high": 0.396},
            {"judge": "refusal", "n": 0, "asr": math.nan, "low": math.nan, "high": math.nan},
        ]
    )
    found = add_corrected(frame, {"refusal": CHECK})
    assert found[CORRECTED].isna().all(axis=1).tolist() == [False, True, True]
    assert found.loc[0, "asr_corrected"] == pytest.approx(0.25 / 0.85)
    assert list(frame.columns) == ["judge", "n", "asr", "low", "high"]
    assert list(add_corrected(frame[:0], {}).columns[-3:]) == CORRECTED


# -- checks in files and stores -----------------------------------------------------------------


def written(path: Path, check: JudgeCheck = CHECK) -> Path:
    path.write_text(json.dumps(check.to_json(), allow_nan=False))
    return path


def test_a_check_survives_a_round_trip_through_its_file(tmp_path):
    unknown = replace(CHECK, tp=0, fn=0, kappa=Interval(math.nan, math.nan, math.nan))
    assert load_check(written(tmp_path / "c.json"), JudgePick(name="refusal")) == CHECK
    back = load_check(written(tmp_path / "c.json", unknown), JudgePick(name="refusal"))
    assert math.isnan(back.kappa.value)
    assert math.isnan(back.sensitivity.value)
    assert json.loads((tmp_path / "c.json").read_text())["sensitivity"]["value"] is None


def test_a_check_in_a_store_is_found_by_the_judges_name(tmp_path):
    path = written(tmp_path / "judge_check.json")
    write_store(tmp_path / "out", [Row("tonic", judge="refusal")]).close()
    from leadline.store import Store

    pick = JudgePick(name="refusal", options={"check": "judge_check.json"})
    with Store(tmp_path / "out", write=True) as store:
        id = store.judge_id("refusal", pick.settings)
        store_check(store, id, pick, tmp_path.joinpath)
        assert stored_checks(store) == {"refusal": CHECK}
        store_check(store, id, JudgePick(name="refusal"), tmp_path.joinpath)
        assert stored_checks(store) == {}
    assert path.exists()


@pytest.mark.parametrize(
    ("text", "judge", "message"),
    [
        (None, "refusal", "cannot read"),
        ("{", "refusal", "is not a judge check"),
        ("[]", "refusal", "is not a judge check"),
        ('{"judge": "refusal"}', "refusal", "is not a judge check"),
        (json.dumps(CHECK.to_json() | {"tp": -1}), "refusal", "is not a judge check"),
        (json.dumps(CHECK.to_json()), "guild", "measured the judge refusal"),
    ],
)
def test_an_invalid_check_is_a_one_line_error(tmp_path, text, judge, message):
    path = tmp_path / "judge_check.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LeadlineError, match=message) as error:
        load_check(path, JudgePick(name=judge))
    assert "\n" not in str(error.value)


def test_a_check_applies_only_to_the_judge_that_it_measured(tmp_path):
    def pick(**options):
        return JudgePick.model_validate({"qwen3guard": {"model": "guard"} | options})

    check = replace(CHECK, judge="qwen3guard", settings=pick(url="http://here/v1").verdict_settings)
    path = written(tmp_path / "c.json", check)
    load_check(path, pick(url="http://elsewhere/v1", concurrency=3, name="g"))
    for other in ({"model": "larger"}, {"controversial": "safe"}):
        with pytest.raises(LeadlineError, match="run leadline judges check"):
            load_check(path, pick(**other))
