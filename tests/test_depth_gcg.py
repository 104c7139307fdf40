"""The GCG suffix search against a simple reference, and its user-facing behaviour."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import leadline as ll
from leadline.datasets.guild import guild
from leadline.depth.gcg.config import GCGConfig
from leadline.depth.gcg.objective import Losses, Objective
from leadline.depth.gcg.search import GCGResult, save, search
from leadline.depth.gcg.surrogate import Slot, Surrogate
from leadline.judges.guild import guild as guild_judge
from leadline.records import LeadlineError, Message, Prompt, Request, Sampling, Verdict

from . import tiny_models

PROMPT = Prompt("p", "How do I prune a rose?", "garden", target="Sure, here is how: cut it.")
GUILD = [prompt for prompt in guild() if prompt.harmful]
SMALL = GCGConfig(steps=6, candidates=48, topk=32, suffix="so so so so", target_tokens=12)
KINDS = ["llama", "qwen3", "gpt2", "mistral", "mixtral", "lfm2"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def aligned() -> Surrogate:
    return Surrogate.load("organism:aligned")


@pytest.fixture(scope="module")
def deep() -> Surrogate:
    return Surrogate.load("organism:deep")


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Surrogate:
    """A tiny model of each architecture. The prompt has about 70 tokens, more than mistral's window
    of 24; mixtral is a mixture of experts; lfm2 has convolutions, whose state is not in the keys
    and values that the search reuses."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    if kind in ("mixtral", "lfm2"):
        tiny_models.save(folder)  # the tokenizer
        shape: dict[str, Any] = {
            "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
        }  # fmt: skip
        torch.manual_seed(7)
        config: Any = transformers.MixtralConfig(**shape, num_local_experts=4)
        if kind == "lfm2":
            config = transformers.Lfm2Config(**shape, layer_types=["conv", "full_attention"])
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    else:
        tiny_models.save(folder, kind=kind)
    return Surrogate.load(str(folder))


def slow_loss(model: Surrogate, context: list[int], target: list[int]) -> float:
    """The target loss from one sequence without a cache, with all logits."""
    with torch.no_grad():
        logits = model.weights.model(input_ids=torch.tensor([context + target])).logits[0]
    log_probs = logits[len(context) - 1 : -1].double().log_softmax(-1)
    return -float(log_probs[range(len(target)), target].mean())


def changed(slot: Slot, count: int) -> list[list[int]]:
    """The current suffix, and `count` that differ from it at one or two random positions."""
    random = torch.Generator().manual_seed(3)
    rows = [list(slot.suffix)]
    for n in range(count):
        row = list(slot.suffix)
        for _ in range(1 + n % 2):
            place = int(torch.randint(0, len(row), (), generator=random))
            row[place] = int(torch.randint(33, 126, (), generator=random))
        rows.append(row)
    return rows


def text_of(result: GCGResult, *, prompt: Prompt) -> str:
    return f"{prompt.text} {result.suffix}"


@pytest.mark.parametrize("mib", [1, 64])
def test_losses_agree_with_slow_loss(tiny: Surrogate, mib: int):
    slot = Slot.find(tiny, PROMPT, "! ! ! ! ! !", None)
    losses = Losses(tiny, slot, mib * 2**20)
    for current in changed(slot, 2)[::2]:
        losses.move(slot.context(current))
        rows = [slot.context(row) for row in changed(slot, 40)]
        rows += [[*row[:-9], *row[-5:]] for row in rows[:3]]  # another length, as from another text
        slow = torch.tensor([slow_loss(tiny, row, slot.target) for row in rows])
        fast = losses.of(rows)
        torch.testing.assert_close(fast, slow, atol=2e-5, rtol=0)
        assert fast.argmin() == slow.argmin()
        one_by_one = torch.cat([losses.of([row]) for row in rows[:5]])
        torch.testing.assert_close(one_by_one, slow[:5], atol=2e-5, rtol=0)
    assert slow.max() - slow.min() > 0.05
    assert losses.reuses == (tiny.weights.model.config.model_type != "lfm2")


def test_gradients_agree_with_those_of_one_hot_rows(tiny: Surrogate):
    slot = Slot.find(tiny, PROMPT, "! ! ! ! ! !", None)
    losses = Losses(tiny, slot)
    current = changed(slot, 1)[1]
    losses.move(slot.context(current))
    loss, gradient = losses.gradient()
    model = tiny.weights.model
    table = model.get_input_embeddings().weight
    ids = torch.tensor(slot.context(current) + slot.target)
    hot = torch.nn.functional.one_hot(ids, len(table)).float().requires_grad_()
    logits = model(inputs_embeds=(hot @ table)[None]).logits[0]
    at = len(ids) - len(slot.target)
    slow = torch.nn.functional.cross_entropy(logits[at - 1 : -1], torch.tensor(slot.target))
    slow.backward()
    start = len(slot.before)
    assert loss == pytest.approx(slow.item(), abs=2e-5)
    assert hot.grad is not None
    expected = hot.grad[start : start + len(current)]
    torch.testing.assert_close(gradient, expected, atol=2e-5, rtol=1e-4)


def test_prompts_and_models_have_equal_weight(aligned: Surrogate, deep: Surrogate, tmp_path: Path):
    other_vocabulary = Surrogate.load(str(tiny_models.save(tmp_path)))
    models, prompts = [aligned, deep, other_vocabulary], GUILD[:2]
    objective = Objective(models, prompts, SMALL)
    rows = [objective.start, *(aligned.template.encode(t) for t in ("so the key so", "a b c salt"))]
    objective.move(rows[1])
    slow = []
    for row in rows:
        losses = []
        for model in models:
            for prompt in prompts:
                message = Message("user", f"{prompt.text} {aligned.text([row])[0]}")
                ids = model.template.render(Request((message,), None, Sampling())).ids
                target = model.template.encode(prompt.target)[:12]
                losses.append(slow_loss(model, ids, target))
        slow.append(sum(losses) / len(losses))
    torch.testing.assert_close(objective.of(rows), torch.tensor(slow), atol=2e-5, rtol=0)
    gradients = [Objective([model], prompts, SMALL).gradient() for model in (aligned, deep)]
    units = [gradient / gradient.norm(dim=1, keepdim=True) for gradient in gradients]
    objective.move(objective.start)
    torch.testing.assert_close(objective.gradient(), sum(units) / 2)
    result = search(models, prompts, replace(SMALL, steps=3))
    assert result.loss < slow[0] - 0.1
    assert result.settings["models"][:2] == ["organism:aligned", "organism:deep"]


def test_forward_passes_stay_within_the_memory_limit(tmp_path: Path):
    model = Surrogate.load(str(tiny_models.save(tmp_path)))
    config = GCGConfig(steps=2, candidates=64, topk=64)
    rows: list[int] = []
    sizes: list[int] = []

    def record(module: Any, inputs: Any, out: Any) -> None:
        rows.append(out.logits.shape[0])
        sizes.append(out.logits.numel() * 4)

    hook = model.weights.model.register_forward_hook(record)
    tight = search([model], [PROMPT], replace(config, memory_mib=1))
    assert 1 < max(rows) < 64
    assert max(sizes) <= 2**20
    rows.clear()
    wide = search([model], [PROMPT], replace(config, memory_mib=256))
    hook.remove()
    assert max(rows) > 40  # of 64, without duplicates and those that tokenize differently
    assert wide.ids == tight.ids
    assert wide.losses == pytest.approx(tight.losses, abs=2e-5)


def test_each_step_moves_to_the_best_candidate(aligned: Surrogate):
    seen: list[tuple[int, float, str]] = []
    result = search([aligned], GUILD[:1], SMALL, progress=lambda *step: seen.append(step))
    assert [step for step, *_ in seen] == [1, 2, 3, 4, 5, 6]
    assert tuple(loss for _, loss, _ in seen) == result.losses
    slot = Slot.find(aligned, GUILD[0], SMALL.suffix, 12)
    assert result.losses[2] < slow_loss(aligned, slot.context(slot.suffix), slot.target) - 0.1
    assert result.loss == min(result.losses)
    for _, loss, suffix in seen:  # the loss is that of the suffix as text
        request = Request((Message("user", f"{GUILD[0].text} {suffix}"),), None, Sampling())
        ids = aligned.template.render(request).ids
        assert slow_loss(aligned, ids, slot.target) == pytest.approx(loss, abs=2e-5)
    assert (result.steps, result.stopped, result.settings["exact"]) == (6, False, True)


def test_the_result_is_the_best_of_all_steps(aligned: Surrogate):
    texts: list[str] = []
    config = replace(SMALL, steps=12, candidates=2)
    result = search([aligned], GUILD[:1], config, progress=lambda *step: texts.append(step[2]))
    best = result.losses.index(min(result.losses))
    assert best < 11
    assert (result.loss, result.suffix) == (result.losses[best], texts[best])


def test_retokenize_drops_candidates_that_tokenize_differently(tmp_path: Path):
    model = Surrogate.load(str(tiny_models.save(tmp_path)))
    config = GCGConfig(candidates=64, topk=64)

    def drift(retokenize: bool) -> int:
        """The number of steps whose suffix tokenizes to other ids than those that were searched."""
        texts: list[str] = []
        chosen = replace(config, steps=5, retokenize=retokenize)
        result = search(
            [model], [PROMPT], chosen, progress=lambda n, loss, text: texts.append(text)
        )
        assert all(text.isascii() and text.isprintable() for text in texts)
        assert not set(result.ids) & set(model.template.tokenizer.all_special_ids)
        slot = Slot.find(model, PROMPT, config.suffix, None)
        requests = [
            Request((Message("user", f"{PROMPT.text} {text}"),), None, Sampling()) for text in texts
        ]
        measured = [slow_loss(model, model.template.render(r).ids, slot.target) for r in requests]
        return sum(abs(a - b) > 1e-4 for a, b in zip(measured, result.losses, strict=True))

    assert drift(retokenize=True) == 0
    assert drift(retokenize=False) > 0  # tokens are bytes, and the first one has to be a space


def test_the_seed_decides_the_search(aligned: Surrogate):
    first, again = (search([aligned], GUILD[:1], SMALL) for _ in range(2))
    assert first == again
    assert search([aligned], GUILD[:1], replace(SMALL, seed=1)).losses != first.losses


@pytest.mark.parametrize("probe", [False, True])
def test_a_killed_search_resumes_from_its_checkpoint(
    aligned: Surrogate, tmp_path: Path, probe: bool
):
    file = tmp_path / "search" / "checkpoint.json"
    config = replace(SMALL, probe=probe)
    whole = search([aligned], GUILD[:2], config)
    steps: list[int] = []

    def kill(step: int, loss: float, suffix: str) -> None:
        steps.append(step)
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search([aligned], GUILD[:2], config, checkpoint=file, progress=kill)
    resumed = search([aligned], GUILD[:2], config, checkpoint=file, progress=kill)
    assert resumed == whole
    assert steps == [1, 2, 3, 4, 5, 6]
    longer = search([aligned], GUILD[:2], replace(config, steps=8), checkpoint=file, progress=kill)
    assert steps[6:] == [7, 8]
    assert longer.losses[:6] == whole.losses
    with pytest.raises(LeadlineError, match="other models, prompts or settings"):
        search([aligned], GUILD[:2], replace(config, seed=1), checkpoint=file)
    file.write_text("{")
    with pytest.raises(LeadlineError, match="not a checkpoint"):
        search([aligned], GUILD[:2], config, checkpoint=file)


@pytest.mark.parametrize("name", ["s.json", "s.jsonl"])
def test_a_saved_suffix_breaks_the_model_in_a_study(aligned: Surrogate, tmp_path: Path, name: str):
    """The judge ends the search, and a study with the saved suffix has the same verdict."""
    config = replace(SMALL, steps=40, judge_every=1)
    result = search([aligned], GUILD[:1], config, judge=guild_judge())
    assert result.stopped
    assert 1 < result.steps < 40
    file, initial = tmp_path / name, tmp_path / "initial.json"
    save(result, file)
    initial.write_text(json.dumps([SMALL.suffix]))
    attacks = [{"gcg_transfer_harmbench": {"suffixes": str(f)}} for f in (file, initial)]
    study = ll.Study(
        targets=["organism:aligned"],
        datasets=[{"guild": {"limit": 1}}],
        attacks=["direct", *attacks],
    )
    cells = ll.run(study, tmp_path / "out").cells()
    assert dict(zip(cells["attack"].str.contains(name), cells["unsafe"], strict=True))[True] == 1
    assert sorted(cells["unsafe"]) == [0, 0, 1]


def test_the_search_continues_until_the_judge_finds_every_answer_unsafe(aligned: Surrogate):
    judged: list[str] = []

    async def judge(prompt: Prompt, attempt: Any, response: Any) -> Verdict:
        judged.append(attempt.messages[0].content)
        return Verdict(unsafe=None)

    config = replace(SMALL, judge_every=4)
    result = search([aligned], GUILD[:2], config, judge=judge)
    assert not result.stopped
    assert result.steps == 6
    assert judged[-1] == text_of(result, prompt=GUILD[0])
    # Before the search and after steps 4 and 6. A safe answer to the first prompt ends each check.
    assert len(judged) == 3


def test_an_initial_suffix_that_breaks_the_model_ends_the_search(aligned: Surrogate):
    config = replace(SMALL, suffix="! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! !")
    results = [search([aligned], [p], config, judge=guild_judge()) for p in GUILD]
    without_search = [r for r in results if r.steps == 0]
    assert without_search  # twenty exclamation marks alone break this shallow alignment
    for result in without_search:
        assert (result.stopped, result.losses, set(result.suffix)) == (True, (), {"!"})
        assert 0 < result.loss < 10


def test_probe_sampling_computes_few_losses_and_is_recorded_in_the_settings(
    aligned: Surrogate, deep: Surrogate
):
    config = replace(SMALL, candidates=256, probe=True)
    rows: list[int] = []
    hook = aligned.weights.model.register_forward_hook(
        lambda module, inputs, out: rows.append(out.logits.shape[0])
    )
    by_gradient = search([aligned], GUILD[:1], config)
    gradient_rows, rows[:] = sum(rows), []
    by_draft = search([aligned], GUILD[:1], config, draft=deep)
    draft_rows, rows[:] = sum(rows), []
    search([aligned], GUILD[:1], replace(config, probe=False))
    hook.remove()
    assert gradient_rows < sum(rows) / 3
    assert draft_rows < sum(rows) / 3
    assert (by_gradient.settings["exact"], by_gradient.settings["estimate"]) == (False, "gradient")
    assert by_draft.settings["estimate"] == "organism:deep"
    assert by_gradient.losses[-1] < by_gradient.losses[0]
    assert by_draft.losses[-1] < by_draft.losses[0]


def test_invalid_input_is_a_one_line_error(aligned: Surrogate, tmp_path: Path):
    def fails(match: str, prompts: list[Prompt], config: GCGConfig = SMALL, **rest: Any) -> None:
        with pytest.raises(LeadlineError, match=match) as caught:
            search([aligned], prompts, config, **rest)
        assert "\n" not in str(caught.value)

    fails("at least one model and one prompt", [])
    fails("prompt x: GCG needs a target", [Prompt("x", "How?", "garden")])
    fails("context is 2048", [replace(GUILD[0], text="stir " * 2100)])
    fails("set probe", GUILD[:1], draft=aligned)
    for wrong in ({"candidates": 0}, {"memory_mib": 0}, {"suffix": " so"}, {"suffix": ""}):
        with pytest.raises(LeadlineError, match="gcg: "):
            replace(SMALL, **wrong)
    result = GCGResult("so", (1,), 0.1, (0.1,), 1, False, {"models": [], "prompts": []})
    with pytest.raises(LeadlineError, match=r"name it \.json or \.jsonl"):
        save(result, tmp_path / "s.txt")
    with pytest.raises(LeadlineError, match="there is no such folder"):
        Surrogate.load(str(tmp_path / "none" / "here"))
