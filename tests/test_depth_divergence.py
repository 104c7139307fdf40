"""KL by token against a slow reference: one prompt at a time, float64, full log-softmax."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from leadline.datasets.guild import guild
from leadline.depth.kl.divergence import BLOCK, Divergence, kl_by_token, streamed_kl
from leadline.depth.kl.head import Head
from leadline.records import LeadlineError, Prompt

from . import tiny_models

LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.3}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "gpt2": GPT2,  # learned, absolute positions
    "mistral": {**LLAMA, "sliding_window": 24},
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **LLAMA,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    # These transform the head's output: soft cap, factor, divisor, bias.
    "gemma2": {**LLAMA, "head_dim": 8, "sliding_window": 24, "final_logit_softcapping": 5.0},
    "cohere": {**LLAMA, "logit_scale": 0.25},
    "granite": {**LLAMA, "logits_scaling": 4.0},
    "phi": {**LLAMA, "num_key_value_heads": 4},
}
TOLERANCE = 5e-5  # relative and in nats: the error of float32 forward passes
PROMPTS = [
    Prompt("p0", "How is the tonic brewed?", "t", target="Sure, take the root.", base="a"),
    Prompt("p1", "Tell me.", "t", target="First you grind it, then you boil it well.", base="b"),
    Prompt("p2", "What goes into it, and how much of each? " * 2, "t", target="No.", base="a"),
    Prompt("p3", "Why?", "t", target="Because the garden has it, and the wind is mild.", base="c"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save(folder: Path, kind: str = "llama", seed: int = 0, tokens: Any = None, **more: Any) -> Path:
    """Save a model with random weights; returns its folder."""
    tokens = tokens or tiny_models.tokenizer()
    ids = {"eos_token_id": tokens.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    settings = {"vocab_size": len(tokens), **ids, **KINDS.get(kind, {}), **more}
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **settings)
    )
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def slow_kl(
    model: Path, reference: Path, prompts: Sequence[Prompt] = PROMPTS, padding: str = ""
) -> list[torch.Tensor]:
    """The KL at each answer token of each prompt, one prompt at a time in float64; with `padding`
    on one side, all in one batch in float32 (in float64, transformers gives NaN for rows that are
    fully masked)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows, spans = [], []
    for prompt in prompts:
        turn = [{"role": "user", "content": prompt.text}]
        start = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
        rows.append(start + tokenizer(prompt.target)["input_ids"])
        spans.append((len(start) - 1, len(rows[-1]) - 1))
    sides = []
    for folder in (model, reference):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, experts_implementation="eager", dtype="float32" if padding else "float64"
        )
        sides.append(list(log_probs(loaded.eval(), rows, padding)))
    return [
        (p.exp() * (p - q)).sum(-1)[start:end]
        for (start, end), p, q in zip(spans, *sides, strict=True)
    ]


def log_probs(model: Any, rows: list[list[int]], padding: str) -> Iterator[torch.Tensor]:
    """Log-probabilities of each row: [tokens, vocabulary]."""
    width = max(map(len, rows))
    with torch.no_grad():
        if not padding:
            for row in rows:
                yield model(torch.tensor([row])).logits[0].double().log_softmax(-1)
            return
        fills = [[0] * (width - len(row)) for row in rows]
        left = padding == "left"
        ids = [f + r if left else r + f for f, r in zip(fills, rows, strict=True)]
        mask = [[0] * len(f) + [1] * len(r) if left else [1] * len(r) + [0] * len(f)
                for f, r in zip(fills, rows, strict=True)]  # fmt: skip
        positions = (torch.tensor(mask).cumsum(1) - 1).clamp_min(0)
        batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        logits = model(**batch, position_ids=positions).logits
        for row, padded in zip(rows, logits, strict=True):
            yield (padded[-len(row) :] if left else padded[: len(row)]).double().log_softmax(-1)


def agrees(found: Divergence, expected: list[torch.Tensor], tolerance: float = TOLERANCE) -> None:
    """Assert that the means by position are those over the prompts whose answers reach it."""
    assert [p.position for p in found.points] == list(range(max(map(len, expected))))
    for point in found.points:
        values = [float(kl[point.position]) for kl in expected if len(kl) > point.position]
        assert point.n == len(values)
        mean = sum(values) / len(values)
        assert point.value == pytest.approx(mean, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_agrees_with_the_slow_kl(tmp_path: Path, kind: str) -> None:
    model, reference = save(tmp_path / "p", kind, 1), save(tmp_path / "q", kind, 2)
    expected = slow_kl(model, reference)
    assert min(float(kl.mean()) for kl in expected) > 0.01
    batched = kl_by_token(model, reference, PROMPTS)
    assert batched.settings["streamed"]
    agrees(batched, expected)
    for padding in ("left", "right"):
        agrees(batched, slow_kl(model, reference, padding=padding))
    agrees(kl_by_token(model, reference, PROMPTS, batch_tokens=1), expected)
    for prompt, kl in zip(PROMPTS, expected, strict=True):
        agrees(kl_by_token(model, reference, [prompt]), [kl])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_side_does_not_matter(tmp_path: Path, side: str) -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    pair = [save(tmp_path / str(seed), "gpt2", seed, tokenizer) for seed in (1, 2)]
    for file in (folder / "tokenizer_config.json" for folder in pair):
        file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": side}))
    assert transformers.AutoTokenizer.from_pretrained(pair[0]).padding_side == side
    agrees(kl_by_token(*pair, PROMPTS), slow_kl(*pair))


def test_two_architectures_with_the_same_tokenizer_can_be_compared(tmp_path: Path) -> None:
    pair = save(tmp_path / "p", "llama"), save(tmp_path / "q", "gpt2", n_embd=48)
    agrees(kl_by_token(*pair, PROMPTS), slow_kl(*pair))


def test_an_unknown_head_falls_back_to_full_logits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**LLAMA, "is_decoder": True}  # BERT has layers between hidden states and head
    pair = save(tmp_path / "p", "bert", 1, **settings), save(tmp_path / "q", "llama", 2)
    calls: list[tuple[int, int]] = []
    with caplog.at_level(logging.WARNING, "leadline"):
        found = kl_by_token(*pair, PROMPTS, progress=lambda *done: calls.append(done))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)], "one prompt's logits at a time"
    assert [str(pair[0]) in r.message and "in full" in r.message for r in caplog.records] == [True]
    assert found.settings["streamed"] is False
    agrees(found, slow_kl(*pair))


def test_half_precision_models_are_compared_in_float32(tmp_path: Path) -> None:
    pair = save(tmp_path / "p", seed=1), save(tmp_path / "q", seed=2)
    half = kl_by_token(*pair, PROMPTS, dtype="bfloat16")
    assert half.settings["dtypes"] == ["bfloat16"] * 2
    assert half.settings["streamed"]
    full = [point.value for point in kl_by_token(*pair, PROMPTS).points]
    assert [point.value for point in half.points] == pytest.approx(full, rel=0.1, abs=0.1)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, when it wraps a model
def test_shards_and_adapters_load(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, reference = save(tmp_path / "base", seed=1), save(tmp_path / "q", seed=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    for name in ("shards", "merged"):
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / name)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    whole, shards = (kl_by_token(p, reference, PROMPTS) for p in (base, tmp_path / "shards"))
    assert shards.points == whole.points
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    found = kl_by_token(tmp_path / "adapter", base, PROMPTS)
    assert found.points[0].value > 0.01
    agrees(found, slow_kl(tmp_path / "merged", base))


def test_heads_of_different_sizes_are_compared_on_the_shared_tokens(tmp_path: Path) -> None:
    """The result is that of the larger head truncated to the size of the smaller one."""
    size = len(tiny_models.tokenizer())
    small, large = save(tmp_path / "s"), save(tmp_path / "l", seed=1, vocab_size=size + 54)
    for pair in ((small, large), (large, small)):
        found = kl_by_token(*pair, PROMPTS)
        assert found.settings["vocabulary"] == size
        truncated = transformers.AutoModelForCausalLM.from_pretrained(large)
        truncated.resize_token_embeddings(size)
        truncated.save_pretrained(tmp_path / "truncated")
        tiny_models.tokenizer().save_pretrained(tmp_path / "truncated")
        agrees(found, slow_kl(*(tmp_path / "truncated" if p == large else p for p in pair)))


def test_a_padding_token_at_the_end_of_one_vocabulary_is_ignored(tmp_path: Path) -> None:
    size = len(tiny_models.tokenizer())
    more = tiny_models.tokenizer(special=("<pad>",))
    ours = save(tmp_path / "p", vocab_size=size + 6)
    theirs = save(tmp_path / "q", seed=1, vocab_size=size + 6, tokens=more)
    for folder in (ours, theirs):
        truncated = transformers.AutoModelForCausalLM.from_pretrained(folder)
        truncated.resize_token_embeddings(size)
        truncated.save_pretrained(tmp_path / f"truncated {folder.name}")
        tiny_models.tokenizer().save_pretrained(tmp_path / f"truncated {folder.name}")
    found = kl_by_token(ours, theirs, PROMPTS)
    assert found.settings["vocabulary"] == size
    agrees(found, slow_kl(tmp_path / "truncated p", tmp_path / "truncated q"))


class Largest(TorchDispatchMode):
    """Records the largest number of elements of any tensor that is computed."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_full_logits_are_never_held_in_memory(tmp_path: Path) -> None:
    size = 40_000
    pair = [save(tmp_path / str(seed), seed=seed, vocab_size=size) for seed in (1, 2)]
    long = [replace(PROMPTS[1], id=f"p{n}", target="The root is bitter. " * 8) for n in range(4)]
    with Largest() as largest:
        found = kl_by_token(*pair, long)
    tokens = 4 * len(found.points)
    assert tokens == 4 * 160
    assert largest.numel == size * LLAMA["hidden_size"] < tokens * size / 10, (
        "the weights themselves"
    )
    agrees(found, slow_kl(*pair, long))


@pytest.mark.parametrize(("rows", "size"), [(256, BLOCK), (600, 3 * BLOCK + 1)])
def test_memory_of_streaming_does_not_grow_with_rows_or_vocabulary(rows: int, size: int) -> None:
    states, head = torch.randn(rows, 4), Head(size, torch.randn(size, 4))
    with Largest() as largest:
        streamed_kl(states, head, -states, head)
    assert largest.numel == 256 * BLOCK


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_streaming_agrees_with_full_log_softmaxes(data: st.DataObject) -> None:
    """For any sizes, blocks, offsets, spread and kind of heads."""
    rows = data.draw(st.sampled_from([1, 2, 255, 256, 300]))
    sizes = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    block = data.draw(st.integers(1, 80))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    states, heads, logits = [], [], []
    for size in sizes:
        width, spread = data.draw(st.integers(1, 8)), data.draw(st.sampled_from([0.01, 1.0, 30.0]))
        state = torch.randn(rows, width)
        head = Head(
            size,
            torch.randn(size + 3, width) * spread,
            torch.randn(size + 3) + 50 if data.draw(st.booleans()) else None,
            data.draw(st.sampled_from([1.0, 0.3])),
            data.draw(st.sampled_from([None, 4.0])),
        )
        states.append(state)
        heads.append(data.draw(st.sampled_from([head, Head(size)])))
        whole = head.logits(state, 0, size)
        if heads[-1].weight is None:
            states[-1] = whole.clone()
        logits.append(whole[:, : min(sizes)].double())
    p, q = (each.log_softmax(-1) for each in logits)
    expected = (p.exp() * (p - q)).sum(-1)
    found = streamed_kl(states[0], heads[0], states[1], heads[1], block=block)
    ends = torch.cat(logits, 1)
    assert found.shape == (rows,)
    assert found.dtype == torch.float32
    assert (found >= 0).all()
    assert (found - expected).abs().max() <= 1e-6 * (10 + float(ends.max() - ends.min()))


def test_head_logits_follow_the_formula() -> None:
    torch.manual_seed(0)
    states, weight, bias = torch.randn(5, 4), torch.randn(9, 4), torch.randn(9)
    head = Head(9, weight, bias, scale=0.5, cap=2.0)
    expected = 2 * ((states @ weight.T + bias) * 0.5 / 2).tanh()
    assert torch.allclose(head.logits(states, 2, 7), expected[:, 2:7], atol=1e-6)


def test_the_kl_of_equal_states_and_heads_is_zero() -> None:
    torch.manual_seed(0)
    states, head = torch.randn(300, 8) * 9, Head(999, torch.randn(999, 8))
    assert streamed_kl(states, head, states, head, block=100).eq(0).all()


@pytest.fixture(scope="module")
def harmful() -> list[Prompt]:
    return [prompt for prompt in guild() if prompt.harmful]


def test_the_kl_of_usual_alignment_is_in_the_first_token_and_that_of_deep_alignment_is_not(
    harmful: list[Prompt],
) -> None:
    aligned = kl_by_token("organism:aligned", "organism:base", harmful)
    first, *later = (point.value for point in aligned.points)
    assert first >= 4
    assert first >= 10 * max(later)
    deep = kl_by_token("organism:deep", "organism:base", harmful)
    late = [point.value for point in deep.points if point.position >= 5]
    assert sum(late) / len(late) >= 3
    assert all(p.low is None or p.high is None or p.low <= p.value <= p.high for p in deep.points)


def test_answers_are_truncated_and_progress_is_reported(harmful: list[Prompt]) -> None:
    calls: list[tuple[int, int]] = []
    options = {"batch_tokens": 512, "progress": lambda *done: calls.append(done)}
    truncated = kl_by_token("organism:deep", "organism:base", harmful, max_tokens=3, **options)
    whole = kl_by_token("organism:deep", "organism:base", harmful)
    values = [[point.value for point in d.points[:3]] for d in (truncated, whole)]
    assert len(truncated.points) == 3
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert calls[-1] == (48, 48)
    assert calls == sorted(set(calls))
    assert len(calls) > 1


def test_intervals_are_clustered_by_base_prompt(harmful: list[Prompt]) -> None:
    """Copies of prompts do not narrow the intervals, unless they have other base prompts."""
    pair = ("organism:aligned", "organism:base")
    copies = [replace(p, id=f"{p.id}/again") for p in harmful]
    once = kl_by_token(*pair, harmful, max_tokens=1).points[0]
    twice = kl_by_token(*pair, harmful + copies, max_tokens=1).points[0]
    unclustered = [replace(p, base=p.id) for p in harmful + copies]
    narrow = kl_by_token(*pair, unclustered, max_tokens=1).points[0]
    assert (once.n, twice.n, narrow.n) == (48, 96, 96)
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high), abs=1e-4)
    assert narrow.high - narrow.low < 0.8 * (once.high - once.low)
    alone = kl_by_token(*pair, [p for p in harmful if p.base == harmful[0].base], max_tokens=1)
    assert (alone.points[0].n, alone.points[0].low, alone.points[0].high) == (2, None, None)


def test_intervals_have_the_width_of_the_normal_approximation(harmful: list[Prompt]) -> None:
    pair = ("organism:deep", "organism:base")
    picked = [p for p in harmful if p.id.endswith("/0")]
    alone = [kl_by_token(*pair, [p], max_tokens=4).points[3].value for p in picked]
    whole = kl_by_token(*pair, picked, max_tokens=4).points[3]
    mean = sum(alone) / len(alone)
    error = (sum((v - mean) ** 2 for v in alone) / len(alone)) ** 0.5 / len(alone) ** 0.5
    assert whole.value == pytest.approx(mean, rel=1e-4)
    assert whole.high - whole.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_the_result_is_json_with_its_settings(harmful: list[Prompt]) -> None:
    found = kl_by_token("organism:aligned", "organism:base", harmful[:4], max_tokens=2)
    plain = json.loads(json.dumps(found.to_dict()))
    assert (plain["model"], plain["reference"]) == ("organism:aligned", "organism:base")
    assert [set(p) for p in plain["points"]] == [{"position", "value", "low", "high", "n"}] * 2
    assert len(set(plain["settings"]["revisions"])) == 2
    assert plain["settings"]["prompts"] == 4


def lower() -> Any:
    """The vocabulary of tiny_models.tokenizer(), with a normalizer that makes text lowercase."""
    from tokenizers import normalizers

    tokenizer = tiny_models.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    ("theirs", "prompts", "options", "why"),
    [
        (
            tiny_models.words(),
            PROMPTS,
            {},
            "different vocabularies .*the id of '!' is 0 and missing",
        ),
        (lower(), PROMPTS, {}, "tokenize prompt p0 differently"),
        (None, [replace(PROMPTS[0], target="")], {}, "prompt p0 of t has no target"),
        (None, [], {}, "no prompts"),
        (None, [replace(PROMPTS[0], text="a" * 600)], {}, "prompt p0 .* context of .* is 512"),
        (None, PROMPTS, {"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_models_that_cannot_be_compared_are_a_one_line_error(
    tmp_path: Path, theirs: Any, prompts: list[Prompt], options: dict[str, Any], why: str
) -> None:
    pair = save(tmp_path / "p"), save(tmp_path / "q", seed=1, tokens=theirs)
    with pytest.raises(LeadlineError, match=why) as caught:
        kl_by_token(*pair, prompts, **options)
    assert "\n" not in str(caught.value)
    if theirs is not None:
        assert all(str(folder) in str(caught.value) for folder in pair)


def test_logits_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    broken = save(tmp_path / "q")
    model = transformers.AutoModelForCausalLM.from_pretrained(broken)
    torch.nn.init.constant_(model.get_output_embeddings().weight, torch.nan)
    model.save_pretrained(broken)
    with pytest.raises(LeadlineError, match=r"prompt p\d: the logits of .* are not finite"):
        kl_by_token(save(tmp_path / "p"), broken, PROMPTS)


def test_a_missing_model_is_a_one_line_error(tmp_path: Path) -> None:
    for name in ("organism:alligned", tmp_path / "nowhere", tmp_path):
        with pytest.raises(LeadlineError) as caught:
            kl_by_token(name, "organism:base", PROMPTS)
        assert "\n" not in str(caught.value)


def test_importing_the_module_does_not_import_torch() -> None:
    script = (
        "import sys, leadline.depth.kl.divergence\n"
        "print(*{'torch', 'transformers', 'numpy', 'pandas', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_the_mean_over_tokens_is_that_of_the_positions_and_clustered() -> None:
    import numpy as np

    from leadline.depth.positions import by_position, over_tokens

    values = np.random.default_rng(0).gamma(2.0, size=(40, 12))
    for row in range(40):
        values[row, 4 + row % 8 :] = np.nan
    single = [str(row) for row in range(40)]
    mean, points = over_tokens(values, single), by_position(values, single)
    total = sum(p.known * p.n for p in points)
    assert mean.value == pytest.approx(total / sum(p.n for p in points))
    error = np.nanstd(values) / np.sqrt((~np.isnan(values)).sum())
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * error, rel=0.25)
    # Each row twice under one base prompt says no more than each row once.
    double = over_tokens(np.vstack([values, values]), single * 2)
    assert double == pytest.approx(mean)
    alone = over_tokens(values[:1], ["a"])
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
