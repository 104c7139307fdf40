"""The installed command, run as a user runs it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import leadline as package
from leadline.registry import KINDS
from leadline.store import Store


def test_help_shows_the_commands_with_examples(leadline):
    shown = leadline("--help")
    assert shown.returncode == 0
    for command in (
        "demo", "run", "report", "judge", "judges", "list", "depth", "deepen", "finetune",
        "organism",
    ):  # fmt: skip
        assert command in shown.stdout
        assert leadline(command, "--help").returncode == 0
    assert "leadline run study.yaml --dry-run" in leadline("run", "--help").stdout
    kinds = leadline("list", "--help").stdout
    assert all(kind in kinds for kind in KINDS)


def test_importing_and_help_load_nothing_heavy():
    heavy = ("torch", "transformers", "pandas", "scipy", "plotly", "aiohttp", "numpy")
    code = (
        "import sys, leadline, leadline.cli\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(leadline.cli.app, ['--help']).exit_code == 0\n"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_listing_loads_no_torch():
    code = (
        "import sys\nfrom leadline import catalogue\n"
        "for what in ('attacks', 'datasets', 'judges', 'models'): assert catalogue.rows(what)\n"
        "print([m for m in ('torch', 'transformers', 'pandas', 'datasets') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_public_names_are_these_and_no_more():
    assert sorted(package.__all__) == [
        "Answers", "Comparison", "DepthReport", "LeadlineError", "Results", "Study", "__version__",
        "compare", "measure_depth", "results", "run", "what_matters",
    ]  # fmt: skip
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert callable(package.run)
    import leadline.engine

    assert package.run is leadline.engine.run


def test_depth_is_a_package_and_measure_depth_a_function():
    import leadline.depth.run

    assert isinstance(package.depth, ModuleType)
    assert package.measure_depth is leadline.depth.run.measure_depth


def test_lists_are_tables_or_json(leadline):
    attacks = json.loads(leadline("list", "attacks", "--json").stdout)
    names = {row["name"] for row in attacks}
    assert names >= {
        "direct", "prefill", "base64", "rot_13", "refusal_suppression", "prefix_injection",
        "cot_prefix_forged",
    }  # fmt: skip
    assert all(row["source"] and row["family"] and row["summary"] for row in attacks)
    assert "cot_prefix_forged" in leadline("list", "attacks").stdout
    datasets = {row["name"] for row in json.loads(leadline("list", "datasets", "--json").stdout)}
    assert datasets >= {
        "guild", "advbench", "harmbench", "xstest", "strongreject", "sorrybench",
        "jailbreakbench", "hexphi", "file", "magic",
    }  # fmt: skip
    judges = {row["name"] for row in json.loads(leadline("list", "judges", "--json").stdout)}
    assert judges >= {
        "guild", "refusal", "qwen3guard", "llamaguard", "harmbench", "strongreject", "rubric",
        "panel",
    }  # fmt: skip
    models = {row["name"] for row in json.loads(leadline("list", "models", "--json").stdout)}
    assert models >= {"organism:base", "organism:aligned", "organism:deep"}
    measures = {row["name"] for row in json.loads(leadline("list", "measures", "--json").stdout)}
    assert measures >= {"kl", "prefill", "decoding", "gcg", "finetuning", "refusal_prefix"}


def test_errors_are_one_line_and_exit_with_2(leadline, tmp_path):
    (tmp_path / "bad.yaml").write_text("targets: [organism:alinged]\ndatasets: [guild]\n")
    for arguments, message in [
        (("run", "none.yaml"), "cannot read none.yaml"),
        (("list", "atacks"), "did you mean 'attacks'"),
        (("report", "nowhere"), "no study at nowhere"),
        (("run", "bad.yaml"), "did you mean"),
    ]:
        ran = leadline(*arguments)
        assert ran.returncode == 2, ran.stderr
        assert message in ran.stderr
        assert len(ran.stderr.strip().splitlines()) == 1, ran.stderr


def test_a_dry_run_counts_and_sends_nothing(leadline, server, garden, study_file):
    file = study_file(
        targets=[{"model": "m", "url": server.url, "thinking": ["on", "off"]}],
        datasets=[{"file": {"path": str(garden(10))}}],
        attacks=["direct", "base64", {"prefill": {"k": [5]}}],
        sampling={"samples": 2, "max_tokens": 100},
    )
    (row,) = json.loads(leadline("run", file, "--dry-run", "--json").stdout)
    assert row["trials"] == 2 * 10 * 3 * 2
    assert row["requests"] == 2 * 10 * 2 * 2  # prefill(k=5) has no target to take
    assert row["answer_tokens"] == row["requests"] * 100
    assert row["prompt_tokens"] > row["requests"] * 5
    assert "requests" in leadline("run", file, "--dry-run").stdout
    assert server.seen == 0


def test_a_run_writes_a_report_and_a_summary(leadline, server, garden, study_file, tmp_path):
    file = study_file(
        name="roses.yaml",
        **{"targets": [{"model": "m", "url": server.url}]},
        datasets=[{"file": {"path": str(garden(20))}}],
    )
    ran = leadline("run", file, "--out", "out")
    assert ran.returncode == 0, ran.stderr
    assert "Open out/report.html" in ran.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    (cell,) = summary["cells"]
    assert set(cell) >= {
        "model", "dataset", "attack", "thinking", "n", "unsafe", "asr", "low", "high", "failed",
        "not_applicable",
    }  # fmt: skip
    assert (cell["n"], cell["asr"]) == (20, 0.0)


def test_failed_trials_exit_with_1_and_a_hint_to_run_again(leadline, server, garden, study_file):
    server.sticky = {"[3]": 400}
    file = study_file(
        targets=[{"model": "m", "url": server.url}],
        datasets=[{"file": {"path": str(garden(6))}}],
    )
    ran = leadline("run", file, "--out", "out")
    assert ran.returncode == 1
    assert "1 trials failed: run the same command again" in ran.stderr
    server.sticky = {}
    assert leadline("run", file, "--out", "out").returncode == 0


def test_ctrl_c_exits_with_130_and_a_hint_to_run_again(server, garden, study_file, tmp_path):
    server.delay = 0.05
    file = study_file(
        targets=[{"model": "m", "url": server.url}],
        datasets=[{"file": {"path": str(garden(600))}}],
        limits={"concurrency": 4},
    )
    command = [str(Path(sys.executable).parent / "leadline"), "run", str(file), "--out", "out"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while server.seen < 40:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "run the same command again to resume" in errors
    assert "Traceback" not in errors
    with Store(tmp_path / "out") as store:
        assert store.query("SELECT count(*) FROM responses")[0][0] >= 30
