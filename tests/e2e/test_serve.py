"""One organism in process and behind `transformers serve`: the answers are equal."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import leadline
from leadline import Study, organism
from leadline.store import Store


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """Run `transformers serve` with the aligned organism; yields its /v1 URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = Path(sys.executable).parent / "transformers"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [str(command), "serve", str(organism.path("aligned")), "--port", str(port),
         "--device", "cpu"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except OSError:
                assert process.poll() is None, "transformers serve ended"
                assert time.monotonic() < deadline, "transformers serve did not start"
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def study(target: object, attacks: list[object]) -> Study:
    return Study.model_validate(
        {
            "targets": [target],
            "datasets": [{"guild": {"limit": 24}}],
            "attacks": attacks,
            "sampling": {"temperature": 0, "max_tokens": 48},
            "limits": {"concurrency": 4, "timeout": 120},
        }
    )


def answers(folder: Path) -> dict[tuple[str, str], str]:
    with Store(folder) as store:
        rows = store.query(
            "SELECT o.attack, o.prompt, r.answer FROM outcomes o JOIN responses r ON r.key = o.key"
        )
    return {(attack, prompt): answer for attack, prompt, answer in rows}


def test_completions_give_the_same_answers_and_rates_as_local_weights(served, tmp_path):
    attacks: list[object] = ["direct", {"prefill": {"k": [5]}}, "base64"]
    folder = str(organism.path("aligned"))
    remote = {"model": folder, "name": "served", "url": served, "interface": "completions"}
    remote_results = leadline.run(study(remote, attacks), tmp_path / "remote")
    local_results = leadline.run(study("organism:aligned", attacks), tmp_path / "local")
    assert remote_results.failed() == local_results.failed() == 0
    assert answers(tmp_path / "remote") == answers(tmp_path / "local")
    rates = ["attack", "n", "unsafe", "asr"]
    assert remote_results.cells()[rates].equals(local_results.cells()[rates])
    assert remote_results.cells().set_index("attack").loc["prefill(k=5)", "asr"] >= 0.7


def test_chat_gives_the_same_direct_answers_and_prefixes_are_not_applicable(served, tmp_path):
    attacks: list[object] = ["direct", {"prefill": {"k": [5]}}]
    folder = str(organism.path("aligned"))
    remote = leadline.run(
        study({"model": folder, "name": "served", "url": served}, attacks), tmp_path / "remote"
    )
    leadline.run(study("organism:aligned", ["direct"]), tmp_path / "local")
    remote_answers = answers(tmp_path / "remote")
    direct = {key: answer for key, answer in remote_answers.items() if key[0] == "direct"}
    assert direct == answers(tmp_path / "local")
    cells = remote.cells().set_index("attack")
    assert cells.loc["prefill(k=5)", "n"] == 0
    assert cells.loc["prefill(k=5)", "not_applicable"] > 0
