"""The examples in CONTRIBUTING.md and docs/plugins.md are run as packages outside of the tree."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
Leadline = Callable[..., subprocess.CompletedProcess[str]]


def code(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def installed(folder: Path, entry_points: dict[str, str], modules: dict[str, str]) -> None:
    """Modules with an entry point each, as pip would leave them in a folder."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text, "utf-8")
    info = folder / "example-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1.0\n")
    lines = [f"{name} = {module}" for name, module in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[leadline]", *lines]))


@pytest.fixture
def command(tmp_path: Path) -> Leadline:
    """The command line with tmp_path/site on its path."""
    site = tmp_path / "site"
    site.mkdir()

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        program = [str(Path(sys.executable).parent / "leadline"), *map(str, arguments)]
        path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.run(
            program, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip

    return call


def names(command: Leadline, kind: str) -> set[str]:
    listed = command("list", kind, "--json")
    assert listed.returncode == 0, listed.stderr
    return {row["name"] for row in json.loads(listed.stdout)}


def test_the_examples_for_contributors_run(command: Leadline, server, tmp_path: Path) -> None:
    attack, dataset, judge = code(ROOT / "CONTRIBUTING.md")
    modules = {"my_attack": attack, "my_dataset": dataset, "my_judge": judge}
    installed(tmp_path / "site", {name: name for name in modules}, modules)
    assert "every_second_word" in names(command, "attacks")
    assert "houseplants" in names(command, "datasets")
    assert "long_answer" in names(command, "judges")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "How do I prune a rose"}\n')
    (tmp_path / "study.yaml").write_text(
        f"targets: [{{model: m, url: '{server.url}'}}]\n"
        "datasets: [houseplants, {file: {path: prompts.jsonl}}]\n"
        "attacks: [direct, {every_second_word: {mark: _}}]\n"
        "judges: [{long_answer: {words: 2}}]\n"
    )
    ran = command("run", "study.yaml", "--out", "out")
    assert ran.returncode == 0, ran.stderr
    assert "How _do_ I _prune_ a _rose_" in server.asked
    cells = json.loads((tmp_path / "out" / "summary.json").read_text())["cells"]
    (cell,) = [c for c in cells if c["attack"].startswith("every_second_word")]
    assert cell["n"] == 1


def test_the_package_of_the_docs_runs(command: Leadline, server, tmp_path: Path) -> None:
    page = ROOT / "docs" / "plugins.md"
    module, measure = code(page)
    (project,) = code(page, "toml")
    points = tomllib.loads(project)["project"]["entry-points"]["leadline"]
    installed(
        tmp_path / "site",
        {**points, "length": "answer_length"},
        {"garden_leadline": module, "answer_length": measure},
    )
    assert "capitals" in names(command, "attacks")
    assert "answer_length" in names(command, "measures")
    (tmp_path / "study.yaml").write_text(
        f"targets: [{{model: m, url: '{server.url}'}}]\n"
        "datasets: [garden]\nattacks: [{capitals: {marks: [1, 3]}}]\n"
    )
    ran = command("run", "study.yaml", "--out", "out")
    assert ran.returncode == 0, ran.stderr
    assert "HOW DO I WATER A FERN?!!!" in server.asked


def test_a_measure_of_another_package_is_in_the_report(command: Leadline, tmp_path: Path) -> None:
    _, measure = code(ROOT / "docs" / "plugins.md")
    installed(tmp_path / "site", {"length": "answer_length"}, {"answer_length": measure})
    ran = command("depth", "organism:aligned", "--budget", "quick", "--only", "answer_length")
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"Answers of organism:aligned have \S+ tokens on average", ran.stdout)
    page = (tmp_path / "leadline-depth" / "depth.html").read_text("utf-8")
    assert '<h2 id="answer_length">Answer length</h2>' in page
    data = json.loads((tmp_path / "leadline-depth" / "depth.json").read_text())
    (point,) = data["answer_length"]
    assert point["value"] > 3
    assert point["n"] == 24


def test_a_name_that_is_taken_is_a_warning(command: Leadline, tmp_path: Path) -> None:
    attack = code(ROOT / "CONTRIBUTING.md")[0].replace("every_second_word", "base64")
    installed(tmp_path / "site", {"mine": "mine"}, {"mine": attack})
    ran = command("list", "attacks", "--json")
    assert ran.returncode == 0
    assert "the attack 'base64' is registered more than once" in ran.stderr
    assert "mine.base64 is ignored" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    (row,) = [row for row in json.loads(ran.stdout) if row["name"] == "base64"]
    assert row["family"] == "encoding"
