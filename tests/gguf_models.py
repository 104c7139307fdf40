"""A model folder written as a GGUF file, with the writer of the package gguf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def write(folder: Path, file: Path) -> Path:
    """Write the Llama model in `folder`, whose tokenizer is one of bytes, as an unquantized GGUF
    file."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = [tokens.convert_ids_to_tokens(i) for i in range(len(tokens))]
    special = set(tokens.added_tokens_decoder)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_types([3 if i in special else 1 for i in range(len(names))])  # 3: control
    writer.add_token_scores([0.0] * len(names))  # in place of merges, of which there are none
    writer.add_bos_token_id(tokens.bos_token_id)
    writer.add_eos_token_id(tokens.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokens.chat_template)

    def add(name: str, tensor: Any) -> None:
        writer.add_tensor(f"{name}.weight", tensor.float().numpy())

    add("token_embd", weights["model.embed_tokens.weight"])
    add("output_norm", weights["model.norm.weight"])
    add("output", weights["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for name, original in _LAYER.items():
            tensor = weights[f"model.layers.{layer}.{original}.weight"]
            if name in ("attn_q", "attn_k"):  # llama.cpp rotates pairs of neighbours
                heads = (
                    config.num_attention_heads if name[-1] == "q" else config.num_key_value_heads
                )
                halves = tensor.reshape(heads, 2, -1, tensor.shape[-1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
            add(f"blk.{layer}.{name}", tensor.contiguous())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
