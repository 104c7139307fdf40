"""The GitHub action runs what `leadline compare` has: its steps, in bash, as GitHub would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .stores import Row, write_store

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("broken", "code"), [(0, 0), (60, 1)])
def test_the_action_decides_and_writes_a_summary(tmp_path: Path, broken: int, code: int) -> None:
    for name, many in (("old", 0), ("new", broken)):
        rows = [Row(f"p{at}", at < many, text=f"request {at}") for at in range(100)]
        write_store(tmp_path / name, rows).close()
    steps = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["runs"]["steps"]
    (step,) = [step for step in steps if step.get("id") == "compare"]
    summary, output = tmp_path / "summary", tmp_path / "output"
    environment = {
        **os.environ, "BASELINE": "old", "CANDIDATE": "new", "MARGIN": "5pp", "OPTIONS": "",
        "GITHUB_STEP_SUMMARY": str(summary), "GITHUB_OUTPUT": str(output),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    subprocess.run(["bash", "-e", "-c", step["run"]], cwd=tmp_path, env=environment, check=True)
    assert output.read_text() == f"code={code}\n"
    assert summary.read_text().startswith("### Fail" if code else "### Pass")
