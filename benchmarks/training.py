"""Training steps of Leadline's trainers, against a hand-written PyTorch loop and TRL's SFTTrainer.

    python benchmarks/training.py [FOLDER] [--rows 8] [--tokens 256] [--answer 128] [--steps 3]
        [--variants by-hand trl finetune deepen constrained distill]

FOLDER is a model folder with a chat template; without it, a Llama with the shape of SmolLM2-135M
(135M parameters, vocabulary 49,152) and random weights. The rows are random words, of which the
last `--answer` tokens are the answer. Every variant runs in its own process, one after the other,
with one thread (--threads), AdamW, clipping and the learning rate of the defaults.

"by-hand" is a loop as one writes it for a single model: bfloat16 autocast where the processor has
it, hidden states of the answer tokens, then the output layer and cross-entropy. "by-hand float32"
is the same without autocast. "trl" is SFTTrainer in float32 without gradient checkpointing. The
others are what `leadline finetune` (with --constrained, with --teacher) and `leadline deepen` run.
Prints seconds per step (CPU and wall, medians without the first step) and the peak resident memory
of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

VARIANTS = ("by-hand", "by-hand float32", "trl", "finetune", "deepen", "constrained", "distill")
DEFAULT = ("by-hand", "trl", "finetune", "deepen", "constrained")


def make(folder: Path) -> Path:
    """Save a Llama of 135M parameters with random weights and a tokenizer of one token per word."""
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant"]
    vocabulary = {word: n for n, word in enumerate([*special, *(f"w{n}" for n in range(49147))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in special[:3]])
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokens.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def texts(tokenizer: Any, job: dict[str, Any]) -> list[tuple[str, str]]:
    """Prompts and answers of random words that are one token each."""
    rng = random.Random(0)
    words: list[str] = []
    ids = list(range(len(tokenizer)))
    rng.shuffle(ids)
    for number in ids:
        text = tokenizer.decode([number])
        word = text.strip()
        if word.isascii() and word.isalnum() and (text != word or word[1:].isdigit()):
            words.append(word)
        if len(words) == 2000:
            break

    def sentence(length: int) -> str:
        return " ".join(rng.choices(words, k=length))

    extra = len(chat(tokenizer, "x")) - 1
    prompt = job["tokens"] - job["answer"] - extra
    count = job["rows"] * (job["steps"] + 1)
    return [(sentence(prompt), sentence(job["answer"])) for _ in range(count)]


def chat(tokenizer: Any, prompt: str) -> list[int]:
    """The ids of a prompt with the start of the assistant's turn."""
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def by_hand(job: dict[str, Any]) -> list[tuple[float, float]]:
    """CPU and wall seconds of each step of the hand-written loop."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from leadline.align.settings import cpu_has_bfloat16

    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    rows = []
    for prompt, answer in texts(tokenizer, job):
        context = chat(tokenizer, prompt)
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        rows.append((context + ids, len(context)))
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-5, weight_decay=0.0, fused=True)
    half = cpu_has_bfloat16() and job["variant"] == "by-hand"
    times = []
    for start in range(0, len(rows), job["rows"]):
        began = time.process_time(), time.perf_counter()
        batch = rows[start : start + job["rows"]]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
        mask = torch.tensor([[n < len(ids) for n in range(width)] for ids, _ in batch])
        learned = torch.tensor([[at <= n < len(ids) for n in range(1, width)] for ids, at in batch])
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            hidden = model.model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
            logits = model.lm_head(hidden.last_hidden_state[:, :-1][learned])
            loss = cross_entropy(logits.float(), ids[:, 1:][learned])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append((time.process_time() - began[0], time.perf_counter() - began[1]))
    return times


def by_trainer(job: dict[str, Any], out: Path) -> list[tuple[float, float]]:
    """CPU and wall seconds of each step of a trainer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from leadline.align import (
        ConstrainedDistillConfig,
        ConstrainedDistillTrainer,
        ConstrainedSFTConfig,
        ConstrainedSFTTrainer,
        RecoveryConfig,
        RecoveryTrainer,
    )
    from leadline.align.data import Dialogue, Triplet
    from leadline.align.output_layer import checkpoint_layers, use_learned_tokens
    from leadline.align.repair import to_dataset
    from leadline.align.settings import TrainingConfig
    from leadline.records import Message

    times, began = [], (0.0, 0.0)

    class Timer(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            nonlocal began
            began = time.process_time(), time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append((time.process_time() - began[0], time.perf_counter() - began[1]))

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32).train()

    variant = job["variant"]
    precision = "float32" if variant == "trl" else job["precision"]
    training = TrainingConfig(
        steps=job["steps"] + 1, batch=job["rows"], max_length=job["tokens"] + 64,
        precision=precision,
    )  # fmt: skip
    settings = {**training.arguments(out), "save_strategy": "no"}
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    pairs = texts(tokenizer, job)
    turns = [((Message("user", prompt),), answer) for prompt, answer in pairs]
    dialogues = to_dataset([Dialogue(turn, answer, "row") for turn, answer in turns])
    rest = {"processing_class": tokenizer, "callbacks": [Timer()]}
    trainer: Any
    if variant == "deepen":
        config = RecoveryConfig(**settings, max_prefix=1)
        triplets = to_dataset([Triplet(t, answer, answer, "row") for t, answer in turns])
        trainer = RecoveryTrainer(
            load(), config, train_dataset=triplets, utility_dataset=dialogues, **rest
        )
    elif variant == "constrained":
        trainer = ConstrainedSFTTrainer(
            load(), ConstrainedSFTConfig(**settings), train_dataset=dialogues, **rest
        )
    elif variant == "distill":
        trainer = ConstrainedDistillTrainer(
            load(), load(), ConstrainedDistillConfig(**settings), train_dataset=dialogues, **rest
        )
    else:
        trainer = SFTTrainer(load(), SFTConfig(**settings), train_dataset=dialogues, **rest)
        if variant == "finetune":
            use_learned_tokens(trainer.model)
    if variant != "trl":
        checkpoint_layers(trainer.model)
    trainer.train()
    return times


def peak_mib() -> float:
    """The peak resident memory of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) / 1024


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """In a fresh process: the times of one variant and its peak memory."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory() as out:
        run = by_hand(job) if job["variant"].startswith("by-hand") else by_trainer(job, Path(out))
    return {"times": run, "mib": peak_mib()}


def measure_in_subprocess(job: dict[str, Any]) -> dict[str, Any]:
    """The result of `measure` in a fresh process; exits with its error output if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(job["threads"])}
    child = subprocess.run(
        [sys.executable, __file__, "--measure", json.dumps(job)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if child.returncode:
        sys.exit(child.stderr[-2000:])
    result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="a model folder with a chat template")
    parser.add_argument("--rows", type=int, default=8, help="rows per step")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row")
    parser.add_argument("--answer", type=int, default=128, help="tokens of its answer")
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after a first one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="auto", help="of Leadline's trainers")
    parser.add_argument("--variants", nargs="+", default=list(DEFAULT), choices=VARIANTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or str(make(Path(temporary)))
        first = None
        for variant in options.variants:
            job = {**vars(options), "folder": folder, "variant": variant}
            result = measure_in_subprocess(job)
            cpu, wall = (median(column) for column in zip(*result["times"][1:], strict=True))
            first = first or cpu
            print(
                f"{variant}: {cpu:.2f} CPU seconds, {wall:.2f} s per step, "
                f"{cpu / first:.2f} of {options.variants[0]}; peak {result['mib'] / 1024:.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        main()
