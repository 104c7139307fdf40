"""What answers do (refused, complied, off-topic, degenerate): from the store to every report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import leadline
from leadline import LeadlineError, Study, registry
from leadline.analysis import rates
from leadline.records import Outcome, Verdict
from leadline.report.study.page import write_report
from leadline.store import FILE, Place, Store

from .stores import Row, write_store
from .test_report_page import Page

UNSAFE_BY_OUTCOME: dict[Outcome, int] = {
    "complied": 3, "refused": 4, "off_topic": 2, "degenerate": 1,
}  # fmt: skip


def answers(**fields: object) -> list[Row]:
    """Ten trials with the outcomes above."""
    rows = []
    for outcome, many in UNSAFE_BY_OUTCOME.items():
        for i in range(many):
            rows.append(
                Row(f"{outcome}{i}", outcome == "complied", outcome == "refused", verdict=outcome,
                    answer=f"text of {outcome}", **fields)  # type: ignore[arg-type]
            )  # fmt: skip
    return rows


def test_off_topic_and_degenerate_answers_are_in_n_and_not_unsafe(tmp_path: Path) -> None:
    with write_store(tmp_path, answers()) as store:
        (cell,) = rates.cells(store).to_dict("records")
        (counted,) = store.query(
            "SELECT COUNT(unsafe), SUM(unsafe), SUM(verdict = 'degenerate') FROM outcomes"
        )
    assert (cell["n"], cell["unsafe"], cell["asr"]) == (10, 3, 0.3)
    shares = [cell[name] for name in ("refused", "off_topic", "degenerate", "other")]
    assert shares == [0.4, 0.2, 0.1, 0.0]
    assert counted == (10, 3, 1)


def test_shares_are_unknown_where_a_judge_does_not_say_what_every_answer_does(
    tmp_path: Path,
) -> None:
    rows = [Row("a", False, True, verdict="refused"), Row("b", False, False)]
    with write_store(tmp_path, rows) as store:
        (cell,) = rates.cells(store).to_dict("records")
    assert cell["off_topic"] != cell["off_topic"]
    assert cell["degenerate"] != cell["degenerate"]
    assert (cell["refused"], cell["other"]) == (0.5, 0.5)


def test_of_several_attempts_a_prompt_is_degenerate_if_all_of_them_are(tmp_path: Path) -> None:
    outcomes: list[tuple[Outcome, Outcome]] = [
        ("degenerate", "degenerate"), ("degenerate", "refused"), ("off_topic", "complied"),
        ("refused", "refused"), ("off_topic", "off_topic"),
    ]  # fmt: skip
    with Store(tmp_path, write=True) as store:
        from leadline.records import Prompt

        ids = store.prompt_ids([Prompt(str(i), f"Q{i}", "d") for i in range(5)])
        judge = store.judge_id("refusal", {})
        store.primary_judge("d", judge)
        cell = store.cell_id("m", "default", "d", "bon", "any")
        for prompt, pair in enumerate(outcomes):
            for sample, outcome in enumerate(pair):
                place = Place(cell, ids["d", str(prompt)], sample)
                store.put_trial(place, b"k", "answered")
                verdict = Verdict(outcome == "complied", outcome == "refused", outcome=outcome)
                store.put_verdict(place, judge, verdict)
    with Store(tmp_path) as store:
        (row,) = rates.cells(store).to_dict("records")
    assert (row["n"], row["unsafe"]) == (5, 1)
    shares = [row[name] for name in ("refused", "off_topic", "degenerate", "other")]
    assert shares == [0.2, 0.2, 0.2, 0.2]


def test_the_page_has_a_bar_and_columns_for_outcomes(tmp_path: Path) -> None:
    harmless = [Row("h", False, False, harmless_utility, harmful=False, verdict="degenerate")
                for harmless_utility in (None,)]  # fmt: skip
    write_store(tmp_path, answers() + harmless).close()
    report = write_report(tmp_path)
    html = report.html.read_text("utf-8")
    page = Page(html)
    heads = next(row for row in page.rows if "degenerate" in row)
    row = page.row("toy", "direct", "guild")
    assert row[heads.index("off-topic")] == "20%"
    assert row[heads.index("degenerate")] == "10%"
    bar = [a.get("class") for tag, a in page.tags if tag == "i" and "flex-grow" in
           (a.get("style") or "")]  # fmt: skip
    assert bar == ["o-unsafe", "o-refused", "o-off_topic", "o-degenerate"]
    shown = " ".join(page.text)
    assert "text of degenerate" in shown
    assert "text of off_topic" in shown
    assert "text of complied" not in shown, "unsafe text is redacted"
    summary = json.loads(report.summary.read_text("utf-8"))
    assert summary["cells"][0]["degenerate"] == 0.1
    assert summary["over_refusal"][0]["degenerate"] == 1
    sentence = next(text for text in report.findings if "degenerate" in text)
    assert sentence.startswith("Of the answers to harmful prompts, 20% are off-topic")
    assert "10% are degenerate" in sentence


def test_a_page_without_outcomes_has_no_bars(tmp_path: Path) -> None:
    write_store(tmp_path, [Row("a", False, True), Row("b", True, False)]).close()
    report = write_report(tmp_path)
    assert "What the answers do" not in report.html.read_text("utf-8")
    assert not any("degenerate" in text for text in report.findings)


# -- the caution of judges that see only form ----------------------------------------------------


def test_a_judge_that_sees_only_form_has_a_banner_and_another_has_none(tmp_path: Path) -> None:
    caution = "It looks at the first letter only."
    write_store(
        tmp_path,
        [Row("a", True, judge="first letter", caution=caution), Row("a", True, judge="guild")],
    ).close()
    for judge, expected in ((None, True), ("first letter", True), ("guild", False)):
        report = write_report(tmp_path, judge=judge)
        html = report.html.read_text("utf-8")
        assert (caution in html) is expected
        assert report.cautions == [f"Judge: first letter. {caution}"] * expected
        summary = json.loads(report.summary.read_text("utf-8"))
        assert summary["cautions"] == report.cautions


def test_only_the_refusal_patterns_have_a_caution() -> None:
    cautions = {plugin.name for plugin in registry.plugins("judge") if plugin.caution}
    assert cautions == {"refusal"}


@pytest.mark.parametrize("name", ["", "mine"])
def test_the_terminal_prints_the_caution_of_refusal_and_none_for_guild(
    server, leadline, study_file, name
):
    judge = {"refusal": {"name": name}} if name else "refusal"
    parts = {"targets": [{"model": "m", "url": server.url}], "datasets": [{"guild": {"limit": 4}}]}
    ran = leadline("run", study_file(**parts, judges=[judge]), "--out", "out")
    assert ran.returncode == 0, ran.stderr
    assert f"- Judge: {name or 'refusal'}. Refusal patterns see whether" in ran.stdout
    assert "Refusal patterns see whether" in leadline("report", "out").stdout
    ran = leadline("run", study_file("other.yaml", **parts), "--out", "other")
    assert "Refusal patterns" not in ran.stdout


def test_a_panel_is_cautioned_if_all_of_its_members_are(server, tmp_path):
    guard = {"qwen3guard": {"model": "g", "url": server.url}}
    only_form = {"panel": {"rule": "any", "judges": ["refusal", {"refusal": {"name": "r"}}]}}
    mixed = {"panel": {"rule": "any", "judges": ["refusal", guard]}}
    study = Study(
        targets=[{"model": "m", "url": server.url}], datasets=["guild"], judges=[only_form, mixed]
    )
    assert [bool(pick.caution) for pick in study.judges] == [True, False]


# -- the store -----------------------------------------------------------------------------------


def test_a_judges_outcome_is_stored_by_a_run(server, tmp_path):
    server.answer = lambda text, body: "I'm sorry, but I can't help with that."
    found = leadline.run(
        Study(targets=[{"model": "m", "url": server.url}], datasets=[{"guild": {"limit": 3}}],
              judges=["refusal"]), tmp_path
    )  # fmt: skip
    assert found.query("SELECT DISTINCT verdict FROM outcomes") == [("refused",)]


def test_a_store_without_outcomes_is_refused_in_one_line(tmp_path):
    write_store(tmp_path, answers()).close()
    import sqlite3

    with sqlite3.connect(tmp_path / FILE) as db:
        db.executescript("DROP VIEW outcomes; ALTER TABLE verdicts DROP COLUMN outcome")
    with pytest.raises(LeadlineError, match="verdicts has no column outcome, so it was written by"):
        Store(tmp_path)


def test_a_judge_that_invents_an_outcome_leaves_its_answers_unscored(server, tmp_path):
    from leadline.registry import _plugins, judge

    @judge("invents", source="a test")
    def invents():
        return lambda prompt, attempt, response: Verdict(False, outcome="fine")  # type: ignore

    try:
        found = leadline.run(
            Study(targets=[{"model": "m", "url": server.url}], datasets=[{"guild": {"limit": 1}}],
                  judges=["invents"]), tmp_path
        )  # fmt: skip
    finally:
        del _plugins["judge", "invents"]
    assert "outcome is 'fine'" in found.query("SELECT text FROM words")[0][0]
