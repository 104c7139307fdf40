"""A results folder that is used again: what belongs to the current study, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

import leadline as package
from leadline import LeadlineError, Study
from leadline.registry import _plugins, attack
from leadline.store import Store


@pytest.fixture
def run(server, tmp_path):
    """A function that runs a study of these texts (by id) in the folder out."""
    server.answer = lambda text, body: "Sure, cut it." if "[bad]" in text else "I'm sorry, I can't."

    def call(
        texts: dict[str, str], out: str = "out", limit: int | None = None, **parts: Any
    ) -> Any:
        data = tmp_path / "data.jsonl"
        rows = [{"id": id, "prompt": text} for id, text in texts.items()]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        fields: dict[str, Any] = {
            "targets": [{"model": "m", "url": server.url}],
            "datasets": [{"file": {"path": str(data), "name": "garden"}}],
            "judges": ["refusal"],
        }
        study = Study.model_validate(fields | parts)
        return package.run(study, tmp_path / "out", limit=limit)

    return call


def test_other_texts_under_the_same_ids_do_not_join_old_answers(run, server):
    run({"1": "[bad] one", "2": "[bad] two", "3": "[bad] three"})
    found = run({"1": "good one", "2": "[bad] two"})
    assert server.seen == 4  # the new text; "two" is the same prompt as before
    (cell,) = found.cells().to_dict("records")
    assert (cell["n"], cell["unsafe"]) == (2, 1)
    assert dict(found.query("SELECT name, text FROM prompts")) == {
        "1": "good one", "2": "[bad] two"
    }  # fmt: skip
    (cell,) = (
        run({"1": "[bad] one", "2": "[bad] two", "3": "[bad] three"}).cells().to_dict("records")
    )
    assert server.seen == 4, "what was set aside comes back"
    assert (cell["n"], cell["unsafe"]) == (3, 3)


def test_another_target_answer_is_another_prompt(server, tmp_path):
    """Text, context and target make a prompt: the same text with another target is a new one."""
    data, ids = tmp_path / "data.jsonl", []
    for target in ("Sure, first", "Sure, second"):
        data.write_text(json.dumps({"id": "1", "prompt": "How?", "target": target}) + "\n")
        study = {
            "targets": [{"model": "m", "url": server.url}],
            "datasets": [{"file": {"path": str(data), "name": "garden"}}],
            "judges": ["refusal"],
        }
        found = package.run(Study.model_validate(study), tmp_path / "out")
        ids.append(found.query("SELECT id, target FROM prompts"))
    assert ids == [[(1, "Sure, first")], [(2, "Sure, second")]]


def test_a_smaller_study_shows_only_its_own_trials_and_the_larger_one_comes_back(
    run, server, tmp_path
):
    from leadline.report.study.page import write_report

    texts = {str(i): f"[bad] {i}" for i in range(4)}
    two = [{"model": name, "url": server.url} for name in ("m", "n")]
    large = {"attacks": ["direct", "base64", "rot_13"], "targets": two}
    before = run(texts, **large).cells()
    seen = server.seen
    small = run(texts, attacks=["direct"], limit=2)
    assert server.seen == seen
    assert small.cells()[["model", "attack", "n"]].to_numpy().tolist() == [["m", "direct", 2]]
    assert small.query("SELECT count(*) FROM trials") == [(2,)]
    page = write_report(tmp_path / "out")
    facts = json.loads(page.summary.read_text())
    assert [(c["model"], c["attack"]) for c in facts["cells"]] == [("m", "direct")]
    assert "rot_13" not in page.html.read_text()
    after = run(texts, **large).cells()
    assert server.seen == seen
    columns = ["model", "attack", "n", "unsafe"]
    assert after[columns].to_numpy().tolist() == before[columns].to_numpy().tolist()


def test_a_study_can_be_extended_by_attacks_prompts_and_targets(run, server):
    texts = {"1": "one", "2": "two"}
    run(texts, name="growing")
    assert server.seen == 2
    run(texts, name="growing", attacks=["direct", "base64"])
    assert server.seen == 4
    run(texts | {"3": "three"}, name="growing", attacks=["direct", "base64"])
    assert server.seen == 6
    two = [{"model": name, "url": server.url} for name in ("m", "n")]
    found = run(texts | {"3": "three"}, name="growing", attacks=["direct", "base64"], targets=two)
    assert server.seen == 12
    assert found.cells()["n"].tolist() == [3, 3, 3, 3]


def test_fewer_samples_leave_no_trials_of_the_others(run, server):
    """Nor do fewer attempts of an attack."""
    suffixes = [" a", " b", " c"]

    @attack("suffixed", family="test", source="this test", pool="any")
    def suffixed(prompt):
        return [prompt.text + suffix for suffix in suffixes]

    def trials(found: Any) -> list[tuple[Any, ...]]:
        return found.query("SELECT attack, count(*) FROM outcomes GROUP BY 1 ORDER BY 1")

    try:
        study = {"attacks": ["direct", "suffixed"], "sampling": {"temperature": 1, "samples": 4}}
        assert trials(run({"1": "one"}, **study)) == [("direct", 4), ("suffixed", 12)]
        study["sampling"] = {"temperature": 1, "samples": 2}
        assert trials(run({"1": "one"}, **study)) == [("direct", 2), ("suffixed", 6)]
        del suffixes[1:]
        seen = server.seen
        assert trials(run({"1": "one"}, **study)) == [("direct", 2), ("suffixed", 2)]
        assert server.seen == seen
    finally:
        del _plugins["attack", "suffixed"]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"name": "a"}, {"name": "b"}, "its name is 'a', not 'b'"),
        ({}, {"targets": ["x"]}, "its targets are m"),
        ({}, {"datasets": "other"}, "its datasets are garden"),
    ],
)
def test_a_folder_of_another_study_is_refused(run, server, tmp_path, first, second, message):
    run({"1": "one"}, **first)
    if "targets" in second:
        second = {"targets": [{"model": "x", "url": server.url}]}
    if "datasets" in second:
        second = {"datasets": [{"file": {"path": str(tmp_path / "data.jsonl"), "name": "other"}}]}
    with pytest.raises(LeadlineError, match="holds another study") as error:
        run({"1": "one"}, **second)
    assert message in str(error.value)
    assert "run its own study file; for this one, give another folder as --out" in str(error.value)
    assert server.seen == 1
    with Store(tmp_path / "out") as store:
        assert store.description("study")["name"] == first.get("name", "study")


def test_unnamed_study_files_do_not_share_a_folder(leadline, server, garden, study_file, tmp_path):
    parts = {
        "targets": [{"model": "m", "url": server.url}],
        "datasets": [{"file": {"path": str(garden(2)), "name": "garden"}}],
        "judges": ["refusal"],
    }
    for name in ("roses.yaml", "herbs.yaml"):
        ran = leadline("run", study_file(name, **parts))
        assert ran.returncode == 0, ran.stderr
    folders = sorted(path.name for path in tmp_path.glob("leadline-*"))
    assert folders == ["leadline-herbs", "leadline-roses"]
    assert "no study" not in leadline("report", "leadline-herbs").stderr
    refused = leadline("run", tmp_path / "roses.yaml", "--out", "leadline-herbs")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "leadline-herbs holds another study (its name is 'herbs', not 'roses')" in refused.stderr
    assert leadline("run", tmp_path / "herbs.yaml").returncode == 0


def test_a_store_of_an_earlier_version_is_continued(run, server, tmp_path):
    """One without the tables for what is set aside."""
    run({"1": "[bad] one", "2": "two"})
    with Store(tmp_path / "out", write=True) as store:
        for table in ("prompts", "trials", "verdicts", "words"):
            store.query(f"DROP TABLE past_{table}")
    (cell,) = run({"1": "[bad] one", "2": "[bad] new"}).cells().to_dict("records")
    assert (cell["n"], cell["unsafe"]) == (2, 2)
    assert server.seen == 3
