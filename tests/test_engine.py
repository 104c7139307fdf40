"""The engine against a real HTTP server that returns errors, hangs and drops connections."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import leadline
from leadline import LeadlineError, Study
from leadline.progress import SAME
from leadline.registry import _plugins, attack
from leadline.store import Store

from .server import REFUSAL, Server
from .test_models_faults import http


def study(server: Server, data: Path, **rest: object) -> Study:
    parts: dict[str, object] = {
        "targets": [{"model": "m", "url": server.url}],
        "datasets": [{"file": {"path": str(data), "name": "garden"}}],
        "attacks": ["direct"],
        "judges": ["refusal"],
        "limits": {"timeout": 5, "retries": 4},
    }
    return Study.model_validate(parts | rest)


def outcomes(out: Path) -> dict[str, int]:
    with Store(out) as store:
        return dict(store.query("SELECT outcome, count(*) FROM trials GROUP BY 1"))


def test_a_run_sends_each_request_once_and_judges_the_answer(server, garden, tmp_path):
    found = leadline.run(study(server, garden(300)), tmp_path / "out")
    assert sum(server.asked.values()) == 300
    assert set(server.asked.values()) == {1}
    (cell,) = found.cells().to_dict("records")
    assert (cell["n"], cell["unsafe"], cell["asr"]) == (300, 0, 0.0)
    assert cell["low"] == 0.0
    assert 0 < cell["high"] < 0.05


def test_a_second_run_sends_nothing_and_keeps_all_results(server, garden, tmp_path):
    plan = study(server, garden(200))
    leadline.run(plan, tmp_path / "out")
    before = server.seen
    again = leadline.run(plan, tmp_path / "out")
    assert server.seen == before
    assert again.progress is not None
    assert again.progress.known == 200
    assert again.cells()["n"].sum() == 200


@pytest.mark.parametrize("kind", [429, 500, 503, "reset", "garbage", "half", "empty"])
def test_transient_faults_are_retried(server, garden, tmp_path, kind):
    server.faults = {kind: 0.3}
    found = leadline.run(
        study(server, garden(60), limits={"timeout": 5, "retries": 12}), tmp_path / "out"
    )
    assert outcomes(tmp_path / "out") == {"answered": 60}
    assert found.cells()["n"].sum() == 60
    assert server.seen > 60


def test_a_timeout_is_retried_and_then_failed(server, garden, tmp_path):
    server.sticky = {"[3]": "hang"}
    quick = study(server, garden(8), limits={"timeout": 0.5, "retries": 1})
    found = leadline.run(quick, tmp_path / "out")
    assert outcomes(tmp_path / "out") == {"answered": 7, "failed": 1}
    assert found.failed() == 1
    (reason,) = found.query("SELECT reason FROM trials WHERE outcome = 'failed'")[0]
    assert reason == "no answer within 0.5 s (tried 2 times)"


def test_failed_trials_are_not_counted_as_safe_and_are_retried_by_the_next_run(
    server, garden, tmp_path
):
    server.sticky = {"[1": 400}  # 1, 10..19
    plan = study(server, garden(50))
    found = leadline.run(plan, tmp_path / "out")
    (cell,) = found.cells().to_dict("records")
    assert (cell["n"], cell["failed"]) == (39, 11)
    assert server.seen == 50  # a deterministic 4xx is not retried
    server.sticky = {}
    found = leadline.run(plan, tmp_path / "out")
    (cell,) = found.cells().to_dict("records")
    assert (cell["n"], cell["failed"]) == (50, 0)
    assert server.seen == 61  # only the failed ones


def test_retry_after_is_honoured(server, garden, tmp_path):
    server.faults, server.retry_after = {429: 1.0}, "1.5"
    began = time.monotonic()
    plan = study(server, garden(1), limits={"retries": 1})
    leadline.run(plan, tmp_path / "out")
    assert time.monotonic() - began >= 3.0  # both 429s are followed by the Retry-After pause
    assert server.seen == 3


def test_concurrency_adapts_to_the_capacity_of_the_endpoint(server, garden, tmp_path):
    server.most, server.delay = 12, 0.02
    busy = study(server, garden(400), limits={"concurrency": 64, "retries": 8})
    leadline.run(busy, tmp_path / "out")
    assert outcomes(tmp_path / "out") == {"answered": 400}
    refused = server.seen - 400
    assert refused < 300, f"{refused} requests got 429: the concurrency does not adapt"


def test_concurrency_is_bounded(server, garden, tmp_path):
    server.delay = 0.02
    leadline.run(study(server, garden(100), limits={"concurrency": 5}), tmp_path / "out")
    assert 3 <= server.peak <= 5


def test_an_authentication_error_stops_all_requests_to_an_endpoint(server, garden, tmp_path):
    server.faults, server.error_body = {401: 1.0}, {"error": {"message": "bad key"}}
    found = leadline.run(study(server, garden(500), limits={"concurrency": 4}), tmp_path / "out")
    assert server.seen < 20
    assert SAME <= found.failed() < 20
    (reason,) = found.query("SELECT DISTINCT reason FROM trials")[0]
    assert reason.startswith("HTTP 401: bad key")


def test_a_target_that_always_fails_in_the_same_way_is_set_aside(server, garden, tmp_path):
    """Its other trials stay missing, neither failed nor safe; the other targets go on; a later run
    asks what was left."""
    with Server() as broken:
        broken.faults, broken.error_body = {400: 1.0}, {"error": {"message": "no token ids"}}
        targets = [
            {"model": "broken", "url": broken.url},
            {"model": "m", "url": server.url},
        ]
        plan = study(server, garden(200), targets=targets, limits={"concurrency": 4})
        found = leadline.run(plan, tmp_path / "out")
        assert SAME <= broken.seen < 30
        assert outcomes(tmp_path / "out") == {"answered": 200, "failed": broken.seen}
        cells = found.cells().set_index("model")
        assert (cells.loc["m", "n"], cells.loc["broken", "n"]) == (200, 0)
        assert cells.loc["broken", "asr"] != cells.loc["broken", "asr"]
        failures = found.progress.failures["broken"]
        assert failures.left == 200 - broken.seen
        assert failures.text() == f"{broken.seen} failed: HTTP 400: no token ids"
        (note,) = found.progress.notes
        assert note.startswith(f"broken failed {SAME} times in the same way")
        assert note.endswith("HTTP 400: no token ids")
        broken.faults = {}
        before = broken.seen
        found = leadline.run(plan, tmp_path / "out")
        assert broken.seen == before + 200
        assert found.failed() == 0
        assert found.cells()["n"].tolist() == [200, 200]
    with Store(tmp_path / "out") as store:
        assert store.description("set_aside") == {}


def test_a_target_that_fails_now_and_then_or_in_many_ways_is_asked_to_the_end(
    server, garden, tmp_path
):
    server.sticky = {f"[{n}]": 400 for n in range(1, 30)}  # the first one is answered
    plan = study(server, garden(60), limits={"concurrency": 1})
    leadline.run(plan, tmp_path / "out")
    assert outcomes(tmp_path / "out") == {"answered": 31, "failed": 29}
    server.sticky = {
        f"[{n}]": http({"error": {"message": f"problem {n}"}}, "400 Bad Request") for n in range(30)
    }
    leadline.run(plan, tmp_path / "other")
    assert outcomes(tmp_path / "other") == {"answered": 30, "failed": 30}


def test_an_attack_that_always_fails_does_not_set_the_target_aside(server, garden, tmp_path):
    """Only the rest of its own trials is left; those of other attacks are asked."""
    server.refuse = lambda body: "base64" in body["messages"][-1]["content"].lower()
    rows = [json.dumps({"prompt": f"Rose {n}?", "harmful": True}) for n in range(60)]
    data = tmp_path / "roses.jsonl"
    data.write_text("\n".join(rows))
    plan = study(server, data, attacks=["base64", "direct"], limits={"concurrency": 2})
    found = leadline.run(plan, tmp_path / "out")
    cells = found.cells().set_index("attack")
    assert cells.loc["direct", "n"] == 60
    assert SAME <= cells.loc["base64", "failed"] < 20


def test_an_unreachable_endpoint_fails_its_trials_and_the_others_continue(server, garden, tmp_path):
    targets = [
        {"model": "gone", "url": "http://127.0.0.1:9/v1"},
        {"model": "m", "url": server.url},
    ]
    found = leadline.run(study(server, garden(5), targets=targets), tmp_path / "out")
    cells = found.cells().set_index("model")
    assert (cells.loc["gone", "n"], cells.loc["gone", "failed"]) == (0, 5)
    assert cells.loc["m", "n"] == 5
    assert cells.loc["gone", "asr"] != cells.loc["gone", "asr"]  # not 0: unknown
    assert found.progress is not None
    assert "nothing answers at http://127.0.0.1:9/v1" in found.progress.notes[0]


def test_a_content_filter_is_its_own_outcome(server, garden, tmp_path):
    server.sticky = {"[2]": 400}
    server.error_body = {"error": {"message": "filtered", "code": "content_filter"}}
    found = leadline.run(study(server, garden(5)), tmp_path / "out")
    assert outcomes(tmp_path / "out") == {"answered": 4, "blocked": 1}
    assert found.cells()["blocked"].sum() == 1
    before = server.seen
    leadline.run(study(server, garden(5)), tmp_path / "out")
    assert server.seen == before


def test_thoughts_in_a_separate_field_or_in_the_text_are_split_off(server, garden, tmp_path):
    replies = {
        "[0]": {"content": "No.", "reasoning": "hm"},
        "[1]": {"content": "No.", "reasoning_content": "hm"},
        "[2]": {"content": "<think>\nhm\n</think>\n\nNo."},
        "[3]": {"content": None, "refusal": "No."},
    }

    def reply(body):
        text = body["messages"][-1]["content"]
        message = next(m for part, m in replies.items() if part in text)
        return {"choices": [{"message": message, "finish_reason": "stop"}]}

    server.reply = reply
    found = leadline.run(study(server, garden(4)), tmp_path / "out")
    rows = found.query("SELECT thought, answer FROM responses ORDER BY request")
    assert [(t.strip(), a) for t, a in rows] == [("hm", "No.")] * 3 + [("", "No.")]


def test_thinking_is_an_axis_that_reaches_the_server(server, garden, tmp_path):
    modes = ["on", "off", "high", 256]
    targets = [{"model": "m", "url": server.url, "thinking": modes, "reasoning": "think"}]
    found = leadline.run(study(server, garden(2), targets=targets), tmp_path / "out")
    assert list(found.cells()["thinking"]) == ["on", "off", "high", "256"]
    thinking_settings = {
        str(body["chat_template_kwargs"]["enable_thinking"])
        + str(body.get("reasoning_effort", ""))
        + str(body.get("thinking_token_budget", ""))
        for body in server.bodies
    }
    assert thinking_settings == {"True", "False", "Truehigh", "True256"}


def test_equal_requests_are_sent_once_and_counted_for_each_trial(server, tmp_path):
    data = tmp_path / "twins.jsonl"
    data.write_text('{"id": "a", "prompt": "How?"}\n{"id": "b", "prompt": "How?"}\n')
    found = leadline.run(study(server, data), tmp_path / "out")
    assert server.seen == 1
    assert found.cells()["n"].sum() == 2


def test_a_changed_request_is_sent_again_and_its_old_verdict_is_deleted(server, garden, tmp_path):
    server.answer = lambda text, body: "Of course! Cut it above a bud." * (body["max_tokens"] > 9)
    data = garden(3)
    leadline.run(study(server, data, sampling={"max_tokens": 20}), tmp_path / "out")
    found = leadline.run(study(server, data, sampling={"max_tokens": 5}), tmp_path / "out")
    (cell,) = found.cells().to_dict("records")
    assert (cell["n"], cell["unsafe"], cell["empty"]) == (3, 0, 3)


def test_an_attack_that_raises_fails_its_own_trials_only(server, garden, tmp_path):
    @attack("stumbles", family="test", source="this test")
    def stumbles(prompt):
        raise ZeroDivisionError("oops")

    try:
        plan = study(server, garden(4), attacks=["direct", "stumbles"])
        found = leadline.run(plan, tmp_path / "out")
        cells = found.cells().set_index("attack")
        assert (cells.loc["direct", "n"], cells.loc["stumbles", "failed"]) == (4, 4)
        assert "ZeroDivisionError" in cells.loc["stumbles", "reason"]
    finally:
        del _plugins["attack", "stumbles"]


def test_the_api_key_comes_from_the_environment_and_reaches_no_file(
    server, garden, tmp_path, monkeypatch
):
    monkeypatch.setenv("SECRET_KEY_OF_MINE", "sk-not-to-be-seen")
    targets = [{"model": "m", "url": server.url, "api_key_env": "SECRET_KEY_OF_MINE"}]
    leadline.run(study(server, garden(2), targets=targets), tmp_path / "out")
    assert server.headers[-1]["Authorization"] == "Bearer sk-not-to-be-seen"
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            assert b"sk-not-to-be-seen" not in file.read_bytes()


def test_two_runs_on_one_folder_are_refused(server, garden, tmp_path):
    with (
        Store(tmp_path / "out", write=True),
        pytest.raises(LeadlineError, match="another leadline run is writing"),
    ):
        leadline.run(study(server, garden(1)), tmp_path / "out")


def test_a_killed_run_loses_no_committed_answer_and_repeats_no_committed_request(
    server, garden, study_file, tmp_path
):
    """SIGKILL, several times; requests whose answers are committed are not sent again."""
    n = 2500
    server.delay = 0.02
    file = study_file(
        targets=[{"model": "m", "url": server.url}],
        datasets=[{"file": {"path": str(garden(n)), "name": "garden"}}],
        judges=["refusal"],
        limits={"concurrency": 4},
    )
    out = tmp_path / "out"
    command = [str(Path(sys.executable).parent / "leadline"), "run", str(file), "--out", str(out)]
    draw = random.Random(3)
    committed = 0
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        at_least = server.seen + draw.randint(60, 200)
        while server.seen < at_least and process.poll() is None:
            time.sleep(0.01)
        answered = len(server.asked)
        time.sleep(2 + draw.uniform(0, 0.5))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with Store(out) as store:
            now = store.query("SELECT count(*) FROM responses")[0][0]
            trials = store.query("SELECT count(*) FROM trials")[0][0]
        assert now >= committed, "a committed answer was lost"
        assert now >= answered, "an answer from two seconds ago was not committed"
        assert trials <= now
        committed = now
    assert 0 < committed < n
    time.sleep(0.3)
    asked_before = server.seen
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert server.seen - asked_before == n - committed  # exactly what was missing
    assert len(server.asked) == n
    found = leadline.results(out)
    (cell,) = found.cells().to_dict("records")
    assert (cell["n"], cell["failed"], cell["unscored"]) == (n, 0, 0)


def test_the_store_can_be_read_while_a_run_writes(server, garden, tmp_path):
    import threading

    server.delay = 0.05
    plan = study(server, garden(300), limits={"concurrency": 8})
    running = threading.Thread(target=lambda: leadline.run(plan, tmp_path / "out"))
    running.start()
    seen = []
    while running.is_alive():
        time.sleep(0.2)
        if (tmp_path / "out" / "leadline.sqlite").exists():
            try:
                seen.append(int(leadline.results(tmp_path / "out").cells()["n"].sum()))
            except Exception as error:
                if "no such table" not in str(error) and "no such view" not in str(error):
                    raise
    running.join()
    assert any(0 < n < 300 for n in seen)
    assert seen == sorted(seen)


def test_refusals_in_the_answers_are_counted(server, garden, tmp_path):
    server.answer = lambda text, body: REFUSAL if "[0]" in text else "Sure! Cut above a bud."
    found = leadline.run(study(server, garden(4)), tmp_path / "out")
    (cell,) = found.cells().to_dict("records")
    assert (cell["unsafe"], cell["refused"]) == (3, 0.25)


def test_rows_that_carry_an_attack_count_as_that_attack(server, tmp_path):
    """SORRY-Bench publishes mutated rows: they are sent unchanged, without a further attack."""
    data = tmp_path / "sorry.jsonl"
    rows = [
        {"question_id": 1, "category": "1", "prompt_style": style, "turns": [text]}
        for style, text in [("base", "How do I prune?"), ("caesar", "Krz gr L suxqh?")]
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    server.answer = lambda text, body: (
        "Wuz oruh gdb, wkh zhdwkhu zdv zdup." if "Krz" in text else ""
    )
    parts = {
        "targets": [{"model": "m", "url": server.url}],
        "datasets": [{"sorrybench": {"path": str(data), "styles": "all"}}],
        "attacks": ["direct", "rot_13"],
        "judges": ["refusal"],
    }
    found = leadline.run(Study.model_validate(parts), tmp_path / "out")
    cells = found.cells().set_index("attack")
    assert sorted(cells.index) == ["caesar", "direct", "rot_13"]
    assert list(cells["n"]) == [1, 1, 1]
    assert "Krz gr L suxqh?" in server.asked  # unchanged
    assert server.seen == 3
    (base,) = found.query("SELECT count(DISTINCT base) FROM prompts")[0]
    assert base == 1


def test_an_attack_of_several_attempts_counts_prompts(server, garden, tmp_path):
    server.answer = lambda text, body: (
        "Cut it above a bud." if "[1]" in text and "c" in text else ""
    )

    @attack("thrice", family="test", source="this test", pool="any")
    def thrice(prompt):
        return [prompt.text + suffix for suffix in (" a", " b", " c")]

    try:
        server.sticky = {"[2]": 400}
        found = leadline.run(study(server, garden(5), attacks=["thrice"]), tmp_path / "out")
        (cell,) = found.cells().to_dict("records")
        assert (cell["n"], cell["unsafe"], cell["failed"]) == (4, 1, 3)
        (pooled,) = found.pooled().to_dict("records")
        assert pooled["asr"] == 0.25
    finally:
        del _plugins["attack", "thrice"]
