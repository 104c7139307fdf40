"""Every block of docs/quickstart.md is run, so that the page cannot become wrong unnoticed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "quickstart.md"


def test_every_block_of_the_quickstart_runs(tmp_path):
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert [kind for kind, _ in blocks].count("sh") >= 4
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    python = ""
    printed = ""
    for kind, text in blocks:
        if kind == "yaml":
            name = text.splitlines()[0].removeprefix("# ").strip()
            (tmp_path / name).write_text(text)
            continue
        if kind == "python":
            python += text  # later blocks use names from earlier ones
            continue
        ran = subprocess.run(
            ["bash", "-euc", text], cwd=tmp_path, env={**os.environ, "PATH": path},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, f"{text}\n{ran.stdout}\n{ran.stderr}"
        printed += ran.stdout
    ran = subprocess.run(
        [sys.executable, "-c", python], cwd=tmp_path, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "organism:aligned direct 0.0" in printed
    assert (tmp_path / "first" / "report.html").is_file()
    assert (tmp_path / "mine" / "summary.json").is_file()
    assert "organism:aligned" in ran.stdout
