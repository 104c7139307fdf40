"""The commands `deepen` and `finetune`: train a model, and compare it before and after."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..records import LeadlineError
from ._app import Json, app, print_table, progress_bar, say, stoppable

if TYPE_CHECKING:
    from ..align.repair import EvaluationConfig, RepairResult, TrainingConfig

Model = Annotated[str, typer.Argument(help="A model folder, a hub id, or an organism.")]
Out = Annotated[Path, typer.Option(help="The folder to write the new model to.")]
# The default of an option of training is None: the preset's value.
Lr = Annotated[float | None, typer.Option("--lr", help="The peak learning rate (default: 2e-5).")]
Steps = Annotated[
    int | None,
    typer.Option("--steps", help="The number of optimizer steps. It overrides --epochs."),
]
Batch = Annotated[
    int | None,
    typer.Option("--batch", help="The number of rows per optimizer step (default: 16)."),
]
Micro = Annotated[
    int | None,
    typer.Option(
        "--micro",
        help="The number of rows per forward pass, a divisor of --batch (default: --batch). "
        "A smaller number needs less memory.",
    ),
]
Optimizer = Annotated[
    str | None,
    typer.Option(
        "--optimizer",
        help="The optimizer, by its name in transformers (default: adamw_torch_fused).",
    ),
]
AdamBeta1 = Annotated[
    float | None,
    typer.Option("--adam-beta1", help="beta_1 of Adam and AdamW (default: 0.9)."),
]
Length = Annotated[
    int | None,
    typer.Option("--max-length", help="The largest number of tokens of a row (default: 1024)."),
]
Lora = Annotated[
    int | None,
    typer.Option(
        "--lora",
        help="Train LoRA adapters of this rank and merge them into the model after training "
        "(default: train all weights).",
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="The random seed of training (default: 0).")
]
Report = Annotated[
    str | None,
    typer.Option(
        "--report-to", help="Where to log training: none (default), tensorboard, wandb, ..."
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="float32, bfloat16 or auto (default): bfloat16 on a GPU, and on a CPU that has "
        "instructions for it.",
    ),
]
Dataset = Annotated[
    str,
    typer.Option(
        "--dataset",
        help="The dataset to evaluate on before and after training, as in a study file.",
    ),
]
Judge = Annotated[
    str | None,
    typer.Option(
        "--judge",
        help="The judge of the evaluation, as in a study file (default: the dataset's judge).",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="The largest number of prompts to evaluate on."),
]
Watch = Annotated[
    int | None,
    typer.Option("--watch", min=1, help="Evaluate during training, too, every N steps."),
]
OnBreach = Annotated[
    str,
    typer.Option(
        "--on-breach",
        help="What to do when --watch finds the model unsafe: warn, stop, or rollback "
        "(stop and restore the last safe weights).",
    ),
]
NoEvaluation = Annotated[
    bool, typer.Option("--no-evaluation", help="Only train; do not evaluate the model.")
]


@app.command()
def deepen(
    context: typer.Context,
    model: Model,
    harmful: Annotated[
        Path,
        typer.Option(help="A file of harmful prompts and answers: {prompt, harmful[, refusal]}."),
    ],
    utility: Annotated[
        Path,
        typer.Option(help="A file of harmless dialogues: {prompt[, completion]} or {messages}."),
    ],
    out: Out,
    preset: Annotated[
        str,
        typer.Option(
            help="Values of the options below: default, or paper, the published settings of "
            "arXiv 2406.05946. An option that is given replaces the preset's value."
        ),
    ] = "default",
    loss: Annotated[
        str,
        typer.Option(
            help="paper: all tokens of refusals and answers weigh the same. token-mean: weigh the "
            "mean over refusals and the mean over answers with --alpha."
        ),
    ] = "paper",
    alpha: Annotated[
        float,
        typer.Option(
            help="The weight of the refusals' loss, from 0 to 1. With --loss paper it is also "
            "their share of the rows."
        ),
    ] = 0.2,
    max_prefix: Annotated[
        int, typer.Option(help="The largest number of harmful tokens before a refusal.")
    ] = 100,
    epochs: Annotated[
        float | None, typer.Option(help="The number of passes over the harmful rows (default: 10).")
    ] = None,
    lr: Lr = None,
    steps: Steps = None,
    batch: Batch = None,
    micro: Micro = None,
    warmup: Annotated[
        int | None, typer.Option(help="The number of warmup steps (default: 0).")
    ] = None,
    optimizer: Optimizer = None,
    adam_beta1: AdamBeta1 = None,
    max_length: Length = None,
    lora: Lora = None,
    seed: Seed = None,
    report_to: Report = None,
    precision: Precision = None,
    dataset: Dataset = "guild",
    judge: Judge = None,
    limit: Limit = None,
    watch: Watch = None,
    on_breach: OnBreach = "warn",
    no_evaluation: NoEvaluation = False,
    as_json: Json = False,
) -> None:
    """Deepen safety alignment: train the model to refuse even after a partial harmful answer.

    Missing refusals and utility answers are generated by the model itself. Prints a table of
    measures before and after training.

    Example:

      leadline organism data --out guild

      leadline deepen organism:aligned --harmful guild/harmful.jsonl --utility guild/utility.jsonl
      --lr 5e-4 --steps 200 --batch 64 --out deeper
    """
    from ..align import repair

    training, evaluation = _configs(context, "deepen")
    with stoppable(), progress_bar() as listener:
        result = repair.deepen(
            model, harmful, utility, out, loss=loss.replace("-", "_"), alpha=alpha,
            max_prefix=max_prefix, training=training, evaluation=evaluation, listener=listener,
        )  # fmt: skip
    _print_result(result, as_json)


@app.command()
def finetune(
    context: typer.Context,
    model: Model,
    data: Annotated[
        Path,
        typer.Option(help="A file of dialogues: {prompt, completion} or {messages}."),
    ],
    out: Out,
    constrained: Annotated[
        bool,
        typer.Option(
            "--constrained", help="Constrain the first tokens of each answer to the initial model."
        ),
    ] = False,
    beta: Annotated[
        str | None,
        typer.Option(
            help="The strength of the constraint for the first, second, ... token, separated by "
            "commas; the last value applies to all later tokens (default: 0.5,2,2,2,2,0.1). "
            "Requires --constrained."
        ),
    ] = None,
    weight_floor: Annotated[
        float,
        typer.Option(
            help="The smallest share of a token's plain gradient that the constraint leaves, from "
            "0 to less than 1 (the official code uses 1e-3). Requires --constrained."
        ),
    ] = 0.0,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="A model with the same tokenizer, to distil on the data: half of the loss."
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="Values of the options below: default; paper, the published settings of "
            "arXiv 2406.05946; or paper-harmful, the same with 25 epochs, as published for "
            "harmful data. An option that is given replaces the preset's value."
        ),
    ] = "default",
    epochs: Annotated[
        float | None, typer.Option(help="The number of passes over the data (default: 3).")
    ] = None,
    lr: Lr = None,
    steps: Steps = None,
    batch: Batch = None,
    micro: Micro = None,
    warmup: Annotated[
        int | None, typer.Option(help="The number of warmup steps (default: 10).")
    ] = None,
    optimizer: Optimizer = None,
    adam_beta1: AdamBeta1 = None,
    max_length: Length = None,
    lora: Lora = None,
    seed: Seed = None,
    report_to: Report = None,
    precision: Precision = None,
    dataset: Dataset = "guild",
    judge: Judge = None,
    limit: Limit = None,
    watch: Watch = None,
    on_breach: OnBreach = "warn",
    no_evaluation: NoEvaluation = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model on your data, and measure what that does to its safety.

    With --constrained, the first tokens of each answer are kept close to the initial model, which
    preserves refusals. Prints a table of measures before and after training.

    Example:

      leadline finetune organism:aligned --data guild/benign.jsonl --constrained --out tuned
    """
    from ..align import repair

    training, evaluation = _configs(context, "finetune")
    if weight_floor and not constrained:
        raise LeadlineError("--weight-floor requires --constrained")
    if beta and not constrained:
        raise LeadlineError("--beta requires --constrained")
    try:
        schedule = [float(b) for b in beta.split(",")] if beta is not None else None
    except ValueError:
        raise LeadlineError(
            f"--beta {beta!r}: give numbers separated by commas, such as 0.5,2,2,2,2,0.1"
        ) from None
    with stoppable(), progress_bar() as listener:
        result = repair.finetune(
            model, data, out, constrained=constrained, beta=schedule, weight_floor=weight_floor,
            teacher=teacher, training=training, evaluation=evaluation, listener=listener,
        )  # fmt: skip
    _print_result(result, as_json)


def _configs(
    context: typer.Context, command: str
) -> tuple[TrainingConfig, EvaluationConfig | None]:
    """The configurations from the options that both commands share. Options of training have the
    names of the fields of TrainingConfig, and are None where the preset's value applies."""
    from dataclasses import fields

    from ..align.repair import EvaluationConfig, TrainingConfig
    from ..study import DatasetPick, JudgePick

    options = context.params
    training = TrainingConfig.preset(
        command,
        options["preset"],
        **{each.name: options[each.name] for each in fields(TrainingConfig)},
    )
    if options["no_evaluation"]:
        if options["watch"] or options["on_breach"] != "warn":
            raise LeadlineError("--no-evaluation cannot be combined with --watch or --on-breach")
        return training, None
    judge = options["judge"]
    evaluation = EvaluationConfig(
        dataset=DatasetPick.parse(options["dataset"]).model_dump(),
        judge=JudgePick.parse(judge).model_dump() if judge else None,
        limit=options["limit"],
        every=options["watch"],
        on_breach=options["on_breach"],
    )
    return training, evaluation


def _print_result(result: RepairResult, as_json: bool) -> None:
    if as_json:
        table = result.table.to_dict() if result.table else {}
        summary = {"model": str(result.folder), "notes": result.notes}
        print(json.dumps({**summary, **table}, indent=2, allow_nan=False))
        return
    for note in result.notes:
        say(f"- {note}")
    if result.table:
        print_table(
            ("", "before", "95% interval", "after", "95% interval", "n"),
            [
                [row["measure"], *_value_and_interval(row["before"]),
                 *_value_and_interval(row["after"]),
                 str((row["after"] or row["before"] or {}).get("n", ""))]
                for row in result.table.rows
            ],
        )  # fmt: skip
    say(f"Model saved to {result.folder}")


def _value_and_interval(measured: Mapping[str, Any] | None) -> tuple[str, str]:
    """A value and its 95% interval as text: a rate in percent, a D50 in its unit."""
    if measured is None:
        return "–", ""

    def text(value: float | None, missing: str) -> str:
        if value is None:
            return missing
        return f"{value:.1f}" if "unit" in measured else f"{100 * value:.1f}%"

    censored = measured.get("censored")
    value = text(measured["value"], "–")
    if censored == "above":
        value = f"over {measured['at']:g}"
    elif censored == "below":
        value = f"{measured['at']:g} or less"
    return value, f"[{text(measured['low'], 'open')}, {text(measured['high'], 'open')}]"
