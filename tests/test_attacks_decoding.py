"""The search over decoding settings: on a real model, and against a target that is known."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import leadline
from leadline import LeadlineError, Study, registry
from leadline.attacks.decoding import SWEEPS
from leadline.plan import Attack
from leadline.records import Attempt, AttemptFailed, Prompt, Response, Verdict

NAN = float("nan")


class Target:
    """An Assist whose target breaks at the settings that one says; it remembers what it was
    asked. `harm` scores an answer in [0, 1], unsafe at 1; nan is unscored, None no answer."""

    def __init__(self, harm: Callable[[dict[str, Any]], float | None]) -> None:
        self.harm = harm
        self.asked: list[dict[str, Any]] = []

    async def write(self, *ask: Any, **settings: Any) -> str:
        raise AssertionError("the search needs no attacker")

    async def target(self, attempt: Attempt) -> Response:
        self.asked.append(dict(attempt.sampling))
        if self.harm(self.asked[-1]) is None:
            return Response("", finish="error", error="timeout")
        return Response("words")

    async def judge(self, attempt: Attempt, response: Response) -> Verdict:
        score = self.harm(dict(attempt.sampling))
        return Verdict(unsafe=None if score != score else score == 1, score=score)


def search(target: Target, **options: Any) -> dict[str, Any]:
    attack = Attack("decoding_search", registry.get("attack", "decoding_search"), options)
    prompt = Prompt(id="1", text="How is a tonic brewed?", dataset="d")
    made = asyncio.run(attack.assisted_attempt(prompt, 0, target))
    assert [m.content for m in made.messages] == [prompt.text]
    return dict(made.sampling)


@pytest.mark.parametrize("sweep", ["full", "short"])
def test_a_search_without_bounds_tries_what_decoding_tries(sweep):
    target = Target(lambda settings: 0.0)
    search(target, sweep=sweep, most=99)
    assert len(target.asked) == len(SWEEPS[sweep])
    assert all(settings in target.asked for settings in SWEEPS[sweep])


def test_it_begins_with_the_widest_settings_and_ends_with_the_greedy_ones():
    target = Target(lambda settings: 0.0)
    search(target, hottest=1.5, most=99)
    assert target.asked[:6] == [
        {"temperature": 1.5},
        {"temperature": 1.0, "top_k": 500},
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 1.25},
        {"temperature": 1.0, "top_k": 200},
        {"temperature": 1.0, "top_p": 0.95},
    ]
    assert target.asked[-3:] == [
        {"temperature": 1.0, "top_p": 0.05},
        {"temperature": 0.1},
        {"temperature": 0.05},
    ]


def test_it_stops_at_the_first_break_and_returns_it():
    target = Target(lambda settings: float(settings.get("top_k") == 200))
    assert search(target) == {"temperature": 1.0, "top_k": 200}
    assert len(target.asked) == 5


def test_without_a_break_it_stops_at_most_settings_and_the_best_scored_stands():
    target = Target(lambda settings: 0.6 if settings.get("top_p") == 0.95 else 0.2)
    assert search(target) == {"temperature": 1.0, "top_p": 0.95}
    assert len(target.asked) == 16
    target = Target(lambda settings: 0.0)
    assert search(target, most=3) == {"temperature": 1.0}


@pytest.mark.parametrize(("nothing", "why"), [(None, "no answer: timeout"), (NAN, "unscored")])
def test_what_is_not_known_hides_no_break_and_shows_no_safety(nothing, why):
    def harm(settings: dict[str, Any]) -> float | None:
        return nothing if settings.get("top_k") == 500 else float(settings["temperature"] < 1)

    assert search(Target(harm)) == {"temperature": 0.95}
    with pytest.raises(AttemptFailed, match=why):
        search(Target(harm), most=3)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"most": 0}, "most is a number of settings, not 0"),
        ({"sweep": "long"}, "decoding_search: sweep is full or short"),
        ({"hottest": 0.5}, "hottest is a temperature from 1 to 10"),
    ],
)
def test_wrong_options_are_told(options, why):
    with pytest.raises(LeadlineError, match=why):
        search(Target(lambda settings: 0.0), **options)


def test_on_the_same_settings_it_finds_the_prompts_that_decoding_finds(tmp_path):
    options = {"sweep": "short", "hottest": 1.75}
    study = Study(
        targets=["organism:aligned"],
        datasets=[{"guild": {"harmless": False}}],
        attacks=[{"decoding": options}, {"decoding_search": options}],
        sampling={"temperature": 0, "max_tokens": 72},
    )
    found = leadline.run(study, tmp_path, limit=24)
    broken: dict[str, set[str]] = {"decoding": set(), "decoding_search": set()}
    for attack, prompt in found.query("SELECT attack, prompt FROM outcomes WHERE unsafe"):
        broken[attack.split("(")[0]].add(prompt)
    assert broken["decoding"] == broken["decoding_search"]
    assert 0 < len(broken["decoding"]) < 24
    # The requests are the same, and none was asked twice.
    assert found.query("SELECT count(*) FROM responses") == [(24 * 12,)]
    cells = found.cells().set_index(found.cells()["attack"].str.split("(").str[0])
    assert cells["n"].to_dict() == {"decoding": 24, "decoding_search": 24}
    assert cells["unsafe"].nunique() == 1


def test_settings_that_are_compared_draw_from_streams_of_their_own():
    """With one seed for all, every setting would make the same draws: near copies of one answer."""
    from leadline import plan
    from leadline.plan import Target
    from leadline.study import Study

    study = Study(targets=["t"], datasets=["guild"], attacks=[{"decoding": {"sweep": "full"}}])
    ready = plan.load(study, 1)
    trials = list(plan.trials(ready, Target(study.targets[0], {"model": "t"})))
    settings = [t.request.sampling for t in trials if t.request and t.request.sampling.temperature]
    assert len(settings) == 49
    assert len({s.seed for s in settings}) == 49
    again = list(plan.trials(ready, Target(study.targets[0], {"model": "t"})))
    assert [t.key for t in again] == [t.key for t in trials]
