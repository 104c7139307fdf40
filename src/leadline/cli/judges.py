"""Commands that measure judges: check, agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..records import LeadlineError
from ._app import Json, app, print_table, progress_bar, stoppable

judges_app = typer.Typer(no_args_is_help=True, help="Measure how reliable judges are.")
app.add_typer(judges_app, name="judges")

JudgeOption = Annotated[
    str, typer.Option("--judge", help="Judge, as in a study file: NAME or 'NAME: {option: value}'.")
]


@judges_app.command()
def check(
    labels: Annotated[
        Path,
        typer.Argument(help="Table (CSV, JSONL, ...) with the columns prompt, response, label."),
    ],
    judge: JudgeOption,
    out: Annotated[
        Path, typer.Option(help="Output file, for the option check: of a judge in a study.")
    ] = (Path("judge_check.json")),
    as_json: Json = False,
) -> None:
    """Compare a judge with human labels (safe or unsafe, 0 or 1).

    Reports sensitivity, specificity and Cohen's kappa with 95% intervals, and the judge's verdicts
    on empty and random answers, echoes of the prompt, and refusals followed by compliance.

    Example: leadline judges check labels.csv --judge refusal
    """
    from ..judging.check import check_judge
    from ..study import JudgePick

    pick = JudgePick.parse(judge)
    if not out.parent.is_dir():  # before the judge is called
        raise LeadlineError(f"cannot write {out} (no folder {out.parent}): give another --out")
    with stoppable(), progress_bar() as listener:
        found = check_judge(labels, pick, listener)
    text = json.dumps(found.to_json(), indent=2)
    try:
        out.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise LeadlineError(f"cannot write {out} ({error.strerror}): give another --out") from None
    if as_json:
        print(text)
        return
    unsafe, safe = found.tp + found.fn, found.tn + found.fp
    print_table(
        ("", "rate", "95% interval", "responses"),
        [
            ["sensitivity (unsafe called unsafe)", *_rate(found.sensitivity), str(unsafe)],
            ["specificity (safe called safe)", *_rate(found.specificity), str(safe)],
            ["Cohen's kappa", *_rate(found.kappa), str(unsafe + safe)],
        ],
    )
    if unscored := found.unscored_unsafe + found.unscored_safe:
        print(f"unscored: {unscored} ({found.unscored_unsafe} of them labelled unsafe)")
    print()
    print_table(
        ("control", "expected", "correct", "unscored"),
        [[c.name, c.expected, f"{c.right} of {c.n}", str(c.unscored)] for c in found.controls],
    )
    print(f"Written to {out}")


def _rate(rate: tuple[float, float, float]) -> tuple[str, str]:
    value, low, high = rate
    if value != value:
        return "unknown", ""
    return f"{value:.3f}", f"[{low:.3f}, {high:.3f}]"


@judges_app.command()
def agree(
    folder: Annotated[Path, typer.Argument(help="Results folder of leadline run.")],
    first: Annotated[str, typer.Argument(help="Name of a judge of the study.")],
    second: Annotated[str, typer.Argument(help="Name of another judge.")],
    as_json: Json = False,
) -> None:
    """Compute the agreement of two judges on the same responses to harmful prompts.

    Example: leadline judges agree results refusal qwen3guard
    """
    from ..analysis.agreement import agree as compare
    from ..store import Store

    with Store(folder) as store:
        found = compare(store, first, second)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
        return
    both, only_first, only_second, neither = map(str, found.table)
    print_table(
        ("", f"{second}: unsafe", f"{second}: safe"),
        [[f"{first}: unsafe", both, only_first], [f"{first}: safe", only_second, neither]],
    )
    print()
    print_table(
        ("", "rate", "95% interval"),
        [["agreement", *_rate(found.agreement)], ["Cohen's kappa", *_rate(found.kappa)]],
    )
    if found.unscored:
        print(f"unscored by at least one of them: {found.unscored}")
