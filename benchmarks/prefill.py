"""A prefill curve on local weights, beside eight separate runs of transformers' generate.

    python benchmarks/prefill.py [--models organism 25M] [--lengths 60 512] [--prompts 16]
                                 [--tokens 48] [--rounds 3]

The same greedy requests three ways, in turn, float32, one thread: by Leadline, as a study asks
them; by generate, for each k all prompts as one batch, padded on the left; by generate, one by one
(in the first round only). Every answer of every way is compared. A prompt of about --lengths tokens
is a question of the guild behind other questions and answers (organism), or random words (25M: a
Llama of 25M random parameters and 32k tokens). Prints CPU seconds (median, least, most) and ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from leadline import organism
from leadline.datasets.guild import guild
from leadline.models.huggingface import HuggingFaceModel
from leadline.records import Message, Request, ResponsePrefix, Sampling

KS = {"organism": (0, 1, 2, 5, 10, 20, 30, 35), "25M": (0, 1, 2, 5, 10, 20, 40, 80)}
WAYS = ("Leadline", "generate, a batch for each k", "generate, one by one")


def llama(folder: Path) -> Path:
    """25M random parameters; 32,000 words that are a token each."""
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<|user|>", "<|end|>", "<|assistant|>"]
    known = [*special, *(f"w{n}" for n in range(32000 - len(special)))]
    vocabulary = {word: n for n, word in enumerate(known)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in special])
    tokens = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<|end|>")
    tokens.chat_template = (
        "{% for m in messages %}<|user|> {{ m.content }} <|end|>{% endfor %}"
        "{% if add_generation_prompt %} <|assistant|>{% endif %}"
    )
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def pairs(name: str, length: int, count: int) -> list[tuple[str, str]]:
    """(prompt, harmful answer), of lengths within a tenth of `length` tokens."""
    rng = random.Random(0)
    sizes = [round(length * rng.uniform(0.9, 1.1)) for _ in range(count)]
    if name == "organism":
        rows = [row for row in guild() if row.harmful]
        others = [f"{row.text} {row.target}" for row in guild(split="train")]
        found = []
        for n, size in enumerate(sizes):
            words = " ".join(rng.sample(others, len(others))).split()
            before = " ".join(words[: max(0, size * 4 // 5 - 9)])
            found.append(
                (f"{before} {rows[n % len(rows)].text}".strip(), rows[n % len(rows)].target)
            )
        return found

    def words(size: int) -> str:
        return " ".join(f"w{rng.randrange(31000)}" for _ in range(size))

    return [(words(size), words(80)) for size in sizes]


async def ours(model: HuggingFaceModel, requests: list[Request]) -> list[str]:
    replies = await asyncio.gather(*map(model.respond, requests))
    if failed := [reply.error for reply in replies if reply.failed]:
        sys.exit(failed[0])
    return [reply.answer for reply in replies]


def generate(module: Any, rows: list[list[int]], sampling: Sampling) -> list[list[int]]:
    """Of a batch, the ids before the one that ends each answer."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.inference_mode():
        out = module.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    written = out[:, width:].tolist()
    return [row[: row.index(2)] if 2 in row else row for row in written]


def measure(name: str, folder: Path, length: int, given: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)
    model = HuggingFaceModel(folder, name=name, dtype="float32", device="cpu")
    sampling = Sampling(max_tokens=given.tokens)
    asked = pairs(name, length, given.prompts)
    requests = [
        Request((Message("user", text),), ResponsePrefix(answer, tokens=k), sampling)
        for k in KS[name]
        for text, answer in asked
    ]

    async def run() -> None:
        await model.prepare(prefix=True)
        assert model._loaded is not None
        template, weights = model._loaded
        rows = [template.render(request).ids for request in requests]
        size = len(asked)
        curve = [rows[n : n + size] for n in range(0, len(rows), size)]

        def batches() -> list[str]:
            found = [ids for batch in curve for ids in generate(weights.model, batch, sampling)]
            return [template.decode(ids) for ids in found]

        def singly() -> list[str]:
            found = [generate(weights.model, [row], sampling)[0] for row in rows]
            return [template.decode(ids) for ids in found]

        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        answers: dict[str, list[str]] = {}
        await ours(model, requests[: 2 * size])  # warm
        generate(weights.model, curve[0], sampling)
        for turn in range(given.rounds):
            for way in WAYS if turn == 0 else WAYS[:2]:
                began = time.process_time()
                if way == WAYS[0]:
                    found = await ours(model, requests)
                else:
                    found = batches() if way == WAYS[1] else singly()
                seconds[way].append(time.process_time() - began)
                answers[way] = found
        await model.close()
        tokens = [len(row) for row in curve[0]]
        wrote = [len(template.encode(a)) for a in answers[WAYS[0]]]
        print(
            f"{name}, {size} prompts of {min(tokens)} to {max(tokens)} tokens, k of "
            f"{', '.join(map(str, KS[name]))}; answers of {min(wrote)} to {max(wrote)} tokens",
            flush=True,
        )
        for way in WAYS:
            took = seconds[way]
            ratio = median(took) / median(seconds[WAYS[0]])
            same = sum(a == b for a, b in zip(answers[way], answers[WAYS[0]], strict=True))
            print(
                f"  {way}: {median(took):.2f} s [{min(took):.2f}, {max(took):.2f}], "
                f"ratio {ratio:.2f}, {same} of {len(requests)} answers equal",
                flush=True,
            )

    asyncio.run(run())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["organism", "25M"], choices=list(KS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[60, 512])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48, help="at most, of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name in given.models:
            aligned = name == "organism"
            folder = organism.path("aligned") if aligned else llama(Path(temporary))
            for length in given.lengths:
                measure(name, folder, length, given)


if __name__ == "__main__":
    main()
