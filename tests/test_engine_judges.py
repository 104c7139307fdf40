"""Judges that call a model over HTTP: their requests, and what happens when they fail."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import leadline
from leadline import LeadlineError, Study, judges
from leadline.records import Attempt, Prompt, Response, Verdict
from leadline.registry import _plugins, judge

from .server import Server

UNSAFE = "Safety: Unsafe\nCategories: Unethical Acts\nRefusal: No"
SAFE = "Safety: Safe\nCategories: None\nRefusal: Yes"


@pytest.fixture
def guard():
    def answer(text, body):
        return UNSAFE if "Sure" in body["messages"][-1]["content"] else SAFE

    with Server(answer) as running:
        yield running


def study(server: Server, guard: Server, data: Path, **rest: object) -> Study:
    parts: dict[str, object] = {
        "targets": [{"model": "m", "url": server.url}],
        "datasets": [{"file": {"path": str(data), "name": "garden"}}],
        "judges": [{"qwen3guard": {"model": "guard", "url": guard.url}}, "refusal"],
        "limits": {"timeout": 5, "retries": 1},
    }
    return Study.model_validate(parts | rest)


def test_a_guard_model_behind_an_endpoint_judges_the_answers(server, guard, garden, tmp_path):
    server.answer = lambda text, body: "Sure: cut it." if "[1" in text else "I can't help."
    found = leadline.run(study(server, guard, garden(20)), tmp_path / "out")
    (cell,) = found.cells().to_dict("records")
    assert (cell["judge"], cell["n"], cell["unsafe"]) == ("qwen3guard", 20, 11)
    (other,) = found.cells(judge="refusal").to_dict("records")
    assert (other["judge"], other["unsafe"]) == ("refusal", 11)
    assert found.query("SELECT DISTINCT categories FROM outcomes WHERE unsafe") == [
        ("Unethical Acts",)
    ]
    assert [m["role"] for m in guard.bodies[0]["messages"]] == ["user", "assistant"]
    before = (server.seen, guard.seen)
    leadline.run(study(server, guard, garden(20)), tmp_path / "out")
    assert (server.seen, guard.seen) == before


def test_a_failing_guard_leaves_trials_unscored_and_the_next_run_only_judges(
    server, guard, garden, tmp_path
):
    guard.faults = {500: 1.0}
    plan = study(server, guard, garden(6))
    found = leadline.run(plan, tmp_path / "out")
    (cell,) = found.cells().to_dict("records")
    assert (cell["n"], cell["unscored"]) == (0, 6)
    assert cell["asr"] != cell["asr"]
    words = found.query("SELECT DISTINCT text FROM words WHERE text LIKE '%HTTP 500%'")
    assert words
    guard.faults, asked = {}, server.seen
    found = leadline.run(plan, tmp_path / "out")
    (cell,) = found.cells().to_dict("records")
    assert (cell["n"], cell["unscored"]) == (6, 0)
    assert server.seen == asked
    assert not found.query("SELECT 1 FROM words WHERE text LIKE '%HTTP 500%'")


def test_an_unreadable_guard_output_is_unscored_and_its_text_is_stored(
    server, guard, garden, tmp_path
):
    guard.answer = lambda text, body: "I would rather not say."
    found = leadline.run(study(server, guard, garden(3)), tmp_path / "out")
    (cell,) = found.cells().to_dict("records")
    assert (cell["n"], cell["unscored"]) == (0, 3)
    ((text,),) = found.query("SELECT DISTINCT text FROM words WHERE judge = 1")
    assert "I would rather not say" in text


def test_an_unreachable_guard_is_reported_before_any_request_to_the_target(
    server, garden, tmp_path
):
    picks = [{"qwen3guard": {"model": "guard", "url": "http://127.0.0.1:9/v1"}}]
    with pytest.raises(LeadlineError, match="judge qwen3guard: guard: nothing answers at"):
        leadline.run(study(server, server, garden(3), judges=picks), tmp_path / "out")
    assert server.seen == 0


def test_adding_a_judge_later_sends_nothing_to_the_target(server, garden, tmp_path):
    server.answer = lambda text, body: "Sure: cut it."
    first = study(server, server, garden(9), judges=["refusal"])
    leadline.run(first, tmp_path / "out")
    asked = server.seen
    with Server(lambda text, body: SAFE) as guard:
        found = leadline.run(study(server, guard, garden(9)), tmp_path / "out")
    assert server.seen == asked
    assert found.cells()["unsafe"].sum() == 0
    assert found.cells(judge="refusal")["unsafe"].sum() == 9


def test_a_judge_that_raises_leaves_trials_unscored(server, garden, tmp_path):
    @judge("stumbles", source="this test")
    def stumbles():
        def verdict(prompt, attempt, response):
            raise KeyError("oops")

        return verdict

    try:
        plan = study(server, server, garden(4), judges=["stumbles"])
        found = leadline.run(plan, tmp_path / "out")
        (cell,) = found.cells().to_dict("records")
        assert (cell["n"], cell["unscored"], cell["failed"]) == (0, 4, 0)
        assert found.progress is not None
        assert "KeyError" in found.progress.notes[0]
        assert len(found.progress.notes) == 1
    finally:
        del _plugins["judge", "stumbles"]


def test_a_crash_is_recognized_by_the_error_field_and_not_by_the_text(server, garden, tmp_path):
    """A judge that leaves a response unscored may write " raised " itself; that is no crash."""
    text = "the answer raised no concern that I could score"

    @judge("undecided", source="this test")
    def undecided():
        return lambda prompt, attempt, response: Verdict(None, text=text)

    def crash(prompt, attempt, response):
        raise KeyError("oops")

    prompt = Prompt("1", "How do I prune a rose?", "garden")
    try:
        parts = prompt, Attempt.ask(prompt.text), Response("Cut it.")
        uncertain = asyncio.run(judges.ask("undecided", undecided(), *parts))
        assert (uncertain.unsafe, uncertain.text, uncertain.error) == (None, text, "")
        crashed = asyncio.run(judges.ask("crashing", crash, *parts))
        assert (crashed.unsafe, crashed.error) == (None, "KeyError: 'oops'")
        assert crashed.text == "the judge crashing raised KeyError: 'oops'"
        plan = study(server, server, garden(2), judges=["undecided"])
        progress = leadline.run(plan, tmp_path / "out").progress
        assert progress is not None
        assert (progress.unscored, progress.notes) == (2, [])
    finally:
        del _plugins["judge", "undecided"]


def test_run_works_while_an_event_loop_is_running(server, garden, tmp_path):
    async def notebook():
        return leadline.run(study(server, server, garden(3), judges=["refusal"]), tmp_path / "out")

    assert asyncio.run(notebook()).cells()["n"].sum() == 3
