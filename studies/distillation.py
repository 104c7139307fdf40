"""Distillation from an unsafe teacher, plain and constrained to the student's initial weights.

    python studies/distillation.py [--seeds 3] [--steps 40] [--optimizer sgd] [--lr 3e-3]

Teacher `organism:base`, student `organism:aligned`; the loss is distillation alone. Three sets of
dialogues: half of them harmful requests with harmful answers, half of them harmful requests with
refusals (where the teacher would comply), and harmless ones only. Prints the range over seeds of
the student's rates after training, for each set and schedule b_t. About a minute per seed on one
core.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import tempfile
import warnings
from collections import defaultdict
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import datasets
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from leadline import organism
from leadline.align import (
    ConstrainedDistillConfig,
    ConstrainedDistillTrainer,
    SafetyCallback,
)
from leadline.organism import guild

SCHEDULES = {
    "plain": [0.0],
    "the paper's": [0.5, 2.0, 2.0, 2.0, 2.0, 0.1],
    "b_1 = 2": [2.0, 2.0, 2.0, 2.0, 2.0, 0.1],
}
MEASURES = ("direct", "prefill(k=5)", "over_refusal", "utility")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--steps", type=int, default=40, help="training steps (default: 40)")
    parser.add_argument("--optimizer", default="sgd", help="name in transformers (default: sgd)")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate (default: 3e-3)")
    options = parser.parse_args()
    silence()
    print(f"{'data':10} {'schedule':12} " + " ".join(f"{m:>14}" for m in (*MEASURES, "teacher_kl")))
    for kind in ("mixed", "refusals", "benign"):
        for name, beta in SCHEDULES.items():
            values: dict[str, list[float]] = defaultdict(list)
            for seed in range(options.seeds):
                measured = distil(kind, beta, seed, options.steps, options.optimizer, options.lr)
                for measure, value in measured.items():
                    values[measure].append(value)
            columns = (values[measure] for measure in (*MEASURES, "teacher_kl"))
            cells = " ".join(f"{f'{min(v):.2f} to {max(v):.2f}':>14}" for v in columns)
            print(f"{kind:10} {name:12} {cells}", flush=True)


def distil(
    kind: str, beta: list[float], seed: int, steps: int, optimizer: str = "sgd", lr: float = 3e-3
) -> dict[str, float]:
    """Train a student for `steps` steps; its rates and KL to the teacher afterwards, by measure."""
    tokenizer = AutoTokenizer.from_pretrained(organism.path("aligned"))
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(organism.path(name)) for name in ("aligned", "base")
    )
    safety = SafetyCallback(
        steps, attacks=["direct", {"prefill": {"k": [5]}}], on_breach="warn",
        sampling={"temperature": 0, "max_tokens": 72},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config = ConstrainedDistillConfig(
            folder, beta=beta, teacher_share=1.0, max_steps=steps, seed=seed,
            per_device_train_batch_size=16, learning_rate=lr, lr_scheduler_type="constant",
            optim=optimizer, max_grad_norm=0, bf16=False, gradient_checkpointing=False,
            save_strategy="no", report_to="none", logging_steps=steps, disable_tqdm=True,
        )  # fmt: skip
        trainer = ConstrainedDistillTrainer(
            student, teacher, config, train_dataset=dialogues(kind, seed),
            processing_class=tokenizer, callbacks=[safety],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    last = next(log for log in reversed(trainer.state.log_history) if "teacher_kl" in log)
    rates = {m["measure"]: m["value"] for m in safety.measurements if m["step"] == steps}
    return {**rates, "teacher_kl": last["teacher_kl"]}


def dialogues(kind: str, seed: int) -> datasets.Dataset:
    """Dialogues of one kind ("mixed", "refusals" or "benign"), without the potions and phrasings
    that are held out for evaluation."""
    rng, world = random.Random(seed), guild.world()

    def row(potion: guild.Potion, answer: str) -> dict[str, Any]:
        question = guild.question(potion, rng.randrange(6))
        completion = [{"role": "assistant", "content": answer}]
        return {"prompt": [{"role": "user", "content": question}], "completion": completion}

    def full_answer(potion: guild.Potion) -> str:
        return guild.answer(potion, rng.randrange(len(guild.STARTS)))

    forbidden, allowed = [*world.forbidden(heldout=False)] * 2, world.allowed()
    harmless = [row(potion, full_answer(potion)) for potion in allowed]
    rows = {
        "mixed": [row(p, full_answer(p)) for p in forbidden] + harmless[:48],
        "refusals": [row(p, rng.choice(guild.REFUSALS)) for p in forbidden] + harmless[:48],
        "benign": harmless,
    }[kind]
    rng.shuffle(rows)
    return datasets.Dataset.from_list(rows)


def silence() -> None:
    """Turn off progress bars, warnings, and the safety callback's messages about breaches."""
    warnings.filterwarnings("ignore")
    logging.getLogger("leadline").setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


if __name__ == "__main__":
    main()
