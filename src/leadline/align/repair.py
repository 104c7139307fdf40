"""`leadline deepen` and `leadline finetune`: train a model, and measure it before and after.

Each leaves a normal model folder. What the work needs stands in its `leadline/`: the completed
data, checkpoints, and the trials; a run that was stopped goes on from there.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..models.checkpoint import Checkpoint
from ..progress import Listener
from . import data
from ._work import Repaired, Told, Work, dataset_of, loaded, same_words
from .settings import Exam, Training

__all__ = ["Exam", "Repaired", "Training", "deepen", "finetune"]

_EXAM = Exam()


def deepen(
    model: str | Path,
    harmful: str | Path,
    utility: str | Path,
    out: str | Path,
    *,
    alpha: float = 0.2,
    max_prefix: int = 100,
    training: Training | None = None,
    exam: Exam | None = _EXAM,
    listener: Listener | None = None,
) -> Repaired:
    """Make safety deeper by recovery augmentation (see recovery.py), and measure again.

    `harmful` holds rows {prompt, harmful} and, if you have them, refusals; `utility` dialogues, or
    prompts alone: what is missing, the model writes itself before it is trained. Raises
    LeadlineError, before anything is trained, for bad rows and a folder of another run.
    """
    from .prepare import prepare

    training, out = training or Training(), Path(out)
    work = Work.begin(
        out, model, training, exam, [harmful, utility], alpha=alpha, max_prefix=max_prefix
    )
    triplets, dialogues = data.read_harmful(harmful), data.read_utility(utility)
    data.check_window([*triplets, *dialogues], work.template, training.max_length)
    from .recovery import RecoveryConfig, RecoveryTrainer

    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        config = RecoveryConfig(**work.arguments, alpha=alpha, max_prefix=max_prefix)
    told = Told(listener)
    triplets, dialogues, notes = prepare(
        work.home.path, triplets, dialogues, work.folder / "data", told.relay("data")
    )
    data.check_window([*triplets, *dialogues], work.template, training.max_length)

    def trainer(model: Any, **rest: Any) -> Any:
        return RecoveryTrainer(
            model,
            config,
            train_dataset=dataset_of(triplets),
            utility_dataset=dataset_of(dialogues),
            **rest,
        )

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
    exam: Exam | None = _EXAM,
    listener: Listener | None = None,
) -> Repaired:
    """Fine-tune on dialogues, plainly or `constrained` to what the model was (see trainers.py),
    and measure again. With a `teacher`, of the same vocabulary, its distributions are distilled
    along the dialogues as well, in half of the loss (see distill.py). Raises LeadlineError as
    `deepen` does."""
    training, out = training or Training(epochs=3, warmup=10), Path(out)
    taught = None if teacher is None else Checkpoint.find(teacher)
    work = Work.begin(
        out, model, training, exam, [rows], constrained=constrained, beta=beta,
        teacher=taught and taught.revision,
    )  # fmt: skip
    if taught:
        same_words(work, taught)
    dialogues = data.read_training(rows)
    data.check_window(dialogues, work.template, training.max_length)
    told = Told(listener)
    beside: dict[str, Any] = {"beta": list(beta)} if beta else {}

    def trainer(model: Any, **rest: Any) -> Any:
        args = work.arguments
        if taught:
            from .distill import ConstrainedDistillConfig, ConstrainedDistillTrainer

            pull = beside if constrained else {"beta": [0.0]}
            return ConstrainedDistillTrainer(
                model, loaded(taught), ConstrainedDistillConfig(**args, **pull),
                train_dataset=dataset_of(dialogues), **rest,
            )  # fmt: skip
        if constrained:
            from .trainers import ConstrainedSFTConfig, ConstrainedSFTTrainer

            config = ConstrainedSFTConfig(**args, **beside)
            return ConstrainedSFTTrainer(model, config, train_dataset=dataset_of(dialogues), **rest)
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(model, SFTConfig(**args), train_dataset=dataset_of(dialogues), **rest)

    work.train(trainer, exam, told)
    return work.examined(exam, told)
