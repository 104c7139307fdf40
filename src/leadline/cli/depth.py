"""How deep safety goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._app import Json, app, progress_bar, stoppable


@app.command()
def depth(
    models: Annotated[
        list[str], typer.Argument(help="Model folders, hub ids or organisms, side by side.")
    ],
    base: Annotated[
        str | None, typer.Option(help="The model before alignment, to compare with.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("leadline-depth"),
    budget: Annotated[
        str, typer.Option(help="quick, standard or full: how much is measured.")
    ] = "standard",
    dataset: Annotated[
        str, typer.Option(help="As in a study file: NAME, or 'NAME: {option: value}'.")
    ] = "guild",
    judge: Annotated[
        str | None, typer.Option(help="As in a study file (default: the dataset's own).")
    ] = None,
    only: Annotated[
        str, typer.Option(help="Measures to take, with commas (default: all).")
    ] = "kl,refusal_prefix,prefill,decoding,gcg,finetuning",
    as_json: Json = False,
) -> None:
    """Measure how deep the safety of open weights goes, and leave depth.html and depth.json.

    KL to the base model by token, a refusal's start forced on the base, ASR against the number of
    forced harmful tokens, decoding settings, suffix search, and fine-tuning. Stopped? Run it again.

    Examples:

      leadline depth organism:aligned organism:deep --base organism:base --budget quick

      leadline depth ./rc1 --base ./rc0 --dataset 'file: {path: harmful.jsonl}' --only kl,prefill
    """
    from ..depth.run import depth as measure
    from ..study import DatasetPick, JudgePick

    with stoppable(), progress_bar() as listener:
        report = measure(
            models,
            base,
            dataset=DatasetPick.parse(dataset).model_dump(),
            judge=JudgePick.parse(judge).model_dump() if judge else None,
            out=out,
            budget=budget,
            measures=[name for part in only.split(",") if (name := part.strip())],
            listener=listener,
        )
    if as_json:
        print(report.json.read_text(encoding="utf-8"))
        return
    for finding in report.findings:
        print(f"- {finding}")
    print(f"Open {report.html}")
