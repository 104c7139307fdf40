"""`leadline depth`: measure how deep the safety of models is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._app import Json, app, progress_bar, stoppable


@app.command()
def depth(
    models: Annotated[
        list[str],
        typer.Argument(help="Model folders, hub ids or organisms; compared side by side."),
    ],
    base: Annotated[
        str | None,
        typer.Option(help="The model before alignment; kl and refusal_prefix compare with it."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("leadline-depth"),
    budget: Annotated[
        str, typer.Option(help="How much to measure: quick, standard or full.")
    ] = "standard",
    dataset: Annotated[
        str, typer.Option(help="Dataset, as in a study file: NAME or 'NAME: {option: value}'.")
    ] = "guild",
    judge: Annotated[
        str | None,
        typer.Option(help="Judge, as in a study file (default: the judge of the dataset)."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Measures to run, separated by commas (default: all; see leadline list measures)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how deep the safety of models with open weights is; write depth.html and depth.json.

    Measures: ASR against the number of prefilled tokens of a harmful answer, KL divergence from the
    base model by token, fine-tuning, suffix search (GCG), sampling settings, and refusal prefixes
    on the base model. Run the same command again to resume a run that was stopped.

    Examples:

      leadline depth organism:aligned organism:deep --base organism:base --budget quick

      leadline depth ./rc1 --base ./rc0 --dataset 'file: {path: harmful.jsonl}' --only kl,prefill
    """
    from ..depth.run import measure_depth
    from ..study import DatasetPick, JudgePick

    with stoppable(), progress_bar() as listener:
        report = measure_depth(
            models,
            base,
            dataset=DatasetPick.parse(dataset).model_dump(),
            judge=JudgePick.parse(judge).model_dump() if judge else None,
            out=out,
            budget=budget,
            measures=None
            if only is None
            else [p for part in only.split(",") if (p := part.strip())],
            listener=listener,
        )
    if as_json:
        print(report.json.read_text(encoding="utf-8"))
        return
    for finding in report.findings:
        print(f"- {finding}")
    print(f"Open {report.html}")
