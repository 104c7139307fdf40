"""Progress in a terminal and in a log file: failures by target and reason, readable lines."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from leadline.cli._progress import line, show_lines
from leadline.progress import SAME, CombinedProgress, Failures, Progress

from .test_terminal import in_terminal

PLAIN = logging.Formatter("%(message)s")


def failures(**reasons: int) -> Failures:
    found = Failures()
    for reason, many in reasons.items():
        for _ in range(many):
            found.count(reason.replace("_", " "))
    return found


def test_failures_are_counted_by_target_and_reason():
    progress = Progress({"a": 100, "b": 100}, {"a": 50, "b": 20})
    progress.failures = {"a": failures(HTTP_500=3, timeout=1), "b": Failures()}
    text = line(progress, 60.0, deque([(0.0, 10)]))
    assert text == (
        "1:00 70 of 200 (35%), 1/s, 2:10 left; now a: 50 of 100 and 1 more; "
        "a: 4 failed: HTTP 500 (and 1 other reason)"
    )


def test_the_rate_is_recent_and_slow_work_is_counted_per_minute():
    progress = Progress({"a": 40}, {"a": 10})
    assert "0.2/s, 2:30 left" in line(progress, 100.0, deque([(50.0, 0), (75.0, 5)]))
    assert "3/min, 10:00 left" in line(progress, 200.0, deque([(0.0, 0)]))
    assert "left" not in line(progress, 100.0, deque([(50.0, 10)]))  # nothing done: unknown


def test_many_reasons_take_little_memory_and_stay_counted():
    found = Failures()
    for n in range(500):
        found.count(f"problem {n}")
    assert found.reasons.total() == 500
    assert len(found.reasons) < 30


def test_a_target_is_set_aside_after_equal_failures_in_a_row_only():
    found = Failures()
    for n in range(SAME - 1):
        found.note("direct", f"HTTP 500: request req-12345{n} failed")  # ids differ
        assert not found.set_aside("direct")
    found.note("direct", "HTTP 429")
    assert not found.set_aside("direct")
    for _ in range(SAME - 1):
        found.note("direct", "HTTP 429")
    assert found.set_aside("direct")
    assert not found.set_aside("base64")  # only direct requests failed so far
    found.note("base64", "HTTP 429")
    assert found.set_aside("rot13")
    found.note("rot13", "")
    assert not found.set_aside("rot13")


def test_parts_of_a_longer_job_keep_their_failures():
    job = CombinedProgress()
    first = Progress({"m": 4}, {"m": 4}, failures={"m": failures(HTTP_500=2)}, failed=2)
    job.study(lambda target: f"{target}: prefill")(first)
    second = Progress({"m": 3}, {"m": 1}, failures={"m": failures(timeout=1)}, failed=1)
    job.study(lambda target: f"{target}: decoding")(second)
    assert job.progress.failed == 3
    assert {name: of.text() for name, of in job.progress.failures.items()} == {
        "m: prefill": "2 failed: HTTP 500",
        "m: decoding": "1 failed: timeout",
    }


def test_lines_appear_while_nothing_is_reported_and_warnings_are_lines_too():
    """A batch of a local model can take longer than the interval: a thread writes the lines."""
    out = io.StringIO()
    log = logging.getLogger("leadline")
    earlier = log.handlers
    try:
        with show_lines(PLAIN, out, every=0.1) as listen:
            listen(Progress({"m": 10}, {"m": 2}))
            log.warning("server is slow")
            log.warning("server is slow")
            time.sleep(0.55)
    finally:
        log.handlers = earlier
    lines = out.getvalue().splitlines()
    assert lines[0] == "leadline: server is slow"
    assert len(lines) >= 4
    for text in lines[1:]:
        assert re.fullmatch(r"leadline: 0:0\d 2 of 10 \(20%\)", text), text


def test_short_work_writes_no_line():
    out = io.StringIO()
    with show_lines(PLAIN, out) as listen:
        listen(Progress({"m": 10}, {"m": 10}))
    logging.getLogger("leadline").handlers = []
    assert out.getvalue() == ""


def broken_study(server, tmp_path: Path, study_file) -> Path:
    server.sticky = {"[1]": 400}
    server.error_body = {"error": {"message": "this server is out of roses"}}
    data = tmp_path / "roses.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"[{n}] A rose?"}) + "\n" for n in range(4)))
    long_name = "a-model-with-a-very-long-name/" * 3 + "rc1"
    return study_file(
        targets=[
            {"model": "m", "url": server.url},
            {"model": "m", "name": long_name, "url": server.url},
        ],
        datasets=[{"file": {"path": str(data)}}],
        judges=["refusal"],
    )


def test_a_log_file_holds_plain_lines(server, tmp_path, study_file):
    file = broken_study(server, tmp_path, study_file)
    command = [str(Path(sys.executable).parent / "leadline"), "run", str(file), "--out", "out"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1
    lines = ran.stderr.splitlines()
    assert lines
    assert all(text.startswith("leadline: ") for text in lines), ran.stderr
    assert "leadline: m: 1 failed: HTTP 400: this server is out of roses" in lines
    assert not re.search("[━╸\x1b]", ran.stderr)


def test_a_terminal_shows_the_reason_beside_its_target(server, tmp_path, study_file):
    file = broken_study(server, tmp_path, study_file)
    command = [str(Path(sys.executable).parent / "leadline"), "run", str(file), "--out", "out"]
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", in_terminal(command, tmp_path))
    assert re.search(r"m +━+ *4/4 .*1 failed: HTTP 400: this server is out of roses", shown), shown
    assert re.search(r"…[a-z/-]+rc1 +━+ *4/4", shown), "a long name is cut, not the numbers"
