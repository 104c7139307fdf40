"""A GGUF file as a model: the same answers as the folder it was written from."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import leadline
from leadline import LeadlineError, Study
from leadline.models.checkpoint import Checkpoint, local_path

from . import gguf_models, tiny_models

PROMPTS = [f"How do I prune a rose of kind {n}?" for n in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    pytest.importorskip("gguf")
    return gguf_models.write(folder, folder.parent / "tiny.gguf")


@pytest.fixture
def garden(tmp_path: Path) -> Path:
    path = tmp_path / "garden.jsonl"
    rows = ({"prompt": p, "harmful": True, "target": "Cut it above a bud."} for p in PROMPTS)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(out: Path, model: str) -> dict[tuple[str, str], str]:
    rows = leadline.results(out).query(
        "SELECT o.attack, o.prompt, r.answer FROM outcomes o JOIN responses r ON r.key = o.key "
        "WHERE o.model = ?",
        model,
    )
    return {(attack, prompt): answer for attack, prompt, answer in rows}


def test_a_run_gives_the_answers_of_the_folder(
    file: Path, folder: Path, garden: Path, tmp_path: Path, capfd: Any
):
    targets = [{"model": str(file), "name": "file"}, {"model": str(folder), "name": "folder"}]
    study = Study.model_validate({
        "targets": targets, "datasets": [{"file": {"path": str(garden)}}], "judges": ["refusal"],
        "attacks": ["direct", {"prefill": {"k": [3]}}], "sampling": {"max_tokens": 12},
    })  # fmt: skip
    results = leadline.run(study, tmp_path / "out")
    assert capfd.readouterr().err == ""  # no bars of other libraries
    assert results.failed() == 0
    of_file = answers(tmp_path / "out", "file")
    assert len(of_file) == 2 * len(PROMPTS)
    assert len(set(of_file.values())) > len(PROMPTS)  # not the same answer to everything
    assert of_file == answers(tmp_path / "out", "folder")


def test_depth_measures_need_weights_and_get_them(file: Path, folder: Path, garden: Path, tmp_path):
    """KL of the file's model from the folder's: the same weights, so it is 0 at every position."""
    found = leadline.measure_depth(
        str(file), str(folder), dataset={"file": {"path": str(garden)}}, judge="refusal",
        out=tmp_path / "out", budget="quick", measures=["kl", "prefill"],
    ).to_dict()  # fmt: skip
    assert {p["model"] for p in found["prefill"]} == {str(file)}
    assert found["kl"]
    assert max(abs(p["value"]) for p in found["kl"]) < 1e-5


def test_a_model_trained_from_a_file_is_saved_as_a_folder(file: Path, tmp_path: Path):
    from leadline.align.repair import TrainingConfig, finetune

    data = tmp_path / "sums.jsonl"
    rows = ({"prompt": f"{n} and {n}?", "completion": f"{2 * n}"} for n in range(8))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = finetune(
        file, data, tmp_path / "tuned", training=TrainingConfig(steps=2, batch=4, lr=1e-3),
        evaluation=None,
    )  # fmt: skip
    assert list(done.folder.glob("*.safetensors"))
    assert "quantization_config" not in json.loads((done.folder / "config.json").read_text())
    trained = Checkpoint.find(done.folder)
    assert trained.revision != Checkpoint.find(file).revision
    from leadline.models.template import Template
    from leadline.models.weights import Weights

    before = Weights.load(str(file), None, "float32", "cpu").model.state_dict()
    after = Weights.load(trained.path, None, "float32", "cpu").model.state_dict()
    assert before.keys() == after.keys()
    changed = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < changed < 0.01  # two steps of 1e-3 from the file's own weights
    assert Template.load(trained.path).tokenizer.chat_template == tiny_models.CHATML


def test_a_file_is_identified_by_its_content(file: Path, tmp_path: Path):
    copy = tmp_path / "copy.gguf"
    shutil.copy(file, copy)
    assert Checkpoint.find(copy).revision == Checkpoint.find(file).revision
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    assert Checkpoint.find(copy).revision != Checkpoint.find(file).revision


def test_a_folder_with_one_file_is_that_file_and_with_several_asks_which(
    file: Path, tmp_path: Path, study_file: Any, leadline: Any
):
    for name in ("q4.gguf", "q8.gguf"):
        shutil.copy(file, tmp_path / name)
        if name == "q4.gguf":
            assert local_path(tmp_path) == tmp_path / name
    study = study_file(targets=[str(tmp_path)], datasets=["guild"])
    for arguments in (("run", study), ("depth", str(tmp_path))):
        ran = leadline(*arguments, "--out", "out")
        assert ran.returncode == 2
        assert len(ran.stderr.strip().splitlines()) == 1, ran.stderr
        assert (
            "2 GGUF files and no config.json: give the path of one of them: q4.gguf, q8.gguf"
            in (ran.stderr)
        )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("part-00001-of-00002.gguf", b"GGUF", "one part of a split model, .*llama-gguf-split"),
        ("m.gguf", b"<html>", "not a GGUF file: download it again"),
        ("gone.gguf", None, "there is no such file"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_one_line(tmp_path: Path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LeadlineError, match=message) as caught:
        Checkpoint.find(path)
    assert "\n" not in str(caught.value)


def test_without_the_package_the_error_says_how_to_get_it_or_serve_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    with pytest.raises(LeadlineError) as caught:
        leadline.run(
            Study.model_validate({"targets": [str(path)], "datasets": ["guild"]}), tmp_path / "out"
        )
    assert "pip install 'leadline[gguf]'" in str(caught.value)
    assert "llama-server -m m.gguf" in str(caught.value)
    assert not (tmp_path / "out").exists()
