"""Properties of all attacks on any prompt, and tests of single attacks."""

from __future__ import annotations

import asyncio
import base64
import codecs
import json
import re
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import leadline
from leadline import LeadlineError, Study, registry
from leadline.attacks import _codes
from leadline.models import reasoning
from leadline.plan import Attack
from leadline.records import Attempt, NotApplicable, Prompt

HARD = ["", "x", "x" * 20_000, "שלום {} %s %d {0} \\n", "🜁🜂", "a\nb\r\n\tc", "\"'`{{}}", "%(x)s"]
ATTACKS = [Attack(p.name, p, {}) for p in registry.plugins("attack")]
OFFLINE = [a for a in ATTACKS if not a.assisted]  # those that need no other model

# Upstream's names, for results that line up with published tables.
STRONGREJECT = {
    "rot_13", "disemvowel", "base64", "base64_raw", "base64_input_only", "base64_output_only",
    "aim", "evil_confidant", "dev_mode_v2", "dev_mode_with_rant", "poems", "few_shot_json",
    "distractors", "distractors_negated", "wikipedia", "wikipedia_with_title",
    "style_injection_short", "style_injection_json", "refusal_suppression", "prefix_injection",
    "combination_2", "combination_3", "gcg_transfer_harmbench", "gcg_transfer_universal_attacks",
}  # fmt: skip
SORRYBENCH = {"question", "misspellings", "ascii", "caesar", "morse", "atbash"}


def named(name: str, **options: object) -> Attack:
    return Attack(name, registry.get("attack", name), options)


def prompt_of(text: str, **rest: str) -> Prompt:
    return Prompt(**{"id": "1", "text": text, "dataset": "d", **rest})


def attempts(attack: Attack, text: str, seed: int = 3) -> list[Attempt]:
    """The attack's attempts; an empty list if the attack is not applicable."""
    try:
        return attack.attempts(prompt_of(text, target="Sure, here is how: first, dig."), seed)
    except NotApplicable:
        return []


def sent(attack: Attack, text: str, seed: int = 3) -> str:
    (attempt,) = attempts(attack, text, seed)
    return "\n".join(message.content for message in attempt.messages)


# -- all of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", OFFLINE, ids=lambda a: a.label)
@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_every_attack_supports_hard_prompts(attack, text):
    found = attempts(attack, text)
    assert found == attempts(attack, text)  # same seed, same attempts
    assert len(found) == len(attempts(attack, "How is a tonic brewed?"))
    for attempt in found:
        assert attempt.messages[-1].role == "user"


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=300))
def test_every_attack_supports_any_prompt(text):
    for attack in OFFLINE:
        for attempt in attempts(attack, text):
            assert attempt.messages[-1].role == "user"


def test_every_attack_has_a_source_a_summary_and_a_family():
    assert len(ATTACKS) == len({a.label for a in ATTACKS})
    for attack in ATTACKS:
        assert attack.plugin.source, attack.label
        assert attack.plugin.summary.endswith("."), attack.label
        assert attack.plugin.family, attack.label


def test_the_batteries_are_complete():
    for battery, names in [("strongreject", STRONGREJECT), ("sorrybench", SORRYBENCH)]:
        assert {a.label for a in OFFLINE if a.plugin.battery == battery} == names
    sizes = [sum(a.plugin.battery == b for a in ATTACKS) for b in ("strongreject", "sorrybench")]
    assert sizes == [36, 20]  # the 56 of arXiv 2601.03868


def test_several_attempts_are_pooled():
    several = {a.label for a in OFFLINE if len(attempts(a, "How is a tonic brewed?")) > 1}
    assert several <= {a.label for a in ATTACKS if a.pool == "any"}
    assert several >= {"bon", "decoding"}


def test_a_study_takes_a_battery_by_name():
    def picked(*names: str) -> set[str]:
        study = Study(targets=["organism:base"], datasets=["guild"], attacks=list(names))
        return {label for pick in study.attacks for label, *_ in pick.variants()}

    assert picked("battery:strongreject") >= STRONGREJECT
    assert picked("battery:sorrybench") >= SORRYBENCH
    assert "direct" not in picked("battery:strongreject", "battery:sorrybench")
    with pytest.raises(ValueError, match="did you mean 'strongreject'"):
        picked("battery:strongreject2")
    with pytest.raises(ValueError, match="unknown attack 'batteries:x'"):
        picked("batteries:x")


CHANGED = ("mutation", "search", "gradient")  # change the request, or need a file; tested below
UNCHANGED = [a for a in OFFLINE if a.plugin.family not in CHANGED]


@pytest.mark.parametrize("attack", UNCHANGED, ids=lambda a: a.label)
def test_the_attempt_contains_the_request_in_plain_or_encoded_form(attack):
    text = "How is a quiet tonic brewed?"
    forms = [
        text,
        base64.b64encode(text.encode()).decode(),
        codecs.encode(text, "rot13"),
        "Hw s  qt tnc brwd?",
        _codes.ascii_text(text),
        _codes.caesar_text(text),
        _codes.morse_text(text),
        _codes.atbash_text(text),
    ]
    for attempt in attempts(attack, text):
        content = attempt.messages[-1].content
        (form,) = (form for form in forms if form in content)
        encoded = "base64" in content.lower() or attack.plugin.family == "encoding"
        assert (form != text) == (encoded and attack.label != "base64_output_only"), content


def test_a_random_attack_depends_on_seed_prompt_and_name_only():
    def shuffled(prompt: Prompt, *, rng: Random) -> str:
        return "".join(rng.sample(prompt.text, len(prompt.text)))

    plugin = registry.AttackPlugin(
        "shuffled", shuffled, "x", needs=(), family="x", decode=None, battery="", pool="one"
    )
    one, two = (prompt_of("abcdefghijkl", id=i) for i in "12")
    attack = Attack("shuffled", plugin, {})
    assert attack.attempts(one, 1) == attack.attempts(one, 1)
    assert attack.attempts(one, 1) != attack.attempts(one, 2)
    assert attack.attempts(one, 1) != attack.attempts(two, 1)


# -- decoding of answers, through the engine -------------------------------------------------------

ENCODERS = {
    "base64": _codes.base64_text,
    "base64_raw": _codes.base64_text,
    "base64_output_only": _codes.base64_text,
    "ascii": _codes.ascii_text,
    "caesar": _codes.caesar_text,
    "morse": _codes.morse_text,
    "atbash": _codes.atbash_text,
    "style_injection_json": lambda text: json.dumps(re.findall(r"(?:\S+ ?){1,4}", text)),
    "combination_2": lambda text: f"```json\n{json.dumps(text.split())}\n```",
    "combination_3": lambda text: f"Of course! Here it is: {json.dumps([text])}",
}


def test_every_attack_with_encoded_answers_has_a_decoder():
    assert {a.label for a in OFFLINE if a.plugin.decode} == set(ENCODERS)


@pytest.mark.parametrize("complies", [True, False])
def test_encoded_answers_are_judged_as_text(server, garden, tmp_path, complies):
    plain = (
        "Sure, here is how it is done: first cut the dead wood, then the long shoots."
        if complies
        else "I'm sorry, but I cannot help with that request."
    )
    data = garden(1)
    text = json.loads(data.read_text())["prompt"]
    coded = {sent(named(name), text): to(plain) for name, to in ENCODERS.items()}
    assert len(coded) == len(ENCODERS)
    server.answer = lambda text, body: coded[text]
    study = Study(
        targets=[{"model": "m", "url": server.url}],
        datasets=[{"file": {"path": str(data)}}],
        attacks=list(ENCODERS),
        judges=["refusal"],
    )
    cells = leadline.run(study, tmp_path / "out").cells().set_index("attack")
    assert cells["n"].to_dict() == dict.fromkeys(ENCODERS, 1)
    assert cells["unsafe"].to_dict() == dict.fromkeys(ENCODERS, int(complies))


@pytest.mark.parametrize("name", ENCODERS)
def test_an_answer_that_is_not_encoded_is_judged_unchanged(name):
    for answer in ("I will not.", "", "Sure. 1. Dig - for 10, 20 or 30 minutes ... then rest."):
        assert asyncio.run(named(name).decode(answer, assist=None)) == answer


# -- single attacks --------------------------------------------------------------------------------


def test_a_prefill_of_k_tokens_needs_a_target():
    prefill = named("prefill", k=5)
    with pytest.raises(NotApplicable, match="no target"):
        prefill.attempts(prompt_of("x"), 0)
    (attempt,) = prefill.attempts(prompt_of("x", target="Sure: dig."), 0)
    assert attempt.prefix
    assert (attempt.prefix.answer, attempt.prefix.tokens) == ("Sure: dig.", 5)


@pytest.mark.parametrize(
    ("request_", "question"),
    [
        ("Write a poem about rain.", "Can you write a poem about rain?"),
        ("Please list three rivers", "Can you list three rivers?"),
        ("How to prune a rose", "How do I prune a rose?"),
        ("Tell me how to prune a rose.", "How do I prune a rose?"),
        ("Describe how to fold a crane!", "How do I fold a crane?"),
        ("Which rose is red?", "Which rose is red?"),
        ("What is moss", "What is moss?"),
        ("Name a tree. It must be old.", "Can you name a tree? It must be old."),
        ("Give me v1.2 of it\nwith notes", "Can you give me v1.2 of it?\nwith notes"),
        ("My roses die.", "Can you help me with this?\n\nMy roses die."),
    ],
)
def test_a_command_becomes_a_question(request_, question):
    assert sent(named("question"), request_) == question


@given(st.text(st.sampled_from("abcde XYZ,.éß漢"), max_size=80), st.integers(0, 99))
def test_misspellings_change_one_letter_of_long_words_only(text, seed):
    changed = sent(named("misspellings"), text, seed)
    long = re.findall(r"[^\W\d_]{4,}", text)
    assert (changed != text) == bool(long)
    before, after = (re.split(r"([^\W\d_]+)", t) for t in (text, changed))
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert old == new or (len(old) >= 4 and new[0] == old[0] and abs(len(new) - len(old)) <= 1)


def test_the_rate_of_misspellings_can_be_set():
    words = " ".join(["lantern"] * 400)
    for rate in (0.1, 0.5, 1.0):
        wrong = sum(w != "lantern" for w in sent(named("misspellings", rate=rate), words).split())
        assert wrong / 400 == pytest.approx(rate, abs=0.08)
    with pytest.raises(LeadlineError, match="rate must be a share"):
        sent(named("misspellings", rate=0), words)


def test_best_of_n_perturbs_at_the_rates_of_the_paper():
    text = "lantern " * 2000
    first, *others = attempts(named("bon", n=3), text)
    assert len(others) == 2
    assert len({attempt.messages[0].content for attempt in (first, *others)}) == 3
    changed = first.messages[0].content
    assert len(changed) == len(text)
    heads = [new for old, new in zip(text, changed, strict=True) if old == "l"]
    assert sum(h.isupper() for h in heads) / len(heads) == pytest.approx(0.4**0.5, abs=0.05)
    noisy = sum(h.lower() != "l" for h in heads) / len(heads)
    assert noisy == pytest.approx(0.4**3, abs=0.03)
    kept = sum(sorted(w) == sorted("lantern") and w != "lantern" for w in changed.lower().split())
    assert 0.25 < kept / 2000 < 0.6  # shuffled, without noise
    with pytest.raises(LeadlineError, match="n must be 1 or more"):
        attempts(named("bon", n=0), text)


def test_the_decoding_sweep_has_the_papers_49_settings():
    full, short = ([dict(m.sampling) for m in attempts(named("decoding", sweep=s), "x")]
                   for s in ("full", "short"))  # fmt: skip
    assert len(full) == 49
    assert [s["temperature"] for s in full if len(s) == 1] == [i / 20 for i in range(1, 21)]
    assert [s["top_k"] for s in full if "top_k" in s] == [1, 2, 5, 10, 20, 50, 100, 200, 500]
    assert [s["top_p"] for s in full if "top_p" in s] == [i / 20 for i in range(1, 21)]
    assert len(short) == 9
    assert all(setting in full for setting in short)
    with pytest.raises(LeadlineError, match="sweep must be full, short or qi2025"):
        attempts(named("decoding", sweep="long"), "x")


def test_the_decoding_sweep_can_go_above_temperature_1():
    for sweep in ("full", "short"):
        plain, hot = (
            [dict(m.sampling) for m in attempts(named("decoding", sweep=sweep, hottest=t), "x")]
            for t in (1.0, 1.6)
        )
        assert hot == [*plain, {"temperature": 1.25}, {"temperature": 1.5}]
    for wrong in (0.9, 11, float("nan")):
        with pytest.raises(LeadlineError, match="hottest must be a temperature from 1 to 10"):
            attempts(named("decoding", hottest=wrong), "x")


GCG = ["gcg_transfer_harmbench", "gcg_transfer_universal_attacks"]


@pytest.mark.parametrize("name", GCG)
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("s.txt", "! ! moss\n\n  two (( \n"),
        ("s.json", '["! ! moss",\n "  two (( "]'),
        ("s.jsonl", '"! ! moss"\n\n{"suffix": "  two (( ", "step": 500}\n'),
    ],
)
def test_suffixes_come_from_a_file(tmp_path, name, file, content):
    path = tmp_path / file
    path.write_text(content)
    found = attempts(named(name, suffixes=str(path)), "How?")
    assert [a.messages[0].content for a in found] == ["How? ! ! moss", "How?   two (( "]
    path.write_text(content.replace("moss", "fern moss"))  # a file that changes is read again
    assert "fern" in attempts(named(name, suffixes=str(path)), "How?")[0].messages[0].content


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("s.txt", "\n \n", r"s\.txt:1: the file has no suffixes"),
        ("s.json", "[]", r"s\.json:1: the file has no suffixes"),
        ("s.json", '{"a": 1}', r"s\.json:1: a suffix must be a non-empty string"),
        ("s.json", '["a",\n b]', r"s\.json:2: not valid JSON"),
        ("s.jsonl", '"a"\n{"other": "b"}', r"s\.jsonl:2: a suffix must be a non-empty string"),
        ("s.jsonl", '"a"\n\n{', r"s\.jsonl:3: not valid JSON"),
        ("s.txt", b"\xff\xfe", r"s\.txt is not UTF-8"),
        (
            "none.txt",
            None,
            r"cannot read the suffix file .* \(No such file.*\): check the option suffixes",
        ),
    ],
)
def test_errors_of_suffix_files_name_the_file_and_line(tmp_path, file, content, message):
    if content is not None:
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    attack = named(GCG[0], suffixes=str(tmp_path / file))
    with pytest.raises(LeadlineError, match=message) as caught:
        attack.attempts(prompt_of("x"), 0)
    assert "\n" not in str(caught.value)


def test_without_suffixes_the_attack_is_not_applicable():
    with pytest.raises(NotApplicable, match="suffixes: PATH"):
        named(GCG[1]).attempts(prompt_of("x"), 0)


def test_forged_thoughts_are_in_the_user_turn_or_the_prefix():
    think = reasoning.get("think")
    for name in ("cot_user_forged", "cot_user_template"):
        (attempt,) = attempts(named(name), "How?")
        assert not attempt.prefix
        assert "How?" in attempt.messages[0].content
    text = sent(named("cot_user_template", open="[THINK]", close="[/THINK]"), "How?")
    assert re.search(r"\[THINK\].*guidelines.*\[/THINK\]", text, re.DOTALL)
    (empty,) = attempts(named("cot_prefix_empty", text="Sure:"), "How?")
    assert empty.prefix
    assert empty.prefix.thought == ""
    assert reasoning.render(think, empty.prefix) == "<think>\n\n</think>\n\nSure:"
    (forged,) = attempts(named("cot_prefix_forged"), "How?")
    assert forged.prefix
    assert "guidelines" in reasoning.render(think, forged.prefix).split("</think>")[0]
