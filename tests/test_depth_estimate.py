"""Estimates of the measures' work, and budgets by time."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import leadline as ll
from leadline import LeadlineError
from leadline.depth import session as sessions
from leadline.depth.budgets import BUDGETS, LEAST, duration, parse_time, reduced
from leadline.depth.estimate import Speed, fit
from leadline.depth.run import _prepare, estimate_depth
from leadline.registry import get, plugins

ALIGNED, BASE = "organism:aligned", "organism:base"
ALL = [plugin.name for plugin in plugins("measure")]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("20min", 1200), ("2h", 7200), ("1h30min", 5400), ("1.5 h", 5400), ("5 m", 300),
     ("quick", None), ("20", None), ("min", None), ("20 minutes", None), ("", None)],
)  # fmt: skip
def test_times_are_read(text: str, seconds: float | None):
    assert parse_time(text) == seconds


def test_a_time_of_zero_is_an_error():
    with pytest.raises(LeadlineError, match="give a time above 0"):
        parse_time("0min")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (45, "45 s"), (600, "10 min"), (10_200, "2 h 50 min"), (43_200, "12 h")],
)
def test_durations_are_rounded(seconds: float, text: str):
    assert duration(seconds) == text


def test_limits_are_reduced_step_by_step_and_never_below_the_least():
    full = BUDGETS["standard"]
    assert reduced(full, 1, 500) is full
    before = full
    for level in (0.8, 0.5, 0.2, 0.05, 0.001):
        found = reduced(full, level, 500)
        for name in ("prompts", "max_tokens", "kl_prompts", "kl_tokens", "gcg_prompts"):
            assert getattr(LEAST, name) <= getattr(found, name) <= getattr(before, name)
        assert LEAST.gcg.steps <= found.gcg.steps <= before.gcg.steps
        assert LEAST.gcg.candidates <= found.gcg.candidates <= before.gcg.candidates
        assert set(found.ks) <= set(before.ks)
        assert found.steps == before.steps[: len(found.steps)]
        before = found
    assert replace(before, gcg=LEAST.gcg) == LEAST
    assert reduced(BUDGETS["full"], 0.25, 300).prompts == 150  # half of all prompts
    few = replace(full, prompts=5)
    assert reduced(few, 0.01, 500).prompts == 5


def prepared(tmp_path: Path, names: list[str]) -> Any:
    session, chosen, _ = _prepare([ALIGNED], BASE, "guild", None, tmp_path, "standard", names, None)
    return session, chosen


# Seconds per token, and answers of full length: as slow as a 135M model on two cores.
SLOW = Speed(generated=0.01, read=0.003, trained=0.01, length=1e9)


@pytest.mark.parametrize("seconds", [30.0, 300.0, 1200.0, 7200.0, 1e6])
def test_a_time_is_divided_over_the_measures(tmp_path: Path, seconds: float):
    session, chosen = prepared(tmp_path, ALL)
    full = session.budget
    shares = fit(session, chosen, SLOW, seconds)
    assert list(shares) == [plugin.name for plugin in chosen]
    assert session.budget is full
    measured = {name: share for name, share in shares.items() if not share.left_out}
    assert sum(share.seconds for share in measured.values()) <= seconds
    for name, share in shares.items():
        session.use(share.budget)
        assert get("measure", name).work(session) == share.work
        assert share.seconds == pytest.approx(SLOW.seconds(share.work))
        assert bool(share.reduced) == (share.budget is not full)
        if share.left_out:
            assert share.seconds > seconds / len(ALL)  # an equal part would not have done
            assert "larger --budget" in share.left_out
    if seconds == 30:
        assert "gcg" not in measured
        assert "finetuning" not in measured
        assert "kl" in measured
    if seconds == 1e6:
        assert not any(share.reduced or share.left_out for share in shares.values())


def test_more_time_never_measures_less(tmp_path: Path):
    session, chosen = prepared(tmp_path, ["gcg", "prefill"])
    steps, last = [], 0.0
    for seconds in (600.0, 2000.0, 8000.0, 100_000.0):
        share = fit(session, chosen, SLOW, seconds)["gcg"]
        assert not share.left_out
        assert share.seconds >= last
        last = share.seconds
        steps.append(share.budget.gcg.steps)
    assert steps == sorted(steps)
    assert steps[0] < steps[-1] == BUDGETS["standard"].gcg.steps


def test_the_work_of_a_measure_is_what_it_does(tmp_path: Path):
    """Against counts of a real run: answers of prefill, and steps of GCG."""
    session, _ = prepared(tmp_path, ALL)
    session.use(replace(session.budget, prompts=8, ks=(1, 5)))
    work = get("measure", "prefill").work(session)
    results = ll.measure_depth(
        ALIGNED, out=tmp_path / "out", measures="prefill",
        budget=replace(BUDGETS["quick"], prompts=8, ks=(1, 5)),
    )  # fmt: skip
    store = next((tmp_path / "out" / "trials").glob("*/prefill"))
    asked = ll.results(store).query("SELECT count(*) FROM outcomes")[0][0]
    assert work.answers == asked
    assert results.data["budget"] == "custom"


def test_a_budget_by_time_says_what_it_reduced_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    slow = Speed(generated=2e-3, read=1e-3, trained=3e-3, length=30)
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "leadline"):
        patch.setattr("leadline.depth.run.measure_speed", lambda *_: slow)
        options: dict[str, Any] = {"base": BASE, "out": tmp_path, "budget": "20s"}
        measures = ["prefill", "kl", "gcg"]
        found = ll.measure_depth(ALIGNED, measures=measures, **options).to_dict()
        patch.setattr("leadline.depth.run.measure_speed", lambda *_: 1 / 0)  # resumed: stored
        again = ll.measure_depth(ALIGNED, measures=measures, **options).to_dict()
    assert again["prefill"] == found["prefill"]
    assert found["budget"] == "20s"
    assert found["gcg"] == []
    assert found["skipped"]["gcg"].startswith("left out: it needs at least")
    assert found["prefill"]
    assert "instead of" in found["settings"]["prefill"]["reduced to fit the time"]
    assert found["settings"]["prefill"]["prompts"] < 48
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "gcg is left out: it needs at least" in said
    assert "prefill: about" in said


def test_the_first_step_announces_the_time_of_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sessions, "_WORTH_SAYING", 0.0)
    monkeypatch.setattr(sessions, "_SETTLED", 0.0)
    gcg = replace(BUDGETS["quick"].gcg, steps=3, candidates=8)
    budget = replace(BUDGETS["quick"], gcg_prompts=2, gcg=gcg)
    with caplog.at_level(logging.WARNING, "leadline"):
        ll.measure_depth("organism:deep", out=tmp_path, budget=budget, measures="gcg")
    said = [record.getMessage() for record in caplog.records]
    assert sum("GCG: about " in text and " s for 6 steps (" in text for text in said) == 1


def test_a_dry_run_lists_every_measure_and_writes_nothing(leadline: Any, tmp_path: Path):
    ran = leadline("depth", ALIGNED, "--dry-run", "--budget", "quick")
    assert ran.returncode == 0, ran.stderr
    for name in ALL:
        assert f"{name} " in ran.stdout
    assert "4 searches of 20 steps with 64 candidates" in ran.stdout
    assert "it compares with a base model" in ran.stdout
    assert "in total" in ran.stdout
    assert not (tmp_path / "leadline-depth").exists()
    ran = leadline("depth", ALIGNED, "--dry-run", "--json", "--only", "gcg", "--budget", "1s")
    gcg = next(row for row in json.loads(ran.stdout) if row["measure"] == "gcg")
    assert gcg["seconds"] > 1
    assert gcg["skipped"].startswith("left out: ")
    wrong = leadline("depth", ALIGNED, "--dry-run", "--budget", "20 parsecs")
    assert wrong.returncode == 2
    assert "or a time such as 20min" in wrong.stderr


def test_the_estimate_is_of_the_right_size(tmp_path: Path):
    """Answers of an organism end early: the estimate is not that of answers of full length."""
    (found,) = [e for e in estimate_depth(ALIGNED, measures="prefill") if e.measure == "prefill"]
    assert 0.2 < found.seconds < 120
