"""Who can read the result files, and what an interrupted write leaves behind."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

import leadline as package
from leadline import LeadlineError
from leadline.files import write_private
from leadline.store import FILE, Store


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def modes(folder: Path) -> dict[str, int]:
    """The modes of a folder and of all that it holds, by relative path."""
    return {str(p.relative_to(folder.parent)): mode(p) for p in (folder, *folder.rglob("*"))}


def only_for_the_owner(folder: Path) -> None:
    found = modes(folder)
    assert len(found) > 1
    assert {name: oct(m) for name, m in found.items() if m & 0o077} == {}


@pytest.fixture
def usual_mask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_only_the_owner_can_read_the_results_of_a_run(
    leadline, server, garden, study_file, tmp_path, usual_mask
):
    file = study_file(
        targets=[{"model": "m", "url": server.url}],
        datasets=[{"file": {"path": str(garden(5)), "name": "garden"}}],
        judges=["refusal"],
    )
    ran = leadline("run", file, "--out", "a/results")
    assert ran.returncode == 0, ran.stderr
    only_for_the_owner(tmp_path / "a")
    assert {"report.html", "summary.json", FILE} <= {
        p.name for p in (tmp_path / "a/results").iterdir()
    }
    labels = tmp_path / "labels.csv"
    labels.write_text("prompt,response,label\nHow?,No.,safe\nHow?,So.,unsafe\n")
    ran = leadline("judges", "check", labels, "--judge", "refusal", "--out", "check.json")
    assert ran.returncode == 0, ran.stderr
    assert mode(tmp_path / "check.json") == 0o600


def test_the_files_of_sqlite_are_private_while_a_run_writes(tmp_path, usual_mask):
    with Store(tmp_path / "out", write=True) as store:
        store.describe("name", "value")
        assert set(modes(tmp_path / "out")) >= {f"out/{FILE}-wal", f"out/{FILE}-shm"}
        only_for_the_owner(tmp_path / "out")


def test_a_store_of_an_earlier_version_becomes_private(tmp_path, usual_mask):
    with Store(tmp_path, write=True) as store:
        store.describe("name", "value")
    (tmp_path / FILE).chmod(0o644)
    with Store(tmp_path, write=True) as store:
        assert mode(tmp_path / FILE) == 0o600
        assert store.description("name") == "value"


def test_only_the_owner_can_read_a_depth_report(tmp_path, usual_mask):
    package.measure_depth(
        "organism:aligned", out=tmp_path / "depth", budget="quick", measures="prefill"
    )
    only_for_the_owner(tmp_path / "depth")
    assert json.loads((tmp_path / "depth/depth.json").read_text())["models"]


def test_a_failed_write_leaves_the_earlier_file_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "report.html"
    write_private(file, "one")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        LeadlineError, match=r"cannot write .*report.html \(No space left on device\)"
    ):
        write_private(file, "two")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert file.read_text() == "one"
