"""Training step of ConstrainedSFTTrainer, against TRL's SFTTrainer and the paper's own loss.

    python benchmarks/constrained.py [--models 25M 57M] [--rows 4] [--prompt 64] [--response 64]
        [--rounds 9]

Random-weight Llamas (25M parameters with a vocabulary of 32k tokens, 57M with 128k), random rows,
float32, AdamW, one thread. A step is what the trainer does for one batch: collate, forward,
backward, update. The variants take turns in one process, so that disturbances affect all of them.
Prints median CPU seconds with their range, and the median of the ratios within a round. Peak memory
is measured in a fresh process for each variant, relative to its memory once the model and the
optimizer state are allocated.

"plain" is TRL's trainer, "constrained" ours with its default settings. "fused head" is ours with
the fused output head that TRL uses (the default off the CPU): compared with "plain", it shows the
cost of the objective itself. "full logits" reimplements the behaviour of the paper's code: logits
and log-softmax of every token, including prompt and padding, then the surrogate loss whose detached
weights are clamped to at least 1e-3.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

SHAPES = {
    "25M": {"vocab_size": 32000, "hidden_size": 256, "intermediate_size": 1024, "layers": 8},
    "57M": {"vocab_size": 128256, "hidden_size": 192, "intermediate_size": 1152, "layers": 10},
}
VARIANTS = ("plain", "constrained", "fused head", "full logits")


def make_model(name: str) -> Any:
    """A Llama of this shape with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(SHAPES[name])
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=shape.pop("layers"),
            num_attention_heads=4,
            num_key_value_heads=4,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=2,
            **shape,
        )
    )


def make_data(job: dict[str, Any]) -> Any:
    """A dataset of random rows of equal length, so that every step has the same cost."""
    import numpy as np
    from datasets import Dataset

    rng = np.random.default_rng(0)
    shape = (job["rows"] * 4, job["prompt"] + job["response"])
    ids = rng.integers(3, SHAPES[job["model"]]["vocab_size"], shape)
    labels = ids.copy()
    labels[:, : job["prompt"]] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def tokenizer() -> Any:
    """A placeholder tokenizer: TRL requires one, although the rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "<end>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )


def make_trainer(variant: str, job: dict[str, Any], out: str) -> Any:
    """The trainer of a variant, with its model and data; it writes to the folder `out`."""
    from trl import SFTConfig, SFTTrainer

    from leadline.align import ConstrainedSFTConfig, ConstrainedSFTTrainer
    from leadline.align.losses import positions, schedule
    from leadline.align.reference import COLUMN

    class FullLogits(ConstrainedSFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            labels, reference = inputs["labels"][:, 1:], inputs[COLUMN][:, 1:]
            mask = labels != -100
            logits = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).logits[:, :-1]
            logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            beta = schedule(self.args.beta, positions(mask))
            weight = (2 * (beta * (reference - logps)).sigmoid()).clamp(min=1e-3).detach()
            return -(weight * logps * mask).sum() / mask.sum()

    kind, config = {
        "plain": (SFTTrainer, SFTConfig),
        "constrained": (ConstrainedSFTTrainer, ConstrainedSFTConfig),
        "fused head": (ConstrainedSFTTrainer, ConstrainedSFTConfig),
        "full logits": (FullLogits, ConstrainedSFTConfig),
    }[variant]
    settings = config(
        out,
        per_device_train_batch_size=job["rows"],
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        learning_rate=1e-4,
    )
    head = nullcontext()
    if variant == "fused head":  # keep TRL's
        head = patch("leadline.align.trainers.use_learned_tokens", lambda model: None)
    with head:
        return kind(
            make_model(job["model"]),
            settings,
            train_dataset=make_data(job),
            processing_class=tokenizer(),
        )


def stepper(trainer: Any) -> Callable[[], float]:
    """A function that trains one step on the next batch of the trainer's dataloader and returns the
    loss."""
    trainer.create_optimizer()
    batches = iter(())
    trainer.current_gradient_accumulation_steps = 1

    def step() -> float:
        nonlocal batches
        if (batch := next(batches, None)) is None:
            batches = iter(trainer.get_train_dataloader())
            batch = next(batches)
        count = (batch["labels"][:, 1:] != -100).sum()
        loss = trainer.training_step(trainer.model, batch, count)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return float(loss)

    return step


def memory(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) / 1024


def measure(job: dict[str, Any], out: str) -> dict[str, Any]:
    """In a fresh process: the peak memory of one variant, or the CPU seconds of all of them."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if "variant" in job:
        trainer = make_trainer(job["variant"], job, out)
        step = stepper(trainer)
        step()  # allocates the optimizer state
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        step()
        return {"mib": memory("VmHWM") - before}
    trainers = {variant: make_trainer(variant, job, f"{out}/{variant}") for variant in VARIANTS}
    steps = {variant: stepper(trainer) for variant, trainer in trainers.items()}
    for step in steps.values():
        step()
    cpu: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for n in range(job["rounds"]):
        for variant in VARIANTS[n % 4 :] + VARIANTS[: n % 4]:
            start = time.process_time()
            steps[variant]()
            cpu[variant].append(time.process_time() - start)
    constrained = trainers["constrained"]
    constrained.args.reference_cache = f"{out}/again"  # an empty cache
    start = time.process_time()
    constrained._with_reference(constrained.train_dataset, "train")
    seconds = time.process_time() - start
    return {"cpu": cpu, "reference_seconds_per_row": seconds / len(constrained.train_dataset)}


def measure_in_subprocess(job: dict[str, Any]) -> dict[str, Any]:
    """The result of `measure` in a fresh process; exits with its error output if it fails."""
    with tempfile.TemporaryDirectory() as out:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": f"{out}/cache",
            "CI": "1",
        }
        child = subprocess.run(
            [sys.executable, __file__, "--measure", json.dumps(job), out],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if child.returncode:
            sys.exit(child.stderr[-2000:])
        result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens of a row")
    parser.add_argument("--response", type=int, default=64, help="response tokens of a row")
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each variant")
    options = parser.parse_args()
    for name in options.models:
        job = {k: getattr(options, k) for k in ("rows", "prompt", "response", "rounds")}
        job["model"] = name
        mib = {v: measure_in_subprocess({**job, "variant": v})["mib"] for v in VARIANTS}
        timings = measure_in_subprocess(job)
        cpu = timings["cpu"]
        print("{}: {rows} rows of {prompt} + {response} tokens".format(name, **job))
        for variant in VARIANTS:
            runs = cpu[variant]
            seconds = f"{median(runs):.3f} s [{min(runs):.3f}, {max(runs):.3f}]"
            print(f"  {variant:12} {seconds}, {mib[variant]:.0f} MiB")
        for ours, other in (("constrained", "plain"), ("fused head", "plain"),
                            ("constrained", "full logits")):  # fmt: skip
            ratio = median(a / b for a, b in zip(cpu[ours], cpu[other], strict=True))
            print(f"  {ours}: {ratio:.3f}x the time of {other} ({1 / ratio:.2f}x its speed), "
                  f"{mib[ours] / mib[other]:.2f}x its memory")  # fmt: skip
        steps = timings["reference_seconds_per_row"] * job["rows"] / median(cpu["plain"])
        print(f"  reference pass (run once): {steps:.2f} plain steps per batch", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(json.loads(sys.argv[2]), sys.argv[3])))
    else:
        main()
