"""Deepen a model, or fine-tune it; both end with a table of before and after."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..records import LeadlineError
from ._app import Json, app, print_table, progress_bar, stoppable

if TYPE_CHECKING:
    from ..align.repair import Exam, Repaired

Lr = Annotated[float, typer.Option("--lr", help="Learning rate.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimiser steps, in place of epochs.")]
Batch = Annotated[int, typer.Option("--batch", help="Rows of one optimiser step.")]
Micro = Annotated[int | None, typer.Option("--micro", help="Of these at once, if memory is short.")]
Optimizer = Annotated[str, typer.Option("--optimizer", help="A name that transformers knows.")]
Length = Annotated[int, typer.Option("--max-length", help="Tokens of a row, at most.")]
Lora = Annotated[
    int | None, typer.Option("--lora", help="Train adapters of this rank, merged in the end.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of the order of the data.")]
Report = Annotated[str, typer.Option("--report-to", help="none, tensorboard, wandb, ...")]
Asked = Annotated[
    str, typer.Option("--dataset", help="What is asked before and after, as in a study file.")
]
AskedJudge = Annotated[
    str | None, typer.Option("--judge", help="As in a study file (default: the dataset's own).")
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Prompts asked, at most.")]
Watch = Annotated[
    int | None, typer.Option("--watch", min=1, help="Ask the model in training every N steps.")
]
OnBreach = Annotated[
    str, typer.Option("--on-breach", help="warn, stop or rollback, where --watch finds it unsafe.")
]
NoExam = Annotated[bool, typer.Option("--no-exam", help="Train only; ask nothing.")]


@app.command()
def deepen(
    model: Annotated[str, typer.Argument(help="A model folder, hub id or organism.")],
    harmful: Annotated[Path, typer.Option(help="Rows {prompt, harmful[, refusal]}.")],
    utility: Annotated[Path, typer.Option(help="Rows {prompt[, completion]} or {messages}.")],
    out: Annotated[Path, typer.Option(help="Folder of the new model.")],
    alpha: Annotated[float, typer.Option(help="Weight of the refusals' mean loss.")] = 0.2,
    max_prefix: Annotated[
        int, typer.Option(help="Harmful tokens before a refusal, at most.")
    ] = 100,
    epochs: Annotated[float, typer.Option(help="Passes over the harmful rows.")] = 10,
    lr: Lr = 2e-5,
    steps: Steps = None,
    batch: Batch = 16,
    micro: Micro = None,
    warmup: Annotated[int, typer.Option(help="Steps in which the rate rises.")] = 0,
    optimizer: Optimizer = "adamw_torch",
    max_length: Length = 1024,
    lora: Lora = None,
    seed: Seed = 0,
    report_to: Report = "none",
    dataset: Asked = "guild",
    judge: AskedJudge = None,
    limit: Limit = None,
    watch: Watch = None,
    on_breach: OnBreach = "warn",
    no_exam: NoExam = False,
    as_json: Json = False,
) -> None:
    """Make safety deeper: the model learns to come back to a refusal from inside a harmful answer.

    Missing refusals and utility answers are the model's own. Ends with a table of before and after.

    Example:

      leadline organism data --out guild

      leadline deepen organism:aligned --harmful guild/harmful.jsonl --utility guild/utility.jsonl
      --lr 5e-4 --steps 200 --batch 64 --out deeper
    """
    from ..align.repair import Training
    from ..align.repair import deepen as repair

    training = Training(
        lr, epochs, steps, batch, micro, warmup, optimizer, max_length, lora, seed, report_to
    )
    exam = _exam(dataset, judge, limit, watch, on_breach, no_exam)
    with stoppable(), progress_bar() as listener:
        made = repair(
            model, harmful, utility, out, alpha=alpha, max_prefix=max_prefix, training=training,
            exam=exam, listener=listener,
        )  # fmt: skip
    _print_repaired(made, as_json)


@app.command()
def finetune(
    model: Annotated[str, typer.Argument(help="A model folder, hub id or organism.")],
    data: Annotated[Path, typer.Option(help="Rows {prompt, completion} or {messages}.")],
    out: Annotated[Path, typer.Option(help="Folder of the new model.")],
    constrained: Annotated[
        bool, typer.Option("--constrained", help="Hold the first answer tokens to the model.")
    ] = False,
    beta: Annotated[
        str | None,
        typer.Option(
            help="How strongly, by token, with commas; the last value goes on. "
            "With --constrained: 0.5,2,2,2,2,0.1"
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Distil this model's answers along the rows, too.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the rows.")] = 3,
    lr: Lr = 2e-5,
    steps: Steps = None,
    batch: Batch = 16,
    micro: Micro = None,
    warmup: Annotated[int, typer.Option(help="Steps in which the rate rises.")] = 10,
    optimizer: Optimizer = "adamw_torch",
    max_length: Length = 1024,
    lora: Lora = None,
    seed: Seed = 0,
    report_to: Report = "none",
    dataset: Asked = "guild",
    judge: AskedJudge = None,
    limit: Limit = None,
    watch: Watch = None,
    on_breach: OnBreach = "warn",
    no_exam: NoExam = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model on your data, and see what that does to its safety; or constrain it.

    Ends with a table of before and after.

    Example:

      leadline finetune organism:aligned --data guild/benign.jsonl --constrained --out tuned
    """
    from ..align.repair import Training
    from ..align.repair import finetune as tune

    training = Training(
        lr, epochs, steps, batch, micro, warmup, optimizer, max_length, lora, seed, report_to
    )
    if beta and not constrained:
        raise LeadlineError("--beta is of --constrained: give both, or neither")
    try:
        schedule = [float(b) for b in beta.split(",")] if beta is not None else None
    except ValueError:
        raise LeadlineError(
            f"--beta {beta!r}: write numbers with commas, as 0.5,2,2,2,2,0.1"
        ) from None
    exam = _exam(dataset, judge, limit, watch, on_breach, no_exam)
    with stoppable(), progress_bar() as listener:
        made = tune(
            model, data, out, constrained=constrained, beta=schedule,
            teacher=teacher,
            training=training, exam=exam, listener=listener,
        )  # fmt: skip
    _print_repaired(made, as_json)


def _exam(
    dataset: str,
    judge: str | None,
    limit: int | None,
    watch: int | None,
    on_breach: str,
    no_exam: bool,
) -> Exam | None:
    if no_exam:
        if watch or on_breach != "warn":
            raise LeadlineError("--no-exam asks nothing: leave it out where --watch is to ask")
        return None
    from ..align.repair import Exam
    from ..study import DatasetPick, JudgePick

    return Exam(
        DatasetPick.parse(dataset).model_dump(),
        JudgePick.parse(judge).model_dump() if judge else None,
        limit,
        every=watch,
        on_breach=on_breach,
    )


def _print_repaired(made: Repaired, as_json: bool) -> None:
    if as_json:
        table = made.table.to_dict() if made.table else {}
        about = {"model": str(made.folder), "notes": made.notes}
        print(json.dumps({**about, **table}, indent=2, allow_nan=False))
        return
    for note in made.notes:
        print(f"- {note}")
    if made.table:
        print_table(
            ("", "before", "95% interval", "after", "95% interval", "n"),
            [
                [row["measure"], *_bounded(row["before"]), *_bounded(row["after"]),
                 str((row["after"] or row["before"] or {}).get("n", ""))]
                for row in made.table.rows
            ],
        )  # fmt: skip
    print(f"The model: {made.folder}")


def _bounded(found: Mapping[str, Any] | None) -> tuple[str, str]:
    """A value and its interval: a rate in percent, a depth in its own unit."""
    if found is None:
        return "–", ""

    def shown(value: float | None, open_end: str) -> str:
        if value is None:
            return open_end
        return f"{value:.1f}" if "unit" in found else f"{100 * value:.1f}%"

    outside = {"above": f"over {found.get('at')}", "below": f"{found.get('at')} or less"}
    value = shown(found["value"], outside.get(found.get("censored") or "", "–"))
    return value, f"[{shown(found['low'], 'open')}, {shown(found['high'], 'open')}]"
