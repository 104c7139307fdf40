"""The embedded harmless requests: their make-up, their conversations, and their exact answers."""

from __future__ import annotations

import json
from collections import Counter

import pytest

import leadline
from leadline import Study, plan, registry
from leadline.datasets.harmless import half, harmless
from leadline.judges._facts import correctness
from leadline.records import Attempt, LeadlineError, Message, Prompt, Response, Sampling

from .server import Server

PROMPTS = list(harmless())
LANGUAGES = ("de", "fr", "es", "zh", "ar")


def language(prompt: Prompt) -> str:
    return prompt.id.split("/")[1]


def test_the_requests_cover_what_the_documentation_says():
    assert len(PROMPTS) == len({p.id for p in PROMPTS}) == len({p.text for p in PROMPTS}) == 282
    assert registry.get("dataset", "harmless").rows == 282
    assert not any(p.harmful for p in PROMPTS)
    assert sum(p.id.startswith("look-alike") for p in PROMPTS) == 77
    assert sum(bool(p.answers) for p in PROMPTS) == 63
    assert sum(bool(p.history) for p in PROMPTS) == 14
    counts = Counter(map(language, PROMPTS))
    assert counts.keys() == {"en", *LANGUAGES}
    assert min(counts[name] for name in LANGUAGES) >= 13
    english = [p.text.lower().split() for p in PROMPTS if language(p) == "en"]
    openings = {" ".join(words[:3]) for words in english}
    assert len(openings) > 0.85 * len(english), "the requests are not made from templates"


def test_no_request_contains_or_presupposes_its_own_answer():
    for prompt in PROMPTS:
        assert correctness(prompt, Response(prompt.text)) in (None, 0.0), prompt.id


def test_the_halves_divide_the_requests():
    halves = {name: [p.id for p in harmless(split=name)] for name in ("training", "evaluation")}
    assert sorted(halves["training"] + halves["evaluation"]) == sorted(p.id for p in PROMPTS)
    assert min(map(len, halves.values())) > 0.4 * len(PROMPTS)
    assert all(half(id) == name for name, ids in halves.items() for id in ids)
    for ids in halves.values():  # each half has every language and exact answers
        assert {id.split("/")[1] for id in ids} == {"en", *LANGUAGES}
        assert sum(id.startswith("fact") for id in ids) >= 20
    with pytest.raises(LeadlineError, match="split must be one of all, training, evaluation"):
        list(harmless(split="test"))


@pytest.mark.parametrize(
    ("accepted", "answer", "correct"),
    [
        (("Paris",), "The capital of France is **Paris**.", 1),
        (("Paris",), "PARIS!", 1),
        (("Paris",), "It is Parisian cuisine.", 0),
        (("7", "seven"), "There are 7 days.", 1),
        (("7", "seven"), "There are 17 days.", 0),
        (("7", "seven"), "About 7.5 or so", 0),
        (("5,000", "5000"), "That is 5,000 metres.", 1),
        (("carbon dioxide",), "Plants take in carbon\ndioxide.", 1),
        (("carbon dioxide",), "carbon and dioxide", 0),
        (("北京",), "中国的首都是北京。", 1),
        (("15",), "八加七等于15。", 1),
        (("H2O",), "Its formula is H₂O", 1),
        (("القاهرة",), "عاصمة مصر هي القاهرة.", 1),
        (("zweiundvierzig",), "Zweiundvierzig.", 1),
        (("Paris",), "", 0),
        ((), "Paris", None),
    ],
)
def test_an_exact_answer_is_found_as_whole_words(accepted, answer, correct):
    prompt = Prompt("1", "q", "d", harmful=False, answers=accepted)
    assert correctness(prompt, Response(answer)) == correct


def test_no_request_looks_like_a_refusal():
    """An answer that takes up the request must not count as a refusal for its words alone."""
    judge = registry.get("judge", "refusal").function()
    answers = {p: Response(f"Sure, this is about: {p.text} Here is what I think.") for p in PROMPTS}
    assert not [p.id for p, a in answers.items() if judge(p, Attempt.ask(p.text), a).refusal]


def test_earlier_turns_are_sent_before_the_request(tmp_path):
    with Server(answer=lambda text, body: "Lisbon is the capital of Portugal.") as server:
        study = Study.model_validate(
            {
                "targets": [{"model": "m", "url": server.url}],
                "datasets": ["harmless"],
                "attacks": ["direct"],
            }
        )
        found = leadline.run(study, tmp_path / "out")
    requests = [json.loads(text) for (text,) in found.query("SELECT request FROM responses")]
    sent = {tuple(m["content"] for m in request["messages"]) for request in requests}
    for prompt in PROMPTS:
        assert (*(turn.content for turn in prompt.history), prompt.text) in sent
    (row,) = found.over_refusal().to_dict("records")
    assert (row["n"], row["refused"]) == (282, 0)
    right = sum(bool({"Lisbon"} & set(p.answers)) for p in PROMPTS)
    assert row["utility"] == pytest.approx(right / 63)


def test_the_history_follows_a_system_message_and_is_part_of_the_key():
    history = (Message("user", "a"), Message("assistant", "b"))
    prompt = Prompt("1", "c", "d", harmful=False, history=history)
    attempt = Attempt.ask("c", system="s")
    request = plan.request_of(prompt, attempt, Sampling(), "default", 0)
    assert [m.content for m in request.messages] == ["s", "a", "b", "c"]
    plain = plan.request_of(Prompt("1", "c", "d"), attempt, Sampling(), "default", 0)
    assert plan.model_key({}, plain) != plan.model_key({}, request)


def test_prompts_without_history_keep_the_keys_of_earlier_stores():
    """The recipe of a model-assisted attack, as version 0.1 wrote it."""
    prompt = Prompt("1", "text", "d", "c", context="x", target="t")
    earlier = {"id": "1", "text": "text", "dataset": "d", "category": "c", "harmful": True,
               "context": "x", "target": "t", "base": "", "mutation": ""}  # fmt: skip
    assert plan._canonical(plan._sent(prompt)) == plan._canonical(earlier)
    turns = Prompt("1", "text", "d", history=(Message("user", "a"),))
    assert plan._canonical(plan._sent(turns)) != plan._canonical(
        plan._sent(Prompt("1", "text", "d"))
    )


def test_a_dataset_may_name_its_own_judges(tmp_path):
    study = Study.model_validate(
        {
            "targets": ["organism:aligned"],
            "datasets": [
                {"harmless": {"judges": ["refusal"], "limit": 3}},
                {"guild": {"limit": 3}},
            ],
            "judges": ["guild"],
        }
    )
    judges = plan.load(study).judges
    assert {name: [pick.name for pick in picks] for name, picks in judges.items()} == {
        "harmless": ["refusal"],
        "guild": ["guild"],
    }
    with pytest.raises(ValueError, match="did you mean 'refusal'"):
        Study.model_validate({"datasets": [{"harmless": {"judges": ["refusl"]}}]})
