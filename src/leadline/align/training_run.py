"""One training run in its output folder: start or resume it, train, save the model, evaluate it."""

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

from ..files import private_folder, write_private
from ..models.checkpoint import Checkpoint, adapter_base
from ..models.template import Template, load_tokenizer, quiet
from ..models.weights import Weights
from ..progress import CombinedProgress
from ..records import LeadlineError
from ..secret import scrub
from ..study import DatasetPick
from ..text import one_line
from . import data
from .before_after import BeforeAfter, before_after, check_evaluation, check_reuse
from .harmless import evaluation_requests, knows_the_guild
from .settings import EvaluationConfig, TrainingConfig
from .watch import callback_arguments

_SMALL = 40 * 2**20  # bytes of weights below which bfloat16 is slower on a CPU than float32


@dataclass(frozen=True)
class RepairResult:
    """The trained model's folder, the table of before and after (None without an evaluation), notes
    on data and training, and warnings: bounds that do not hold, or did not before weights were
    restored."""

    folder: Path
    table: BeforeAfter | None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingRun:
    """A training run that writes to the folder `out`.

    `description` (JSON) identifies the run: model, data and settings. It is written to
    leadline/run.json after the first step; from then on the folder belongs to this run. `dataset`
    has the harmful requests of the evaluation (None: there are none), and `watch` are arguments
    of the SafetyCallback.
    """

    out: Path
    checkpoint: Checkpoint
    template: Template
    config: TrainingConfig
    description: str
    dataset: Any = None
    watch: dict[str, Any] | None = None

    @property
    def folder(self) -> Path:
        """Where the run keeps its data, checkpoints and trials."""
        return self.out / "leadline"

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of an SFTConfig or a subclass."""
        small = self.checkpoint.local and _size(self.checkpoint) < _SMALL
        return self.config.arguments(self.folder / "checkpoints", small=small)

    @property
    def is_trained(self) -> bool:
        """Whether the trained model is complete."""
        return (self.folder / "trained").is_file()

    @staticmethod
    def open(
        out: Path,
        model: str | Path,
        config: TrainingConfig,
        evaluation: EvaluationConfig | None,
        files: Sequence[str | Path],
        *,
        deepens: bool = False,
        held_out: bool = False,
        **options: Any,
    ) -> TrainingRun:
        """Start a run in `out`, or resume it.

        `files` are the training data; `deepens` says that over-refusal is to be bounded during
        training, and `held_out` that half of the harmless requests are training data. `options` are
        further settings that identify the run. Raises
        LeadlineError where `out` contains another run or another model, where a file is missing,
        and for an invalid evaluation, so that it does not fail after hours of training.
        """
        checkpoint = Checkpoint.find(model)
        for file in files:
            if not Path(file).is_file():
                raise LeadlineError(f"no file {file}: give a JSONL, JSON, CSV or Parquet file")
        hashes = [blake2b(Path(f).read_bytes(), digest_size=16).hexdigest() for f in files]
        identity = {"model": str(model), "revision": checkpoint.revision,
                    "training": asdict(config), "files": hashes, **options}  # fmt: skip
        template = Template.load(checkpoint.path, revision=checkpoint.pinned)
        dataset, watch = None, None
        if evaluation:
            dataset = _dataset(evaluation.dataset, template, model)
            check_evaluation(
                dataset, evaluation.judge, evaluation.limit, evaluation.max_tokens, evaluation.only
            )
            if evaluation.before_from:
                check_reuse(Path(evaluation.before_from), checkpoint.path)
            harmless = evaluation_requests(checkpoint, held_out=held_out)
            watch = callback_arguments(evaluation, dataset, harmless, deepen=deepens)
            if watch:  # it may stop training or restore earlier weights
                identity["watch"] = watch
        description = json.dumps(identity, indent=1)
        run = TrainingRun(out, checkpoint, template, config, description, dataset, watch)
        file = run.folder / "run.json"
        if file.is_file() and not run._is_of(file.read_text(encoding="utf-8")):
            raise LeadlineError(
                f"{out} contains a run with other data or settings (see {file}): give another "
                "--out, or remove it"
            )
        if not file.is_file() and (out / "config.json").exists():
            raise LeadlineError(f"{out} already contains a model: give another --out")
        try:
            out.mkdir(parents=True, exist_ok=True)  # a model folder has the usual mode
            private_folder(run.folder)
        except OSError as error:
            raise LeadlineError(f"{out}: {error.strerror}: give another --out") from error
        return run

    def train(self, build_trainer: Callable[..., Any], progress: CombinedProgress) -> None:
        """Train, from the last checkpoint where there is one, and save the model to `out`.

        `build_trainer` is called with the model and keyword arguments of a TRL trainer. Does
        nothing where the run is complete. Raises LeadlineError where training diverges.
        """
        if self.is_trained:
            return
        import datasets

        datasets.disable_progress_bars()  # progress is reported to the listener
        checkpoints = self.folder / "checkpoints"
        last = _last_complete_checkpoint(checkpoints)
        callbacks: list[Any] = [_progress_callback(self, progress)]
        safety = None
        if self.watch:
            from .callback import SafetyCallback

            callbacks.append(safety := SafetyCallback(**self.watch))
        with quiet(), warnings.catch_warnings(action="ignore", category=FutureWarning):
            trainer = build_trainer(
                load_for_training(self.checkpoint),
                processing_class=self.template.tokenizer,
                peft_config=_lora_config(self.config.lora),
                callbacks=callbacks,
            )
            trainer.remove_callback(_printer_callback())
            if not trainer.args.gradient_checkpointing:
                from .output_layer import checkpoint_layers

                checkpoint_layers(trainer.model)
            try:
                trainer.train(resume_from_checkpoint=last)
            except ImportError as error:  # the optimizer's package is not installed
                raise LeadlineError(one_line(error)) from error
            model = trainer.accelerator.unwrap_model(trainer.model)
            if self.config.lora:
                model = model.merge_and_unload()
            if not all(weights.isfinite().all() for weights in model.parameters()):
                raise LeadlineError(
                    "training diverged: the weights are not finite: remove "
                    f"{self.out}, and give a smaller --lr or more --warmup"
                )
            if trainer.is_world_process_zero():
                self._copy_safety_curves(checkpoints)
                model.save_pretrained(self.out)
                self.template.tokenizer.save_pretrained(self.out)
                names = ("breach", "reached", "restored") if safety else ()
                ended = {name: getattr(safety, name) for name in names}
                (self.folder / "trained").write_text(json.dumps(ended), encoding="utf-8")

    def _is_of(self, stored: str) -> bool:
        """Whether a stored description is this run's. After training, another evaluation is still
        the same run."""
        one, other = json.loads(stored), json.loads(scrub(self.description))
        if self.is_trained:
            one.pop("watch", None)
            other.pop("watch", None)
        return bool(one == other)

    def _ended(self) -> dict[str, Any]:
        """Why training ended early, by the name of the SafetyCallback's attribute."""
        file = self.folder / "trained"
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        return dict(json.loads(text or "{}"))

    def _copy_safety_curves(self, checkpoints: Path) -> None:
        """Copy the safety callback's measurements to where the depth report looks for them."""
        curves = checkpoints / "safety" / "training.json"
        if curves.is_file():
            private_folder(self.out / "safety")
            copy(curves, self.out / "safety")

    def evaluate(
        self,
        evaluation: EvaluationConfig | None,
        progress: CombinedProgress,
        rows: Sequence[data.Dialogue],
        notes: tuple[str, ...] = (),
        *,
        held_out: bool = False,
    ) -> RepairResult:
        """Evaluate the model before and after training, and write before_after.json to `out`.

        `rows` are dialogues of the training data. Raises LeadlineError where the evaluation of
        `before_from` cannot be used.
        """
        ended = self._ended()
        warnings: tuple[str, ...] = ()
        if breach := ended.get("breach"):
            warnings = (breach + _restoration(ended.get("restored")),)
        if reached := ended.get("reached"):
            notes = (*notes, reached)
        if evaluation is None:
            return RepairResult(self.out, None, notes, warnings)
        if self.dataset is None:
            notes = (*notes, "Attack success was not measured: no --dataset of harmful requests")
        trials = self.folder / "before_after"
        table = before_after(
            self.checkpoint.name, self.out, trials, dataset=self.dataset, judge=evaluation.judge,
            limit=evaluation.limit, max_tokens=evaluation.max_tokens, only=evaluation.only,
            rows=rows, held_out=held_out, max_over_refusal=evaluation.max_over_refusal,
            before_from=Path(evaluation.before_from) if evaluation.before_from else None,
            progress=progress,
        )  # fmt: skip
        os.replace(trials / "before_after.json", self.out / "before_after.json")
        return RepairResult(self.out, table, notes, (*warnings, *table.warnings))


def _restoration(step: int | None) -> str:
    """What was done about a breach, for its warning. `step` is the one whose weights were restored
    (None: none were)."""
    if step is None:
        return ""
    which = f"the weights of step {step}" if step else "the weights before training"
    return (
        f": training stopped, and {which} were restored: give a smaller --lr, or more varied "
        "harmless rows"
    )


def _dataset(given: Any, template: Template, model: str | Path) -> Any:
    """The dataset of the evaluation's harmful requests: the given one, or by default `guild` for
    organisms. Raises LeadlineError where `guild` is given for another model."""
    is_organism = knows_the_guild(template.tokenizer)
    if given is None:
        return "guild" if is_organism else None
    if DatasetPick.model_validate(given).name == "guild" and not is_organism:
        raise LeadlineError(
            f"the dataset guild is for organisms, and {model} does not know its vocabulary: give "
            "--dataset, such as 'harmbench: {path: harmbench.csv}', or --no-evaluation"
        )
    return given


def to_dataset(rows: Sequence[data.Triplet | data.Dialogue]) -> Any:
    """The rows as a datasets.Dataset."""
    from datasets import Dataset

    cells = [row.row() for row in rows]
    # from_list takes the columns of the first row.
    columns = dict.fromkeys(name for row in cells for name in row)
    return Dataset.from_list([columns | row for row in cells])


def check_vocabularies(run: TrainingRun, teacher: Checkpoint) -> None:
    """Raise LeadlineError where a token of the student has another id, or none, in the teacher's
    vocabulary: distributions are compared by token id. The teacher may have additional tokens."""
    vocabulary = run.template.tokenizer.get_vocab()
    teachers = load_tokenizer(teacher.path, teacher.pinned).get_vocab()
    if other := sorted(token for token, id in vocabulary.items() if teachers.get(token) != id):
        ids = f"{vocabulary[other[0]]} and {teachers.get(other[0], 'missing')}"
        raise LeadlineError(
            f"{run.checkpoint.name} and its teacher {teacher.name} have different vocabularies "
            f"({len(vocabulary)} and {len(teachers)} tokens; the ids of {other[0]!r} are {ids}): "
            "give a teacher with the model's tokenizer"
        )


def load_for_training(checkpoint: Checkpoint) -> Any:
    """The model in float32 on the CPU, from where the trainer moves it. An adapter is merged into
    its base model, since the trainer would otherwise ignore it."""
    if checkpoint.local and adapter_base(Path(checkpoint.path)):
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(checkpoint.path, dtype="float32")
        return model.merge_and_unload().requires_grad_(True).train()
    return Weights.load(checkpoint.path, checkpoint.pinned, "float32", "cpu").model.train()


def _size(checkpoint: Checkpoint) -> int:
    """Bytes of a local model's weights."""
    return sum(file.stat().st_size for file in Path(checkpoint.path).glob("*.safetensors"))


def _last_complete_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; newer incomplete ones are deleted. The trainer writes
    trainer_state.json last, so its content shows whether the checkpoint is complete."""
    steps = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    for _, path in sorted(steps.items(), reverse=True):
        with suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return str(path)
        rmtree(path)
    return None


def _lora_config(rank: int | None) -> Any:
    if rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip


def _progress_callback(run: TrainingRun, progress: CombinedProgress) -> Any:
    from transformers import TrainerCallback

    class ProgressCallback(TrainerCallback):  # type: ignore[misc]
        """Reports the step, and marks the folder as this run's."""

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.is_world_process_zero:
                write_private(run.folder / "run.json", run.description)
            progress.update("training", state.global_step, state.max_steps)

    return ProgressCallback()


def _printer_callback() -> Any:
    """The callback that prints every log line when a trainer's progress bars are disabled."""
    from transformers import PrinterCallback

    return PrinterCallback
