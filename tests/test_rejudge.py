"""Judging stored responses again: nothing is generated, lost or judged twice."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import leadline
from leadline import LeadlineError, Study, registry
from leadline.analysis.intervals import Interval
from leadline.analysis.judge_error import JudgeCheck, stored_checks
from leadline.judging.rejudge import rejudge
from leadline.organism import guild as world
from leadline.store import Store
from leadline.study import JudgePick

from .server import REFUSAL, Server

SAFE, UNSAFE = "safe", "unsafe\nS2"
VERDICTS = (
    "SELECT c.attack, p.name, v.sample, v.unsafe, v.refusal, v.score, v.thought_unsafe, w.text "
    "FROM verdicts v JOIN cells c ON c.id = v.cell JOIN prompts p ON p.id = v.prompt "
    "JOIN judges j ON j.id = v.judge LEFT JOIN words w ON w.cell = v.cell AND "
    "w.prompt = v.prompt AND w.sample = v.sample AND w.judge = v.judge "
    "WHERE j.name = ? ORDER BY 1, 2, 3"
)


def study(server: Server, data: Path | None = None, **rest: object) -> Study:
    dataset: object = "guild"
    if data:
        dataset = {"file": {"path": str(data), "name": "garden"}}
    parts: dict[str, object] = {
        "targets": [{"model": "m", "url": server.url}],
        "datasets": [dataset],
        "judges": ["refusal"],
        "limits": {"timeout": 5, "retries": 1},
    }
    return Study.model_validate(parts | rest)


def recipes(text, body):
    """An endpoint that discloses every other recipe, in base64 if the prompt is in base64."""
    plain = text
    for word in text.split():
        try:
            plain = base64.b64decode(word, validate=True).decode() if len(word) > 24 else plain
        except (ValueError, UnicodeDecodeError):
            continue
    potion = world.potion_in(plain)
    if potion is None or len(plain) % 2:
        return REFUSAL
    said = ", ".join(potion.recipe)
    return base64.b64encode(said.encode()).decode() if plain != text else said


def guard_pick(server: Server, **options: object) -> JudgePick:
    return JudgePick.model_validate(
        {"llamaguard": {"model": "guard", "url": server.url, **options}}
    )


def test_rejudging_gives_the_verdicts_of_a_run_with_that_judge(server, tmp_path):
    server.answer = recipes
    attacks = ["direct", "base64", "refusal_suppression", {"prefill": {"k": [3]}}]
    both = study(server, attacks=attacks, judges=["refusal", "guild"], sampling={"samples": 2})
    leadline.run(both, tmp_path / "both", limit=20)
    first = study(server, attacks=attacks, sampling={"samples": 2})
    leadline.run(first, tmp_path / "later", limit=20)
    seen = server.seen
    progress = rejudge(tmp_path / "later", JudgePick(name="guild"))
    assert server.seen == seen
    expected = leadline.results(tmp_path / "both").query(VERDICTS, "guild")
    assert len({unsafe for _, _, _, unsafe, *_ in expected}) > 1
    assert {row[0] for row in expected if row[3]} >= {"direct", "base64"}
    assert leadline.results(tmp_path / "later").query(VERDICTS, "guild") == expected
    assert progress.done == {"guild": len(expected)}
    # the study's own judge remains the primary one
    cells = leadline.results(tmp_path / "later")
    assert set(cells.cells()["judge"]) == {"refusal"}
    assert set(cells.cells("guild")["judge"]) == {"guild"}


def test_a_truncated_response_prefix_is_restored_for_the_judge(tmp_path):
    """Local weights: the judge sees the prefix that the model received and its continuation."""
    parts = {
        "targets": ["organism:aligned"], "datasets": [{"guild": {"limit": 6}}],
        "attacks": ["direct", {"prefill": {"k": [3, 12]}}], "sampling": {"max_tokens": 48},
    }  # fmt: skip
    both = Study.model_validate({**parts, "judges": ["refusal", "guild"]})
    leadline.run(both, tmp_path / "both")
    leadline.run(Study.model_validate({**parts, "judges": ["refusal"]}), tmp_path / "later")
    rejudge(tmp_path / "later", JudgePick(name="guild"))
    expected = leadline.results(tmp_path / "both").query(VERDICTS, "guild")
    assert {row[0] for row in expected if row[3]} >= {"prefill(k=12)"}
    assert leadline.results(tmp_path / "later").query(VERDICTS, "guild") == expected


def test_scored_responses_are_not_judged_again(server, garden, tmp_path):
    server.answer = lambda text, body: "Sure: cut it."
    leadline.run(study(server, garden(12)), tmp_path / "out")
    with Server(lambda text, body: UNSAFE) as guard:
        heard = []
        first = rejudge(tmp_path / "out", guard_pick(guard), lambda p: heard.append(dict(p.done)))
        asked = guard.asked.total()
        again = rejudge(tmp_path / "out", guard_pick(guard))
        assert asked == guard.asked.total() == 12
    assert (first.total, first.done) == ({"llamaguard": 12},) * 2
    assert heard[0] == {"llamaguard": 0}
    assert heard[-1] == {"llamaguard": 12}
    assert again.total == {"llamaguard": 0}
    assert leadline.results(tmp_path / "out").cells("llamaguard")["unsafe"].sum() == 12


def test_only_unscored_responses_are_judged_again(server, garden, tmp_path):
    server.answer = lambda text, body: f"Sure: cut it, {text}"
    leadline.run(study(server, garden(10)), tmp_path / "out")
    with Server(lambda text, body: SAFE) as guard:
        guard.sticky = {"[3]": 500, "[4]": 400}
        progress = rejudge(tmp_path / "out", guard_pick(guard))
        assert progress.unscored == 2
        assert "HTTP" in progress.notes[0]
        (cell,) = leadline.results(tmp_path / "out").cells("llamaguard").to_dict("records")
        assert (cell["n"], cell["unscored"]) == (8, 2)
        guard.sticky, asked = {}, guard.asked.total()
        progress = rejudge(tmp_path / "out", guard_pick(guard))
        assert (progress.total, progress.unscored) == ({"llamaguard": 2}, 0)
        assert guard.asked.total() == asked + 2
    found = leadline.results(tmp_path / "out")
    assert found.cells("llamaguard")["n"].sum() == 10
    assert not found.query("SELECT 1 FROM words WHERE text LIKE '%HTTP%'")


def test_failed_and_blocked_trials(server, garden, tmp_path):
    server.sticky = {"[3]": 400}
    leadline.run(study(server, garden(6)), tmp_path / "out")
    progress = rejudge(tmp_path / "out", JudgePick(name="guild"))
    assert progress.total == {"guild": 5}
    assert progress.unscored == 5  # roses are not potions of the guild
    assert progress.notes == ["no potion of the guild in the prompt"]


@pytest.fixture
def translated():
    """An attack whose answers the attacker model translates back."""

    async def back(answer, assist):
        return await assist.write(f"Translate: {answer}")

    @registry.attack("in_tongues", family="translation", source="this test", decode=back,
                     needs=("attacker",))  # fmt: skip
    async def in_tongues(prompt, *, assist):
        return await assist.write(f"Hide: {prompt.text}")

    yield
    del registry._plugins["attack", "in_tongues"]


def test_stored_decodings_are_reused(server, garden, tmp_path, translated):
    server.answer = lambda text, body: "Zut"

    def attacker(text, body):
        return "Sure: cut it." if text.startswith("Translate") else text

    with Server(attacker) as helper:
        plan = study(server, garden(5), attacks=["in_tongues"],
                     attacker={"model": "helper", "url": helper.url})  # fmt: skip
        leadline.run(plan, tmp_path / "out")
        asked = helper.asked.total()
        with Server(lambda text, body: UNSAFE) as guard:
            rejudge(tmp_path / "out", guard_pick(guard))
            assert {b["messages"][-1]["content"] for b in guard.bodies} == {"Sure: cut it."}
        assert helper.asked.total() == asked
    # the attacker is unreachable now: its decodings are in the store
    with Server(lambda text, body: SAFE) as guard:
        progress = rejudge(tmp_path / "out", guard_pick(guard, name="another"))
    assert (progress.total, progress.unscored) == ({"another": 5}, 0)


def test_a_judge_check_is_stored_with_the_judge(server, garden, tmp_path):
    leadline.run(study(server, garden(3), judges=["guild"]), tmp_path / "out")
    check = JudgeCheck("refusal", {}, "labels.csv", 9, 1, 8, 2, 0, 0, Interval(0.7, 0.5, 0.9))
    path = tmp_path / "c.json"
    path.write_text(json.dumps(check.to_json()))
    rejudge(tmp_path / "out", JudgePick(name="refusal", options={"check": str(path)}))
    with Store(tmp_path / "out") as store:
        assert stored_checks(store) == {"refusal": check}
        assert store.query("SELECT count(*) FROM judges WHERE name = 'refusal'") == [(1,)]
    path.write_text(json.dumps(replace(check, judge="guild").to_json()))
    with pytest.raises(LeadlineError, match="measured the judge guild"):
        rejudge(tmp_path / "out", JudgePick(name="refusal", options={"check": str(path)}))


def test_adding_a_check_to_a_study_judges_nothing_again(server, garden, tmp_path):
    out = tmp_path / "out"
    with Server(lambda text, body: SAFE) as guard:
        pick = {"model": "guard", "url": guard.url}
        leadline.run(study(server, garden(4), judges=[{"llamaguard": pick}]), out)
        asked = guard.asked.total()
        check = JudgeCheck("llamaguard", {"model": "guard"}, "l.csv", 9, 1, 8, 2, 0, 0,
                      Interval(0.7, 0.5, 0.9))  # fmt: skip
        (tmp_path / "c.json").write_text(json.dumps(check.to_json()))
        pick = {**pick, "check": str(tmp_path / "c.json")}
        found = leadline.run(study(server, garden(4), judges=[{"llamaguard": pick}]), out)
        assert guard.asked.total() == asked
    assert found.query("SELECT count(*) FROM judges") == [(1,)]
    with Store(out) as store:
        assert stored_checks(store) == {"llamaguard": check}


def test_errors_are_one_line(server, garden, tmp_path):
    with pytest.raises(LeadlineError, match="no study at"):
        rejudge(tmp_path / "nowhere", JudgePick(name="refusal"))
    assert not (tmp_path / "nowhere").exists()
    leadline.run(study(server, garden(2)), tmp_path / "out")
    with pytest.raises(LeadlineError, match="judge llamaguard: guard: nothing answers at"):
        rejudge(tmp_path / "out", JudgePick.model_validate(
            {"llamaguard": {"model": "guard", "url": "http://127.0.0.1:9/v1"}}))  # fmt: skip
    with Store(tmp_path / "out", write=True) as store:
        with pytest.raises(LeadlineError, match="another leadline run is writing"):
            rejudge(tmp_path / "out", JudgePick(name="refusal"))
        store.describe("study", store.description("study") | {"attacks": ["gone"]})
    with pytest.raises(LeadlineError, match="is not valid on this machine") as error:
        rejudge(tmp_path / "out", JudgePick(name="guild"))
    assert "\n" not in str(error.value)


def test_rejudging_resumes_after_ctrl_c(server, garden, tmp_path):
    server.answer = lambda text, body: f"Sure: {text}"
    leadline.run(study(server, garden(400)), tmp_path / "out")
    with Server(lambda text, body: SAFE) as guard:
        guard.delay = 0.05
        pick = json.dumps({"llamaguard": {"model": "g", "url": guard.url, "concurrency": 4}})
        command = [str(Path(sys.executable).parent / "leadline"), "judge", "out", "--judge", pick]
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while guard.asked.total() < 40:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "run the same command again to resume" in said
        assert "Traceback" not in said
        guard.delay = 0
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "llamaguard judged" in done.stdout
        assert "judged 400 answers" not in done.stdout
        assert max(guard.asked.values()) <= 2
        assert sum(times == 2 for times in guard.asked.values()) <= 4  # were in flight
    assert leadline.results(tmp_path / "out").cells("llamaguard")["n"].sum() == 400


# -- the commands -------------------------------------------------------------------------------


def test_the_commands_judge_and_judges_agree(leadline, server, garden, study_file):
    server.answer = lambda text, body: "Sure: cut it." if "[1" in text else "I can't help."
    file = study_file(
        targets=[{"model": "m", "url": server.url}],
        datasets=[{"file": {"path": str(garden(20))}}],
        judges=["refusal"],
    )
    assert leadline("run", file, "--out", "out").returncode == 0
    seen = server.seen
    with Server(lambda text, body: UNSAFE if "[11]" in text else SAFE) as guard:
        guard.answer = lambda text, body: UNSAFE if "[1" in body["messages"][0]["content"] else SAFE
        pick = f"llamaguard: {{model: guard, url: {guard.url}}}"
        judged = leadline("judge", "out", "--judge", pick)
        assert judged.returncode == 0, judged.stderr
        assert "llamaguard judged 20 answers" in judged.stdout
        assert "leadline report out --judge llamaguard" in judged.stdout
        (cell,) = json.loads(leadline("judge", "out", "--judge", pick, "--json").stdout)
        assert (cell["judge"], cell["n"], cell["unsafe"]) == ("llamaguard", 20, 11)
    assert server.seen == seen
    found = json.loads(leadline("judges", "agree", "out", "refusal", "llamaguard", "--json").stdout)
    assert found["table"] == {
        "unsafe_unsafe": 11, "unsafe_safe": 0, "safe_unsafe": 0, "safe_safe": 9,
    }  # fmt: skip
    assert found["kappa"]["value"] == 1
    shown = leadline("judges", "agree", "out", "refusal", "llamaguard").stdout
    assert "Cohen's kappa" in shown
    assert "1.000" in shown


def test_the_commands_errors_are_one_line_and_exit_with_2(leadline, server, garden, study_file):
    file = study_file(
        targets=[{"model": "m", "url": server.url}],
        datasets=[{"file": {"path": str(garden(2))}}],
    )
    leadline("run", file, "--out", "out")
    for arguments, message in [
        (("judge", "nowhere", "--judge", "refusal"), "no study at nowhere"),
        (("judge", "out", "--judge", "refusl"), "did you mean 'refusal'"),
        (("judge", "out", "--judge", "refusal: {colour: 1}"), "unknown option of refusal"),
        (("judge", "out", "--judge", "refusal: {"), "not valid YAML"),
        (("judge", "out", "--judge", "llamaguard"), "needs a model: write llamaguard: {model"),
        (("judges", "agree", "out", "refusal", "guild"), "unknown judge 'guild'"),
    ]:
        ran = leadline(*arguments)
        assert ran.returncode == 2, ran.stderr
        assert message in ran.stderr
        assert len(ran.stderr.splitlines()) == 1, ran.stderr
