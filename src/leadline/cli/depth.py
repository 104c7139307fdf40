"""The command `depth`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._app import Json, app, print_table, progress_bar, say, stoppable
from .judges import parse_judge

if TYPE_CHECKING:
    from ..depth.run import Estimate


@app.command()
def depth(
    models: Annotated[
        list[str],
        typer.Argument(help="Models to compare: folders, Hugging Face hub ids or organisms."),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="The model before alignment, with the same vocabulary (folder, hub id or "
            "organism). Some measures need it."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write the report to.")] = Path(
        "leadline-depth"
    ),
    budget: Annotated[
        str,
        typer.Option(
            help="How much to measure: quick, standard or full, or a time such as 90s, 20min or "
            "2h, which is divided over the measures."
        ),
    ] = "standard",
    dataset: Annotated[
        str,
        typer.Option(
            help="The dataset, as in a study file: NAME, or 'NAME: {option: value}'.",
        ),
    ] = "guild",
    judge: Annotated[
        str | None,
        typer.Option(help="The judge, as in a study file (default: the dataset's judge)."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Measures to run, separated by commas (default: all; see leadline list measures)."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print what each measure would do and for how long; measure nothing."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure how deep the safety alignment of models with open weights goes.

    Safety is shallow if it depends on the first tokens of an answer. The
    measures include KL divergence from the base model by token, attack success
    rate (ASR) after prefilled tokens of a harmful answer, sampling settings,
    adversarial suffix search (GCG), and fine-tuning. Writes depth.html and
    depth.json. If interrupted, run the same command again to resume.

    Examples:

      leadline depth organism:aligned organism:deep --base organism:base --budget quick

      leadline depth ./rc1 --base ./rc0 --dataset 'file: {path: harmful.jsonl}' --only kl,prefill

      leadline depth ./rc1 --budget 20min --dry-run
    """
    from ..depth.run import estimate_depth, measure_depth
    from ..study import DatasetPick

    prompts = DatasetPick.parse(dataset)
    judged_by = parse_judge(judge, prompts.judge) if judge else None
    if dry_run:
        estimates = estimate_depth(
            models,
            base,
            dataset=prompts.model_dump(),
            judge=judged_by.model_dump() if judged_by else None,
            budget=budget,
            measures=None if only is None else _names(only),
        )
        _print_estimates(estimates, as_json)
        return
    with stoppable(), progress_bar() as listener:
        report = measure_depth(
            models,
            base,
            dataset=prompts.model_dump(),
            judge=judged_by.model_dump() if judged_by else None,
            out=out,
            budget=budget,
            measures=None if only is None else _names(only),
            listener=listener,
        )
    if as_json:
        print(report.json.read_text(encoding="utf-8"))
        return
    for line in filter(None, [*report.findings, report.caution]):
        say(f"- {line}")
    say(f"Open {report.html}")


def _print_estimates(estimates: list[Estimate], as_json: bool) -> None:
    from ..depth.budgets import duration

    if as_json:
        print(json.dumps([asdict(each) for each in estimates], indent=1))
        return
    print_table(
        ("measure", "work", "time", ""),
        [
            [each.measure, each.work, duration(each.seconds) if each.seconds else "–",
             each.skipped or each.reduced]
            for each in estimates
        ],
    )  # fmt: skip
    total = sum(each.seconds for each in estimates if not each.skipped)
    say(f"About {duration(total)} in total, estimated from a short trial on the first model.")


def _names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]
