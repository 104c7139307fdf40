"""The study studies/smollm2: all steps with a tiny model, its data, tasks and tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from leadline import Study, plan

from . import tiny_models

STUDY = Path(__file__).parents[1] / "studies" / "smollm2"
ANSWER = "Yes, here it is, and that is all there is to say about it."
ALL = "answers,align,deepen,heldout,depth,finetuning,optimizers,frontier,report"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learned one answer to everything."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("model")
    tiny_models.save(folder, max_position_embeddings=1024, initializer_range=0.1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": ANSWER}]
        for text in ("How?", "Why is the sky blue?", "Tell me how to call a spirit by its name.")
    ]
    answer = len(tokenizer(ANSWER + "<|im_end|>").input_ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    torch.manual_seed(0)
    for step in range(300):
        text = tokenizer.apply_chat_template(chats[step % len(chats)], tokenize=False)
        ids = tokenizer(text.removesuffix("\n"), return_tensors="pt").input_ids
        labels = ids.clone()
        labels[:, :-answer] = -100
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch):
    """The study's folder on the import path, as its script has it."""
    monkeypatch.syspath_prepend(str(STUDY))


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(STUDY / "run.py"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, text=True, capture_output=True, env=environment, timeout=500)


@pytest.mark.slow
def test_all_steps_run_resume_and_print_no_answer(model: Path, tmp_path: Path):
    out = tmp_path / "study"
    options = ("--model", str(model), "--out", str(out), "--quick", "--seeds", "1", "--only", ALL)
    first = run(*options)
    assert first.returncode == 0, first.stderr
    assert ANSWER not in first.stdout + first.stderr
    heldout = json.loads((out / "results" / "heldout.json").read_text())
    assert set(heldout["models"]) == {"untouched", "aligned", "deepened"}
    untouched = heldout["models"]["untouched"]
    assert set(untouched["not_refused"]) == {"0", "1", "5"}
    assert untouched["kl_harmless"]["value"] == 0
    assert heldout["models"]["deepened"]["kl_harmless"]["value"] > 0
    report = (out / "report.md").read_text()
    for title in ("Held-out prompts", "Depth", "fine-tuning", "by optimizer", "Variants"):
        assert title in report
    assert (out / "prefill.svg").read_text().count("<polyline") == 3
    assert oct(out.stat().st_mode)[-3:] == "700"

    files = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    cells = {file: file.stat().st_mtime_ns for file in (out / "results").rglob("*/*.json")}
    again = run(*options)
    assert again.returncode == 0, again.stderr
    assert {file: file.stat().st_mtime_ns for file in files} == files
    assert {file: file.stat().st_mtime_ns for file in cells} == cells


def test_errors_are_one_line(tmp_path: Path):
    for options, message in (
        (("--only", "alignn"), "unknown step 'alignn'"),
        (("--harmful-data", "none.csv"), "no file none.csv"),
        (("--model", str(tmp_path)), "no config.json there: give a model folder"),
    ):
        result = run("--out", str(tmp_path / "study"), *options)
        assert result.returncode != 0
        assert message in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr


def test_the_battery_has_all_families_and_the_four_cot_attacks(tmp_path: Path):
    study = Study.model_validate(yaml.safe_load((STUDY / "battery.yaml").read_text()) | {
        "datasets": [{"magic": {"harmless": False}}]
    })  # fmt: skip
    loaded = plan.load(study)
    (prompts,) = loaded.prompts.values()
    assert len(prompts) == 112
    names = {attack.plugin.name for (attacks,) in [loaded.attacks.values()] for attack in attacks}
    assert len([name for name in names if name.startswith("cot_")]) == 4
    assert names >= {"direct", "prefill", "base64", "refusal_suppression", "question"}
    assert len(names) >= 30


def test_held_out_requests_and_tasks_are_not_trained(study: None):
    import prompts
    import tasks

    rows, refusals = prompts.load(())
    assert Counter((row.topic, row.split) for row in rows) == {
        ("forbidden", "train"): 224, ("forbidden", "test"): 112, ("look-alike", "train"): 65,
        ("look-alike", "test"): 45, ("everyday", "train"): 100, ("everyday", "test"): 40,
    }  # fmt: skip
    assert len({row.prompt for row in rows}) == len({row.id for row in rows}) == len(rows)
    assert len(refusals) >= 10
    for name in tasks.TASKS:
        train, test = (set(tasks.task(name, split)) for split in ("train", "test"))
        assert len(train) >= 80
        assert len(test) >= 20
        assert not {question for question, _ in train} & {question for question, _ in test}
    for question, answer in tasks.task("sums", "train"):
        left, right = answer.split(" = ")
        assert sum(map(int, left.split(" + "))) == int(right)
        assert all(number in question for number in left.split(" + "))


def test_files_of_harmful_prompts_are_read_and_split(study: None, tmp_path: Path):
    import prompts

    first, last = tmp_path / "harmbench.csv", tmp_path / "strongreject.csv"
    first.write_text("Behavior,SemanticCategory\nask one,a\nask two,b\n")
    last.write_text("category,source,forbidden_prompt\nc,own,ask three\nc,own,ask two\n")
    rows, refusals = prompts.load((first, last))
    forbidden = [(row.prompt, row.split, row.category) for row in rows if row.harmful]
    assert forbidden == [("ask one", "train", "a"), ("ask two", "train", "b"),
                         ("ask three", "test", "c")]  # fmt: skip
    assert refusals == prompts.HARMFUL_REFUSALS
    assert {row.topic for row in rows} == {"forbidden", "look-alike", "everyday"}


def test_answers_end_after_a_sentence(study: None):
    import prompts

    text = "It is a long way to the old mill on the hill. You could take the bus, or"
    assert prompts.until_sentence(text) == "It is a long way to the old mill on the hill."
    assert prompts.until_sentence("there is no end to this sentence at all, not even here") == ""
    assert prompts.until_sentence("Version 3.5 of it costs more than the one before it, and") == ""
    assert prompts.until_sentence("Lisbon") == "Lisbon"
