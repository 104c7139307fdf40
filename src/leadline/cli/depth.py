"""The command `depth`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._app import Json, app, progress_bar, say, stoppable
from .judges import parse_judge


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
        str, typer.Option(help="How much to measure: quick, standard or full.")
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
    """
    from ..depth.run import measure_depth
    from ..study import DatasetPick

    prompts = DatasetPick.parse(dataset)
    judged_by = parse_judge(judge, prompts.judge) if judge else None
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


def _names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]
