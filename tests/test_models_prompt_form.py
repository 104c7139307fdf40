"""Prompts over /v1/completions: as token ids, or as text where the server does not take those.

The servers count tokens with the tokenizer of an organism, as real ones report them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

import leadline
from leadline import Study, organism
from leadline.store import Store

from .server import Server

FOLDER = str(organism.path("aligned"))
ERRORS = {
    # llama-cpp-python 0.3.36 and transformers serve 5.23, as they answer token ids
    500: {"error": {"message": "[{'type': 'string_type', 'loc': ('body', 'prompt', 'str')}]",
                    "type": "internal_server_error", "param": None, "code": None}},
    400: {"detail": "prompt must be a string."},
}  # fmt: skip


class Completions:
    """A /v1/completions server. `text` counts the tokens of a text, `ids` those of token ids."""

    def __init__(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(FOLDER)
        self.text = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
        self.ids = len

    def reply(self, body: Any) -> Any:
        prompt = body["prompt"]
        count = self.text(prompt) if isinstance(prompt, str) else self.ids(prompt)
        return {
            "choices": [{"text": "A reply.", "finish_reason": "stop"}],
            "usage": {"prompt_tokens": count, "completion_tokens": 3},
        }


def run(server: Server, out: Any, model: str = FOLDER, **parts: Any) -> tuple[Any, str]:
    target = {"model": model, "name": "m", "url": server.url, "interface": "completions"}
    study = Study.model_validate(
        {
            "targets": [target],
            "datasets": [{"guild": {"limit": 12}}],
            "attacks": ["direct", {"prefill": {"k": [3]}}],
            **parts,
        }
    )
    results = leadline.run(study, out)
    with Store(out) as store:
        return results, store.description("model:m")["prefix"]


def rejecting(server: Server, status: int) -> None:
    """Answer token ids with `status`."""
    server.refuse = lambda body: not isinstance(body["prompt"], str)
    server.refuse_status, server.error_body = status, ERRORS[status]


@pytest.mark.parametrize("status", ERRORS)
def test_a_server_that_rejects_token_ids_is_sent_text(server, tmp_path, status):
    rejecting(server, status)
    server.reply = Completions().reply
    results, way = run(server, tmp_path / "out")
    assert results.failed() == 0
    assert results.cells()["n"].sum() > 0
    assert way == "rendered with the chat template and sent to /v1/completions as text"
    rejected = [body for body in server.bodies if not isinstance(body["prompt"], str)]
    assert 1 <= len(rejected) <= 4  # the probe decides it, before the study
    assert rejected == server.bodies[: len(rejected)]


def test_a_server_that_takes_token_ids_is_sent_token_ids(server, tmp_path):
    server.reply = Completions().reply
    results, way = run(server, tmp_path / "out")
    assert results.failed() == 0
    assert way.endswith("as token ids")
    assert all(isinstance(body["prompt"], list) for body in server.bodies)


def test_token_ids_that_a_proxy_decodes_with_another_tokenizer_are_not_sent(server, tmp_path):
    completions = Completions()
    completions.ids = lambda ids: 3 * len(ids)
    server.reply = completions.reply
    results, way = run(server, tmp_path / "out")
    assert results.failed() == 0
    assert way.endswith("as text")
    assert all(isinstance(body["prompt"], str) for body in server.bodies[1:])


def test_the_bos_of_the_template_is_left_out_if_the_server_adds_one(server, tmp_path):
    rejecting(server, 400)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    tokenizer.bos_token = bos = "<|user|>"  # the first token of its template, as in SmolLM2
    tokenizer.save_pretrained(tmp_path / "model")
    completions = Completions()
    plain = completions.text
    completions.text = lambda text: 1 + plain(text)
    server.reply = completions.reply
    _, way = run(server, tmp_path / "out", str(tmp_path / "model"))
    assert way.endswith("as text")
    sent = [body["prompt"] for body in server.bodies if isinstance(body["prompt"], str)]
    assert sent[0].startswith(bos)
    assert not any(prompt.startswith(bos) for prompt in sent[1:])


def test_a_text_of_which_the_server_counts_other_tokens_is_in_the_report(server, tmp_path):
    rejecting(server, 400)
    completions = Completions()
    completions.text = lambda text: 99
    server.reply = completions.reply
    _, way = run(server, tmp_path / "out")
    assert "as text, in which the server counts 99 tokens instead of" in way


def test_a_server_that_always_fails_shows_its_own_error(server, tmp_path):
    server.faults, server.error_body = {400: 1.0}, {"detail": "no such model"}
    results, _ = run(server, tmp_path / "out")
    reasons = results.query("SELECT DISTINCT reason FROM trials WHERE reason IS NOT NULL")
    assert reasons == [("HTTP 400: no such model",)]
    assert results.cells()["n"].sum() == 0


def test_a_judge_behind_completions_is_sent_text_too(server, tmp_path):
    rejecting(server, 400)
    server.reply = Completions().reply
    judge = {"qwen3guard": {"model": FOLDER, "url": server.url, "interface": "completions"}}
    results, _ = run(server, tmp_path / "out", judges=[judge])
    assert results.failed() == 0
    assert sum(not isinstance(body["prompt"], str) for body in server.bodies) <= 2
