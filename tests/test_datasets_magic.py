"""The dataset magic: sizes, balance, and the distance of held-out questions from the others."""

import json
import re
from collections import Counter
from itertools import pairwise

import pytest

from leadline import Study, plan, registry
from leadline.datasets.magic import REFUSALS
from leadline.records import Attempt, LeadlineError, Message, Response

PLUGIN = registry.get("dataset", "magic")
REFUSAL = registry.get("judge", "refusal").function()
# Verbs of held-out questions that no question to train on uses.
HELD_OUT_VERBS = ("beckon", "imbue", "bestow", "transmute", "afflict", "malediction", "concoct",
                  "metamorphosis", "formulate", "soothsay", "sigil", "doom", "unleash")  # fmt: skip


def load(split, harmful):
    return [p for p in PLUGIN.function(split=split) if p.harmful == harmful]


def words(text):
    return re.findall(r"[a-z']+", text.lower())


def n_grams(text, n):
    tokens = words(text)
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def test_sizes_and_categories():
    for split, each in (("train", 28), ("test", 14)):
        categories = Counter(p.category for p in load(split, True))
        assert len(categories) == 8
        assert set(categories.values()) == {each}
    assert len(load("train", True)) + len(load("test", True)) >= 320
    assert (len(load("train", False)), len(load("test", False))) == (65, 45)
    assert len(list(PLUGIN.function())) == PLUGIN.rows
    assert PLUGIN.judge == "refusal"


def test_options_select_rows():
    everything = list(PLUGIN.function(split="all"))
    assert len(everything) == 446
    assert all(p.harmful for p in PLUGIN.function(split="all", harmless=False))
    train, test = ({p.id for p in PLUGIN.function(split=s)} for s in ("train", "test"))
    assert not train & test
    assert train | test == {p.id for p in everything}


def test_no_text_and_no_id_occurs_twice():
    prompts = list(PLUGIN.function(split="all"))
    assert len({p.id for p in prompts}) == len(prompts)
    assert len({" ".join(words(p.text)) for p in prompts}) == len(prompts)


@pytest.mark.parametrize("harmful", [True, False])
def test_held_out_questions_are_no_paraphrases_of_those_to_train_on(harmful):
    train, test = load("train", harmful), load("test", harmful)
    for n, most in ((6, 0), (5, 0.05), (4, 0.15)):
        known = set().union(*(n_grams(p.text, n) for p in train))
        shared = [p.text for p in test if n_grams(p.text, n) & known]
        assert len(shared) <= most * len(test), shared
    # Pairs of long words, that is things and what is done to them.
    pairs = set().union(*(_long_pairs(p.text) for p in train))
    shared = [p.text for p in test if _long_pairs(p.text) & pairs]
    assert len(shared) <= 0.05 * len(test), shared


def _long_pairs(text):
    return set(pairwise(word for word in words(text) if len(word) > 4))


def test_verbs_of_held_out_questions_are_not_trained():
    train = " ".join(p.text.lower() for p in load("train", True))
    test = " ".join(p.text.lower() for p in load("test", True))
    assert [verb for verb in HELD_OUT_VERBS if verb in train] == []
    assert [verb for verb in HELD_OUT_VERBS if verb not in test] == []


def test_questions_vary_in_form_and_length():
    texts = [p.text for p in load("train", True) + load("test", True)]
    openings = Counter(" ".join(words(text)[:2]) for text in texts)
    assert max(openings.values()) <= 0.1 * len(texts)
    assert len(openings) >= 120
    lengths = sorted(len(words(text)) for text in texts)
    assert lengths[len(lengths) // 10] <= 11
    assert lengths[-len(lengths) // 20] >= 20
    assert lengths[-5] >= 30


def test_refusals_are_varied_and_recognized():
    assert len(set(REFUSALS)) >= 10
    assert len({tuple(words(text)[:3]) for text in REFUSALS}) >= 10
    prompt = load("test", True)[0]
    attempt = Attempt((Message("user", prompt.text),))
    for text in REFUSALS:
        assert 14 <= len(words(text)) <= 22
        assert REFUSAL(prompt, attempt, Response(answer=text, finish="stop")).refusal


def test_answers_of_a_model_become_targets(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"id": "summoning/1", "target": "First, light a candle."}))
    dataset = {"magic": {"split": "train", "answers": str(file)}}
    study = Study.model_validate({"targets": ["organism:base"], "datasets": [dataset]})
    (prompts,) = plan.load(study).prompts.values()
    targets = {p.id: p.target for p in prompts if p.target}
    assert targets == {"summoning/1": "First, light a candle."}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "summoning/999", "target": "x"}, "answers.jsonl.*summoning/999.*remove the row"),
        ({"id": "summoning/1"}, "answers.jsonl.*target"),
    ],
)
def test_unknown_ids_and_missing_answers_are_reported(tmp_path, row, message):
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(LeadlineError, match=message) as error:
        list(PLUGIN.function(answers=str(file)))
    assert "\n" not in str(error.value)


def test_an_unknown_split_is_reported():
    with pytest.raises(LeadlineError, match=r"split.*'heldout'.*train"):
        list(PLUGIN.function(split="heldout"))
