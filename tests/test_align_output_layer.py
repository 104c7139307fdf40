"""Logits of learned tokens in chunks, and gradient checkpointing: the same loss and gradients."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
from torch.nn.functional import cross_entropy  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
)
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from leadline.align import output_layer  # noqa: E402
from leadline.align.losses import in_chunks, logps_in_chunks  # noqa: E402
from leadline.align.output_layer import (  # noqa: E402
    checkpoint_layers,
    ends_in_output_layer,
    use_learned_tokens,
)

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 1,
    "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
# Whether logits are the output layer's result; Cohere and Granite scale it, Gemma soft-caps it.
KINDS: dict[str, tuple[Any, bool]] = {
    "llama": (lambda: LlamaConfig(**SHAPE), True),
    "tied": (lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True), True),
    "gpt2": (lambda: GPT2Config(**GPT2), True),
    "mixtral": (lambda: MixtralConfig(**SHAPE, **EXPERTS), True),
    "gemma2": (lambda: Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=3.0), False),
    "cohere": (lambda: CohereConfig(**SHAPE, logit_scale=0.2), False),
    "granite": (lambda: GraniteConfig(**SHAPE, logits_scaling=7.0), False),
}


def build(kind: str) -> Any:
    torch.manual_seed(3)
    config = KINDS[kind][0]()
    config._attn_implementation = config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config).double().train()


def batch() -> dict[str, Any]:
    """Four rows, of which one has no learned token; learned tokens differ between rows."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (4, 24), generator=generator)
    labels = ids.clone()
    for row, start in enumerate((4, 20, 24, 11)):
        labels[row, :start] = -100
    labels[0, 12:17] = -100  # two turns
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model: Any) -> dict[str, Any]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def weighted(log_probs: Any) -> Any:
    """A loss in which every token has another weight, and which is not linear."""
    weights = torch.linspace(0.2, 3, log_probs.numel()).view(log_probs.shape).to(log_probs)
    return -(weights * log_probs + 0.1 * log_probs**2).sum()


def full(model: Any, inputs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """From the logits of every position: log-probs, entropy and top 1, 0 where not learned."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")[:, 1:]
    logits = model(**inputs, use_cache=False).logits[:, :-1].double()
    mask, logps = labels != -100, logits.log_softmax(-1)
    chosen = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    entropy = -(logps.exp() * logps).sum(-1)
    return chosen.where(mask, 0), entropy.where(mask, 0), (logps.argmax(-1) == labels) & mask


@pytest.mark.parametrize("memory", [4 * VOCABULARY * 5, 2**26])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_full_logits(
    kind: str, memory: int, monkeypatch: pytest.MonkeyPatch
):
    """In chunks of five tokens, and in one: float64, within 1e-10."""
    monkeypatch.setattr(
        output_layer, "logps_in_chunks", lambda *args: logps_in_chunks(*args, memory=memory)
    )
    model, inputs = build(kind), batch()
    expected, entropy, is_top1 = full(model, inputs)
    weighted(expected).backward()
    right = gradients(model)
    add_fused_lm_head(model)
    use_learned_tokens(model)
    found = model(**inputs, use_cache=False, fused_lm_head=True)
    assert torch.equal(found.label_mask, inputs["labels"][:, 1:] != -100)
    torch.testing.assert_close(found.log_probs, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.entropy, entropy, atol=1e-10, rtol=0)
    assert torch.equal(found.is_top1 > 0, is_top1)
    assert (found.aux_loss is not None) == (kind == "mixtral")
    weighted(found.log_probs).backward()
    mine = gradients(model)
    assert mine.keys() == right.keys()
    size = max(float(each.abs().max()) for each in right.values())
    for name, value in right.items():
        torch.testing.assert_close(mine[name], value, atol=1e-10 * size, rtol=0, msg=name)
    # Generation and plain calls are unchanged.
    plain = {name: value for name, value in inputs.items() if name != "labels"}
    torch.testing.assert_close(full(model, inputs)[0], expected, atol=1e-12, rtol=0)
    assert model.generate(**plain, max_new_tokens=2, pad_token_id=0).shape == (4, 26)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_changes_its_logits_is_recognized(kind: str):
    model = build(kind)
    assert ends_in_output_layer(model) is KINDS[kind][1]
    assert model.training


def test_the_check_does_not_need_large_logits():
    """A soft cap of 30 hardly changes the small logits of a new model, and is found."""
    torch.manual_seed(0)
    settings = {**SHAPE, "initializer_range": 1e-3}
    config = Gemma2Config(**settings, head_dim=8, final_logit_softcapping=30.0)
    assert not ends_in_output_layer(AutoModelForCausalLM.from_config(config))


def test_a_batch_without_learned_tokens_has_a_gradient_of_zero():
    model, inputs = build("llama"), batch()
    add_fused_lm_head(model)
    use_learned_tokens(model)
    inputs["labels"][:] = -100
    found = model(**inputs, fused_lm_head=True)
    assert not found.log_probs.any()
    found.log_probs.sum().backward()
    assert not any(each.any() for each in gradients(model).values())


def test_an_adapter_on_the_output_layer_is_trained():
    """TRL's fused layer reads the weight alone and would leave the adapter out."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "v_proj"], task_type="CAUSAL_LM")
    base = build("llama")
    add_fused_lm_head(base)
    model = peft.get_peft_model(base, config).double()
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.5)
    inputs = batch()
    expected = full(model, inputs)[0]
    weighted(expected).backward()
    right = gradients(model)
    use_learned_tokens(model)
    found = model(**inputs, use_cache=False, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    weighted(found).backward()
    mine = gradients(model)
    assert any("lm_head" in name for name in mine)
    for name, value in right.items():
        torch.testing.assert_close(mine[name], value, atol=1e-9, rtol=1e-9, msg=name)


def test_chunks_hold_only_as_many_tokens_as_fit():
    sizes: list[int] = []

    def logps(logits: Any, labels: Any) -> Any:
        sizes.append(len(logits))
        return -cross_entropy(logits, labels, reduction="none")

    logits = torch.randn(23, 10, requires_grad=True)
    labels = torch.randint(10, (23,))
    found = in_chunks(logps, 10, logits, labels, memory=4 * 10 * 6)
    assert sizes == [6, 6, 6, 5]
    torch.testing.assert_close(found, logps(logits, labels))
    sizes.clear()
    found.sum().backward()
    assert sorted(sizes) == [5, 6, 6, 6]  # again, in the backward pass
    sizes.clear()
    in_chunks(logps, 10, logits, labels)
    assert sizes == [23]


@pytest.mark.parametrize(("limit", "checkpointed"), [(0, 2), (2, 1), (10, 0)])
def test_as_many_layers_are_checkpointed_as_the_limit_requires(limit: int, checkpointed: int):
    """`limit` in units of one layer's activations; loss and gradients stay the same."""
    model, inputs = build("llama"), batch()
    per_layer = 4 * 24 * 4 * (8 * 32 + 3 * 48)
    weighted(full(model, inputs)[0]).backward()
    right = gradients(model)
    checkpoint_layers(model, limit * per_layer)
    logps = full(model, inputs)[0]
    layers = model.model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [
        number < checkpointed for number in range(3)
    ]
    weighted(logps).backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, right[name], atol=1e-10, rtol=1e-10, msg=name)
