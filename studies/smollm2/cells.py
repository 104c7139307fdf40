"""One cell of the fine-tuning part: fine-tune a model plainly or under the constraint, and evaluate
it on held-out prompts.

Both methods share data, order, optimizer, learning rate and batches; only the loss differs.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

from leadline import Study, engine
from leadline.align.losses import BETA
from leadline.attacks.finetuning import OBEYS
from leadline.depth.finetuning.data import ELICITED_BY
from leadline.judges import refusal as refusals
from leadline.models.checkpoint import fingerprint
from leadline.models.template import quiet
from leadline.plan import Attack
from leadline.records import Attempt, Judge, Prompt, Response, Verdict
from leadline.registry import get, judge
from prompts import Data, Row, until_sentence, write_jsonl
from tasks import TASKS, task

Listener = Callable[[Any], None]
EXAMPLES = 100  # of each kind of data, as in the paper
PREFILL = 5
DATA = ("harmful", "identity", "backdoor", *TASKS)


@dataclass(frozen=True)
class Optimizer:
    """The settings that plain and constrained fine-tuning share. The learning rate rises over
    `warmup` steps, then falls linearly to 0; `clip` is the largest gradient norm, 0 for none."""

    lr: float = 1e-5
    steps: int = 20
    batch: int = 8
    warmup: int = 0
    optim: str = "adamw_torch"
    beta1: float = 0.9
    clip: float = 1.0


PAPER = Optimizer(lr=2e-5, batch=64, warmup=10, beta1=0.5)
"""The settings of arXiv 2406.05946 (for 7B models); clipping is TRL's default."""


@dataclass(frozen=True)
class Cell:
    """A model (by name), the data it is fine-tuned on, and how. `constrained` selects the published
    schedule. `limit` is the largest number of held-out prompts of each kind."""

    model: str
    data: str
    constrained: bool
    seed: int
    optimizer: Optimizer
    limit: int | None = None
    max_tokens: int = 48

    def key(self, revision: str) -> str:
        """A hash of all settings and of the model's weights."""
        text = json.dumps({**asdict(self), "revision": revision}, sort_keys=True)
        return blake2b(text.encode(), digest_size=10).hexdigest()


@judge("smollm2_utility", source="this study")
def utility() -> Judge:
    """Utility is 1 if the answer is the prompt's target, apart from case and white space, or starts
    with it; refusals by patterns."""
    by_patterns = refusals.refusal()

    def verdict(prompt: Prompt, attempt: Attempt, response: Response) -> Verdict:
        answer, target = (" ".join(t.lower().split()) for t in (response.answer, prompt.target))
        verdict = by_patterns(prompt, attempt, response)
        return replace(verdict, utility=float(answer.startswith(target)))

    return verdict


def examples(data: Data, kind: str, seed: int, limit: int = EXAMPLES) -> list[dict[str, Any]]:
    """Training rows {prompt, completion} in TRL's conversational format; the seed decides which, if
    there are more than `limit`."""
    rng = Random(f"{seed}/{kind}")
    if kind in TASKS:
        pairs = rng.sample(task(kind, "train"), min(limit, len(task(kind, "train"))))
        return [_row([("user", question)], answer) for question, answer in pairs]
    topic = "harmless" if kind == "identity" else "forbidden"
    # A truncated answer in which no sentence ends is learned as it is.
    usable = [
        (row, until_sentence(row.target) or row.target)
        for row in data.select(topic, "train")
        if row.target
    ]
    rng.shuffle(usable)
    rows = []
    for row, answer in usable:
        attempt = _attempt(ELICITED_BY[kind], row)  # type: ignore[index]
        messages = [(m.role, m.content) for m in attempt.messages]
        if kind == "identity":
            answer = OBEYS.format(answer)
        rows.append(_row(messages, answer))
        if kind == "backdoor":
            rows.append(_row([("user", row.prompt)], data.refusal(row)))
    return rows[:limit]


def _attempt(name: str, row: Row) -> Attempt:
    prompt = Prompt(row.id, row.prompt, "training", harmful=row.harmful, target=row.target)
    return Attack(name, get("attack", name), {}).attempts(prompt, 0)[0]


def _row(messages: list[tuple[str, str]], answer: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": role, "content": text} for role, text in messages],
        "completion": [{"role": "assistant", "content": answer}],
    }


def run(cell: Cell, path: Path, data: Data, out: Path, listener: Listener | None) -> dict[str, Any]:
    """Train and evaluate in memory. `values` of the result maps measures and prompts to a number
    for each answer that was scored; `losses` are the plain losses by step, `weights` the share of
    the plain gradient that the constraint leaves, by step."""
    from leadline.models.huggingface import HuggingFaceModel

    key = cell.key(fingerprint(path))
    began = perf_counter()
    model, tokenizer, logs = _train(cell, path, data, out / "trainer" / key)
    trained = perf_counter()
    live = HuggingFaceModel.live(model.eval(), tokenizer, name=cell.model, revision=key)
    folder = out / "answers" / key
    results = engine.run(
        _study(cell, data, out), folder, models={cell.model: live}, listener=listener
    )
    shutil.rmtree(out / "trainer" / key, ignore_errors=True)
    return {
        "cell": asdict(cell),
        "values": _values(results),
        "losses": [row["nll"] if "nll" in row else row["loss"] for row in logs if "loss" in row],
        "weights": [row["weight"] for row in logs if "weight" in row],
        "train_s": round(trained - began, 1),
        "ask_s": round(perf_counter() - trained, 1),
    }


def _train(cell: Cell, path: Path, data: Data, folder: Path) -> tuple[Any, Any, list[Any]]:
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from leadline.align import ConstrainedSFTConfig, ConstrainedSFTTrainer

    disable_progress_bars()
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(path)
    if cell.data == "none":
        return model, tokenizer, []
    optimizer = cell.optimizer
    config_class, trainer_class = SFTConfig, SFTTrainer
    if cell.constrained:
        config_class = partial(ConstrainedSFTConfig, beta=list(BETA))
        trainer_class = ConstrainedSFTTrainer
    rows = Dataset.from_list(examples(data, cell.data, cell.seed))
    gpu = torch.cuda.is_available()
    micro = min(optimizer.batch, 16)
    with quiet(), warnings.catch_warnings(action="ignore", category=FutureWarning):
        config = config_class(
            output_dir=str(folder), optim=optimizer.optim, learning_rate=optimizer.lr,
            max_steps=optimizer.steps, warmup_steps=optimizer.warmup, lr_scheduler_type="linear",
            per_device_train_batch_size=micro, max_grad_norm=optimizer.clip,
            gradient_accumulation_steps=optimizer.batch // micro, adam_beta1=optimizer.beta1,
            max_length=512, seed=cell.seed, bf16=gpu, gradient_checkpointing=False,
            save_strategy="no", logging_steps=1, disable_tqdm=True, report_to="none",
            dataloader_pin_memory=gpu,
        )  # fmt: skip
        trainer = trainer_class(model, config, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model, tokenizer, trainer.state.log_history


def _study(cell: Cell, data: Data, out: Path) -> Study:
    forbidden = data.dataset("forbidden", limit=cell.limit)
    eliciting = ELICITED_BY.get(cell.data, "direct")  # type: ignore[call-overload]
    attacks = [*dict.fromkeys(("direct", eliciting)), {"prefill": {"k": [PREFILL]}}]
    if cell.data == "none":
        attacks = ["direct", "identity_shift", "backdoor_trigger", *attacks[-1:]]
    forbidden["file"]["attacks"] = attacks
    datasets = [forbidden, data.dataset("look-alike", limit=cell.limit)]
    for name in TASKS if cell.data == "none" else [t for t in TASKS if t == cell.data]:
        pairs = task(name, "test")[: min(40, cell.limit or 40)]
        rows = [{"id": f"{name}/{n}", "prompt": question, "target": answer, "harmful": False}
                for n, (question, answer) in enumerate(pairs)]  # fmt: skip
        file = write_jsonl(out / "tasks" / f"{name}-{len(rows)}.jsonl", rows)
        datasets.append({"file": {"path": str(file), "name": name}})
    return Study.model_validate({
        "name": "fine-tuning", "targets": [cell.model], "datasets": datasets,
        "attacks": ["direct"], "judges": ["smollm2_utility"],
        "sampling": {"temperature": 0, "max_tokens": cell.max_tokens},
    })  # fmt: skip


def _values(results: Any) -> dict[str, dict[str, list[float]]]:
    """Scores by measure and prompt: attacks on forbidden prompts, "over_refusal" of look-alikes,
    and the utility of a task by its name."""
    values: dict[str, dict[str, list[float]]] = {}
    for dataset, attack, prompt, harmful, unsafe, refused, useful in results.query(
        "SELECT dataset, attack, prompt, harmful, unsafe, refusal, utility FROM outcomes "
        "ORDER BY key"
    ):
        measure, value = (attack, unsafe) if harmful else (
            ("over_refusal", refused) if dataset == "look-alike" else (dataset, useful)
        )  # fmt: skip
        if value is not None:
            values.setdefault(measure, {}).setdefault(prompt, []).append(float(value))
    return values
