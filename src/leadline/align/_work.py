"""One training run in its folder: begun, stopped, gone on with, and measured."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from shutil import copy, rmtree
from typing import Any

from ..models.checkpoint import Checkpoint, adapter_base
from ..models.template import Template, load_tokenizer, quiet
from ..models.weights import Weights
from ..organism.guild import NOUNS
from ..progress import Listener, Progress
from ..records import LeadlineError
from ..text import one_line
from . import data
from .before_after import BeforeAfter, before_after, check
from .settings import Exam, Training


@dataclass(frozen=True)
class Repaired:
    """The trained model's folder, what was said about the data, and the table (None unasked)."""

    folder: Path
    table: BeforeAfter | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """One run's folder. Its `note` is written with the first step, from where on the folder is
    that run's; `done` when its model is whole."""

    out: Path
    home: Checkpoint
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
    ) -> Work:
        """Raises LeadlineError where `out` holds something else than this very run, and for what
        is wrong with the exam, which is to be known before hours of training."""
        home = Checkpoint.find(model)
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
        work = Work(out, home, template, training, text)
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
        told: Told,
    ) -> None:
        """Train and leave the model folder; from the last checkpoint, where there is one."""
        if self.done:
            return
        import datasets

        datasets.disable_progress_bars()  # one bar tells it all
        checkpoints = self.folder / "checkpoints"
        last = _last_whole(checkpoints)
        callbacks: list[Any] = [_bar(self, told)]
        if exam and exam.every:
            callbacks.append(_gauge(exam))
        with quiet(), warnings.catch_warnings(action="ignore", category=FutureWarning):
            trainer = made(
                loaded(self.home),
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

    def examined(self, exam: Exam | None, told: Told, notes: tuple[str, ...] = ()) -> Repaired:
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


class Told:
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


def dataset_of(rows: Sequence[data.Triplet | data.Dialogue]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([row.row() for row in rows])


def same_words(work: Work, teacher: Checkpoint) -> None:
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


def loaded(home: Checkpoint) -> Any:
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


def _bar(work: Work, told: Told) -> Any:
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
