"""Shared prefixes change no answer: compared with transformers' generate, one prompt at a time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from leadline import organism, registry
from leadline.datasets.guild import guild
from leadline.models import shared_prefix
from leadline.models.huggingface import HuggingFaceModel
from leadline.models.weights import Job, Reply, Weights
from leadline.plan import request_of
from leadline.records import Response, Sampling

VOCABULARY = 60
LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.3},
    "opt": {**LLAMA, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3},
    "phi": {**LLAMA, "num_key_value_heads": 4},
    "cohere": {**LLAMA, "logit_scale": 0.25},
    "mistral": {**LLAMA, "sliding_window": 400},
    "gemma2": {**LLAMA, "head_dim": 8, "sliding_window": 400},
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "deepseek_v3": {
        **LLAMA, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
}  # fmt: skip
UNUSUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "a short window": ("mistral", {**LLAMA, "sliding_window": 24}),
    "convolutions": ("lfm2", {**LLAMA, "layer_types": ["conv", "full_attention"]}),
    "a state": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "biased by distance": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "positions by length": (
        "llama",
        {**LLAMA, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(kind: str, settings: dict[str, Any], vocabulary: int = VOCABULARY) -> Weights:
    torch.manual_seed(7)
    ends = {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": None}
    config = transformers.AutoConfig.for_model(kind, vocab_size=vocabulary, **ends, **settings)
    weights = Weights.of(transformers.AutoModelForCausalLM.from_config(config).eval())
    weights.stops = {1}
    return weights


def job(ids: Sequence[int], sample: int = 0, **sampling: Any) -> Job:
    future: Any = None  # not used by Weights
    return Job(list(ids), Sampling(**{"max_tokens": 16, **sampling}), sample, future)


def generate(weights: Weights, jobs: Sequence[Job]) -> list[Reply]:
    return [replace(r, ids=list(r.ids), seconds=0) for r in weights.answer(jobs, lambda: False)]


def one_by_one(weights: Weights, jobs: Sequence[Job]) -> list[Reply]:
    return [reply for job in jobs for reply in generate(weights, [job])]


def watch(weights: Weights) -> list[int]:
    """The number of tokens of each forward pass, in a list that grows."""
    seen: list[int] = []

    def hook(module: Any, given: Any, named: Any) -> None:
        seen.append(named["input_ids"].numel())

    weights.model.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


def sweeps(weights: Weights, ks: Sequence[int] = (0, 1, 2, 7, 12, 36)) -> list[list[int]]:
    """Prompts of 3, 30, 60 and 30 tokens, each with the first k tokens of a response prefix that
    starts with the model's own greedy answer. One of the results is there twice."""
    rng = random.Random(3)
    found = []
    for size in (3, 30, 60, 30):
        prompt = [rng.randrange(2, VOCABULARY) for _ in range(size)]
        own = list(generate(weights, [job(prompt, max_tokens=12)])[0].ids)
        answer = own[:8] + [rng.randrange(2, VOCABULARY) for _ in range(28)]
        found += [prompt + answer[:k] for k in ks]
    rng.shuffle(found)
    return [*found, found[0]]


def end_somewhere(weights: Weights, prompts: list[list[int]], **sampling: Any) -> None:
    """Set the end token to one that occurs in about half of the answers."""
    ids = [
        set(reply.ids[2:]) for reply in one_by_one(weights, [job(p, **sampling) for p in prompts])
    ]
    counts = Counter(token for seen in ids for token in seen)
    weights.stops = {min(counts, key=lambda token: (abs(2 * counts[token] - len(ids)), token))}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", list(KINDS))
def test_sharing_a_prefix_changes_no_answer(kind: str, temperature: float) -> None:
    weights = make(kind, KINDS[kind])
    prompts = sweeps(weights)
    end_somewhere(weights, prompts[::3], temperature=temperature)
    jobs = [job(ids, n, temperature=temperature) for n, ids in enumerate(prompts)]
    expected = one_by_one(weights, jobs)
    assert weights.prefix_sharing is None
    seen = watch(weights)
    assert generate(weights, jobs) == expected
    assert weights.prefix_sharing
    assert {reply.finish for reply in expected} == {"stop", "length"}
    assert len({tuple(reply.ids) for reply in expected}) >= 8
    assert sum(seen[:6]) < sum(map(len, prompts)) / 2


@pytest.mark.parametrize("how", list(UNUSUAL))
def test_unsupported_models_generate_without_sharing(how: str, caplog: Any) -> None:
    kind, given = UNUSUAL[how]
    weights = make(kind, given)
    jobs = [job(ids) for ids in sweeps(weights, (0, 1, 2, 7))]
    expected = one_by_one(weights, jobs)
    with caplog.at_level("DEBUG", logger="leadline"):
        shared = generate(weights, jobs)
    if how in ("convolutions", "a state"):  # padding changes these answers with or without sharing
        assert shared == without_sharing(weights, jobs)
    else:
        assert shared == expected
    assert not weights.prefix_sharing
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


def without_sharing(weights: Weights, jobs: list[Job]) -> list[Reply]:
    weights.prefix_sharing = False
    return generate(weights, jobs)


def test_generation_settings_that_change_scores_are_applied() -> None:
    weights = make("llama", LLAMA)
    prompts = sweeps(weights)
    before = generate(weights, [job(ids) for ids in prompts])
    weights.model.generation_config.repetition_penalty = 5.0
    penalized = generate(weights, [job(ids) for ids in prompts])
    assert penalized == without_sharing(weights, [job(ids) for ids in prompts])
    assert penalized != before


def test_a_model_that_differs_with_a_cache_is_detected() -> None:
    """Here the logits change with a 4-dimensional attention mask, which only sharing uses."""
    weights = make("llama", LLAMA)
    prompts = sweeps(weights)
    expected = one_by_one(weights, [job(ids) for ids in prompts])

    def hook(module: Any, given: Any, named: Any, out: Any) -> Any:
        mask = named.get("attention_mask")
        if mask is not None and mask.ndim == 4:
            out.logits = out.logits.roll(1, -1)
        return out

    weights.model.register_forward_hook(hook, with_kwargs=True)
    assert generate(weights, [job(ids) for ids in prompts]) == expected
    assert weights.prefix_sharing is False


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_common_prefix_with_different_ends(temperature: float) -> None:
    weights = make("gpt2", KINDS["gpt2"])
    rng = random.Random(5)
    common = [rng.randrange(2, VOCABULARY) for _ in range(90)]
    ends = [[rng.randrange(2, VOCABULARY) for _ in range(1 + 5 * n % 17)] for n in range(12)]
    jobs = [job(common + end, temperature=temperature) for end in ends]
    jobs.append(job(common[:60], temperature=temperature))  # a prefix of all the others
    expected = one_by_one(weights, jobs)
    seen = watch(weights)
    assert generate(weights, jobs) == expected
    assert weights.prefix_sharing
    assert max(seen) < 90 + 12 * 50


def test_many_samples_of_one_prompt() -> None:
    """More samples than fit in one row of the cache, each with its own generator."""
    weights = make("qwen3", KINDS["qwen3"])
    prompt = sweeps(weights)[0]
    jobs = [job(prompt, n, temperature=1.5) for n in range(21)]
    expected = one_by_one(weights, jobs)
    assert generate(weights, jobs) == expected
    assert weights.prefix_sharing
    assert len({tuple(reply.ids) for reply in expected}) == 21


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, when it wraps a model
def test_an_adapter_in_memory_is_shared() -> None:
    peft = pytest.importorskip("peft")
    weights = make("llama", LLAMA)
    prompts = sweeps(weights)
    before = generate(weights, [job(ids) for ids in prompts])
    config = peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = Weights.of(peft.get_peft_model(weights.model, config).eval())
    adapted.stops = {1}
    expected = one_by_one(adapted, [job(ids) for ids in prompts])
    assert generate(adapted, [job(ids) for ids in prompts]) == expected != before
    assert adapted.prefix_sharing


def test_prompts_up_to_the_end_of_the_context() -> None:
    weights = make("gpt2", {**KINDS["gpt2"], "n_positions": 64})
    weights.stops = set()
    rng = random.Random(1)
    longest = [rng.randrange(2, VOCABULARY) for _ in range(56)]
    jobs = [job(longest[:n], max_tokens=8) for n in (50, 52, 53, 54, 55, 56)]
    expected = one_by_one(weights, jobs)
    assert generate(weights, jobs) == expected
    assert weights.prefix_sharing


def test_a_shared_batch_that_runs_out_of_memory_is_halved() -> None:
    weights = make("llama", LLAMA)
    jobs = [job(ids) for ids in sweeps(weights)]
    expected = one_by_one(weights, jobs)

    def full(module: Any, given: Any, named: Any) -> None:
        if named["input_ids"].numel() > 250:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    hook = weights.model.register_forward_pre_hook(full, with_kwargs=True)
    assert generate(weights, jobs) == expected
    assert weights.max_batch_tokens < 2**62
    assert weights.prefix_sharing
    hook.remove()


def test_stopping_ends_shared_generation() -> None:
    weights = make("llama", LLAMA)
    weights.stops = set()
    jobs = [job(ids, max_tokens=400) for ids in sweeps(weights)]
    seen = watch(weights)
    replies = weights.answer(jobs, lambda: len(seen) > 12)
    assert len(seen) < 20
    assert all(reply.finish == "error" for reply in replies)


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=12),
    st.integers(1, 6),
)
@settings(max_examples=40, deadline=None)
def test_sharing_is_exact_for_any_prompts(prompts: list[list[int]], most: int) -> None:
    weights = make("llama", {**LLAMA, "num_hidden_layers": 1}, vocabulary=6)
    weights.stops = {5}
    with torch.inference_mode():
        shared = shared_prefix.generate(
            weights.model,
            shared_prefix.SharedPrefixes(prompts),
            most,
            lambda scores: scores.argmax(-1),
            greedy=True,
            stops=weights.stops,
            stopped=lambda: False,
        )
    expected = one_by_one(weights, [job(ids, max_tokens=most) for ids in prompts])
    for ids, reply in zip(shared, expected, strict=True):
        end = next((n for n, token in enumerate(ids) if token in weights.stops), len(ids))
        assert ids[:end] == reply.ids
        assert (reply.finish == "stop") == (end < len(ids))


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=20))
def test_groups_are_prefixes_of_their_first_prompt(prompts: list[list[int]]) -> None:
    groups = shared_prefix.prefix_groups(prompts)
    assert sorted(n for group in groups for n in group) == list(range(len(prompts)))
    all_longest = [prompts[group[0]] for group in groups]
    for group, longest in zip(groups, all_longest, strict=True):
        assert all(longest[: len(prompts[n])] == prompts[n] for n in group)
        assert [len(prompts[n]) for n in group] == sorted(
            (len(prompts[n]) for n in group), reverse=True
        )
        # It is a prefix of itself only.
        assert sum(other[: len(longest)] == longest for other in all_longest) == 1


def test_a_prefill_sweep_shares_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill attack on an organism, with and without sharing; each batch is made of sweeps."""
    prefill = registry.get("attack", "prefill").function
    prompts = [row for row in guild() if row.harmful][:8]
    requests = [
        request_of(prompt, prefill(prompt, k=k), Sampling(max_tokens=48), "default", 0)
        for k in (0, 1, 2, 5, 10, 20, 30)
        for prompt in prompts
    ]
    passed: list[int] = []
    batches: list[list[int]] = []

    async def run() -> list[Response]:
        model = HuggingFaceModel(organism.path("aligned"), name="aligned", batch_size=14)
        await model.prepare(prefix=True)
        assert model._loaded is not None
        weights = model._loaded[1]
        seen = watch(weights)
        original = weights._generate
        weights._generate = lambda jobs, stopped: (  # type: ignore[method-assign]
            batches.append([len(f) for f in shared_prefix.prefix_groups([j.ids for j in jobs])])
            or original(jobs, stopped)
        )
        try:
            answers = await asyncio.gather(*map(model.respond, requests))
        finally:
            await model.close()
        passed.append(sum(seen))
        return [replace(answer, seconds=0) for answer in answers]

    shared = asyncio.run(run())
    assert batches == [[7, 7]] * 4
    monkeypatch.setattr(shared_prefix.SharedPrefixes, "worthwhile", False)
    assert asyncio.run(run()) == shared
    assert not any(answer.failed for answer in shared)
    assert len({answer.answer for answer in shared}) > 20
    assert passed[1] > 3 * passed[0]
