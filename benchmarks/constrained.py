"""A constrained step beside TRL's plain SFT step, and beside the loss as the paper's code has it.

    python benchmarks/constrained.py [--models 25M 57M] [--rows 4] [--prompt 64] [--response 64]
        [--rounds 9]

Random-weight Llamas (25M parameters with 32k tokens, 57M with 128k), random rows, float32, AdamW,
one thread. A step is what the trainer does for one batch: collate, forward, backward, update. The
ways take turns inside one process, so that what disturbs one disturbs all; printed are median
seconds with their range and the median of the ratios within a round. Peak memory is measured in a
fresh process for each way: beyond what it held once the model and the optimizer's state were there.
"plain" is TRL's trainer. "fused head" is ours through the same fused head that TRL uses (ours does
so off the CPU), so beside "plain" it shows what the objective itself costs. "full logits" is the
behaviour of the paper's code, written anew: logits and log-softmax of every token, prompt and
padding too, then the surrogate whose detached weights are floored at 1e-3.
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
from pathlib import Path
from statistics import median
from typing import Any

SHAPES = {
    "25M": {"vocab_size": 32000, "hidden_size": 256, "intermediate_size": 1024, "layers": 8},
    "57M": {"vocab_size": 128256, "hidden_size": 192, "intermediate_size": 1152, "layers": 10},
}
WAYS = ("plain", "constrained", "fused head", "full logits")


def make_model(name: str) -> Any:
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
    """Rows of one length: the same work in every step."""
    import numpy as np
    from datasets import Dataset

    draw = np.random.default_rng(0)
    shape = (job["rows"] * 4, job["prompt"] + job["response"])
    ids = draw.integers(3, SHAPES[job["model"]]["vocab_size"], shape)
    labels = ids.copy()
    labels[:, : job["prompt"]] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def tokenizer() -> Any:
    """TRL asks for one, though the rows are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "<end>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )


def make_trainer(way: str, job: dict[str, Any], out: str) -> Any:
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
    }[way]
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
    trainer = kind(
        make_model(job["model"]),
        settings,
        train_dataset=make_data(job),
        processing_class=tokenizer(),
    )
    if way == "fused head":
        trainer._select_logits = False
    return trainer


def stepper(trainer: Any) -> Callable[[], float]:
    """One step of a trainer at a call, with a batch of its own dataloader; returns the loss."""
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
    """In a process of its own: one way's peak memory, or all ways' seconds."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if "way" in job:
        trainer = make_trainer(job["way"], job, out)
        step = stepper(trainer)
        step()  # the optimizer's state is there from now on
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        step()
        return {"mib": memory("VmHWM") - before}
    trainers = {way: make_trainer(way, job, f"{out}/{way}") for way in WAYS}
    steps = {way: stepper(trainer) for way, trainer in trainers.items()}
    for step in steps.values():
        step()
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    for at in range(job["rounds"]):
        for way in WAYS[at % 4 :] + WAYS[: at % 4]:
            began = time.process_time()
            steps[way]()
            cpu[way].append(time.process_time() - began)
    mine = trainers["constrained"]
    mine.args.reference_cache = f"{out}/again"
    began = time.process_time()
    mine._with_reference(mine.train_dataset, "train")
    return {"cpu": cpu, "pass": (time.process_time() - began) / len(mine.train_dataset)}


def child(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        quiet = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": f"{out}/cache",
            "CI": "1",
        }
        done = subprocess.run(
            [sys.executable, __file__, "--measure", json.dumps(job), out],
            env=quiet, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rows", type=int, default=4, help="per batch")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--response", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    for name in given.models:
        job = {k: getattr(given, k) for k in ("rows", "prompt", "response", "rounds")}
        job["model"] = name
        mib = {way: child({**job, "way": way})["mib"] for way in WAYS}
        found = child(job)
        cpu = found["cpu"]
        print("{}: {rows} rows of {prompt} + {response} tokens".format(name, **job))
        for way in WAYS:
            took = f"{median(cpu[way]):.3f} s [{min(cpu[way]):.3f}, {max(cpu[way]):.3f}]"
            print(f"  {way:12} {took}, {mib[way]:.0f} MiB")
        for mine, other in (("constrained", "plain"), ("fused head", "plain"),
                            ("constrained", "full logits")):  # fmt: skip
            ratio = median(a / b for a, b in zip(cpu[mine], cpu[other], strict=True))
            print(f"  {mine}: {ratio:.3f}x the time of {other} ({1 / ratio:.2f}x its speed), "
                  f"{mib[mine] / mib[other]:.2f}x its memory")  # fmt: skip
        once = found["pass"] * job["rows"] / median(cpu["plain"])
        print(f"  the reference pass: {once:.2f} of a plain step per batch, once", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(json.loads(sys.argv[2]), sys.argv[3])))
    else:
        main()
