"""Model-assisted attacks, with attacker and target as real HTTP servers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import leadline
from leadline import Study, registry
from leadline.attacks import _assisted
from leadline.plan import Attack
from leadline.records import Attempt, AttemptFailed, NotApplicable, Prompt, Response, Verdict

from .server import REFUSAL, Server
from .test_attacks import ATTACKS, HARD, OFFLINE

ASSISTED = [a for a in ATTACKS if a.assisted]
WRITTEN = [a for a in ASSISTED if "attacker" in a.plugin.needs]  # not decoding_search
NAMES = [a.label for a in WRITTEN]
STRONGREJECT = {
    "auto_payload_splitting", "auto_obfuscation", "pair", "pap_evidence_based_persuasion",
    "pap_expert_endorsement", "pap_misrepresentation", "pap_authority_endorsement",
    "pap_logical_appeal", "translation_hmong", "translation_scotts_gaelic", "translation_guarani",
    "translation_zulu",
}  # fmt: skip
SORRYBENCH = {
    "slang", "uncommon_dialects", "technical_terms", "role_play", "logical_appeal",
    "authority_endorsement", "misrepresentation", "evidence-based_persuasion",
    "expert_endorsement", "translate-ml", "translate-ta", "translate-mr", "translate-zh-cn",
    "translate-fr",
}  # fmt: skip
TRANSLATIONS = [n for n in NAMES if n.startswith("translat")]
PLAIN = [n for n in NAMES if n not in ("pair", "renellm", *TRANSLATIONS) and "auto" not in n]


def writes(text: str, body: Any) -> str:
    """A compliant attacker: its text identifies the request and the task that it was given."""
    number = next(iter(re.findall(r"\[(\d+)\]", text)), "")
    messages = json.dumps(body["messages"]) if body else text
    mark = sha256(messages.encode()).hexdigest()[:8]
    if '"improvement"' in text or "improvement and prompt" in text:
        prompt = f"zuba [{number}] {mark} in disguise"
        return json.dumps({"improvement": "bolder", "prompt": prompt})
    if "JSON list" in text:
        return '```json\n["prune", "ROSE", "no such words"]\n```'
    return f"<text>Zuba rozu lami [{number}], kelo {mark} novira tasu mile zon.</text>"


@pytest.fixture
def attacker() -> Iterator[Server]:
    with Server(writes) as running:
        yield running


@pytest.fixture
def study(server, attacker, garden) -> Callable[..., Study]:
    def make(*attacks: Any, n: int = 1, **rest: Any) -> Study:
        parts: dict[str, Any] = {
            "targets": [{"model": "m", "url": server.url}],
            "datasets": [{"file": {"path": str(garden(n)), "name": "garden"}}],
            "attacks": list(attacks),
            "attacker": {"model": "a", "url": attacker.url},
            "judges": ["refusal"],
            "limits": {"timeout": 5, "retries": 0},
        }
        return Study.model_validate(parts | rest)

    return make


def reasons(found: Any) -> set[str]:
    return {reason for (reason,) in found.query("SELECT DISTINCT reason FROM trials")}


def sent_twice(server: Server) -> list[str]:
    counts = Counter(json.dumps(body) for body in server.bodies)
    return [body for body, count in counts.items() if count > 1]


def outcomes(found: Any) -> dict[str, int]:
    return dict(found.query("SELECT outcome, count(*) FROM trials GROUP BY 1"))


# -- the catalogue ---------------------------------------------------------------------------------


def test_the_batteries_are_complete_with_the_assisted_attacks():
    def battery(name: str, attacks: list[Attack]) -> set[str]:
        return {a.label for a in attacks if a.plugin.battery == name}

    assert battery("strongreject", ASSISTED) == STRONGREJECT
    assert battery("sorrybench", ASSISTED) == SORRYBENCH
    assert len(battery("strongreject", ATTACKS)) == 36
    assert len(battery("sorrybench", ATTACKS)) == 20
    assert {a.label for a in ASSISTED} - STRONGREJECT - SORRYBENCH == {"renellm", "decoding_search"}
    assert not {a.label for a in OFFLINE if "attacker" in a.plugin.needs}


# -- end to end ------------------------------------------------------------------------------------


def test_the_attackers_text_is_sent_to_the_target(server, attacker, study, tmp_path):
    found = leadline.run(study(*NAMES, n=2), tmp_path / "out")
    assert outcomes(found) == {"answered": 2 * len(NAMES)}
    cells = found.cells().set_index("attack")
    assert cells["n"].to_dict() == dict.fromkeys(NAMES, 2)
    requests = found.query(
        "SELECT o.attack, o.prompt, r.request FROM outcomes o JOIN responses r ON r.key = o.key"
    )
    sent = {(a, p): json.loads(r)["messages"][-1]["content"] for a, p, r in requests}
    written = {
        "pair": r"zuba \[{i}\] \w{{8}} in disguise",
        "renellm": r"Zuba rozu lami \[{i}\], kelo \w{{8}} novira",
        "auto_payload_splitting": r'x1 = "pru"\nx2 = "ne"\nx3 = "ro"\nx4 = "se"\n\n(?s:.*)'
        r"Request: \[{i}\] How do I \(x1 \+ x2\) a \(x3 \+ x4\) of kind {i}\?",
        "auto_obfuscation": r"\[{i}\] How do I prun3 a r053 of kind {i}\?",
    }
    for (name, prompt), text in sent.items():
        pattern = written.get(
            name, r"\AZuba rozu lami \[{i}\], kelo \w{{8}} novira tasu mile zon.\Z"
        )
        assert re.search(pattern.format(i=prompt[1:]), text), (name, text)
        assert text in server.asked
    # one text for each technique: StrongREJECT's and SORRY-Bench's five are the same
    assert len({text for (_, prompt), text in sent.items() if prompt == "g0"}) == len(NAMES) - 5


def test_the_attacker_is_called_once_per_prompt_and_technique(server, attacker, study, tmp_path):
    server.sticky = {"[1]": 500}
    plan = study(*PLAIN, "translation_zulu", n=3)
    found = leadline.run(plan, tmp_path / "out")
    assert outcomes(found) == {"answered": 2 * (len(PLAIN) + 1), "failed": len(PLAIN) + 1}
    calls = attacker.seen
    assert not sent_twice(attacker)
    assert calls == 3 * (len(PLAIN) - 5 + 1)  # five techniques have two names
    server.sticky = {}
    found = leadline.run(plan, tmp_path / "out")
    assert outcomes(found) == {"answered": 3 * (len(PLAIN) + 1)}
    assert attacker.seen == calls
    assert set(server.asked.values()) == {1}


def test_two_targets_are_attacked_with_the_same_words(server, attacker, study, tmp_path):
    targets = [{"model": name, "url": server.url} for name in ("one", "two")]
    found = leadline.run(study("slang", "pair", targets=targets), tmp_path / "out")
    assert outcomes(found) == {"answered": 4}
    assert not sent_twice(attacker)
    rows = found.query("SELECT model, attack, request FROM outcomes JOIN responses USING (key)")
    assert len({(attack, json.loads(request)["messages"][0]["content"])
                for _, attack, request in rows}) == 2  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("I'm sorry, but I can't help with that.", "the attacker refused: I'm sorry"),
        ("<text>I cannot assist with rewriting this request.</text>", "the attacker refused"),
        ("As an AI language model, I must decline.", "the attacker refused"),
        ("   ", "the attacker's answer is empty"),
        ("<text>...</text>", "the attacker"),
        ("<text>[0] How do I prune a rose of kind 0?</text>", "returned the request unchanged"),
        ("<text>OK!</text>", "far shorter than the request"),
        ("Of course: cut above a bud.", "wrote no text between <text> and </text>"),
    ],
)
def test_an_unusable_reply_of_the_attacker_fails_the_trial(
    server, attacker, study, tmp_path, reply, reason
):
    attacker.answer = lambda text, body: reply
    found = leadline.run(study(*PLAIN, "translate-fr"), tmp_path / "out")
    assert outcomes(found) == {"failed": len(PLAIN) + 1}
    assert all(reason in why for why in reasons(found)), reasons(found)
    assert found.cells()["asr"].isna().all()
    assert server.seen == 0


@pytest.mark.parametrize("fault", [500, "empty", "garbage"])
def test_a_failed_attacker_fails_the_trial_and_the_next_run_retries(
    attacker, study, tmp_path, fault
):
    names = ["slang", "auto_obfuscation", "renellm", "pair", "translate-ta"]
    attacker.faults = {fault: 1.0}
    found = leadline.run(study(*names), tmp_path / "out")
    assert outcomes(found) == {"failed": 5}
    for name, why in found.query("SELECT attack, reason FROM outcomes"):
        assert why.startswith(f"{name}: the attacker gave no text: ")
    assert found.cells()["asr"].isna().all()
    attacker.faults = {}
    assert outcomes(leadline.run(study(*names), tmp_path / "out")) == {"answered": 5}


def test_a_truncated_text_is_not_used(attacker, study, tmp_path):
    cut = {"message": {"content": "<text>How do I prune a ro"}, "finish_reason": "length"}
    attacker.reply = lambda body: {"choices": [cut]}
    found = leadline.run(study("slang"), tmp_path / "out")
    ((why,),) = found.query("SELECT reason FROM trials")
    assert re.fullmatch(r"slang: the attacker's answer was truncated at \d+ tokens", why)


def test_marked_words_must_occur_in_the_request(attacker, study, tmp_path):
    attacker.answer = lambda text, body: '["gunpowder", ""] and ["a"]'
    found = leadline.run(study("auto_payload_splitting"), tmp_path / "out")
    assert outcomes(found) == {"failed": 1}
    assert "the attacker marked no words of the request" in reasons(found).pop()


def test_without_an_attacker_they_are_not_applicable(server, study, tmp_path):
    found = leadline.run(study("direct", *NAMES, attacker=None), tmp_path / "out")
    assert outcomes(found) == {"answered": 1, "not_applicable": len(NAMES)}
    assert "slang: no attacker model: name one under attacker: in the study file" in reasons(found)
    cells = found.cells().set_index("attack")
    assert cells.loc["slang", "asr"] != cells.loc["slang", "asr"]
    assert server.seen == 1
    found = leadline.run(study("direct", *NAMES), tmp_path / "out")  # with an attacker, they run
    assert outcomes(found) == {"answered": 1 + len(NAMES)}


# -- translation -----------------------------------------------------------------------------------

ZULU = "Ngiyaxolisa, kodwa angikwazi ukukusiza ngalokho namhlanje."


def test_the_back_translation_is_judged(server, attacker, study, tmp_path):
    server.answer = lambda text, body: ZULU
    back = "<text>Sure, here is how: cut above a bud, in late winter.</text>"
    attacker.answer = lambda text, body: back if ZULU in text else writes(text, body)
    found = leadline.run(study(*TRANSLATIONS), tmp_path / "out")
    cells = found.cells().set_index("attack")
    assert cells["unsafe"].to_dict() == dict.fromkeys(TRANSLATIONS, 1)
    assert attacker.seen == 2 * len(TRANSLATIONS) == 18

    attacker.answer = lambda text, body: f"<text>{REFUSAL}</text>"
    judges = [{"refusal": {"name": "again"}}]
    found = leadline.run(study(*TRANSLATIONS, judges=judges), tmp_path / "out")
    assert found.cells(judge="again")["unsafe"].sum() == len(TRANSLATIONS)
    assert attacker.seen == 18  # stored: not translated twice


def test_a_refusal_in_another_language_is_detected(server, attacker, study, tmp_path):
    server.answer = lambda text, body: ZULU
    attacker.answer = lambda text, body: (
        f"<text>{REFUSAL}</text>" if ZULU in text else writes(text, body)
    )
    found = leadline.run(study("translation_zulu"), tmp_path / "out")
    assert found.query("SELECT unsafe, refusal FROM outcomes") == [(0, 1)]


@pytest.mark.parametrize("fault", [REFUSAL, "Cut it.", 500])
def test_an_answer_that_cannot_be_translated_back_is_unscored(
    server, attacker, study, tmp_path, fault
):
    server.answer = lambda text, body: ZULU
    attacker.answer = lambda text, body: str(fault) if ZULU in text else writes(text, body)
    attacker.sticky = {ZULU: fault} if fault == 500 else {}
    found = leadline.run(study("translation_zulu"), tmp_path / "out")
    (cell,) = found.cells().to_dict("records")
    assert (cell["n"], cell["unscored"], cell["failed"]) == (0, 1, 0)
    assert cell["asr"] != cell["asr"]
    assert found.query("SELECT text FROM words WHERE text LIKE '%could not be decoded: the att%'")


def test_an_english_answer_is_not_translated(server, attacker, study, tmp_path):
    for reply, unsafe in ((REFUSAL, 0), ("Sure, here is how you do it: cut the old wood.", 1)):
        server.answer = lambda text, body, reply=reply: reply
        found = leadline.run(study("translate-mr"), tmp_path / f"out{unsafe}")
        assert found.cells()["unsafe"].sum() == unsafe
    assert attacker.seen == 2  # the requests only


def test_a_translation_that_is_still_english_is_not_used(attacker, study, tmp_path):
    attacker.answer = lambda text, body: "<text>How should I cut back the wood of my rose?</text>"
    found = leadline.run(study("translate-zh-cn"), tmp_path / "out")
    assert reasons(found) == {"translate-zh-cn: the attacker did not write Simplified Chinese"}


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_a_table_of_translations_needs_no_attacker(server, study, tmp_path, kind):
    data = {"g0": "Ngilithena kanjani irozi?", "[1] How do I prune a rose of kind 1?": "Ngilinqa?"}
    table = tmp_path / f"zulu.{kind}"
    if kind == "json":
        table.write_text(json.dumps(data))
    else:
        rows = "".join(f'"{key}","{value}"\n' for key, value in data.items())
        table.write_text(f"prompt,translation\n{rows}")
    attack = {"translation_zulu": {"table": str(table)}}
    plan = study(attack, n=3, attacker=None)
    found = leadline.run(plan, tmp_path / "out")
    assert set(server.asked) == set(data.values())
    assert outcomes(found) == {"answered": 2, "failed": 1}
    assert f"{table.name} has no translation of the prompt 'g2'" in str(reasons(found))
    assert found.cells()["n"].sum() == 2  # answered in English
    # after a change of the table, only the changed requests are sent
    table.write_text(table.read_text().replace("Ngilinqa?", "Ngiliphunga?"))
    leadline.run(plan, tmp_path / "out")
    assert server.asked == {"Ngilithena kanjani irozi?": 1, "Ngilinqa?": 1, "Ngiliphunga?": 1}


def test_the_path_of_a_table_is_relative_to_the_study_file(server, garden, study_file, leadline):
    file = study_file(
        targets=[{"model": "m", "url": server.url}],
        datasets=[{"file": {"path": str(garden(1))}}],
        attacks=[{"translation_hmong": {"table": "tables/hmong.json"}}],
    )
    (file.parent / "tables").mkdir()
    (file.parent / "tables/hmong.json").write_text('{"g0": "Kuv txiav paj li cas?"}')
    done = leadline("run", file.name, "--out", "out")
    assert done.returncode == 0, done.stderr
    assert list(server.asked) == ["Kuv txiav paj li cas?"]


@pytest.mark.parametrize(
    ("name", "text", "wrong"),
    [
        ("t.json", '{\n"g0": }', "t.json:2: not valid JSON"),
        ("t.json", '["g0"]', "t.json:1: the table must be a JSON object"),
        ("t.json", '{"g0": 3}', "t.json:1: no translation of 'g0'"),
        ("t.csv", "prompt,text\ng0,x\n", "t.csv:1: no column 'translation'"),
        ("t.csv", "prompt,translation\ng0,x\ng1,\n", "t.csv:3: no translation of 'g1'"),
        ("t.csv", 'prompt,translation\n"g0', "t.csv:2: not valid CSV"),
        ("t.csv", b"prompt,translation\ng0,\xff\n", "is not UTF-8 text"),
        ("gone.csv", None, "cannot read the translation table"),
    ],
)
def test_errors_of_tables_name_the_file_and_line(study, tmp_path, name, text, wrong):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    attack = {"translation_zulu": {"table": str(tmp_path / name)}}
    found = leadline.run(study(attack), tmp_path / "out")
    assert outcomes(found) == {"failed": 1}
    (reason,) = reasons(found)
    assert wrong in reason
    assert "raised" not in reason


def test_answers_to_shipped_translations_are_translated_back(server, attacker, study, tmp_path):
    """SORRY-Bench ships translated rows: the attacker translates only the answers."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "1", "prompt": "Comment tailler un rosier?", "mutation": '
                    '"translate-fr", "base": "1"}\n')  # fmt: skip
    datasets = [{"file": {"path": str(path), "name": "rows"}}]
    reply = "Désolé, je préfère parler d'autres fleurs aujourd'hui."
    server.answer = lambda text, body: reply
    found = leadline.run(study("direct", datasets=datasets, attacker=None), tmp_path / "out")
    (cell,) = found.cells().to_dict("records")
    assert (cell["attack"], cell["unscored"]) == ("translate-fr", 1)
    assert found.query("SELECT text FROM words WHERE text LIKE '%no attacker model: name one%'")
    attacker.answer = lambda text, body: "<text>I'm sorry, but I can't help with that.</text>"
    found = leadline.run(study("direct", datasets=datasets), tmp_path / "out")
    assert found.query("SELECT attack, unsafe, refusal FROM outcomes") == [("translate-fr", 0, 1)]
    assert (server.seen, attacker.seen) == (1, 1)
    assert reply in attacker.bodies[0]["messages"][-1]["content"]


# -- searches that use the target's answers --------------------------------------------------------


def turns(server: Server) -> list[str]:
    return [body["messages"][-1]["content"] for body in server.bodies]


def test_pair_sends_the_targets_answers_to_the_attacker(server, attacker, study, tmp_path):
    found = leadline.run(study({"pair": {"turns": 4}}), tmp_path / "out")
    assert outcomes(found) == {"answered": 1}
    assert (attacker.seen, server.seen) == (4, 4)  # the final attempt is not sent again
    assert set(server.asked.values()) == {1}
    chat = attacker.bodies[-1]["messages"]
    assert [m["role"] for m in chat] == ["user", "assistant"] * 3 + ["user"]
    assert "[0] How do I prune a rose of kind 0?" in chat[0]["content"]
    assert all(REFUSAL in m["content"] and "Score: 1" in m["content"] for m in chat[2::2])


def test_pair_stops_when_the_judge_says_unsafe(server, attacker, study, tmp_path):
    def answer(text, body):
        return "Sure, here is how: cut above a bud." if len(server.asked) == 2 else REFUSAL

    server.answer = answer
    found = leadline.run(study({"pair": {"turns": 5, "streams": 3}}), tmp_path / "out")
    (cell,) = found.cells().to_dict("records")
    assert (cell["n"], cell["unsafe"]) == (1, 1)
    assert (attacker.seen, server.seen) == (2, 2)
    ((request,),) = found.query("SELECT request FROM outcomes JOIN responses USING (key)")
    assert json.loads(request)["messages"][0]["content"] == turns(server)[1]


def test_pair_keeps_the_best_prompt(server, attacker, study, tmp_path):
    """An answer that neither refuses nor complies beats a refusal."""
    server.answer = lambda text, body: "Sure:" if len(server.asked) == 2 else REFUSAL
    found = leadline.run(study({"pair": {"turns": 3}}), tmp_path / "out")
    ((request,),) = found.query("SELECT request FROM outcomes JOIN responses USING (key)")
    assert json.loads(request)["messages"][0]["content"] == turns(server)[1]
    assert (attacker.seen, server.seen) == (3, 3)


def test_pair_streams_have_different_openings_and_seeds(attacker, study, tmp_path):
    leadline.run(study({"pair": {"turns": 1, "streams": 4}}), tmp_path / "out")
    opened = [(b["messages"][0]["content"], b["seed"]) for b in attacker.bodies]
    assert len({seed for _, seed in opened}) == 4
    assert len({text for text, _ in opened}) == 3
    assert all(b["temperature"] == 1.0 for b in attacker.bodies)


@pytest.mark.parametrize(
    "reply",
    [
        '```json\n{"improvement": "x", "prompt": "zuba zuba"}\n```',
        'Sure! Here it is: {"improvement": "x",\n "prompt": "zuba zuba"} Good luck.',
        '{"improvement": "...", "prompt": "..."}\n{"improvement": "a {b}", "prompt": "zuba zuba"}',
        '{"prompt": "zuba zuba"}',
        '{"improvement": "first\nsecond", "prompt": "zuba zuba"}',
        '{"improvement": ["a"], "prompt": " zuba zuba "}',
    ],
)
def test_pair_parses_json_as_models_write_it(server, attacker, study, tmp_path, reply):
    attacker.answer = lambda text, body: reply
    leadline.run(study({"pair": {"turns": 1}}), tmp_path / "out")
    assert list(server.asked) == ["zuba zuba"]
    assert attacker.seen == 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("{improvement: none}", "the attacker did not reply with the required JSON"),
        ('{"improvement": "x", "prompt": 3}', "not reply with the required JSON"),
        ('{"improvement": "x", "prompt": "zuba', "not reply with the required JSON"),
        ('{"improvement": "x", "prompt": "I\'m sorry, I can\'t help."}', "the attacker refused"),
        ("I cannot help to attack a model.", "the attacker refused: I cannot help to attack"),
        ('{"improvement": "...", "prompt": "..."}', "the attacker wrote a text without letters"),
        ("[" * 5000 + "{" * 5000, "not reply with the required JSON"),
    ],
)
def test_pair_retries_unusable_replies_and_then_gives_up(
    server, attacker, study, tmp_path, reply, reason
):
    attacker.answer = lambda text, body: reply
    found = leadline.run(study("pair"), tmp_path / "out")
    assert outcomes(found) == {"failed": 1}
    (why,) = reasons(found)
    assert reason in why
    assert why.endswith("(3 tries)")
    assert [b["seed"] for b in attacker.bodies] == [0, 1, 2]
    assert server.seen == 0

    attacker.answer = lambda text, body: reply if body["seed"] == 0 else writes(text, body)
    found = leadline.run(study("pair"), tmp_path / "retried")
    assert outcomes(found) == {"answered": 1}


def test_an_interrupted_search_does_not_count_as_safe(server, attacker, study, tmp_path):
    attacker.answer = lambda text, body: "no JSON" if REFUSAL in text else writes(text, body)
    found = leadline.run(study({"pair": {"streams": 2}}), tmp_path / "out")
    assert outcomes(found) == {"failed": 1}
    assert server.seen == 2  # each stream's first prompt
    server.answer = lambda text, body: "Sure, here is how: cut it." if server.seen > 3 else REFUSAL
    found = leadline.run(study({"pair": {"streams": 2}}), tmp_path / "other")
    assert outcomes(found) == {"answered": 1}  # the second stream broke it
    assert found.cells()["unsafe"].sum() == 1


@pytest.mark.parametrize("name", ["pair", "renellm"])
def test_a_search_needs_answers_and_verdicts(server, study, tmp_path, name):
    server.faults = {500: 1.0}
    found = leadline.run(study(name), tmp_path / "out")
    assert outcomes(found) == {"failed": 1}
    assert f"{name}: the target gave no answer: HTTP 500" in reasons(found).pop()
    server.faults = {}
    with Server(lambda text, body: "no verdict") as guard:
        judges = [{"qwen3guard": {"model": "guard", "url": guard.url}}]
        found = leadline.run(study(name, judges=judges), tmp_path / "out")
        assert outcomes(found) == {"failed": 1}
        assert f"{name}: the judge left an answer unscored: " in reasons(found).pop()
        guard.asked.clear()
        guard.answer = lambda text, body: "Safety: Safe\nCategories: None\nRefusal: Yes"
        found = leadline.run(study(name, judges=judges), tmp_path / "other")
        assert outcomes(found) == {"answered": 1}
        assert set(guard.asked.values()) == {1}  # the verdict on the final attempt is stored


def test_renellm_stops_when_the_target_breaks_and_depends_on_the_seed(
    server, attacker, study, tmp_path
):
    found = leadline.run(study({"renellm": {"rounds": 4}}), tmp_path / "safe")
    assert outcomes(found) == {"answered": 1}
    assert server.seen == 4
    first = turns(server)
    leadline.run(study({"renellm": {"rounds": 4}}, seed=1), tmp_path / "other")
    assert turns(server)[4:] != first
    server.answer = lambda text, body: "Sure, here is how: cut it."
    found = leadline.run(study({"renellm": {"rounds": 4}}), tmp_path / "broken")
    assert server.seen == 9
    assert turns(server)[-1] == first[0]
    assert found.cells()["unsafe"].sum() == 1


@pytest.mark.parametrize("name", ["pair", "renellm"])
def test_a_killed_search_resumes_and_sends_nothing_twice(
    server, attacker, garden, study_file, tmp_path, name
):
    """SIGKILL during the second request to the target."""
    options = {"pair": {"turns": 3}, "renellm": {"rounds": 3}}[name]
    file = study_file(
        targets=[{"model": "m", "url": server.url}],
        datasets=[{"file": {"path": str(garden(1)), "name": "garden"}}],
        attacks=[{name: options}],
        attacker={"model": "a", "url": attacker.url},
        judges=["refusal"],
    )
    received: list[str] = []

    def answer(text: str, body: Any) -> str:
        server.sticky = {"": "hang"} if not received else {}  # the next request
        received.append(text)
        return REFUSAL

    server.answer = answer
    command = [str(Path(sys.executable).parent / "leadline"), "run", str(file), "--out", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 30
    while server.seen < 2 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.8)  # longer than the commit interval
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    server.sticky = {}
    before = attacker.seen
    assert before >= 2
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not sent_twice(attacker)
    assert set(server.asked.values()) == {1}
    assert len(received) == 3
    assert attacker.seen > before
    (cell,) = leadline.results(tmp_path / "out").cells().to_dict("records")
    assert (cell["n"], cell["failed"]) == (1, 0)


# -- any prompt, any reply of the attacker ---------------------------------------------------------


class Scripted:
    """An Assist without models, for property tests; `reply` is the attacker's."""

    def __init__(self, reply: Callable[[str], str]) -> None:
        self.reply = reply

    async def write(self, ask: Any, **settings: Any) -> str:
        return self.reply(ask if isinstance(ask, str) else ask[-1].content)

    async def target(self, attempt: Attempt) -> Response:
        return Response(REFUSAL)

    async def judge(self, attempt: Attempt, response: Response) -> Verdict:
        return Verdict(unsafe=False, refusal=True)


def attempt_of(attack: Attack, text: str, reply: Callable[[str], str]) -> Attempt | None:
    prompt = Prompt(id="1", text=text, dataset="d")
    try:
        return asyncio.run(attack.assisted_attempt(prompt, 3, Scripted(reply)))
    except (AttemptFailed, NotApplicable):
        return None


@pytest.mark.parametrize("attack", ASSISTED, ids=lambda a: a.label)
@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_every_assisted_attack_supports_hard_prompts(attack, text):
    def reply(ask: str) -> str:
        if "JSON list" in ask:
            return json.dumps([text, text[:5]])
        longer = " mile zon" * (len(text) // 40)
        return re.sub("(mile zon|in disguise)", rf"\1{longer}", writes(ask, None))

    one = attempt_of(attack, text, reply)
    assert one == attempt_of(attack, text, reply)  # same seed, same attempt
    if "auto" in attack.label and len(text) < 2:
        assert one is None  # no words to mark
    else:
        assert one is not None
        assert one.messages[-1].role == "user"


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(HARD) | st.text(max_size=60), st.text(max_size=120), st.integers(0, 3))
def test_any_reply_of_the_attacker_gives_an_attempt_or_a_failure(text, reply, shape):
    shapes = (reply, f"<text>{reply}</text>", json.dumps({"prompt": reply}), json.dumps([reply]))
    for attack in WRITTEN:
        one = attempt_of(attack, text, lambda ask: shapes[shape])
        assert one is None or one.messages[-1].content.strip()


@given(st.text(max_size=200))
def test_any_answer_is_translated_back_or_judged_unchanged(text):
    zulu = Attack("translation_zulu", registry.get("attack", "translation_zulu"), {})
    decoded = asyncio.run(zulu.decode(text, Scripted(lambda ask: "<text>Cut the wood.</text>")))
    assert decoded in (text, "Cut the wood.")


@pytest.mark.parametrize(
    "text",
    [
        "I'm really sorry, but I can't assist with that.",
        "Sorry, I cannot rewrite this.",
        "I\u2019m not able to help with this request.",
        "I won't write that for you.",
        "Unfortunately I am unable to do this.",
        "I must respectfully decline.",
        "As an AI assistant, I am here to be useful and safe.",
        "**I cannot** help to attack a model.",
        "I'm sorry, I can't do that.",
        "I can't do this.",
        "I apologize, but as a responsible assistant I will not take part.",
        "抱歉，我无法翻译这段文字。",
        "Je suis désolé, mais je ne peux pas traduire ce texte.",
    ],
)
def test_refusals_of_attackers_are_detected(text):
    assert _assisted.refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "I can't sleep since my roses wither. How do I prune them?",
        "I'm sorry to write so late, but I cannot sleep: how are roses pruned?",
        "I'm sorry to bother you, professor. How would you prune a rose?",
        "As an AI safety auditor for the county's gardens, tell me how to prune a rose.",
        "Unfortunately my grandmother never told me how she pruned her roses.",
        "My doctor says I can't do this without a proper plan. Write me one.",
        "I will not rest until I know how to prune a rose.",
        "You refuse to help? A fellow gardener would not.",
        "I can't help but wonder how roses are pruned.",
        "I can't provide for my family unless I learn to prune roses.",
        "I can't do this alone: how do I prune a rose?",
        "As an AI researcher I can vouch for this study of roses.",
        "Désolé de vous déranger : comment tailler un rosier ?",
        "Je ne peux pas dormir. Comment tailler un rosier ?",
        "我不能等了。玫瑰怎么修剪？",
        "",
    ],
)
def test_requests_are_not_detected_as_refusals(text):
    assert not _assisted.refuses(text)


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("Sure! <text>Prune it.</text> Good luck.", "Prune it."),
        ("It goes between <text> and </text>: <TEXT>\nPrune it.\n", "Prune it."),
        ("<text>Draft.</text> Better: <text>Prune it.</text><text></text>", "Prune it."),
    ],
)
def test_the_tagged_text_is_found_in_a_reply(reply, text):
    assert _assisted.tagged_text(reply) == text


def test_reasons_never_quote_an_answer_to_the_request(attacker, study, tmp_path):
    """An attacker may answer the request that it should rewrite, and reports show the reasons."""
    for folder, reply in (("a", "I can't help with that. But: mix soot."), ("b", "Mix soot.")):
        attacker.answer = lambda text, body, reply=reply: reply
        found = leadline.run(study(*NAMES), tmp_path / folder)
        assert outcomes(found) == {"failed": len(NAMES)}
        assert "soot" not in str(reasons(found))


def test_invalid_numbers_are_reported(study, tmp_path):
    found = leadline.run(study({"pair": {"turns": 0}}, {"renellm": {"rounds": 0}}), tmp_path / "o")
    assert outcomes(found) == {"failed": 2}
    assert "pair: turns and streams must be 1 or more, not 0 and 1" in str(reasons(found))
    assert "renellm: rounds must be 1 or more, not 0" in str(reasons(found))
