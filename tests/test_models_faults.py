"""Endpoints that send errors, wrong types, huge replies and redirects.

Every fault is a failure with its reason, none is counted as safe, and the other endpoints of the
study are not affected."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

import leadline
from leadline import Study
from leadline.models.spec import Limits
from leadline.progress import SAME
from leadline.records import Response
from leadline.registry import _plugins, attack

from .server import REFUSAL, Server

# The answer of replies that are usable in spite of a fault. It is unsafe by the refusal judge, so a
# count of safe answers of 0 shows that no fault was taken for a refusal or an empty answer.
SURE = "Sure! Cut it above a bud, at an angle, with clean shears."


def http(
    body: bytes | Any, status: str = "200 OK", kind: str = "application/json", length: int = -1,
    **headers: str,
) -> bytes:  # fmt: skip
    """The bytes of an HTTP response; `length` replaces the Content-Length."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    fields = {"Content-Type": kind, "Content-Length": str(len(body) if length < 0 else length)}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status}\r\n{head}Connection: close\r\n\r\n".encode() + body


def chat(content: Any = SURE, finish: Any = "stop", usage: Any = None, **message: Any) -> Any:
    """A chat reply."""
    choice = {"message": {"role": "assistant", "content": content, **message}}
    return {"choices": [{**choice, "finish_reason": finish}], "usage": usage}


def choices(value: Any) -> bytes:
    return http({"choices": value})


def bomb(mib: int) -> bytes:
    """A gzip stream of spaces."""
    packer = zlib.compressobj(9, wbits=31)
    return b"".join([*(packer.compress(b" " * 2**20) for _ in range(mib)), packer.flush()])


USABLE = ""  # the reply is usable: the trial is answered
# (the fault, what the server sends, the reason of the failed trial or USABLE)
FAULTS: list[tuple[str, Any, str]] = [
    # statuses
    ("400", http({"error": {"message": "bad"}}, "400 Bad Request"), "HTTP 400: bad"),
    ("401", http({"error": "no key"}, "401 Unauthorized"), "HTTP 401: no key"),
    ("403", http(b"", "403 Forbidden"), "HTTP 403"),
    ("404", http({"detail": "no model"}, "404 Not Found"), "HTTP 404: no model"),
    ("413", http(b"too big", "413 Payload Too Large", "text/plain"), "HTTP 413: too big"),
    ("429", http({"error": {"message": "slow"}}, "429 Too Many"), "HTTP 429: slow"),
    ("500", http(b"\xff\xfe\x00", "500 Internal Server Error"), "HTTP 500"),
    ("502", http(b"<html>bad gateway</html>", "502 Bad Gateway", "text/html"), "HTTP 502"),
    ("503 of odd types", http({"error": {"message": {"a": 1}, "code": {}}}, "503 No"), "HTTP 503"),
    ("529 with a list", http([1, 2], "529 Overloaded"), "HTTP 529"),
    ("200 in a body of 204", http(b"", "204 No Content"), "HTTP 204"),
    ("an error with a broken gzip", http(b"junk", "500 Oh", Content_Encoding="gzip"), "HTTP 500"),
    # redirects
    ("301", http(b"", "301 Moved", Location="http://evil.test/v1?key=s3cret"),
     "HTTP 301: the server redirects to http://evil.test/v1, .*not followed"),
    ("307", http(b"", "307 Temporary", Location="http://u:s3cret@evil.test/"),
     "HTTP 307: the server redirects to http://evil.test/, .*not followed"),
    ("308 to nowhere", http(b"", "308 Permanent"), "HTTP 308: the server redirects to another"),
    ("302 to bytes", http(b"", "302 Found", Location="\x1b[31m\u00ff"), "HTTP 302|header"),
    # bodies
    ("no body", http(b""), "not valid JSON .0 bytes"),
    ("HTML with status 200", http(b"<html>login</html>", kind="text/html"), "not valid JSON.*html"),
    ("half of the JSON", http(json.dumps(chat()).encode()[:60]), "not valid JSON"),
    ("a truncated body", http(json.dumps(chat()).encode(), length=10_000), "payload|length|closed"),
    ("non-UTF-8", http(b'{"choices": [{"message": {"content": "\xff\xfe"}}]}'), "not valid JSON"),
    ("UTF-16", http(json.dumps(chat()).encode("utf-16")), "not valid JSON"),
    ("a lone surrogate", http(chat("\ud800")), "not valid JSON"),
    ("NaN", http(b'{"choices": NaN}'), "not valid JSON"),
    ("JSON 100,000 deep", http(b"[" * 100_000 + b"]" * 100_000), "not valid JSON"),
    ("server-sent events", http(b'data: {"choices": []}\n\n', kind="text/event-stream"),
     "not valid JSON"),
    ("two JSON documents", http(json.dumps(chat()).encode() * 2), "not valid JSON"),
    ("a reset", "reset", "disconnected|reset"),
    ("a reply after the timeout", "hang", "no answer within"),
    ("no HTTP at all", b"SSH-2.0-OpenSSH_9.6\r\n", "Bad|Expected|Invalid|SSH"),
    ("a status line of words", b"HTTP/1.1 okay\r\n\r\n", "Bad|Expected|Invalid|status"),
    ("a header of 100 kB", http(chat(), X="a" * 100_000), "more than|too long|bytes"),
    ("a broken chunk", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n", "."),
    ("a negative length", b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}", "."),
    # sizes and compression
    ("a body of 1 MiB", http(chat("a" * 2**20)), "larger than 0.25 MiB"),
    ("a gzip bomb", http(bomb(64), Content_Encoding="gzip"), "larger than 0.25 MiB"),
    ("a deflate bomb", http(zlib.compress(b" " * 2**24), Content_Encoding="deflate"), "larger"),
    ("gzip that is none", http(chat(), Content_Encoding="gzip"), "cannot be decompressed"),
    ("truncated gzip", http(gzip.compress(json.dumps(chat()).encode())[:-20],
                            Content_Encoding="gzip"), "compressed reply is truncated"),
    ("brotli", http(b"\x0b\x02\x80", Content_Encoding="br"), "Content-Encoding br"),
    # structure
    ("null", http(b"null"), "not a JSON object"),
    ("a list", http(b"[]"), "not a JSON object"),
    ("a number of 400 digits", http(b"9" * 400), "not valid JSON|not a JSON object"),
    ("no choices", http({}), "has no choices"),
    ("choices null", choices(None), "has no choices"),
    ("choices empty", choices([]), "has no choices"),
    ("choices as an object", choices({"0": chat()}), "has no choices"),
    ("a choice null", choices([None]), "no message with text"),
    ("a choice as a string", choices(["hello"]), "no message with text"),
    ("a choice without a message", choices([{"index": 0}]), "no message with text"),
    ("a message null", choices([{"message": None, "finish_reason": "stop"}]), "no message"),
    ("a message as a string", choices([{"message": "No."}]), "no message with text"),
    ("a message without content", choices([{"message": {"role": "assistant"}}]), "no message"),
    ("content as a number", http(chat(7)), "no message with text"),
    ("content as a list", http(chat([{"type": "text", "text": SURE}])), "no message with text"),
    ("content false", http(chat(False)), "no message with text"),
    ("a thought as an object", http(chat(reasoning={"a": 1})), "no message with text"),
    # errors with status 200
    ("an error object", http({"error": {"message": "out of memory", "code": 500}}),
     "the reply is an error: out of memory"),
    ("an error beside an answer", http({**chat(""), "error": {"message": "upstream"}}),
     "the reply is an error: upstream"),
    ("an error as a string", http({"error": "overloaded\x1b[31m"}),
     "the reply is an error: overloaded⟨U"),
    ("an error in the choice", choices([{"error": {"message": "lost"}, "message": {"content": ""},
                                         "finish_reason": "error"}]), "is an error: lost"),
    # finish reasons
    ("finish error", http(chat("", "error")), "finish_reason error"),
    ("finish error with half an answer", http(chat("I'm sorry", "error")), "finish_reason error"),
    ("finish abort", http(chat("", "abort")), "finish_reason abort"),
    ("no resources", http(chat("", "insufficient_system_resource")), "finish_reason insufficient"),
    ("finish unknown", http(chat("", "paused")), "unknown finish_reason 'paused'"),
    ("finish unknown with an answer", http(chat(REFUSAL, "paused")), "unknown finish_reason"),
    ("finish as an object", http(chat("", {"type": "abort"})), "unknown finish_reason"),
    ("finish as a number", http(chat("", 7)), "unknown finish_reason '7'"),
    ("nothing, and no finish reason", http(chat("", None)), "no finish_reason"),
    ("tool_calls", http(chat(None, "tool_calls", tool_calls=[{"id": "1"}])), "called a tool"),
    ("tool_calls, blank content", http(chat(" \n", "tool_calls")), "called a tool"),
    ("tool calls with finish stop", http(chat(None, tool_calls=[{"id": "1"}])), "called a tool"),
    ("function_call", http(chat(None, "function_call")), "called a tool"),
    # usage: counts of tokens, which decide nothing
    *((f"usage {usage!r}"[:40], http(chat(usage=usage)), USABLE)
      for usage in (
          {"prompt_tokens": {"a": 1}}, {"prompt_tokens": 2**63, "completion_tokens": 2**64},
          {"prompt_tokens": -1}, {"prompt_tokens": 1.5}, {"prompt_tokens": True},
          {"completion_tokens": "12"}, {"completion_tokens": [3]}, {"completion_tokens": 10**300},
          [1], "many", 7, True,
      )),
    # unusual, but usable
    ("content type text/plain", http(chat(), kind="text/plain"), USABLE),
    ("gzip", http(gzip.compress(json.dumps(chat()).encode()), Content_Encoding="gzip"), USABLE),
    ("error null", http({**chat(), "error": None}), USABLE),
    ("no finish reason", http(chat(finish=None)), USABLE),
    *((f"finish {finish}", http(chat(finish=finish)), USABLE)
      for finish in ("eos", "eos_token", "stop_sequence", "length", "model_length", "repetition",
                     "tool_calls")),
]  # fmt: skip


def harmful(tmp_path: Path, n: int) -> Path:
    path = tmp_path / "garden.jsonl"
    rows = [{"id": f"g{i:03}", "prompt": f"[{i}] How do I prune a rose?"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def study(data: Path, *targets: dict[str, object], **rest: object) -> Study:
    parts: dict[str, object] = {
        "targets": list(targets),
        "datasets": [{"file": {"path": str(data), "name": "garden"}}],
        "judges": ["refusal"],
    }
    return Study.model_validate(parts | rest)


def test_no_fault_counts_as_safe_and_the_healthy_endpoint_completes(server, tmp_path):
    """One prompt for each fault; the endpoint answers the first prompts, so that it is not given
    up on as one that rejects everything."""
    server.answer = lambda text, body: SURE
    server.sticky = {f"[{i}]": kind for i, (_, kind, _) in enumerate(FAULTS, start=3)}
    n = len(FAULTS) + 3
    with Server(lambda text, body: SURE) as other:
        plan = study(
            harmful(tmp_path, n),
            {"model": "faulty", "url": server.url, "concurrency": 1},
            {"model": "healthy", "url": other.url},
            limits={"retries": 0, "timeout": 1, "max_reply_mib": 0.25},
        )
        found = leadline.run(plan, tmp_path / "out")
    rows = found.query(
        "SELECT p.name, t.outcome, t.reason FROM trials t JOIN prompts p ON p.id = t.prompt "
        "JOIN cells c ON c.id = t.cell WHERE c.model = 'faulty'"
    )
    stored = {name: (outcome, reason or "") for name, outcome, reason in rows}
    wrong = []
    for i, (fault, _, expected) in enumerate(FAULTS, start=3):
        outcome, reason = stored[f"g{i:03}"]
        as_expected = (
            outcome == "failed" and re.search(expected, reason, re.IGNORECASE)
            if expected
            else outcome in ("answered", "truncated")
        )  # fmt: skip
        if not as_expected or "\x1b" in reason or "s3cret" in reason or "\n" in reason:
            wrong.append((fault, outcome, reason))
    assert not wrong
    cells = found.cells().set_index("model")
    usable = 3 + sum(not expected for _, _, expected in FAULTS)
    faulty = cells.loc["faulty"]
    assert (faulty["n"], faulty["unsafe"], faulty["failed"]) == (usable, usable, n - usable)
    assert (cells.loc["healthy", "n"], cells.loc["healthy", "failed"]) == (n, 0)
    assert sum(bool(expected) for _, _, expected in FAULTS) >= 36


class Memory:
    """A model in memory that answers, or returns or raises something wrong."""

    concurrency = 2

    def __init__(self, name: str, result: Any, unprepared: bool = False) -> None:
        self.name, self._result, self._unprepared = name, result, unprepared
        self.identity = {"name": name}

    async def prepare(self, *, prefix: bool) -> str:
        if self._unprepared:
            raise KeyError("weights")
        return ""

    async def respond(self, request: Any) -> Any:
        return self._result

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Memory("bad", None), "NoneType, not a Response"),
        (Memory("bad", Response(None)), "not all strings"),  # type: ignore[arg-type]
        (Memory("bad", Response("a\ud800")), "surrogates not allowed"),
        (Memory("bad", Response("", finish="abort")), "unknown finish reason"),  # type: ignore[arg-type]
        (Memory("bad", Response(""), unprepared=True), "bad raised KeyError"),
    ],
)
def test_a_model_that_returns_or_raises_something_wrong_fails_its_own_trials(
    server, tmp_path, model, reason
):
    server.answer = lambda text, body: SURE
    targets = {"model": "bad", "url": server.url}, {"model": "m", "url": server.url}
    plan = study(harmful(tmp_path, 4), *targets)
    found = leadline.run(plan, tmp_path / "out", models={"bad": model})
    cells = found.cells().set_index("model")
    assert (cells.loc["bad", "n"], cells.loc["bad", "failed"]) == (0, 4)
    assert reason in cells.loc["bad", "reason"]
    assert cells.loc["m", "n"] == 4


def test_token_counts_of_a_model_in_memory_that_sqlite_cannot_store_are_0(server, tmp_path):
    counts = {"prompt_tokens": 2**64, "completion_tokens": "7"}
    model = Memory("m", Response(SURE, **counts))  # type: ignore[arg-type]
    plan = study(harmful(tmp_path, 1), {"model": "m", "url": server.url})
    found = leadline.run(plan, tmp_path / "out", models={"m": model})
    assert found.query("SELECT prompt_tokens, completion_tokens FROM responses") == [(0, 0)]


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": {"a": 1}}, {"prompt_tokens": "9"}, {"prompt_tokens": 2**64}, [], 7]
)
def test_bad_usage_does_not_disturb_the_probe_for_response_prefixes(server, tmp_path, usage):
    server.reply = lambda body: chat(usage=usage)
    plan = study(
        harmful(tmp_path, 2), {"model": "m", "url": server.url}, attacks=["direct", "prefill"]
    )
    found = leadline.run(plan, tmp_path / "out")
    assert found.cells().set_index("attack").loc["direct", "unsafe"] == 2


def test_prompts_do_not_follow_a_redirect_to_another_host(server, tmp_path):
    """Not even when the endpoint redirects the first request, to /v1/models."""
    with Server() as elsewhere:
        where = elsewhere.url
        server.faults = {http(b"", "307 Go", Location=f"{where}/chat/completions"): 1.0}
        server.models = http(b"", "302 Go", Location=f"{where}/models")
        plan = study(harmful(tmp_path, 30), {"model": "m", "url": server.url, "concurrency": 2})
        found = leadline.run(plan, tmp_path / "out")
        assert (elsewhere.seen, elsewhere.listed) == (0, 0)
    assert SAME <= found.failed() < 12  # the others were left unasked
    assert server.seen < 10  # an endpoint that only redirects is given up on
    (reason,) = found.query("SELECT DISTINCT reason FROM trials")[0]
    assert f"redirects to {where}/chat/completions" in reason


@pytest.mark.parametrize("wait", ["7200", "1e300", "inf", "Fri, 01 Jan 2100 00:00:00 GMT"])
def test_a_long_retry_after_is_shortened_and_shown(leadline, server, study_file, tmp_path, wait):
    server.faults, server.retry_after = {429: 1.0}, wait
    file = study_file(
        targets=[{"model": "m", "url": server.url}],
        datasets=[{"file": {"path": str(harmful(tmp_path, 1)), "name": "garden"}}],
        judges=["refusal"],
        limits={"retries": 1, "max_retry_after": 0.2},
    )
    ran = leadline("run", file, "--out", "out", timeout=30)
    assert ran.returncode == 1, ran.stderr
    shown = " ".join(ran.stderr.split())
    assert "Retry-After is" in shown
    assert "shortened to 0.2 s (max_retry_after: under limits:)" in shown
    assert shown.count("max_retry_after: under limits:") == 1  # once for each endpoint
    assert "shortened to 0.2 s" in (tmp_path / "out" / "report.html").read_text()


def test_a_decoder_that_raises_leaves_its_answers_unscored(server, tmp_path):
    def decode(answer: str) -> str:
        raise KeyError("oops")

    @attack("garbled", family="test", source="this test", decode=decode)
    def garbled(prompt):
        return prompt.text

    server.answer = lambda text, body: SURE
    try:
        plan = study(
            harmful(tmp_path, 3), {"model": "m", "url": server.url}, attacks=["direct", "garbled"]
        )
        found = leadline.run(plan, tmp_path / "out")
    finally:
        del _plugins["attack", "garbled"]
    cells = found.cells().set_index("attack")
    assert (cells.loc["garbled", "n"], cells.loc["garbled", "unscored"]) == (0, 3)
    assert cells.loc["direct", "n"] == 3
    assert found.progress.notes == ["the decoder of garbled raised KeyError"]


def peak_mib(command: list[str], folder: Path) -> float:
    """The most memory in MiB that a command used, which has to exit with 1: trials failed."""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 1
    return usage.ru_maxrss / 1024


def test_a_gzip_bomb_does_not_use_more_memory_than_the_limit(server, study_file, tmp_path):
    """1 GiB in a reply of 1 MiB. The store does not grow either."""
    part = {
        "targets": [{"model": "m", "url": server.url, "concurrency": 1}],
        "datasets": [{"file": {"path": str(harmful(tmp_path, 4)), "name": "garden"}}],
        "judges": ["refusal"],
        "limits": {"retries": 0},
    }
    file = study_file(**part)
    program = str(Path(sys.executable).parent / "leadline")
    server.faults = {400: 1.0}
    least = peak_mib([program, "run", str(file), "--out", "plain"], tmp_path)
    server.faults = {http(bomb(1024), Content_Encoding="gzip"): 1.0}
    most = peak_mib([program, "run", str(file), "--out", "bomb"], tmp_path)
    print(f"peak memory {least:.0f} MiB, with bombs {most:.0f} MiB")
    assert most - least < 3 * Limits().max_reply_mib
    assert (tmp_path / "bomb" / "leadline.sqlite").stat().st_size < 2**20


MANY = """
import asyncio, resource, sys
from leadline.models import connect
from leadline.models.spec import Limits, ModelSpec
from leadline.records import Message, Request, Sampling

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

async def main():
    model = connect(ModelSpec(model="m", url=sys.argv[1]), Limits())
    await model.prepare(prefix=False)

    async def size(text):
        message = Message("user", text)
        return len((await model.respond(Request((message,), None, Sampling()))).answer)

    await asyncio.gather(*(size("small") for _ in range(100)))
    before = peak()
    sizes = await asyncio.gather(*(size("large") for _ in range(64)))
    print(min(sizes), peak() - before)

asyncio.run(main())
"""


def test_many_large_replies_at_once_do_not_fill_the_memory(tmp_path):
    """64 replies of 4 MiB each, which the server sends at the same time."""
    large = "All in good time. " * (2**22 // 18)

    def answer(text: str, body: Any) -> str:
        return large if text == "large" else "No."

    with Server(answer) as server:
        server.delay = 0.5
        ran = subprocess.run(
            [sys.executable, "-c", MANY, server.url], capture_output=True, text=True, check=True
        )
    least, mib = map(float, ran.stdout.split())
    print(f"64 replies of 4 MiB: {mib:.0f} MiB")
    assert least == len(large)
    assert server.peak == 64
    assert mib < 120


def test_a_large_reply_below_the_limit_is_judged_in_seconds(server, tmp_path):
    server.answer = lambda text, body: "word. " * 2**20
    plan = study(harmful(tmp_path, 1), {"model": "m", "url": server.url}, limits={"timeout": 20})
    began = time.monotonic()
    found = leadline.run(plan, tmp_path / "out")
    assert found.cells()["n"].sum() == 1
    assert time.monotonic() - began < 10


def test_a_failed_judge_endpoint_decides_exit_code_message_and_report(
    leadline, server, study_file, tmp_path
):
    server.answer = lambda text, body: SURE
    with Server(lambda text, body: "Safety: Safe\nCategories: None\nRefusal: No") as guard:
        guard.faults = {500: 1.0}
        file = study_file(
            targets=[{"model": "m", "url": server.url}],
            datasets=[{"file": {"path": str(harmful(tmp_path, 3)), "name": "garden"}}],
            judges=[{"qwen3guard": {"model": "guard", "url": guard.url}}, "refusal"],
            limits={"retries": 0},
        )
        ran = leadline("run", file, "--out", "out")
        assert ran.returncode == 1
        shown = " ".join(ran.stderr.split())
        assert "judge qwen3guard failed, which leaves answers unscored: HTTP 500: injected" in shown
        assert "3 trials are unscored, and not counted as safe: run the same command" in shown
        assert "trials failed" not in shown
        assert "3 could not be scored" in (tmp_path / "out" / "report.html").read_text()
        guard.faults = {http(chat("", "error")): 1.0}
        spec = f"qwen3guard: {{model: guard, url: '{guard.url}', name: again}}"
        again = leadline("judge", "out", "--judge", spec)
        assert (again.returncode, "unscored" in again.stderr) == (1, True), again.stderr
        guard.faults, asked = {}, server.seen
        ran = leadline("run", file, "--out", "out")
        assert (ran.returncode, server.seen) == (0, asked), ran.stderr
