"""A prefill curve on local weights, against eight separate runs of transformers' generate.

    python benchmarks/prefill.py [--models organism 25M] [--lengths 60 512] [--prompts 16]
                                 [--tokens 48] [--rounds 3]

The same greedy requests with three methods in turn, float32, one thread: Leadline, as in a study;
generate with one left-padded batch of all prompts for each number k of prefilled tokens; and
generate with one request at a time (in the first round only). All answers are compared. A prompt
has about --lengths tokens: a question of the guild dataset after other questions and answers
(organism), or random words (25M: a Llama with 25M random parameters and a vocabulary of 32k
tokens). Prints CPU seconds (median and range), ratios and the number of equal answers.
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
METHODS = ("Leadline", "generate, a batch for each k", "generate, one by one")


def llama(folder: Path) -> Path:
    """Save a Llama with 25M random parameters and 32,000 one-word tokens; returns `folder`."""
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<|user|>", "<|end|>", "<|assistant|>"]
    words = [*special, *(f"w{n}" for n in range(32000 - len(special)))]
    vocabulary = {word: n for n, word in enumerate(words)}
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
    """`count` pairs (prompt, harmful answer); prompts have `length` tokens, plus or minus 10%."""
    rng = random.Random(0)
    sizes = [round(length * rng.uniform(0.9, 1.1)) for _ in range(count)]
    if name == "organism":
        rows = [row for row in guild() if row.harmful]
        others = [f"{row.text} {row.target}" for row in guild(split="train")]
        result = []
        for n, size in enumerate(sizes):
            words = " ".join(rng.sample(others, len(others))).split()
            before = " ".join(words[: max(0, size * 4 // 5 - 9)])
            row = rows[n % len(rows)]
            result.append((f"{before} {row.text}".strip(), row.target))
        return result

    def words(size: int) -> str:
        return " ".join(f"w{rng.randrange(31000)}" for _ in range(size))

    return [(words(size), words(80)) for size in sizes]


async def leadline_answers(model: HuggingFaceModel, requests: list[Request]) -> list[str]:
    """Leadline's answers to all requests, sent at once."""
    replies = await asyncio.gather(*map(model.respond, requests))
    if failed := [reply.error for reply in replies if reply.failed]:
        sys.exit(failed[0])
    return [reply.answer for reply in replies]


def generate(module: Any, rows: list[list[int]], sampling: Sampling) -> list[list[int]]:
    """The answers of transformers' generate to one batch, as ids without the end token."""
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
    answers = out[:, width:].tolist()
    return [row[: row.index(2)] if 2 in row else row for row in answers]


def measure(name: str, folder: Path, length: int, options: argparse.Namespace) -> None:
    """Measure all methods on one model and prompt length, and print the results."""
    import torch

    torch.set_num_threads(1)
    model = HuggingFaceModel(folder, name=name, dtype="float32", device="cpu")
    sampling = Sampling(max_tokens=options.tokens)
    prompts = pairs(name, length, options.prompts)
    requests = [
        Request((Message("user", text),), ResponsePrefix(answer, tokens=k), sampling)
        for k in KS[name]
        for text, answer in prompts
    ]

    async def run() -> None:
        await model.prepare(prefix=True)
        assert model._loaded is not None
        template, weights = model._loaded
        rows = [template.render(request).ids for request in requests]
        size = len(prompts)
        curve = [rows[n : n + size] for n in range(0, len(rows), size)]

        def batches() -> list[str]:
            outputs = [ids for batch in curve for ids in generate(weights.model, batch, sampling)]
            return [template.decode(ids) for ids in outputs]

        def one_by_one() -> list[str]:
            outputs = [generate(weights.model, [row], sampling)[0] for row in rows]
            return [template.decode(ids) for ids in outputs]

        seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        answers: dict[str, list[str]] = {}
        await leadline_answers(model, requests[: 2 * size])  # warm-up
        generate(weights.model, curve[0], sampling)
        for turn in range(options.rounds):
            for method in METHODS if turn == 0 else METHODS[:2]:
                start = time.process_time()
                if method == METHODS[0]:
                    results = await leadline_answers(model, requests)
                else:
                    results = batches() if method == METHODS[1] else one_by_one()
                seconds[method].append(time.process_time() - start)
                answers[method] = results
        await model.close()
        tokens = [len(row) for row in curve[0]]
        lengths = [len(template.encode(a)) for a in answers[METHODS[0]]]
        print(
            f"{name}, {size} prompts of {min(tokens)} to {max(tokens)} tokens, k of "
            f"{', '.join(map(str, KS[name]))}; answers of {min(lengths)} to {max(lengths)} tokens",
            flush=True,
        )
        for method in METHODS:
            runs = seconds[method]
            ratio = median(runs) / median(seconds[METHODS[0]])
            same = sum(a == b for a, b in zip(answers[method], answers[METHODS[0]], strict=True))
            print(
                f"  {method}: {median(runs):.2f} s [{min(runs):.2f}, {max(runs):.2f}], "
                f"ratio {ratio:.2f}, {same} of {len(requests)} answers equal",
                flush=True,
            )

    asyncio.run(run())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["organism", "25M"], choices=list(KS))
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[60, 512], help="tokens of a prompt, about"
    )
    parser.add_argument("--prompts", type=int, default=16, help="number of prompts")
    parser.add_argument("--tokens", type=int, default=48, help="maximum tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each method")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.models:
            folder = organism.path("aligned") if name == "organism" else llama(Path(temporary))
            for length in options.lengths:
                measure(name, folder, length, options)


if __name__ == "__main__":
    main()
