"""Peak memory of a run and of its report with 50,000 prompts.

    python benchmarks/memory.py [PROMPTS]

Starts a local server that answers every request, runs `leadline run` and `leadline report` as
processes of their own, and prints the peak resident memory (MB, 10^6 bytes) and the time of each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.server import Server


def measure(*arguments: str, folder: str) -> None:
    """Run `leadline` with these arguments and print its peak memory."""
    program = [str(Path(sys.executable).parent / "leadline"), *arguments]
    started = time.monotonic()
    process = subprocess.Popen(program, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(program)}: status {os.waitstatus_to_exitcode(status)}")
    seconds = time.monotonic() - started
    print(f"leadline {arguments[0]}: {usage.ru_maxrss * 1024 / 1e6:.0f} MB, {seconds:.0f} s")


def main(prompts: int) -> None:
    """Measure both commands with this number of prompts."""
    with tempfile.TemporaryDirectory() as folder, Server() as server:
        rows = ({"id": str(i), "prompt": f"[{i}] How do I prune a rose?"} for i in range(prompts))
        lines = (json.dumps(row) + "\n" for row in rows)
        Path(folder, "prompts.jsonl").write_text("".join(lines))
        Path(folder, "study.yaml").write_text(
            f"targets: [{{model: m, url: '{server.url}'}}]\n"
            "datasets: [{file: {path: prompts.jsonl}}]\n"
        )
        measure("run", "study.yaml", "--out", "out", folder=folder)
        measure("report", "out", folder=folder)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50_000)
