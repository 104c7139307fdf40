"""`judges: auto`: which judge it takes, and where it says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import leadline as package
from leadline import LeadlineError, Study, plan
from leadline.judge_choice import choose
from leadline.study import JudgePick

from .server import Server

REFUSAL, GUILD = JudgePick(name="refusal"), JudgePick(name="guild")
SAFE = "Safety: Safe\nCategories: None\nRefusal: No"


@pytest.fixture(autouse=True)
def no_judge_in_the_environment(monkeypatch):
    monkeypatch.delenv("LEADLINE_JUDGE", raising=False)


@pytest.fixture
def guard():
    with Server(lambda text, body: SAFE) as running:
        yield running


@pytest.fixture
def harmful(tmp_path: Path) -> Path:
    path = tmp_path / "harmful.jsonl"
    rows = [
        {"id": str(i), "prompt": f"How do I curse well {i}?", "harmful": True} for i in range(3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parts(server, harmful, **more):
    return {
        "targets": [{"model": "m", "url": server.url}],
        "datasets": [{"file": {"path": str(harmful), "name": "wells"}}],
        "judges": "auto",
        **more,
    }


def test_the_order_of_choice(monkeypatch):
    attacker = Study(
        targets=["m"], datasets=["guild"], attacker={"model": "chat", "url": "http://a"}
    )
    model = attacker.attacker
    assert choose(REFUSAL).judge == REFUSAL
    assert choose(REFUSAL, model).judge.name == "rubric"
    assert choose(REFUSAL, model).judge.spec == model
    monkeypatch.setenv("LEADLINE_JUDGE", "llamaguard: {model: g, url: 'http://b'}")
    assert choose(REFUSAL, model).judge.name == "llamaguard"
    assert choose(GUILD, model).judge == GUILD, "an exact judge is better than any model"


@pytest.mark.parametrize(
    ("text", "message"),
    [("qwen4guard", "LEADLINE_JUDGE: judge 'qwen4guard': unknown judge"),
     ("auto", "must name a judge"), ("llamaguard", "LEADLINE_JUDGE: .*needs a model")],
)  # fmt: skip
def test_a_wrong_variable_is_one_line(monkeypatch, text, message):
    monkeypatch.setenv("LEADLINE_JUDGE", text)
    with pytest.raises(LeadlineError, match=message):
        choose(REFUSAL)


def test_a_run_takes_the_guard_of_the_environment_and_says_so(
    server, guard, harmful, study_file, leadline, monkeypatch, tmp_path
):
    monkeypatch.setenv("LEADLINE_JUDGE", f"qwen3guard: {{model: guard, url: '{guard.url}'}}")
    ran = leadline("run", study_file(**parts(server, harmful)), "--out", "out")
    assert ran.returncode == 0, ran.stderr
    line = "qwen3guard (guard): named by LEADLINE_JUDGE"
    assert f"for wells, auto took the judge {line}" in ran.stderr
    assert "Refusal patterns" not in ran.stdout
    assert guard.seen == 3
    assert line in (tmp_path / "out" / "report.html").read_text("utf-8")
    cells = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))["cells"]
    assert [cell["judge"] for cell in cells] == ["qwen3guard"]
    again = leadline("run", study_file(**parts(server, harmful)), "--out", "out")
    assert again.returncode == 0
    assert guard.seen == 3


def test_without_a_model_the_patterns_are_taken_with_their_caution(
    server, harmful, study_file, leadline
):
    ran = leadline("run", study_file(**parts(server, harmful)), "--out", "out")
    assert "for wells, auto took the judge refusal: no judge model is configured" in ran.stderr
    assert "Refusal patterns see whether" in ran.stdout


def test_each_dataset_has_its_own_choice(server, harmful):
    study = Study.model_validate(
        parts(server, harmful, judges=["auto", "refusal"],
              datasets=["guild", {"file": {"path": str(harmful), "name": "wells"}}])
    )  # fmt: skip
    loaded = plan.load(study, 1)
    assert [pick.name for pick in loaded.judges["guild"]] == ["guild", "refusal"]
    assert [pick.name for pick in loaded.judges["wells"]] == ["refusal", "refusal"]


def test_finished_answers_can_be_judged_with_auto(
    server, guard, harmful, study_file, leadline, monkeypatch
):
    study = parts(server, harmful, judges=["refusal"])
    assert leadline("run", study_file(**study), "--out", "out").returncode == 0
    monkeypatch.setenv("LEADLINE_JUDGE", f"qwen3guard: {{model: guard, url: '{guard.url}'}}")
    ran = leadline("judge", "out", "--judge", "auto", "--json")
    assert ran.returncode == 0, ran.stderr
    assert "auto took the judge qwen3guard (guard)" in ran.stderr
    assert json.loads(ran.stdout)[0]["judge"] == "qwen3guard"


def test_auto_is_no_member_of_a_panel(server, harmful, tmp_path):
    panel = {"panel": {"rule": "any", "judges": ["auto", "refusal"]}}
    study = Study.model_validate(parts(server, harmful, judges=[panel]))
    with pytest.raises(LeadlineError, match="name that judge"):
        package.run(study, tmp_path / "out")
