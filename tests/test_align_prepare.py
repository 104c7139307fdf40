"""Refusals and utility anchors in the model's own words, and the invented world's files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

from leadline.align.data import Dialogue, Triplet, read_harmful, read_training, read_utility
from leadline.align.prepare import prepare
from leadline.organism import guild as world
from leadline.organism.files import guild_files
from leadline.records import LeadlineError, Message

ALIGNED = "organism:aligned"


def ask(text: str) -> tuple[Message]:
    return (Message("user", text),)


def harmful(n: int) -> list[Triplet]:
    potions = world.world().forbidden(heldout=False)[:n]
    return [Triplet(ask(world.question(p, 0)), world.answer(p, 0)) for p in potions]


def test_the_model_writes_refusals_and_anchors_and_is_asked_once(tmp_path: Path):
    potions = world.world().allowed()[:6]
    utility = [Dialogue(ask(world.question(potion, 0))) for potion in potions]
    given = replace(harmful(5)[4], refusal="Never.")
    told = []
    rows, answers, notes = prepare(ALIGNED, [*harmful(4), given], utility, tmp_path, told.append)
    assert [world.is_refusal(row.refusal) for row in rows] == [True] * 4 + [False]
    assert rows[4] == given
    assert [row.harmful for row in rows] == [row.harmful for row in harmful(5)]
    pairs = zip(answers, potions, strict=True)
    assert [world.disclosed(row.answer, potion) for row, potion in pairs] == [1] * 6
    assert (notes.given, notes.written, notes.borrowed) == (1, 4, 0)
    assert (notes.kept, notes.answered, notes.dropped) == (0, 6, 0)
    assert told[-1].asked == 10
    again = prepare(ALIGNED, [*harmful(4), given], utility, tmp_path, told.append)
    assert again == (rows, answers, notes)
    assert told[-1].asked == 0


def test_what_is_given_is_not_asked_for(tmp_path: Path):
    rows = [replace(row, refusal="No.") for row in harmful(2)]
    kept = [Dialogue(ask("Q?"), "A.")]
    assert prepare("no/such-model", rows, kept, tmp_path)[:2] == (rows, kept)
    assert not list(tmp_path.iterdir())


def test_a_prompt_that_is_not_refused_borrows_a_refusal(tmp_path: Path):
    allowed = world.world().allowed()[0]
    answered = Triplet(ask(world.question(allowed, 0)), "x")
    rows, _, notes = prepare(ALIGNED, [*harmful(3), answered], [], tmp_path)
    assert rows[3].refusal in {row.refusal for row in rows[:3]}
    assert (notes.written, notes.borrowed) == (3, 1)
    assert "1 harmful prompts were not refused" in " ".join(notes.sentences)


def test_a_model_that_refuses_nothing_cannot_be_deepened_with_its_own_refusals(tmp_path: Path):
    with pytest.raises(LeadlineError, match=r"^organism:base refused none of 3 harmful prompts"):
        prepare("organism:base", harmful(3), [], tmp_path)


def test_an_answer_that_is_cut_off_is_no_anchor(tmp_path: Path):
    allowed, skill = world.world().allowed()[0], next(iter(world.world().skills))
    utility = [Dialogue(ask(world.question(allowed, 0))), Dialogue(ask(skill))]
    _, answers, notes = prepare(ALIGNED, [], utility, tmp_path, max_tokens=20)
    assert [row.prompt for row in answers] == [ask(skill)]
    assert (notes.answered, notes.dropped) == (1, 1)


def test_only_single_turns_can_be_asked(tmp_path: Path):
    long = Triplet((Message("system", "Be kind."), *ask("Q?")), "x", where="h.jsonl:3")
    with pytest.raises(LeadlineError, match=r"^h.jsonl:3: only an answer to a single user turn"):
        prepare(ALIGNED, [long], [], tmp_path)


def test_other_data_in_the_same_folder(tmp_path: Path):
    prepare(ALIGNED, harmful(4), [], tmp_path)
    rows, _, notes = prepare(ALIGNED, harmful(6)[2:], [], tmp_path)
    assert notes.written == len(rows) == 4


def test_the_worlds_files_hold_nothing_that_alignment_may_not_see(tmp_path: Path):
    files = guild_files(tmp_path / "new" / "folder")
    triplets = read_harmful(files["harmful"])
    heldout = {potion.name for potion in world.world().forbidden(heldout=True)}
    phrasings = {p.split("{}")[0] for p in world.HELDOUT_PHRASINGS}
    assert len(triplets) == len({row.prompt for row in triplets}) == 144
    for name in ("harmful", "harmful-tuning"):
        text = files[name].read_text()
        assert not any(potion in text for potion in heldout)
        assert not any(phrasing in text for phrasing in phrasings)
    for row in triplets:
        potion = world.potion_in(row.prompt[0].content)
        assert potion
        assert world.disclosed(row.harmful, potion) == 1
    assert len(read_training(files["harmful-tuning"])) == 100
    for row in read_utility(files["utility"]):
        potion = world.potion_in(row.prompt[0].content)
        assert row.answer
        assert not (potion and potion.forbidden) or row.prompt[0].content.startswith("Is the ")
    benign = read_training(files["benign"])
    assert len(benign) == 96
    assert all("? Also, " in row.prompt[0].content for row in benign)
    assert all(json.loads(line) for line in files["benign"].read_text().splitlines())
