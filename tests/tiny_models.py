"""Models with random weights and a few thousand parameters, created for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(chat_template: str | None = CHATML, special: tuple[str, ...] = ()) -> Any:
    """A byte-level tokenizer, one token per byte: any text survives encoding and decoding."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    names = ("<|im_end|>", "<|im_start|>", *special)
    inner.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=names[1], eos_token=names[0])
    fast.chat_template = chat_template
    return fast


def save(folder: Path, kind: str = "llama", tokens: Any = None, **settings: Any) -> Path:
    """Write a model folder. The weights are so large that greedy answers differ between prompts."""
    import torch
    import transformers as t

    tokens = tokens or tokenizer()
    common = {"vocab_size": len(tokens), "eos_token_id": tokens.eos_token_id, "bos_token_id": None}
    small = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(7)
    config: Any
    if kind == "gpt2":
        small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
        config = t.GPT2Config(**common, **{**small, "initializer_range": 0.3, **settings})
    else:
        name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}[kind]
        if kind == "mistral":
            small["sliding_window"] = 24
        if kind == "qwen3":
            small["head_dim"] = 8
        config = getattr(t, f"{name}Config")(**common, **{**small, **settings})
    model = t.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def words(size: int = 100) -> Any:
    """A tokenizer with one token per word, w0 to w99: a model's output can be used as a prefix."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<unk>", "system", "user", "assistant", *(f"w{n}" for n in range(size))]
    vocabulary = {word: n for n, word in enumerate(known)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ("<|im_end|>", "<|im_start|>", "<think>", "</think>")
    inner.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=names[1], eos_token=names[0])
    fast.chat_template = CHATML
    return fast
