"""`leadline deepen` and `leadline finetune`: train a model, and measure it before and after.

Each leaves a normal model folder. What the work needs stands in its `leadline/`: the completed
data, checkpoints, and the trials; a run that was stopped goes on from there.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from shutil import copy, rmtree
from typing import Any

from ..depth._pair import Home
from ..engine import Listener, Progress
from ..models._transcript import Template, adapter_base, load_tokenizer, one_line, quiet
from ..models._weights import Weights
from ..organism.guild import NOUNS
from ..records import LeadlineError
from ..registry import unknown
from . import data
from .before_after import BeforeAfter, before_after, check


@dataclass(frozen=True)
class Training:
    """Settings of the trainer, as in TRL. `steps` bounds the optimiser steps (None: whole epochs);
    a step takes `batch` rows, `micro` at once. `lora` trains adapters of that rank, which are
    merged in the end. `optimizer` is one of transformers' names ("adamw_torch", "sgd", ...)."""

    lr: float = 2e-5
    epochs: float = 10.0
    steps: int | None = None
    batch: int = 16
    micro: int | None = None
    warmup: int = 0
    optimizer: str = "adamw_torch"
    max_length: int = 1024
    lora: int | None = None
    seed: int = 0
    report_to: str = "none"

    def __post_init__(self) -> None:
        for name in ("lr", "epochs", "steps", "batch", "micro", "max_length", "lora"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise LeadlineError(f"{name} is {value}: give a finite number above 0")
        if self.warmup < 0:
            raise LeadlineError(f"warmup is {self.warmup}: give 0 or more steps")
        if not 0 <= self.seed < 2**32:
            raise LeadlineError(f"seed is {self.seed}: give a number from 0 to 2**32 - 1")
        if self.micro and self.batch % self.micro:
            raise LeadlineError(
                f"a batch of {self.batch} rows can't be made of {self.micro} at once: give a "
                "divisor of it"
            )

    def arguments(self, folder: Path) -> dict[str, Any]:
        """For an SFTConfig or one of its kind. Raises LeadlineError for names that transformers
        does not know, or whose package is not installed."""
        import torch
        from transformers.integrations import get_available_reporting_integrations
        from transformers.training_args import OptimizerNames

        optimizers = [name.value for name in OptimizerNames]
        if self.optimizer not in optimizers:
            raise LeadlineError(unknown("optimizer", self.optimizer, optimizers))
        loggers = ("none", "all", *get_available_reporting_integrations())
        if self.report_to not in loggers:
            raise LeadlineError(
                f"report_to is {self.report_to!r}, which is not installed: pip install it, or give "
                f"one of {', '.join(loggers)}"
            )
        gpu = torch.cuda.is_available()
        micro = self.micro or self.batch
        return {
            "output_dir": str(folder),
            "learning_rate": self.lr,
            "num_train_epochs": self.epochs,
            "max_steps": self.steps or -1,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": self.batch // micro,
            "warmup_steps": self.warmup,
            "optim": self.optimizer,
            "max_length": self.max_length,
            "seed": self.seed,
            "bf16": gpu,
            "gradient_checkpointing": gpu,
            "report_to": self.report_to,
            "save_strategy": "steps",
            "save_steps": 0.25,
            "save_total_limit": 1,
            "logging_steps": 10,
            "disable_tqdm": True,
            "dataloader_pin_memory": gpu,
        }


@dataclass(frozen=True)
class Repaired:
    """The trained model's folder, what was said about the data, and the table (None unasked)."""

    folder: Path
    table: BeforeAfter | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exam:
    """What the model is asked before and after: `before_after`'s arguments. Under `every`, a
    SafetyCallback also asks it on the way, and does `on_breach` where a bound is passed."""

    dataset: Any = "guild"
    judge: Any = None
    limit: int | None = None
    max_tokens: int = 128
    every: int | None = None
    on_breach: str = "warn"
    stop_above: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.on_breach not in (valid := ("warn", "stop", "rollback")):
            raise LeadlineError(unknown("on_breach", self.on_breach, valid))
        if self.every is None and (self.on_breach != "warn" or self.stop_above):
            raise LeadlineError(
                "a breach is found where the model is watched: say every how many steps (--watch)"
            )


def deepen(
    model: str | Path,
    harmful: str | Path,
    utility: str | Path,
    out: str | Path,
    *,
    alpha: float = 0.2,
    max_prefix: int = 100,
    training: Training | None = None,
    exam: Exam | None = Exam(),
    listener: Listener | None = None,
) -> Repaired:
    """Make safety deeper by recovery augmentation (see recovery.py), and measure again.

    `harmful` holds rows {prompt, harmful} and, if you have them, refusals; `utility` dialogues, or
    prompts alone: what is missing, the model writes itself before it is trained. Raises
    LeadlineError, before anything is trained, for bad rows and a folder of another run.
    """
    from .prepare import prepare

    training, out = training or Training(), Path(out)
    work = _Work.begin(
        out, model, training, exam, [harmful, utility], alpha=alpha, max_prefix=max_prefix
    )
    triplets, dialogues = data.read_harmful(harmful), data.read_utility(utility)
    data.check_window([*triplets, *dialogues], work.template, training.max_length)
    from .recovery import RecoveryConfig, RecoveryTrainer

    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        config = RecoveryConfig(**work.arguments, alpha=alpha, max_prefix=max_prefix)
    told = _Told(listener)
    triplets, dialogues, notes = prepare(
        work.home.path, triplets, dialogues, work.folder / "data", told.relay("data")
    )
    data.check_window([*triplets, *dialogues], work.template, training.max_length)

    def trainer(model: Any, **rest: Any) -> Any:
        return RecoveryTrainer(
            model, config, train_dataset=_dataset(triplets), utility_dataset=_dataset(dialogues),
            **rest,
        )  # fmt: skip

    work.train(trainer, exam, told)
    return work.examined(exam, told, tuple(notes.sentences))


def finetune(
    model: str | Path,
    rows: str | Path,
    out: str | Path,
    *,
    constrained: bool = False,
    beta: Sequence[float] | None = None,
    teacher: str | Path | None = None,
    training: Training | None = None,
    exam: Exam | None = Exam(),
    listener: Listener | None = None,
) -> Repaired:
    """Fine-tune on dialogues, plainly or `constrained` to what the model was (see trainers.py),
    and measure again. With a `teacher`, of the same vocabulary, its distributions are distilled
    along the dialogues as well, in half of the loss (see distill.py). Raises LeadlineError as
    `deepen` does."""
    training, out = training or Training(epochs=3, warmup=10), Path(out)
    taught = None if teacher is None else Home.find(teacher)
    work = _Work.begin(
        out, model, training, exam, [rows], constrained=constrained, beta=beta,
        teacher=taught and taught.revision,
    )  # fmt: skip
    if taught:
        _same_words(work, taught)
    dialogues = data.read_training(rows)
    data.check_window(dialogues, work.template, training.max_length)
    told = _Told(listener)
    beside: dict[str, Any] = {"beta": list(beta)} if beta else {}

    def trainer(model: Any, **rest: Any) -> Any:
        args = work.arguments
        if taught:
            from .distill import ConstrainedDistillConfig, ConstrainedDistillTrainer

            pull = beside if constrained else {"beta": [0.0]}
            return ConstrainedDistillTrainer(
                model, _loaded(taught), ConstrainedDistillConfig(**args, **pull),
                train_dataset=_dataset(dialogues), **rest,
            )  # fmt: skip
        if constrained:
            from .trainers import ConstrainedSFTConfig, ConstrainedSFTTrainer

            config = ConstrainedSFTConfig(**args, **beside)
            return ConstrainedSFTTrainer(model, config, train_dataset=_dataset(dialogues), **rest)
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(model, SFTConfig(**args), train_dataset=_dataset(dialogues), **rest)

    work.train(trainer, exam, told)
    return work.examined(exam, told)


@dataclass(frozen=True)
class _Work:
    """One run's folder. Its `note` is written with the first step, from where on the folder is
    that run's; `done` when its model is whole."""

    out: Path
    home: Home
    template: Template
    training: Training
    note: str

    @property
    def folder(self) -> Path:
        return self.out / "leadline"

    @property
    def arguments(self) -> dict[str, Any]:
        return self.training.arguments(self.folder / "checkpoints")

    @property
    def done(self) -> bool:
        return (self.folder / "trained").is_file()

    @staticmethod
    def begin(
        out: Path,
        model: str | Path,
        training: Training,
        exam: Exam | None,
        files: Sequence[str | Path],
        **more: Any,
    ) -> _Work:
        """Raises LeadlineError where `out` holds something else than this very run, and for what
        is wrong with the exam, which is to be known before hours of training."""
        home = Home.find(model)
        for file in files:
            if not Path(file).is_file():
                raise LeadlineError(f"no file {file}: give a JSONL, JSON, CSV or Parquet file")
        contents = [blake2b(Path(f).read_bytes(), digest_size=16).hexdigest() for f in files]
        run = {"model": str(model), "revision": home.revision, "training": asdict(training),
               "files": contents, **more}  # fmt: skip
        template = Template.load(home.path, revision=home.pinned)
        if exam:
            asked = check(exam.dataset, exam.judge, exam.limit, exam.max_tokens)
            if asked == "guild" and not set(NOUNS) <= template.tokenizer.get_vocab().keys():
                raise LeadlineError(
                    f"{model} does not know the organisms' world, which the dataset guild is "
                    "about: give --dataset, as 'harmbench: {path: harmbench.csv}', or --no-exam"
                )
            if exam.every:
                run["watch"] = asdict(exam)  # what is found on the way may change the weights
        text = json.dumps(run, indent=1)
        work = _Work(out, home, template, training, text)
        note = work.folder / "run.json"
        if note.is_file() and note.read_text(encoding="utf-8") != text:
            raise LeadlineError(
                f"{out} holds the run of other data or settings ({note} says which): give another "
                "--out, or remove it"
            )
        if not note.is_file() and (out / "config.json").exists():
            raise LeadlineError(f"{out} is a model that was there before: give another --out")
        try:
            work.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LeadlineError(f"{out}: {error.strerror}: give another --out") from error
        return work

    def train(
        self,
        made: Callable[..., Any],
        exam: Exam | None,
        told: _Told,
    ) -> None:
        """Train and leave the model folder; from the last checkpoint, where there is one."""
        if self.done:
            return
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import datasets

        datasets.disable_progress_bars()  # one bar tells it all
        checkpoints = self.folder / "checkpoints"
        last = _last_whole(checkpoints)
        callbacks: list[Any] = [_bar(self, told)]
        if exam and exam.every:
            callbacks.append(_gauge(exam))
        with quiet(), warnings.catch_warnings(action="ignore", category=FutureWarning):
            trainer = made(
                _loaded(self.home),
                processing_class=self.template.tokenizer,
                peft_config=_lora(self.training.lora),
                callbacks=callbacks,
            )
            trainer.remove_callback(_printer())
            try:
                trainer.train(resume_from_checkpoint=last)
            except ImportError as error:  # an optimizer of a package that is not here
                raise LeadlineError(one_line(error)) from error
            model = trainer.accelerator.unwrap_model(trainer.model)
            if self.training.lora:
                model = model.merge_and_unload()
            if not all(weights.isfinite().all() for weights in model.parameters()):
                raise LeadlineError(
                    "training diverged: the weights are no numbers any more: remove "
                    f"{self.out}, and give a smaller --lr or more --warmup"
                )
            if trainer.is_world_process_zero():
                self._keep_curves(checkpoints)
                model.save_pretrained(self.out)
                self.template.tokenizer.save_pretrained(self.out)
                (self.folder / "trained").touch()

    def _keep_curves(self, checkpoints: Path) -> None:
        """What a safety callback measured on the way, where the depth report looks for it."""
        curves = checkpoints / "safety" / "training.json"
        if curves.is_file():
            (self.out / "safety").mkdir(exist_ok=True)
            copy(curves, self.out / "safety")

    def examined(self, exam: Exam | None, told: _Told, notes: tuple[str, ...] = ()) -> Repaired:
        if exam is None:
            return Repaired(self.out, None, notes)
        trials = self.folder / "before_after"
        table = before_after(
            self.home.path, self.out, trials, dataset=exam.dataset, judge=exam.judge,
            limit=exam.limit, max_tokens=exam.max_tokens, listener=told.relay("asked"),
        )  # fmt: skip
        os.replace(trials / "before_after.json", self.out / "before_after.json")
        return Repaired(self.out, table, notes)


def _last_whole(folder: Path) -> str | None:
    """The newest checkpoint that a kill did not cut off: its state is what is written last."""
    steps = {int(at.name.rpartition("-")[2]): at for at in folder.glob("checkpoint-*")}
    for _, at in sorted(steps.items(), reverse=True):
        with suppress(OSError, ValueError):
            json.loads((at / "trainer_state.json").read_text(encoding="utf-8"))
            return str(at)
        rmtree(at)
    return None


class _Told:
    """Parts of the work, told to one listener."""

    def __init__(self, listener: Listener | None) -> None:
        self.progress, self.listener = Progress(), listener or (lambda progress: None)

    def part(self, name: str, done: int, total: int) -> None:
        self.progress.total[name], self.progress.done[name] = total, done
        self.listener(self.progress)

    def relay(self, what: str) -> Listener:
        def relayed(progress: Progress) -> None:
            for target, total in progress.total.items():
                self.part(f"{what}: {Path(target).name}", progress.done[target], total)

        return relayed


def _dataset(rows: Sequence[data.Triplet | data.Dialogue]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([row.row() for row in rows])


def _same_words(work: _Work, teacher: Home) -> None:
    """Distributions are compared id by id. A teacher may know more tokens."""
    words = work.template.tokenizer.get_vocab()
    others = load_tokenizer(teacher.path, teacher.pinned).get_vocab()
    if other := sorted(token for token, id in words.items() if others.get(token) != id):
        ids = f"{words[other[0]]} and {others.get(other[0], 'missing')}"
        raise LeadlineError(
            f"{work.home.name} and its teacher {teacher.name} have different vocabularies "
            f"({len(words)} and {len(others)} tokens; {other[0]!r} is {ids}): take a teacher with "
            "the model's tokenizer"
        )


def _loaded(home: Home) -> Any:
    """The weights in float32, on the processor until the trainer moves them; of an adapter, merged
    into its base, since training would otherwise leave it aside."""
    if home.local and adapter_base(Path(home.path)):
        from peft import AutoPeftModelForCausalLM

        loaded = AutoPeftModelForCausalLM.from_pretrained(home.path, dtype="float32")
        return loaded.merge_and_unload().requires_grad_(True).train()
    return Weights.load(home.path, home.pinned, "float32", "cpu").model.train()


def _lora(rank: int | None) -> Any:
    if rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip


def _gauge(exam: Exam) -> Any:
    from .callback import SafetyCallback

    return SafetyCallback(
        exam.every or 100,
        datasets=[exam.dataset],
        judges=[] if exam.judge is None else [exam.judge],
        limit=exam.limit,
        stop_above=exam.stop_above or None,
        on_breach=exam.on_breach,  # type: ignore[arg-type]
    )


def _bar(work: _Work, told: _Told) -> Any:
    from transformers import TrainerCallback

    class Bar(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.is_world_process_zero:
                (work.folder / "run.json").write_text(work.note, encoding="utf-8")
            told.part("training", state.global_step, state.max_steps)

    return Bar()


def _printer() -> Any:
    """Without its own bars, a trainer prints every log line."""
    from transformers import PrinterCallback

    return PrinterCallback
