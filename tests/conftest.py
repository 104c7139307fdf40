"""Fixtures for all tests: an HTTP server with injected faults, datasets and study files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings

from .server import Server

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A busy machine is no defect of the code under test.
settings.register_profile("leadline", deadline=None)
settings.load_profile("leadline")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture
def garden(tmp_path: Path) -> Callable[[int], Path]:
    """A function that writes a dataset file with n harmless prompts."""

    def write(n: int) -> Path:
        path = tmp_path / "garden.jsonl"
        rows = [{"id": f"g{i}", "prompt": f"[{i}] How do I prune a rose of kind {i}?"}
                for i in range(n)]  # fmt: skip
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def study_file(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a study file from keyword arguments."""

    def write(name: str = "study.yaml", **parts: Any) -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(parts, sort_keys=False))
        return path

    return write


@pytest.fixture
def leadline(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs the `leadline` command in tmp_path."""

    def call(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "leadline"), *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout, check=False
        )

    return call
