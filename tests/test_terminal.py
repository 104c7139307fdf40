"""What others wrote reaches the terminal without escape sequences and without markup."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest

TITLE = "\x1b]0;pwn\x07"  # sets the title of the window
NAMES = ("[red]x[/red]", f"m{TITLE}", "[/x]", "a\nleadline: 0 trials failed", "{task}", "b\u202ec")


def in_terminal(command: list[str], cwd: Path) -> str:
    """The output of a command that runs in a terminal (a pseudo terminal)."""
    main, other = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    process = subprocess.Popen(
        command, cwd=cwd, stdin=other, stdout=other, stderr=other, env=environment
    )
    os.close(other)
    parts = []
    while select.select([main], [], [], 60)[0]:
        try:
            part = os.read(main, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(main)
    process.wait(60)
    return b"".join(parts).decode("utf-8", "replace")


def hostile_study(server, garden, study_file) -> Path:
    server.sticky = {"[1]": 400}
    server.error_body = {"error": {"message": f"no{TITLE} [bold]luck[/bold] \x1b[2J"}}
    server.answer = lambda text, body: f"{TITLE}[red]no label[/x] \x1b[31m"
    judge = {"model": f"j{TITLE}", "name": f"[blink]j{TITLE}", "url": server.url}
    return study_file(
        targets=[
            *({"model": "m", "name": name, "url": server.url} for name in NAMES),
            {"model": f"gone{TITLE}[red]", "url": "http://127.0.0.1:9/v1"},
        ],
        datasets=[{"file": {"path": str(garden(3)), "name": f"d{TITLE}[red]"}}],
        judges=[{"qwen3guard": judge}],
        limits={"retries": 0},
    )


def safe(output: str) -> None:
    """No window title, no cleared screen, no bell; rich's own colours and cursor are fine."""
    assert output
    for escape in ("\x1b]0;", "\x07", "\x1b[2J\x1b", "\u202e"):
        assert escape not in output, repr(output[max(0, output.find(escape) - 80) :][:160])
    assert "\x1b[2J" not in output


@pytest.mark.parametrize("verbose", [False, True])
def test_a_run_with_hostile_names_and_replies(server, garden, study_file, tmp_path, verbose):
    """In a real terminal: progress bars, log messages, findings, tables."""
    file = hostile_study(server, garden, study_file)
    command = [str(Path(sys.executable).parent / "leadline"), *["--verbose"] * verbose]
    run = in_terminal([*command, "run", str(file), "--out", "out"], tmp_path)
    safe(run)
    assert "[red]x[/red]" in run, "markup is shown, not interpreted"
    assert "Traceback" not in run
    plan = in_terminal([*command, "run", str(file), "--dry-run"], tmp_path)
    safe(plan)
    assert "[red]x[/red]" in plan
    assert "[/x]" in plan
    assert not [line for line in plan.splitlines() if line.startswith("leadline: 0 trials")]
    safe(in_terminal([*command, "report", "out"], tmp_path))
    judge = json.dumps({"qwen3guard": {"model": "g", "name": f"[red]{TITLE}", "url": server.url}})
    judged = in_terminal([*command, "judge", "out", "--judge", judge], tmp_path)
    safe(judged)
    assert "unscored" in judged
    agreed = [*command, "judges", "agree", "out", f"[blink]j{TITLE}", f"[red]{TITLE}"]
    safe(in_terminal(agreed, tmp_path))


def test_piped_output_has_no_escapes_either(leadline, server, garden, study_file, tmp_path):
    file = hostile_study(server, garden, study_file)
    for arguments in (
        ("run", file, "--out", "out"),
        ("report", "out"),
        ("report", "nowhere\x1b[2J"),
    ):
        ran = leadline("--verbose", *arguments)
        assert "\x1b" not in ran.stdout + ran.stderr
        assert "Traceback" not in ran.stderr
    assert "⟨U+001B⟩" in ran.stderr
