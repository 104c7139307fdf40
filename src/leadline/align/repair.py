"""`leadline deepen` and `leadline finetune`: train a model, and evaluate it before and after.

Both write a standard model folder. Its subfolder `leadline` contains the completed training data,
checkpoints and trials; an interrupted run resumes from there.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..models.checkpoint import Checkpoint
from ..progress import CombinedProgress, Listener
from ..records import LeadlineError
from . import data
from .harmless import knows_the_guild, narrowness, training_requests
from .settings import EvaluationConfig, TrainingConfig
from .training_run import (
    RepairResult,
    TrainingRun,
    check_vocabularies,
    load_for_training,
    to_dataset,
)

__all__ = ["EvaluationConfig", "RepairResult", "TrainingConfig", "deepen", "finetune"]

log = logging.getLogger("leadline")
_EVALUATION = EvaluationConfig()
_OWN_TOKENS = 96  # of the model's own answers to harmless requests


def deepen(
    model: str | Path,
    harmful: str | Path,
    utility: str | Path | None,
    out: str | Path,
    *,
    loss: str = "paper",
    alpha: float = 0.2,
    max_prefix: int = 100,
    training: TrainingConfig | None = None,
    evaluation: EvaluationConfig | None = _EVALUATION,
    listener: Listener | None = None,
) -> RepairResult:
    """Deepen safety alignment by recovery augmentation, and evaluate the result.

    `loss` is "paper" or "token_mean" (see recovery.py), `alpha` the weight of the refusals.
    `harmful` is a file of rows {prompt, harmful} with optional refusals, `utility` a file of
    dialogues or prompts; None stands for half of Leadline's harmless requests, of which the other
    half is evaluated. Missing refusals and answers are generated with the model before training.
    Over-refusal is checked during training: see `watch.py`.
    `training` is TrainingConfig.preset("deepen") by default; preset("deepen", "paper") has the
    published settings. Raises LeadlineError, before training starts, for invalid rows and settings
    and for a folder that contains another run.
    """
    from .prepare import prepare

    training, out = training or TrainingConfig.preset("deepen"), Path(out)
    objective: dict[str, Any] = {"loss": loss, "alpha": alpha, "max_prefix": max_prefix}
    own = utility is None
    files = [harmful] if utility is None else [harmful, utility]
    run = TrainingRun.open(
        out, model, training, evaluation, files, deepens=True, held_out=own, **objective
    )
    triplets = data.read_harmful(harmful)
    dialogues = training_requests(run.checkpoint) if utility is None else data.read_utility(utility)
    narrow = "" if knows_the_guild(run.template.tokenizer) else narrowness(dialogues)
    if narrow:
        log.warning("%s", narrow)
    data.check_lengths([*triplets, *([] if own else dialogues)], run.template, training.max_length)
    from .recovery import RecoveryConfig, RecoveryTrainer

    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        config = RecoveryConfig(**run.arguments, **objective)
    progress = CombinedProgress(listener)
    triplets, dialogues, counts = prepare(
        run.checkpoint.path,
        triplets,
        dialogues,
        run.folder / "data",
        progress.study(lambda target: f"data: {Path(target).name}"),
        utility_tokens=_OWN_TOKENS if own else None,
    )
    notes = (*counts.sentences, *([narrow] if narrow else []))
    if own:
        fitting = data.fitting(dialogues, run.template, training.max_length)
        if not fitting:
            raise LeadlineError(
                f"none of the model's own answers fits in max_length ({training.max_length} "
                "tokens): raise it, or give --utility"
            )
        if longer := len(dialogues) - len(fitting):
            notes = (*notes, f"{longer} of them were left out: longer than max_length")
        dialogues = fitting
    data.check_lengths([*triplets, *dialogues], run.template, training.max_length)

    def build_trainer(model: Any, **rest: Any) -> Any:
        return RecoveryTrainer(
            model,
            config,
            train_dataset=to_dataset(triplets),
            utility_dataset=to_dataset(dialogues),
            **rest,
        )

    run.train(build_trainer, progress)
    return run.evaluate(evaluation, progress, dialogues, notes, held_out=own)


def finetune(
    model: str | Path,
    rows: str | Path,
    out: str | Path,
    *,
    constrained: bool = False,
    beta: Sequence[float] | None = None,
    weight_floor: float = 0.0,
    teacher: str | Path | None = None,
    training: TrainingConfig | None = None,
    evaluation: EvaluationConfig | None = _EVALUATION,
    listener: Listener | None = None,
) -> RepairResult:
    """Fine-tune on a file of dialogues (`rows`), and evaluate the result.

    With `constrained`, the first tokens of each response are constrained to the initial model (see
    trainers.py); `beta` is the schedule of the constraint, and `weight_floor` the smallest share of
    a token's plain gradient that it leaves. With a `teacher` of the same vocabulary, half of the
    loss is distillation of its distributions on the dialogues (see distill.py). `training` is
    TrainingConfig.preset("finetune") by default. Raises LeadlineError as `deepen` does.
    """
    if weight_floor and not constrained:
        raise LeadlineError("weight_floor requires constrained=True")
    training, out = training or TrainingConfig.preset("finetune"), Path(out)
    teacher_checkpoint = None if teacher is None else Checkpoint.find(teacher)
    run = TrainingRun.open(
        out, model, training, evaluation, [rows], constrained=constrained, beta=beta,
        weight_floor=weight_floor, teacher=teacher_checkpoint and teacher_checkpoint.revision,
    )  # fmt: skip
    if teacher_checkpoint:
        check_vocabularies(run, teacher_checkpoint)
    dialogues = data.read_training(rows)
    data.check_lengths(dialogues, run.template, training.max_length)
    progress = CombinedProgress(listener)
    constraint: dict[str, Any] = {"weight_floor": weight_floor}
    if beta:
        constraint["beta"] = list(beta)

    def build_trainer(model: Any, **rest: Any) -> Any:
        rest = {"train_dataset": to_dataset(dialogues), **rest}
        if teacher_checkpoint:
            from .distill import ConstrainedDistillConfig, ConstrainedDistillTrainer

            # b_t = 0 is plain distillation.
            settings = constraint if constrained else {"beta": [0.0]}
            return ConstrainedDistillTrainer(
                model,
                load_for_training(teacher_checkpoint),
                ConstrainedDistillConfig(**run.arguments, **settings),
                **rest,
            )
        if constrained:
            from .trainers import ConstrainedSFTConfig, ConstrainedSFTTrainer

            return ConstrainedSFTTrainer(
                model, ConstrainedSFTConfig(**run.arguments, **constraint), **rest
            )
        from trl import SFTConfig, SFTTrainer

        from .output_layer import use_learned_tokens

        trainer = SFTTrainer(model, SFTConfig(**run.arguments), **rest)
        use_learned_tokens(trainer.model)
        return trainer

    run.train(build_trainer, progress)
    return run.evaluate(evaluation, progress, dialogues)
