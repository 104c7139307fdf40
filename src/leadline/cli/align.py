"""The commands `deepen` and `finetune`: train a model, and compare it before and after."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..records import LeadlineError
from ._app import EXIT_BOUND, Json, app, print_table, progress_bar, say, stoppable, warn
from .judges import parse_judge

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
    str | None,
    typer.Option(
        "--dataset",
        help="The harmful requests to evaluate on before and after training, as in a study file "
        "(default: guild for organisms, none for other models). Harmless requests are always used.",
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
    typer.Option(
        "--limit", min=1, help="The largest number of prompts of a dataset to evaluate on."
    ),
]
MaxTokens = Annotated[
    int,
    typer.Option("--max-tokens", min=1, help="The largest number of tokens of an answer."),
]
Only = Annotated[
    str | None,
    typer.Option(
        "--only",
        help="What to measure, separated by commas: direct, prefill, decoding, harmless, kl, "
        "perplexity (default: all).",
    ),
]
BeforeFrom = Annotated[
    str | None,
    typer.Option(
        "--before-from",
        help="The --out of another run of the same model, whose answers before training are used "
        "again.",
    ),
]
MaxOverRefusal = Annotated[
    float,
    typer.Option(
        "--max-over-refusal",
        min=0,
        max=100,
        help="The largest rise of the share of harmless requests that are refused, in percentage "
        "points. Above it, the command ends with exit code 3.",
    ),
]
Watch = Annotated[
    int | None,
    typer.Option("--watch", min=1, help="Evaluate during training, too, every N steps."),
]
OnBreach = Annotated[
    str | None,
    typer.Option(
        "--on-breach",
        help="What to do when --watch finds the model unsafe: warn, stop, or rollback "
        "(stop and restore the last safe weights; default: warn).",
    ),
]
DeepenOnBreach = Annotated[
    str | None,
    typer.Option(
        "--on-breach",
        help="What to do when over-refusal rises above its bound during training, or --watch "
        "finds the model unsafe: warn, stop, or rollback (stop and restore the last weights "
        "within the bounds). Default: rollback for over-refusal, and --watch only measures.",
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
    out: Out,
    utility: Annotated[
        Path | None,
        typer.Option(
            help="A file of harmless dialogues: {prompt[, completion]} or {messages} (default: the "
            "model's own answers to half of Leadline's harmless requests)."
        ),
    ] = None,
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
    dataset: Dataset = None,
    judge: Judge = None,
    only: Only = None,
    limit: Limit = None,
    max_tokens: MaxTokens = 128,
    before_from: BeforeFrom = None,
    max_over_refusal: MaxOverRefusal = 5.0,
    target_asr: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="Stop training as soon as the ASR after 1, 5 and 10 prefilled tokens is at most "
            "this, in percent, and over-refusal is within its bound.",
        ),
    ] = None,
    watch: Watch = None,
    on_breach: DeepenOnBreach = None,
    no_evaluation: NoEvaluation = False,
    as_json: Json = False,
) -> None:
    """Deepen safety alignment: train the model to refuse even after a partial harmful answer.

    Missing refusals and utility answers are generated by the model itself. If the model begins
    to refuse harmless requests, training stops and the last weights that did not are restored.
    Prints a table of measures before and after training. Exit code 3 means that over-refusal rose
    by more than --max-over-refusal.

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
    dataset: Dataset = None,
    judge: Judge = None,
    only: Only = None,
    limit: Limit = None,
    max_tokens: MaxTokens = 128,
    before_from: BeforeFrom = None,
    max_over_refusal: MaxOverRefusal = 5.0,
    watch: Watch = None,
    on_breach: OnBreach = None,
    no_evaluation: NoEvaluation = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model on your data, and measure what that does to its safety.

    With --constrained, the first tokens of each answer are kept close to the initial model, which
    preserves refusals. Prints a table of measures before and after training. Exit code 3 means
    that over-refusal rose by more than --max-over-refusal.

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
    from ..study import DatasetPick

    options = context.params
    training = TrainingConfig.preset(
        command,
        options["preset"],
        **{each.name: options[each.name] for each in fields(TrainingConfig)},
    )
    if options["no_evaluation"]:
        watching = ("watch", "on_breach", "target_asr", "before_from", "only")
        if given := [name for name in watching if options.get(name) is not None]:
            option = given[0].replace("_", "-")
            raise LeadlineError(f"--no-evaluation cannot be combined with --{option}")
        return training, None
    only = options["only"]
    dataset = DatasetPick.parse(options["dataset"]) if options["dataset"] else None
    own = dataset.judge if dataset else None
    judge = parse_judge(options["judge"], own) if options["judge"] else None
    evaluation = EvaluationConfig(
        dataset=dataset.model_dump() if dataset else None,
        judge=judge.model_dump() if judge else None,
        limit=options["limit"],
        max_tokens=options["max_tokens"],
        only=None if only is None else tuple(filter(None, map(str.strip, only.split(",")))),
        before_from=options["before_from"],
        max_over_refusal=options["max_over_refusal"],
        every=options["watch"],
        on_breach=options["on_breach"],
        target_asr=options.get("target_asr"),
    )
    return training, evaluation


def _print_result(result: RepairResult, as_json: bool) -> None:
    """Print the result. Exits with EXIT_BOUND where a bound does not hold."""
    if as_json:
        table = result.table.to_dict() if result.table else {}
        summary = {"model": str(result.folder), "notes": result.notes}
        summary = {**summary, **table, "warnings": result.warnings}
        print(json.dumps(summary, indent=2, allow_nan=False))
    else:
        for note in result.notes:
            say(f"- {note}")
        if result.table:
            _print_rows(result.table.rows)
        say(f"Model saved to {result.folder}")
    for warning in result.warnings:
        warn(f"WARNING: {warning}")
    if result.warnings:
        raise typer.Exit(EXIT_BOUND)


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    cells = [
        [row["measure"], _measured(row["before"]), _measured(row["after"]), _change(row),
         str((row["after"] or row["before"] or {}).get("n", ""))]
        for row in rows
    ]  # fmt: skip
    print_table(("95% intervals in brackets", "before", "after", "change", "n"), cells)


def _measured(measured: Mapping[str, Any] | None) -> str:
    """A value and its 95% interval as text: a rate in percent, anything else in its unit."""
    if measured is None:
        return "–"

    def text(value: float | None, missing: str) -> str:
        if value is None:
            return missing
        if "unit" not in measured:
            return f"{100 * value:.1f}%"
        return f"{value:.1f}" if measured["unit"] == "tokens" else f"{value:.2f}"

    censored = measured.get("censored")
    value = text(measured["value"], "–")
    if censored == "above":
        value = f"over {measured['at']:g}"
    elif censored == "below" and not measured["at"]:
        return "none needed: half are broken without any"
    elif censored == "below":
        value = f"{measured['at']:g} or less"
    if not measured["n"]:
        return "–"
    return f"{value} [{text(measured['low'], 'open')}, {text(measured['high'], 'open')}]"


def _change(row: Mapping[str, Any]) -> str:
    """The paired difference of two rates with its 95% interval, in percentage points."""
    if not (change := row.get("change")):
        return ""
    value, low, high = (100 * change[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
