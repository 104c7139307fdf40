"""Keys and passwords reach no file and no terminal; errors repeat no prompt and no answer."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

import leadline as package
from leadline import Study
from leadline.judges import ask
from leadline.models.spec import ModelSpec
from leadline.records import Attempt, Prompt, Response
from leadline.registry import _plugins, attack
from leadline.secret import hide, scrub, without_secrets
from leadline.store import Store

from .server import Server

KEY = "sk-planted-by-this-test-0001"
BODY_KEY = "planted/body+key-0002"
NESTED = "planted-nested-header-0003"
PASSWORD = "pl4nted-pass"
QUERY = "planted-query-0004"
JUDGE_KEY = "planted-judge-key-0005"
LOGIN = base64.b64encode(f"user7:{PASSWORD}".encode()).decode()
PLANTED = (KEY, BODY_KEY, NESTED, PASSWORD, QUERY, JUDGE_KEY, LOGIN, "planted%2Fbody")


def echo(server: Server) -> None:
    """Make a server repeat what it was sent, in answers and in errors."""

    def reply(body):
        sent = json.dumps([server.headers[-1].get("Authorization"), body])
        return {
            "choices": [
                {"message": {"content": f"You sent {sent} " + "x" * 90}, "finish_reason": "stop"}
            ]
        }

    server.reply = reply
    keys = "x" * 270 + f" Bearer {KEY} {BODY_KEY} {NESTED} {LOGIN} user7:{PASSWORD}@ {QUERY}"
    server.error_body = {"error": {"message": keys}}
    server.sticky = {"[1]": 400, "[2]": "garbage", "[3]": 418}


def planted_study(server: Server, data: Path) -> dict[str, object]:
    address = server.url.removeprefix("http://")
    return {
        "name": "planted",
        "targets": [
            {"model": "a", "url": server.url, "api_key_env": "PLANTED_KEY"},
            {
                "model": "b", "url": f"http://user7:{PASSWORD}@{address}", "api_key_env": "UNSET",
            },
            {
                "model": "c", "url": server.url, "api_key_env": "PLANTED_KEY",
                "extra_body": {"api_key": BODY_KEY, "extra_headers": {"X-Auth-Token": NESTED}},
            },
            {"model": "gone", "url": f"http://user7:{PASSWORD}@127.0.0.1:9/v1?api_key={QUERY}"},
        ],
        "datasets": [{"file": {"path": str(data), "name": "garden"}}],
        "attacks": ["direct", {"prefill": {"text": "Sure"}}],
        "judges": [
            {
                "qwen3guard": {
                    "model": "guard", "url": server.url, "api_key_env": "PLANTED_KEY",
                    "extra_body": {"token": JUDGE_KEY},
                }
            },
            "refusal",
        ],
        "limits": {"timeout": 5, "retries": 0},
    }  # fmt: skip


def hits(folder: Path, *texts: str) -> list[str]:
    """Where a planted secret occurs: in the raw bytes of the files of a folder, and in texts."""
    found = []
    for file in folder.rglob("*"):
        if file.is_file():
            raw = file.read_bytes()
            found += [f"{file.name}: {secret}" for secret in PLANTED if secret.encode() in raw]
    return found + [secret for secret in PLANTED for text in texts if secret in text]


def test_a_planted_key_is_in_no_file_and_in_no_output(
    leadline, server, garden, study_file, tmp_path, monkeypatch
):
    """Store, report, summary, stdout, stderr: 0 hits, after failures and judge errors."""
    monkeypatch.setenv("PLANTED_KEY", KEY)
    echo(server)
    file = study_file(**planted_study(server, garden(6)))
    ran = leadline("--verbose", "run", file, "--out", "out", "--reveal")
    assert ran.returncode == 1, ran.stderr
    assert f"Bearer {KEY}" in {h.get("Authorization") for h in server.headers}
    with Store(tmp_path / "out") as store:
        outcomes = dict(store.query("SELECT outcome, count(*) FROM trials GROUP BY 1"))
        answers = store.query("SELECT count(*) FROM responses WHERE answer LIKE 'You sent%***%'")
        assert outcomes["failed"] > 5
        assert outcomes["answered"] > 5
        assert answers[0][0] > 5
        (study,) = store.query("SELECT value FROM meta WHERE name = 'study'")[0]
        assert "http://***@" in study
        assert json.loads(study)["targets"][2]["extra_body"]["api_key"] == "***"
    again = leadline("report", "out", "--reveal")
    judged = leadline(
        "judge", "out", "--judge",
        f"llamaguard: {{model: g, url: '{server.url}', extra_body: {{api_key: {JUDGE_KEY}}}}}",
    )  # fmt: skip
    assert "unscored" in judged.stderr
    outputs = (ran.stdout, ran.stderr, again.stdout, again.stderr, judged.stdout, judged.stderr)
    assert hits(tmp_path / "out", *outputs) == []
    assert {"leadline.sqlite", "report.html", "summary.json"} <= set(os.listdir(tmp_path / "out"))


def test_an_error_in_a_study_file_shows_no_key(leadline, study_file):
    spec = {
        "model": "m",
        "url": f"htp://user7:{PASSWORD}@host",
        "extra_body": {"api_key": BODY_KEY},
    }
    ran = leadline("run", study_file(targets=[spec], datasets=["guild"]))
    assert ran.returncode == 2
    assert "is not an HTTP URL" in ran.stderr
    assert PASSWORD not in ran.stderr
    spec = {"model": "m", "url": "http://host", "extra_body": f"api_key {BODY_KEY}"}
    assert leadline("run", study_file(targets=[spec], datasets=["guild"])).returncode == 2


def test_another_key_is_the_same_model(server, garden, tmp_path):
    """A key does not decide responses: a rotated one sends nothing again."""
    data = garden(3)
    for secret in ("first-secret-key", "second-secret-key"):
        target = {"model": "m", "url": server.url, "extra_body": {"api_key": secret, "top_k": 1}}
        package.run(
            Study.model_validate({
                "targets": [target], "judges": ["refusal"],
                "datasets": [{"file": {"path": str(data), "name": "garden"}}],
            }),
            tmp_path / "out",
        )  # fmt: skip
        assert server.bodies[0]["api_key"] == "first-secret-key"
    assert server.seen == 3


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ({"api_key": "k" * 9, "max_tokens": 5}, {"api_key": "***", "max_tokens": 5}),
        ({"eos_token": "</s>", "token_ids": [1]}, {"eos_token": "</s>", "token_ids": [1]}),
        ({"headers": {"Authorization": "Bearer x"}}, {"headers": {"Authorization": "***"}}),
        ({"accessToken": 12345678, "password": ""}, {"accessToken": "***", "password": ""}),
        ({"url": "http://u:p@h/v1?key=abc&x=1"}, {"url": "http://***@h/v1?key=***&x=1"}),
        ({"api_key_env": "MY_KEY", "url": "http://h/v1"}, {"api_key_env": "MY_KEY", "url": "http://h/v1"}),
    ],
)  # fmt: skip
def test_what_counts_as_a_secret(config, shown):
    assert without_secrets(config) == shown
    assert without_secrets(shown) == shown


def test_a_secret_is_removed_in_every_form_and_a_short_one_only_from_its_place():
    spec = ModelSpec(model="m", url="http://me:pw@host/v1", extra_body={"api_key": 'pa"ss/wörd'})
    assert spec.url
    for form in ('pa"ss/wörd', json.dumps('pa"ss/wörd'), "pa%22ss%2Fw%C3%B6rd"):
        assert "rd" not in scrub(f"<{form}>"), form
    assert scrub("http://me:pw@host and my pw") == "http***host and my pw"


def test_errors_repeat_no_prompt_and_no_answer(server, garden, tmp_path):
    """Neither from a server, nor from the exception of an attack or a judge."""

    @attack("repeats", family="test", source="this test")
    def repeats(prompt):
        raise ValueError(f"cannot use {prompt.text!r}, sorry")

    server.sticky = {"[0]": 400, "[1]": "half"}
    server.error_body = {
        "detail": [{"msg": "bad", "input": "[0] How do I prune a rose of kind 0?"}]
    }
    parts = {
        "targets": [{"model": "m", "url": server.url}],
        "datasets": [{"file": {"path": str(garden(3)), "name": "garden"}}],
        "attacks": ["direct", "repeats"],
        "judges": ["refusal"],
        "limits": {"retries": 0},
    }
    try:
        found = package.run(Study.model_validate(parts), tmp_path / "out")
    finally:
        del _plugins["attack", "repeats"]
    reasons = [reason for (reason,) in found.query("SELECT reason FROM trials WHERE reason > ''")]
    assert len(reasons) == 5
    assert not [reason for reason in reasons if "prune" in reason or "rose" in reason]
    assert any("cannot use '[36 characters of prompt or answer]', sorry" in r for r in reasons)
    assert any(r.startswith("HTTP 400: [{'msg': 'bad'") for r in reasons)


async def _crash(prompt, attempt, response):
    raise KeyError(f"no label in {response.answer}")


def test_a_crash_of_a_judge_does_not_repeat_the_answer():
    import asyncio

    answer = "First you take the secret recipe of the guild."
    verdict = asyncio.run(
        ask("j", _crash, Prompt("1", "How?", "d"), Attempt.ask("How?"), Response(answer))
    )
    assert verdict.unsafe is None
    assert "KeyError" in verdict.text
    assert "recipe" not in verdict.text + verdict.error


def test_hiding_keeps_the_rest_of_a_message():
    assert hide("HTTP 404: no model m", "How do I prune?") == "HTTP 404: no model m"
    assert hide("bad: prune it! end", "prune it!") == "bad: [9 characters of prompt or answer] end"
    assert len(hide("x" * 10_000_000, "y" * 1_000_000)) == 2001
