"""The commands `judges check` and `judges agree`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..files import write_private
from ..records import LeadlineError
from ._app import EXIT_FAILED, Json, app, print_table, progress_bar, say, stoppable, warn

if TYPE_CHECKING:
    from ..analysis.judge_error import JudgeCheck
    from ..study import JudgePick, Study

judges_app = typer.Typer(
    no_args_is_help=True, help="Measure judges: against human labels, or against each other."
)
app.add_typer(judges_app, name="judges")

JudgeOption = Annotated[
    str,
    typer.Option(
        "--judge",
        help="The judge, as in a study file: NAME, 'NAME: {option: value}', or auto (the best one "
        "that you have).",
    ),
]


def parse_judge(text: str, own: JudgePick | None = None, study: Study | None = None) -> JudgePick:
    """The judge of a --judge option. For `auto`, says which judge was taken and why; `own` is the
    dataset's own judge (default: the refusal patterns), `study` the one that was run."""
    from ..judge_choice import AUTO, choose
    from ..study import JudgePick

    pick = JudgePick.parse(text)
    if pick.name != AUTO:
        return pick
    choice = choose(own or JudgePick(name="refusal"), study.attacker if study else None)
    warn(f"auto took the judge {choice}")
    return choice.judge


@judges_app.command()
def check(
    labels: Annotated[
        Path,
        typer.Argument(
            help="A table (CSV, JSON, JSONL, Parquet) with the columns prompt, response and label."
        ),
    ],
    judge: JudgeOption,
    out: Annotated[
        Path, typer.Option(help="The file to write the result to, for a judge's check: option.")
    ] = Path("judge_check.json"),
    as_json: Json = False,
) -> None:
    """Compare a judge's verdicts with human labels (safe or unsafe, or 0 and 1).

    Prints sensitivity, specificity and Cohen's kappa with 95% intervals, and
    the judge's verdicts on controls: empty and random answers, echoes of the
    prompt, and refusals followed by compliance. A study that names the result
    as `check:` reports an ASR corrected for the judge's errors.

    Example: leadline judges check labels.csv --judge refusal
    """
    from ..judging.check import check_judge

    pick = parse_judge(judge)
    if not out.parent.is_dir():  # before any request to a judge that costs money
        raise LeadlineError(f"cannot write {out} (no folder {out.parent}): give another --out")
    with stoppable(), progress_bar() as listener:
        result = check_judge(labels, pick, listener)
    text = json.dumps(result.to_json(), indent=2)
    write_private(out, text + "\n")
    if as_json:
        print(text)
    else:
        _print_check(result)
        say(f"Written to {out}")
    if result.unscored:
        reason = f" (first reason: {result.unscored_reason})" if result.unscored_reason else ""
        warn(f"{result.unscored} answers are unscored, and in no rate{reason}")
        raise typer.Exit(EXIT_FAILED)


def _print_check(result: JudgeCheck) -> None:
    unsafe, safe = result.tp + result.fn, result.tn + result.fp
    print_table(
        ("", "rate", "95% interval", "responses"),
        [
            ["sensitivity (unsafe answers judged unsafe)", *_rate(result.sensitivity), str(unsafe)],
            ["specificity (safe answers judged safe)", *_rate(result.specificity), str(safe)],
            ["Cohen's kappa", *_rate(result.kappa), str(unsafe + safe)],
        ],
    )
    if unscored := result.unscored_unsafe + result.unscored_safe:
        say(f"unscored: {unscored} ({result.unscored_unsafe} of them labelled unsafe)")
    print()
    print_table(
        ("control", "expected", "judged correctly", "unscored"),
        [[c.name, c.expected, f"{c.right} of {c.n}", str(c.unscored)] for c in result.controls],
    )


def _rate(rate: tuple[float, float, float]) -> tuple[str, str]:
    """Two table cells: a rate and its interval."""
    value, low, high = rate
    if value != value:
        return "unknown", ""
    return f"{value:.3f}", f"[{low:.3f}, {high:.3f}]"


@judges_app.command()
def agree(
    folder: Annotated[Path, typer.Argument(help="The results folder of a study.")],
    first: Annotated[str, typer.Argument(help="The name of a judge of that study.")],
    second: Annotated[str, typer.Argument(help="The name of another judge of that study.")],
    as_json: Json = False,
) -> None:
    """Compare the verdicts of two judges on the same answers to harmful prompts.

    Prints the table of verdicts, the agreement and Cohen's kappa with 95%
    intervals. To add a judge to a finished study, use `leadline judge`.

    Example: leadline judges agree results refusal qwen3guard
    """
    from ..analysis.agreement import agree as compare
    from ..store import Store

    with Store(folder) as store:
        result = compare(store, first, second)
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
        return
    both, only_first, only_second, neither = map(str, result.table)
    print_table(
        ("", f"{second}: unsafe", f"{second}: safe"),
        [[f"{first}: unsafe", both, only_first], [f"{first}: safe", only_second, neither]],
    )
    print()
    print_table(
        ("", "rate", "95% interval"),
        [["agreement", *_rate(result.agreement)], ["Cohen's kappa", *_rate(result.kappa)]],
    )
    if result.unscored:
        say(f"unscored by one or both judges: {result.unscored}")
