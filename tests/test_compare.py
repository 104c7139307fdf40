"""`leadline compare` and `leadline baseline`: stores, baseline files, the gate and its formats."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

import leadline
from leadline.cli import app
from leadline.comparison.gate import max_t
from leadline.comparison.pairs import Pair, difference
from leadline.comparison.power import power, verdicts
from leadline.comparison.sides import Side
from leadline.records import LeadlineError

from .stores import Row, write_store

runner = CliRunner()


def study(folder: Path, unsafe: dict[str, list[bool | None]], **more: object) -> Path:
    """A store of one model: by attack, whether each prompt was broken (None: unscored)."""
    rows = [
        Row(f"p{at}", value, attack=attack, text=f"request {at}", **more)  # type: ignore[arg-type]
        for attack, values in unsafe.items()
        for at, value in enumerate(values)
    ]
    write_store(folder, rows).close()
    return folder


def compare(*arguments: object, code: int) -> str:
    result = runner.invoke(app, ["compare", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def test_a_model_that_is_not_worse_passes(tmp_path: Path) -> None:
    old = study(tmp_path / "old", {"direct": [True] * 30 + [False] * 170})
    new = study(tmp_path / "new", {"direct": [True] * 20 + [False] * 180})
    output = compare(old, new, "--margin", "2pp", code=0)
    assert "Pass" in output
    assert "-5.0" in output


def test_a_model_that_is_worse_fails(tmp_path: Path) -> None:
    old = study(tmp_path / "old", {"direct": [True] * 20 + [False] * 180})
    new = study(tmp_path / "new", {"direct": [True] * 60 + [False] * 140})
    output = compare(old, new, "--margin", "5pp", code=1)
    assert "attack success rate is worse" in output


def test_too_few_prompts_do_not_pass(tmp_path: Path) -> None:
    old = study(tmp_path / "old", {"direct": [True, False] * 12})
    new = study(tmp_path / "new", {"direct": [True, False] * 11 + [True, True]})
    output = compare(old, new, "--margin", "2pp", code=2)
    assert "too few to tell" in output
    assert "prompts would tell" in output
    compare(old, new, "--margin", "2pp", "--inconclusive", "pass", code=0)
    compare(old, new, "--margin", "2pp", "--inconclusive", "fail", code=1)


def test_the_number_of_prompts_that_would_tell_does(tmp_path: Path) -> None:
    # 5 of 50 prompts change in each direction: the models are equally safe.
    old = [True] * 15 + [False] * 35
    new = [True] * 10 + [False] * 5 + [True] * 5 + [False] * 30
    one = study(tmp_path / "one", {"direct": old})
    other = study(tmp_path / "other", {"direct": new})
    result = leadline.compare(one, other, 0.05)
    assert result.outcome == "inconclusive"
    needed = result.rows[0].needed
    assert needed
    found = power(needed, 0.3, 0.05, discordant=0.2, runs=200)
    assert 0.65 < found.passes_if_equal < 0.95  # planned: 0.8


def test_only_prompts_scored_on_both_sides_are_compared(tmp_path: Path) -> None:
    old = study(tmp_path / "old", {"direct": [False] * 100 + [None] * 10, "base64": [True] * 100})
    new = study(tmp_path / "new", {"direct": [False] * 90 + [None] * 5 + [True] * 15})
    result = leadline.compare(old, new, 0.1)
    assert result.rows[0].prompts == 95
    assert result.rows[0].difference.value == pytest.approx(5 / 95)
    lost = {each.attack: each for each in result.dropped}
    assert lost["direct"].unscored == 15
    assert lost["base64"].only_one == 100


def test_prompts_are_matched_by_content(tmp_path: Path) -> None:
    """The same prompts under other ids and in another order, beside other prompts."""
    rows = [Row(f"a{at}", at < 10, text=f"request {at}") for at in range(40)]
    write_store(tmp_path / "old", rows).close()
    rows = [Row(f"b{at}", at < 10, text=f"request {at}") for at in reversed(range(60))]
    write_store(tmp_path / "new", rows).close()
    result = leadline.compare(tmp_path / "old", tmp_path / "new", 0.2)
    assert result.rows[0].prompts == 40
    assert result.rows[0].difference.value == 0


def test_other_prompts_under_the_same_ids_do_not_match(tmp_path: Path) -> None:
    one = study(tmp_path / "one", {"direct": [True] * 20})
    write_store(tmp_path / "two", [Row(f"p{at}", text=f"other {at}") for at in range(20)]).close()
    with pytest.raises(LeadlineError, match="no prompt and attack in common"):
        leadline.compare(one, tmp_path / "two", 0.1)


def test_phrasings_of_a_prompt_are_one_cluster(tmp_path: Path) -> None:
    def write(name: str, broken: int) -> Path:
        rows = [
            Row(f"{base}/{twin}", base < broken, base=f"{base}/0", text=f"{base} in words {twin}")
            for base in range(20)
            for twin in range(10)
        ]
        write_store(tmp_path / name, rows).close()
        return tmp_path / name

    result = leadline.compare(write("old", 4), write("new", 6), 0.3)
    row = result.rows[0]
    assert row.prompts == 20
    assert row.difference.high - row.difference.low > 0.3  # 200 independent prompts: about 0.1


def test_over_refusal_and_utility_are_part_of_the_gate(tmp_path: Path) -> None:
    def write(name: str, refused: int) -> Path:
        rows = [Row(f"p{at}", text=f"harm {at}") for at in range(200)]
        rows += [
            Row(f"h{at}", None, at < refused, float(at >= refused), harmful=False, text=f"ok {at}")
            for at in range(200)
        ]
        write_store(tmp_path / name, rows).close()
        return tmp_path / name

    output = compare(write("old", 2), write("new", 60), "--margin", "5pp", code=1)
    assert "over-refusal is worse" in output
    assert "utility is worse" in output
    assert "attack success rate is worse" not in output


def test_each_attack_has_to_be_within_the_margin(tmp_path: Path) -> None:
    quiet = {f"attack{at}": [False] * 400 for at in range(9)}
    old = study(tmp_path / "old", {**quiet, "prefill": [False] * 400})
    new = study(tmp_path / "new", {**quiet, "prefill": [True] * 40 + [False] * 360})
    compare(old, new, "--margin", "3pp", code=0)  # the mean rises by one point
    output = compare(old, new, "--margin", "3pp", "--each-attack", code=1)
    assert "attack success rate of prefill is worse" in output


def test_a_baseline_file_gives_the_same_comparison(tmp_path: Path) -> None:
    old = study(tmp_path / "old", {"direct": [True, False, None] * 20, "prefill": [True] * 60})
    new = study(tmp_path / "new", {"direct": [False, True, True] * 20, "prefill": [False] * 60})
    file = tmp_path / "baseline.json"
    result = runner.invoke(app, ["baseline", str(old), "--out", str(file)])
    assert result.exit_code == 0, result.output
    assert "request" not in file.read_text(encoding="utf-8")
    assert leadline.compare(file, new, 0.1).rows == leadline.compare(old, new, 0.1).rows


def test_depth_is_compared(tmp_path: Path) -> None:
    ks = (1, 5, 10)
    shallow = {"direct": [False] * 40} | {f"prefill(k={k})": [True] * 40 for k in ks}
    deep = {"direct": [False] * 40} | {f"prefill(k={k})": [k >= 10] * 40 for k in ks}
    one, other = study(tmp_path / "one", shallow), study(tmp_path / "other", deep)
    output = compare(one, other, "--margin", "5pp", "--depth", code=0)
    (line,) = [line for line in output.splitlines() if "prefill depth D50" in line]
    assert "0.4" in line
    assert "+6.7" in line
    flat = study(tmp_path / "flat", {"direct": [False] * 40})
    result = runner.invoke(app, ["compare", str(flat), str(flat), "--margin", "5pp", "--depth"])
    assert isinstance(result.exception, LeadlineError)
    assert "two prefill lengths" in str(result.exception)


def test_formats(tmp_path: Path) -> None:
    name = "a<b>|`c`"  # names come from study files
    old = study(tmp_path / "old", {"direct": [False] * 100, "prefill": [False] * 100}, model=name)
    new = study(tmp_path / "new", {"direct": [False] * 100, "prefill": [True] * 100}, model=name)
    arguments = (old, new, "--margin", "5pp", "--format")
    markdown = compare(*arguments, "markdown", code=1)
    assert "<b>" not in markdown
    assert markdown.startswith("### Fail")
    suite = ElementTree.fromstring(compare(*arguments, "junit", code=1).encode())
    assert suite.attrib["tests"] == "3"
    failed = [case.attrib["name"] for case in suite if case.find("failure") is not None]
    assert failed == ["attack success rate", "attack success rate prefill"]
    content = json.loads(compare(*arguments, "json", code=1))
    assert content["outcome"] == "fail"
    assert content["rows"][0]["candidate"] == 0.5
    sarif = json.loads(compare(*arguments, "sarif", code=1))
    assert sarif["runs"][0]["results"][0]["level"] == "error"
    file = tmp_path / "gate.xml"
    output = compare(*arguments, "junit", "--output", file, code=1)
    assert "Fail" in output
    ElementTree.parse(file)


def test_power_before_a_run(tmp_path: Path) -> None:
    old = study(tmp_path / "old", {"direct": [True] * 5 + [False] * 45})
    output = compare(old, "--power", "--margin", "5pp", code=0)
    assert output.startswith("50 prompts, ASR 10.0%")
    assert "smallest regression" in output
    few, many = power(50, 0.1, 0.05, runs=100), power(500, 0.1, 0.05, runs=100)
    assert many.detectable
    assert few.detectable
    assert many.detectable < few.detectable / 2
    assert many.passes_if_equal > few.passes_if_equal + 0.3
    assert many.passes_at_margin < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "nothing", "--margin", "2pp"], "no such file or folder"),
        (["{one}", "{one}"], "--margin is missing"),
        (["{one}", "{one}", "--margin", "2"], "give percentage points"),
        (["{one}", "{one}", "--margin", "0pp"], "the margin is 0"),
        (["{one}", "{one}", "--margin", "2pp", "--format", "pdf"], "format"),
        (["{one}", "{one}", "--margin", "2pp", "--inconclusive", "no"], "--inconclusive"),
        (["{one}::nobody", "{one}", "--margin", "2pp"], "nobody"),
        (["{two}", "{one}", "--margin", "2pp"], "2 models"),
        (["{one}", "--margin", "2pp"], "no candidate"),
        (["{empty}", "{one}", "--margin", "2pp"], "leadline.sqlite"),
        (["{other_judge}", "{one}", "--margin", "2pp"], "was judged by refusal"),
    ],
)
def test_bad_input_gets_one_clear_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    one = study(tmp_path / "one", {"direct": [True] * 4})
    rows = [Row("p", model=model) for model in "ab"]
    write_store(tmp_path / "two", rows).close()
    other = study(tmp_path / "other", {"direct": [True] * 4}, judge="refusal")
    (tmp_path / "empty").mkdir()
    names = {"one": one, "two": tmp_path / "two", "empty": tmp_path / "empty", "other_judge": other}
    filled = [argument.format(**names) for argument in arguments]
    result = runner.invoke(app, ["compare", *filled])
    assert isinstance(result.exception, LeadlineError), result.output
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", "[" * 5000, '{"leadline_baseline": 2}', '{"leadline_baseline": 1}',
        '{"leadline_baseline": 1, "model": 1, "judges": [], "prompts": {}, "cells": []}',
        '{"leadline_baseline": 1, "model": "m", "judges": {}, "prompts": {"d": {"keys": ["a"], '
        '"bases": null, "categories": {"names": ["x"], "of": [0]}}}, "cells": [{"measure": '
        '"unsafe", "dataset": "d", "attack": "a", "any": false, "prompts": [3], "attempts": [1], '
        '"scored": [1], "total": [1]}]}',
        '{"leadline_baseline": 1, "model": "m", "judges": {}, "prompts": {"d": {"keys": ["a"], '
        '"bases": null, "categories": {"names": ["x"], "of": [0]}}}, "cells": [{"measure": '
        '"unsafe", "dataset": "d", "attack": "a", "any": false, "prompts": [0], "attempts": [1], '
        '"scored": [1], "total": [2]}]}',
    ],
)  # fmt: skip
def test_a_garbled_baseline_file_gets_one_clear_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "baseline.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(LeadlineError) as raised:
        Side.read(str(file))
    assert "\n" not in str(raised.value)
    assert str(file) in str(raised.value)


# -- twins ----------------------------------------------------------------------------------------


def pair_of(a: int, b: int, c: int, d: int) -> Pair:
    """Counts of prompts that are unsafe for both, for the candidate, for the baseline, for none."""
    candidate = np.array([True] * (a + b) + [False] * (c + d))
    baseline = np.array(([True] * a + [False] * b) + ([True] * c + [False] * d))
    empty = np.full(a + b + c + d, "", dtype=object)
    return Pair("unsafe", verdicts(baseline), verdicts(candidate), empty)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((20, 12, 2, 16), 0.0562, 0.3292),  # Newcombe 1998, method 10
        ((59, 6, 16, 80), -0.1186, -0.0046),
    ],
)
def test_newcombes_method_10(counts: tuple[int, int, int, int], low: float, high: float) -> None:
    found = difference([pair_of(*counts)]).difference
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)
    assert (found.low, found.high) == pytest.approx(method_10(*counts), abs=1e-7)


def method_10(a: int, b: int, c: int, d: int) -> tuple[float, float]:
    """The published formula, from the four counts."""
    n, z = a + b + c + d, 1.959963984540054

    def score(x: int) -> tuple[float, float]:
        middle, half = 2 * x + z * z, z * math.sqrt(z * z + 4 * x * (1 - x / n))
        return (middle - half) / (2 * (n + z * z)), (middle + half) / (2 * (n + z * z))

    (low1, high1), (low2, high2) = score(a + b), score(a + c)
    p1, p2 = (a + b) / n, (a + c) / n
    numerator = a * d - b * c
    numerator = max(numerator - n / 2, 0) if numerator > 0 else numerator
    phi = numerator / math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    below = (p1 - low1, high2 - p2)
    above = (high1 - p1, p2 - low2)
    widths = [math.sqrt(x * x - 2 * phi * x * y + y * y) for x, y in (below, above)]
    return p1 - p2 - widths[0], p1 - p2 + widths[1]


def test_max_t_of_one_test_is_the_exact_sign_test() -> None:
    """With k discordant prompts, all worse, the exact one-sided p-value is 1 / 2^k."""
    moved = np.zeros((1, 30))
    moved[0, :6] = 1 / 30
    (p,) = max_t(moved, flips=40_000)
    assert p == pytest.approx(1 / 2**6, rel=0.15)
    assert max_t(np.zeros((3, 10))) == [1.0, 1.0, 1.0]
