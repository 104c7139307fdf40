"""A report says how much of what was planned its results hold."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import leadline
from leadline import Study
from leadline.plugins import Attempt, NotApplicable
from leadline.registry import _plugins, attack
from leadline.report.study.page import write_report

SURE = "Sure! Cut it above a bud, at an angle, with clean shears."


def roses(folder: Path, n: int) -> Path:
    """A dataset file with n prompts that count as harmful."""
    path = folder / "roses.jsonl"
    rows = ({"id": f"r{i}", "prompt": f"[{i}] How do I prune a rose?"} for i in range(n))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parts(server: Any, data: Path, **more: Any) -> dict[str, Any]:
    return {
        "targets": [{"model": "m", "url": server.url}],
        "datasets": [{"file": {"path": str(data), "name": "roses"}}],
        "judges": ["refusal"],
        **more,
    }


def test_a_killed_run_is_reported_as_partial_until_it_is_resumed(
    server, tmp_path, study_file, leadline
):
    server.answer, server.delay = lambda text, body: SURE, 0.1
    file = study_file(
        **parts(
            server, roses(tmp_path, 60), limits={"concurrency": 2}, attacks=["direct", "base64"]
        )
    )
    command = [str(Path(sys.executable).parent / "leadline"), "run", str(file), "--out", "out"]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 60
    while server.seen < 40 and time.monotonic() < limit:
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    summary = json.loads(leadline("report", "out", "--json").stdout)
    found = summary["completeness"]
    assert found["planned"] == 120
    assert 10 <= found["done"] <= 60
    assert (found["failed"], found["missing"]) == (0, 120 - found["done"])
    assert found["complete"] is False
    assert [(cell["attack"], cell["planned"]) for cell in found["cells"]] == [
        ("direct", 60),
        ("base64", 60),
    ]
    assert sum(cell["done"] for cell in found["cells"]) == found["done"]
    first, second = summary["findings"][:2]
    assert first.startswith(f"Partial results: {found['done']} of 120 planned trials are done")
    assert f"was given {found['done']} prompts" in second  # those of the cell, not the planned 60
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"<b>{found['done']}</b> of 120 planned trials done" in page
    assert "not finished" in page
    server.delay = 0
    assert leadline("run", file, "--out", "out").returncode == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["completeness"] == {
        "planned": 120, "done": 120, "failed": 0, "missing": 0, "limit": None, "set_aside": {},
        "cells": [], "complete": True,
    }  # fmt: skip
    assert not summary["findings"][0].startswith("Partial")
    assert "planned trials done" not in (tmp_path / "out" / "report.html").read_text()


def test_failed_trials_are_not_done_and_rates_name_their_own_denominators(server, tmp_path):
    server.answer = lambda text, body: SURE
    server.sticky = {f"[{n}]": 400 for n in range(10, 20)}  # in direct requests only
    study = Study.model_validate(
        parts(server, roses(tmp_path, 40), attacks=["direct", "base64"], limits={"retries": 0})
    )
    leadline.run(study, tmp_path / "out")
    report = write_report(tmp_path / "out")
    found = json.loads(report.summary.read_text())["completeness"]
    assert (found["planned"], found["done"], found["failed"]) == (80, 70, 10)
    assert (found["missing"], found["complete"]) == (0, False)
    assert "was given 40 prompts" in report.findings[0]
    assert "of them get an unsafe answer (of 30 scored ones)" in report.findings[0]


def test_a_target_that_was_set_aside_is_named_with_its_reason(
    server, tmp_path, leadline, study_file
):
    server.faults, server.error_body = {400: 1.0}, {"error": {"message": "no roses here"}}
    file = study_file(**parts(server, roses(tmp_path, 50), limits={"concurrency": 2}))
    ran = leadline("run", file, "--out", "out")
    assert ran.returncode == 1
    assert "trials were not asked: fix the cause and run the same command again" in ran.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["completeness"]["set_aside"] == {"m": "HTTP 400: no roses here"}
    assert summary["findings"][-1].endswith("in the same way every time: HTTP 400: no roses here.")
    (cell,) = summary["cells"]
    assert (cell["n"], cell["asr"]) == (0, None)
    assert cell["failed"] == summary["completeness"]["failed"] < 20


def test_a_limit_is_shown(server, tmp_path):
    leadline.run(Study.model_validate(parts(server, roses(tmp_path, 9))), tmp_path / "out", limit=4)
    report = write_report(tmp_path / "out")
    found = json.loads(report.summary.read_text())["completeness"]
    assert (found["planned"], found["done"], found["limit"]) == (4, 4, 4)
    assert "at most 4 prompts per dataset" in report.html.read_text()


@pytest.fixture
def every_other() -> Any:
    """An attack of three attempts that applies to every other prompt only."""

    @attack("every_other", family="test", source="this test", pool="any")
    def every_other(prompt):
        """Three attempts."""
        if prompt.id[-1] in "13579":
            raise NotApplicable("odd")
        return [Attempt.ask(f"{n}: {prompt.text}") for n in range(3)]

    yield
    del _plugins["attack", "every_other"]


@pytest.mark.usefixtures("every_other")
def test_the_number_of_planned_trials_is_exact_once_a_run_is_finished(server, tmp_path):
    study = Study.model_validate(parts(server, roses(tmp_path, 10), attacks=["every_other"]))
    leadline.run(study, tmp_path / "out")
    found = json.loads(write_report(tmp_path / "out").summary.read_text())["completeness"]
    assert (found["planned"], found["done"], found["complete"]) == (20, 20, True)  # 5 x 3 + 5


def test_an_earlier_store_without_a_plan_claims_nothing(tmp_path):
    from .stores import Row, write_store

    write_store(tmp_path, [Row("a", unsafe=True)]).close()
    report = write_report(tmp_path)
    assert json.loads(report.summary.read_text())["completeness"] is None
    assert not report.findings[0].startswith("Partial")
