"""The example studies, and datasets that list their own attacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leadline import LeadlineError, Study
from leadline import plan as planning
from leadline.models.cards import cards
from leadline.plan import Target

STUDIES = Path(__file__).parents[1] / "studies"
COT = ["cot_user_forged", "cot_user_template", "cot_prefix_forged", "cot_prefix_empty"]


def labels(picks) -> list[str]:
    return [label for pick in picks for label, *_ in pick.variants()]


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_loads_and_its_names_resolve(path):
    study = Study.load(path)
    assert study.name == path.stem
    for picks in (study.attacks, *(d.attacks for d in study.datasets if d.attacks)):
        assert len(labels(picks)) == len(set(labels(picks)))
    for target in study.targets:
        assert target.described, target.model


def test_the_offline_battery_needs_no_second_model():
    study = Study.load(STUDIES / "jailbreaks.yaml")
    plugins = [plugin for pick in study.attacks for _, plugin, _ in pick.variants()]
    assert len(plugins) >= 29
    assert all(set(plugin.needs) <= {"response_prefix"} for plugin in plugins)
    assert study.attacker is None


def test_the_study_has_the_papers_design():
    study = Study.load(STUDIES / "what-matters.yaml")
    assert {t.model for t in study.targets} == {c for c in cards() if not c.startswith("organism:")}
    for target in study.targets:
        hybrid = target.described.reasoning == "hybrid"
        assert target.thinking == (["on", "off"] if hybrid else ["default"]), target.model
        assert target.interface == "completions"  # where forged thoughts are exact
    by_name = {pick.name: pick for pick in study.datasets}
    assert list(by_name) == ["advbench", "xstest", "harmbench", "sorrybench", "strongreject"]
    assert by_name["sorrybench"].options["styles"] == "all"
    assert labels(study.attacks) == ["direct", *COT]
    jailbroken = labels(by_name["strongreject"].attacks)
    assert [jailbroken[0], *jailbroken[-4:]] == ["direct", *COT]
    assert len(jailbroken) > 24
    (judge,) = study.judges
    assert judge.spec.model == "Qwen/Qwen3Guard-Gen-8B"


def test_a_dataset_may_list_its_own_attacks(tmp_path):
    own = {"guild": {"limit": 3, "attacks": ["direct", {"prefill": {"k": [5, 10]}}]}}
    study = Study(targets=["organism:base"], datasets=[own, "guild"], attacks=["base64"])
    assert labels(study.datasets[0].attacks) == ["direct", "prefill(k=5)", "prefill(k=10)"]
    assert study.datasets[1].attacks is None
    assert Study.model_validate(study.model_dump(mode="json")) == study


@pytest.mark.parametrize(
    ("written", "line", "message"),
    [
        ("attacks: [direct, base46]", 5, "unknown attack 'base46': did you mean 'base64'"),
        ("attacks:\n        - direct\n        - base46", 7, "unknown attack 'base46'"),
        ("attacks:\n        - direct\n        - prefill: {k: 5,\n            kk: 6}", 8, "option"),
        ("attacks: []", 5, "must be a list such as [direct, base64]"),
        ("attacks: direct", 5, "must be a list such as [direct, base64]"),
        ("attacks:", 5, "must be a list such as [direct, base64]"),
        ("attacks: [{direct: 3}]", 5, "write the options of 'direct' as direct"),
        ("attack: [direct]", 5, "unknown option of guild 'attack': did you mean 'attacks'"),
    ],
)
def test_an_invalid_attack_of_a_dataset_is_an_error_with_its_line(tmp_path, written, line, message):
    file = tmp_path / "study.yaml"
    file.write_text(
        f"targets: [organism:base]\ndatasets:\n  - guild:\n      limit: 3\n      {written}\n"
    )
    with pytest.raises(LeadlineError) as caught:
        Study.load(file)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{file}:{line}: ")
    assert "\n" not in str(caught.value)


def test_a_dry_run_uses_published_counts_for_missing_datasets(leadline):
    ran = leadline("run", STUDIES / "what-matters.yaml", "--dry-run", "--json")
    assert ran.returncode == 0, ran.stderr
    assert "sorrybench was not found: counting its 9240 published prompts" in ran.stderr
    rows = {row["model"]: row for row in json.loads(ran.stdout)}
    assert len(rows) == 32
    prompts = 520 + 450 + 400 + 440 * 21 + 313 * 37
    assert prompts == 22_191
    forged = 4 * (520 + 200 + 400 + 440 + 313)  # harmful base prompts, without jailbreaks
    assert rows["openai/gpt-oss-20b"]["trials"] == prompts + forged
    assert rows["Qwen/Qwen3-8B"]["trials"] == 2 * (prompts + forged)
    assert sum(row["requests"] for row in rows.values()) > 10**6


def test_a_dry_run_reports_an_invalid_dataset(leadline, study_file, tmp_path):
    (tmp_path / "advbench.csv").write_text("gaol\nHow do I prune a rose?\n")
    file = study_file(targets=["organism:base"], datasets=[{"advbench": {"path": "advbench.csv"}}])
    ran = leadline("run", file, "--dry-run")
    assert ran.returncode == 2
    assert "did you mean 'gaol'" in ran.stderr


def test_a_run_needs_the_dataset_itself(leadline, study_file):
    file = study_file(targets=["organism:base"], datasets=[{"advbench": {"path": "none.csv"}}])
    ran = leadline("run", file)
    assert ran.returncode == 2
    assert "none.csv does not exist" in ran.stderr


def test_attacks_of_a_dataset_apply_to_that_dataset_only():
    own = {"guild": {"name": "first", "limit": 4, "attacks": ["direct", "rot_13"]}}
    study = Study(targets=["organism:base"], datasets=[own, "guild"], attacks=["base64"])
    plan = planning.load(study, limit=4)
    trials = planning.trials(plan, Target(study.targets[0], {}))
    pairs = {(trial.prompt.dataset, trial.attack) for trial in trials}
    assert pairs == {("first", "direct"), ("first", "rot_13"), ("guild", "base64")}
