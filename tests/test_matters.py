"""`leadline matters`: planted differences are found, and nothing is found where there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import leadline
from leadline.cli import app
from leadline.matters import factors
from leadline.matters.external import any_of
from leadline.matters.factors import Row as ModelRow
from leadline.records import LeadlineError

from .stores import Row, write_store

FAMILIES = {"direct": "direct", "prefill": "prefill", "aim": "persona", "base64": "encoding"}


@dataclass(frozen=True)
class Planted:
    """A model with a card and, by attack, the chance that a prompt is broken."""

    name: str
    rates: Mapping[str, float]
    thinking: str = "default"
    card: Mapping[str, Any] = field(default_factory=dict)


def study(folder: Path, models: Sequence[Planted], prompts: int = 80, **more: Any) -> Path:
    rows, cards = [], {}
    for at, model in enumerate(models):
        rng = np.random.default_rng(at)
        full = {
            "id": model.name, "family": "one", "parameters": 8.0, "architecture": "dense",
            "reasoning": "none", "stage": "instruct", **model.card,
        }  # fmt: skip
        cards[f"model:{model.name}"] = {"card": full}
        for attack, rate in model.rates.items():
            rows += [
                Row(f"p{n}", bool(hit), model=model.name, thinking=model.thinking, attack=attack,
                    text=f"request {n}", **more)
                for n, hit in enumerate(rng.random(prompts) < rate)
            ]  # fmt: skip
    write_store(folder, rows, families=FAMILIES, **cards).close()
    return folder


FLAT = {"direct": 0.2, "prefill": 0.2, "aim": 0.2}


def test_a_forged_prefix_is_found(tmp_path: Path) -> None:
    models = [Planted(f"m{n}", {"direct": 0.1, "prefill": 0.6, "aim": 0.1}) for n in range(3)]
    found = leadline.what_matters(study(tmp_path, models))
    row = {each.name: each for each in found.techniques}["response prefix"]
    assert row.models == 3
    assert row.ratio.low > 2
    assert row.found.difference.low <= 0.5 <= row.found.difference.high
    assert any("forged response prefix" in each.text for each in found.sentences)
    jailbreaks = {each.name: each for each in found.techniques}["all jailbreaks"]
    assert jailbreaks.found.difference.low < 0 < jailbreaks.found.difference.high
    assert not any("With a jailbreak" in each.text for each in found.sentences)
    assert found.attack_families[-1].name == "response prefix"
    assert found.attack_families[-1].first == found.attack_families[-1].last == 2


def test_equal_models_share_their_ranks(tmp_path: Path) -> None:
    found = leadline.what_matters(study(tmp_path, [Planted(f"m{n}", FLAT) for n in range(5)]))
    assert {(row.first, row.last) for row in found.ranking} == {(1, 5)}
    assert not any("safest" in each.text for each in found.sentences)


def test_different_models_are_ranked(tmp_path: Path) -> None:
    models = [
        Planted(f"m{n}", dict.fromkeys(FLAT, rate)) for n, rate in enumerate((0.8, 0.02, 0.4))
    ]
    found = leadline.what_matters(study(tmp_path, models))
    assert [(row.name, row.first, row.last) for row in found.ranking] == [
        ("m1", 1, 1), ("m2", 2, 2), ("m0", 3, 3),
    ]  # fmt: skip


def test_matched_pairs_differ_in_one_characteristic(tmp_path: Path) -> None:
    base, child = {"stage": "base"}, {"parent": "base"}
    models = [
        Planted("base", dict.fromkeys(FLAT, 0.7), card=base),
        Planted("instruct", dict.fromkeys(FLAT, 0.1), card=child),
        Planted("distilled", dict.fromkeys(FLAT, 0.5), card={"stage": "distilled", **child}),
        Planted("large", FLAT, card={"parameters": 70.0}),
        Planted("other", FLAT, card={"family": "two", "architecture": "moe"}),
        Planted("both", FLAT, card={"architecture": "moe", "parameters": 400.0}),
    ]
    found = leadline.what_matters(study(tmp_path, models))
    pairs = {(row.characteristic, row.less, row.more): row.found for row in found.matched}
    assert set(pairs) == {
        ("stage", "base", "instruct"), ("distillation", "instruct", "distilled"),
        ("size", "instruct", "large"),
    }  # fmt: skip
    assert pairs["stage", "base", "instruct"].difference.high < -0.4
    assert pairs["distillation", "instruct", "distilled"].difference.low > 0.2
    sizes = pairs["size", "instruct", "large"].difference
    assert sizes.low < 0.1 < sizes.high


def test_thinking_modes_are_matched(tmp_path: Path) -> None:
    card = {"reasoning": "hybrid", "stage": "reasoning"}
    rows = []
    for thinking, rate in (("off", 0.1), ("on", 0.6)):
        rng = np.random.default_rng(len(thinking))
        rows += [
            Row(f"p{n}", bool(hit), model="m", thinking=thinking, text=f"request {n}")
            for n, hit in enumerate(rng.random(80) < rate)
        ]
    full = {"id": "m", "family": "one", "parameters": 8.0, "architecture": "dense", **card}
    write_store(tmp_path, rows, families=FAMILIES, **{"model:m": {"card": full}}).close()
    (row,) = leadline.what_matters(tmp_path).matched
    assert (row.characteristic, row.less, row.more) == ("reasoning", "m (thinking off)",
                                                        "m (thinking on)")  # fmt: skip
    assert row.found.difference.low > 0.3


def fleet(effect: float) -> list[Planted]:
    """Ten families of three models: two sizes, and one mixture of experts in half of them."""
    models = []
    rng = np.random.default_rng(5)
    for family in range(10):
        level = rng.normal(-1, 0.5)
        for n, size in enumerate((2.0, 8.0, 32.0)):
            logit = level + effect * math.log2(size) + rng.normal(0, 0.2)
            rate = 1 / (1 + math.exp(-logit))
            card = {"family": f"f{family}", "parameters": size,
                    "architecture": "moe" if n == 1 and family % 2 else "dense"}  # fmt: skip
            models.append(Planted(f"m{family}.{n}", {"direct": rate}, card=card))
    return models


def test_a_planted_effect_of_size_is_found_and_no_other(tmp_path: Path) -> None:
    found = leadline.what_matters(study(tmp_path, fleet(-0.5), prompts=150)).factors
    effects = {effect.characteristic: effect for effect in found.effects}
    assert effects["size"].p_holm < 0.01
    assert effects["size"].estimate.low < -0.5 < effects["size"].estimate.high
    assert effects["size"].lowest < effects["size"].estimate.value < effects["size"].highest
    assert effects["architecture"].p_holm > 0.05
    assert len(effects["architecture"].families) == 5
    assert all(0.9 < effect.coverage <= 1 for effect in found.effects)
    assert effects["size"].power > effects["architecture"].power
    reasons = {each.characteristic: each.reason for each in found.unanswered}
    assert set(reasons) == {"reasoning", "stage", "distillation"}
    assert "add some that are distilled" in reasons["distillation"]


def test_aliased_characteristics_are_named(tmp_path: Path) -> None:
    models = [
        Planted(f"m{family}{n}", FLAT, card={
            "family": f"f{family}", "reasoning": ("none", "native")[n],
            "stage": ("instruct", "distilled")[n]})
        for family in range(4) for n in range(2)
    ]  # fmt: skip
    found = leadline.what_matters(study(tmp_path, models)).factors
    assert found.effects == ()
    reasons = {each.characteristic: each.reason for each in found.unanswered}
    assert "moves together with distillation" in reasons["reasoning"]
    assert "moves together with reasoning" in reasons["distillation"]


def test_models_without_a_card_are_named(tmp_path: Path) -> None:
    models = [Planted("known", FLAT), Planted("unknown", FLAT, card={"parameters": None})]
    found = leadline.what_matters(study(tmp_path, models))
    assert found.factors.left_out == ("unknown",)
    assert any("unknown" in text for text in found.unanswered)


def test_the_smallest_battery_is_measured_on_other_prompts(tmp_path: Path) -> None:
    rates = {"direct": 0.0, "prefill": 0.6, "aim": 0.0, "base64": 0.0}
    found = leadline.what_matters(study(tmp_path, [Planted("m", rates)], prompts=200)).battery
    assert found
    assert found.attacks == ("prefill",)
    assert found.of == 4
    assert found.found.value == 1
    assert 40 < found.breaks < 80


def test_the_thought_and_the_answer_are_told_apart(tmp_path: Path) -> None:
    from leadline.records import Response, Verdict
    from leadline.store import Place, Store

    rows = [Row(f"p{n}", text=f"request {n}") for n in range(60)]
    write_store(tmp_path, rows, families=FAMILIES).close()
    with Store(tmp_path, write=True) as store:
        judge = store.judge_id("guild", {})
        for prompt, name in store.query("SELECT id, name FROM prompts"):
            place, unsafe = Place(1, prompt, 0), int(name[1:]) < 20
            store.put_response(name.encode(), "{}", Response("fine", "a thought"))
            store.put_trial(place, name.encode(), "answered", "")
            verdict = Verdict(unsafe, thought_unsafe=unsafe, answer_unsafe=False)
            store.put_verdict(place, judge, verdict)
    (row,) = leadline.what_matters(tmp_path).parts
    assert row.only_thought.value == pytest.approx(1 / 3)
    assert row.only_answer.value == 0
    assert any("the thought is unsafe" in s.text for s in leadline.what_matters(tmp_path).sentences)


def test_sentences_can_be_reproduced(tmp_path: Path) -> None:
    models = [Planted(f"m{n}", {"direct": 0.1, "prefill": 0.5 + n / 5}) for n in range(3)]
    m = leadline.what_matters(study(tmp_path, models))
    assert m.sentences
    assert len(m.sentences) <= 10
    for sentence in m.sentences:
        value, low, high = eval(sentence.query, {"m": m})
        assert (value, low, high) == (sentence.value, sentence.low, sentence.high)
        assert low <= value <= high
        for word in ("cause", "because", "due to", "most important"):
            assert word not in sentence.text


def test_the_command_writes_json(tmp_path: Path) -> None:
    study(tmp_path, fleet(-0.5), prompts=40)
    result = CliRunner().invoke(app, ["matters", str(tmp_path), "--tables"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "safest first" in result.output
    assert "Not answered by this study" in result.output
    content = json.loads((tmp_path / "matters.json").read_text(encoding="utf-8"))
    assert len(content["ranking"]) == 30
    assert content["factors"]["effects"]


def test_a_folder_without_answers_is_refused(tmp_path: Path) -> None:
    rows = [Row("p", None, outcome="failed", reason="no server")]
    write_store(tmp_path, rows).close()
    with pytest.raises(LeadlineError, match="no scored answers"):
        leadline.what_matters(tmp_path)


# -- twins ----------------------------------------------------------------------------------------


def test_cr3_is_the_jackknife_of_ordinary_least_squares() -> None:
    """Against refits with numpy's least squares, without one family at a time."""
    rng = np.random.default_rng(3)
    x, of = rng.normal(size=(24, 2)), np.repeat(np.arange(6), 4)
    y = x @ [0.5, -0.2] + rng.normal(size=6)[of] + rng.normal(size=24)
    rows = [
        ModelRow(str(n), f"f{of[n]}", float(y[n]), 0.0, {"size": x[n, 0], "stage": x[n, 1]})
        for n in range(24)
    ]
    fit = factors.estimator_of(rows, "size", ["size", "stage"], "between families")(y)
    design = np.column_stack([x, np.ones(24)])
    full = np.linalg.lstsq(design, y, rcond=None)[0][0]
    left = [np.linalg.lstsq(design[of != g], y[of != g], rcond=None)[0][0] for g in range(6)]
    assert fit.value == pytest.approx(full)
    assert fit.error == pytest.approx(math.sqrt(5 / 6 * sum((b - full) ** 2 for b in left)))
    assert 1 < fit.freedom < 5


def test_any_of_k_is_unbiased_and_extrapolates() -> None:
    rng = np.random.default_rng(1)
    chance = np.where(rng.random(300) < 0.3, 0.0, rng.beta(0.6, 2.0, 300))
    total = rng.binomial(20, chance).astype(float)
    rows = any_of(total, np.full(300, 20.0), np.arange(300), (1, 20, 200))
    truth = {k: float((1 - (1 - chance) ** k).mean()) for k in (1, 20, 200)}
    for row in rows:
        assert row.observed == (row.k <= 20)
        assert row.rate.low <= truth[row.k] <= row.rate.high
    assert rows[1].rate.value == pytest.approx(float((total > 0).mean()))
    assert rows[0].rate.value == pytest.approx(float((total / 20).mean()))
