"""Study files and plans: valid files, error messages, and the order and count of trials."""

from __future__ import annotations

import pytest

from leadline import LeadlineError, Study
from leadline import plan as planning
from leadline.plan import Target
from leadline.records import Request, ResponsePrefix, Sampling

GOOD = """\
name: mine
targets:
  - model: my-model
    url: http://localhost:8000/v1
    thinking: [on, off]
  - organism:aligned
datasets:
  - guild
attacks: [direct, family:encoding, {prefill: {k: [5, 10]}}]
sampling: {temperature: 0.7, max_tokens: 64, samples: 3}
"""


def load(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return Study.load(path)


def test_a_valid_file_loads(tmp_path):
    study = load(tmp_path, GOOD)
    assert [t.label for t in study.targets] == ["my-model", "organism:aligned"]
    assert study.targets[0].thinking == ["on", "off"]  # YAML reads on as true
    labels = [label for pick in study.attacks for label, *_ in pick.variants()]
    assert labels[0] == "direct"
    assert {"base64", "rot_13"} <= set(labels[1:-2])
    assert labels[-2:] == ["prefill(k=5)", "prefill(k=10)"]


@pytest.mark.parametrize(
    ("line", "wrong", "message"),
    [
        (9, "attacks: [direct, base46]", "unknown attack 'base46': did you mean 'base64'"),
        (9, "attacks: [family:encodings]", "did you mean 'encoding'"),
        (9, "attacks: [{prefill: {kk: 5}}]", "unknown option of prefill 'kk'"),
        (9, "attacks: []", "at least 1 item"),
        (8, "  - gild", "unknown dataset 'gild': did you mean 'guild'"),
        (8, "  - guild: {limit: 0}", "limit must be a number of prompts, at least 1, not 0"),
        (4, "    url: localhost:8000", "is not an HTTP URL"),
        (4, "    urll: http://x", "unknown field 'urll': did you mean 'url'"),
        (6, "  - my-model", "two targets are called 'my-model'"),
        (10, "sampling: {temperature: hot}", "not 'hot'"),
        (10, "sampling: {temprature: 1}", "did you mean 'temperature'"),
        (10, "judges: [qwen3guard]", "needs a model"),
        (10, "judges: [{qwen3guard: {model: g, urll: http://x}}]", "did you mean 'url'"),
        (1, "nam: mine", "did you mean 'name'"),
        (5, "    thinking: [maybe]", "or a budget in tokens, not 'maybe'"),
    ],
)
def test_errors_name_the_line_the_problem_and_the_fix(tmp_path, line, wrong, message):
    lines = GOOD.splitlines()
    lines[line - 1] = wrong
    with pytest.raises(LeadlineError) as caught:
        load(tmp_path, "\n".join(lines))
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    expected = 2 if "two targets" in message else line
    assert text.startswith(f"{tmp_path / 'study.yaml'}:{expected}: "), text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("targets: [a\n", "study.yaml:2: not valid YAML"),
        ("- a\n", "a study file is a mapping"),
        ("", "a study file is a mapping"),
        ("targets: [organism:base]\n", "'datasets' is missing"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_study_gives_a_one_line_error(tmp_path, text, message):
    with pytest.raises(LeadlineError, match=message) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(LeadlineError, match="cannot read"):
        Study.load(tmp_path / "none.yaml")


def test_the_plan_is_lazy_and_in_a_fixed_order(tmp_path):
    study = load(tmp_path, GOOD.replace("samples: 3", "samples: 1000000"))
    plan = planning.load(study)
    target = Target(study.targets[0], {"model": "m"})
    trials = planning.trials(plan, target)
    first = [next(trials) for _ in range(3)]
    again = planning.trials(plan, target)
    assert [t.key for t in first] == [next(again).key for _ in range(3)]
    assert len({t.key for t in first}) == 3  # each sample of a prompt is a separate trial
    assert planning.count(plan)["my-model"] > 10**8


def test_the_count_equals_the_number_of_trials_yielded(tmp_path):
    plan = planning.load(load(tmp_path, GOOD), limit=6)
    for spec in plan.study.targets:
        n = sum(1 for _ in planning.trials(plan, Target(spec, {})))
        assert n == planning.count(plan)[spec.label]
        (row,) = [r for r in planning.estimate(plan) if r.model == spec.label]
        assert row.trials == n


def test_harmless_prompts_get_only_the_direct_attack(tmp_path):
    plan = planning.load(load(tmp_path, GOOD))
    trials = planning.trials(plan, Target(plan.study.targets[1], {}))
    attacks = {t.attack for t in trials if not t.prompt.harmful}
    assert attacks == {"direct"}


def test_a_limit_is_spread_over_the_whole_set(tmp_path):
    plan = planning.load(load(tmp_path, GOOD), limit=8)
    (prompts,) = plan.prompts.values()
    assert len(prompts) == 8
    assert any(p.harmful for p in prompts)
    assert any(not p.harmful for p in prompts)


def test_prefix_attacks_are_not_applicable_to_a_target_without_prefixes(tmp_path):
    plan = planning.load(load(tmp_path, GOOD), limit=4)
    target = Target(plan.study.targets[0], {}, no_prefix="it cannot")
    for trial in planning.trials(plan, target):
        if trial.attack.startswith("prefill"):
            assert (trial.request, trial.outcome, trial.reason) == (
                None, "not_applicable", "it cannot",
            )  # fmt: skip
        else:
            assert trial.request


def test_every_part_of_a_request_is_part_of_its_key():
    from dataclasses import replace

    from leadline.records import Message

    base = Request((Message("user", "x"),), ResponsePrefix("a"), Sampling(), "default", 0)
    others = [
        replace(base, messages=(Message("system", "x"),)),
        replace(base, messages=(Message("user", "y"),)),
        replace(base, prefix=None),
        replace(base, prefix=ResponsePrefix("a", thought="")),
        replace(base, prefix=ResponsePrefix("a", tokens=1)),
        replace(base, sampling=Sampling(temperature=0.1)),
        replace(base, sampling=Sampling(max_tokens=1)),
        replace(base, thinking="on"),
        replace(base, sample=1),
    ]
    keys = {planning.model_key({"model": "m"}, r) for r in [base, *others]}
    assert len(keys) == len(others) + 1
    assert planning.model_key({"model": "n"}, base) not in keys


def test_a_context_precedes_the_request(tmp_path):
    data = tmp_path / "h.csv"
    data.write_text(
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        'Sum it up,contextual,garden,,"Roses need\nsun.",b1\n'
    )
    study = Study.model_validate(
        {"targets": ["organism:base"], "datasets": [{"harmbench": {"path": str(data)}}]}
    )
    plan = planning.load(study)
    (trial,) = planning.trials(plan, Target(study.targets[0], {}))
    (message,) = trial.attempt.messages
    assert message.content.startswith("Roses need\nsun.")
    assert message.content.endswith("Sum it up")
