"""The commands for studies: `demo`, `run`, `report`, `judge` and `list`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..records import LeadlineError
from ._app import EXIT_FAILED, Json, Reveal, app, print_table, progress_bar, say, stoppable, warn
from .judges import JudgeOption, parse_judge

if TYPE_CHECKING:
    from ..plan import Estimate
    from ..report.study.page import Report

Folder = Annotated[Path, typer.Argument(help="The results folder of a study.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder to write the results to.")] = Path(
        "leadline-demo"
    ),
    reveal: Reveal = False,
) -> None:
    """Attack four tiny models, judge their answers, and measure how deep their safety goes.

    The models (organisms) ship with Leadline. They were trained on a harmless
    invented world, so the demo needs no server, no download and no GPU. It
    writes report.html and depth/depth.html.

    Example: leadline demo --out leadline-demo
    """
    from importlib.resources import as_file, files

    from .. import organism
    from ..depth.run import measure_depth

    with as_file(files("leadline") / "demo.yaml") as study:
        _run(study, out, limit=None, dry_run=False, as_json=False, reveal=reveal)
    models = [f"organism:{name}" for name in organism.names()]
    with stoppable(), progress_bar() as listener:
        report = measure_depth(
            models, "organism:base", out=out / "depth", budget="quick", listener=listener
        )
    for finding in report.findings[:3]:
        say(f"- {finding}")
    say(f"Open {report.html}")


@app.command()
def run(
    study: Annotated[Path, typer.Argument(help="Study file (YAML).")],
    out: Annotated[
        Path | None,
        typer.Option(help="The results folder (default: leadline-NAME, with the study's name)."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Count trials, requests and tokens without sending any."),
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The maximum number of prompts per dataset.")
    ] = None,
    reveal: Reveal = False,
    as_json: Json = False,
) -> None:
    """Run a study: attack the models, judge their answers, and write a report.

    Writes leadline.sqlite, report.html and summary.json to the results folder.
    If interrupted or killed, run the same command again: only missing trials
    are sent.

    Examples:

      leadline run study.yaml --dry-run

      leadline run study.yaml --out results --limit 20
    """
    _run(study, out, limit=limit, dry_run=dry_run, as_json=as_json, reveal=reveal)


def _run(
    file: Path, out: Path | None, *, limit: int | None, dry_run: bool, as_json: bool, reveal: bool
) -> None:
    from .. import engine, plan
    from ..judge_choice import choices
    from ..study import Study

    study = Study.load(file)
    if dry_run:
        _print_estimates(plan.estimate(plan.load(study, limit, counting=True)), as_json)
        return
    for dataset, choice in choices(study).items():
        warn(f"for {dataset}, auto took the judge {choice}")
    folder = out or Path(f"leadline-{_slug(study.name)}")
    with stoppable(), progress_bar() as listener:
        results = engine.run(study, folder, limit=limit, listener=listener)
    try:
        report = _write_report(folder, reveal)
    except LeadlineError as error:
        again = f"the results are kept; to write it later: leadline report {folder}"
        raise LeadlineError(f"{error}; {again}") from None
    if as_json:
        print((folder / "summary.json").read_text(encoding="utf-8"))
    else:
        for line in [*report.findings[:3], *report.cautions]:
            say(f"- {line}")
        say(f"Open {report.html}")
    failed, unscored = results.failed(), results.progress.unscored if results.progress else 0
    if unscored:
        warn(
            f"{unscored} trials are unscored, and not counted as safe: run the same command again "
            "to judge only these"
        )
    failures = results.progress.failures if results.progress else {}
    for target, those in failures.items():
        if those.reasons:
            warn(f"{target}: {those.text()}")
    if failed:
        warn(f"{failed} trials failed: run the same command again to retry only these")
    left = sum(those.left for those in failures.values())
    if left:
        warn(f"{left} trials were not asked: fix the cause and run the same command again")
    if failed or unscored or left:
        raise typer.Exit(EXIT_FAILED)


def _write_report(folder: Path, reveal: bool, judge: str | None = None) -> Report:
    """The written report. Raises LeadlineError if it cannot be written, e.g. on a full disk."""
    from ..report.study.page import write_report

    try:
        return write_report(folder, reveal=reveal, judge=judge)
    except OSError as error:
        raise LeadlineError(
            f"cannot write the report to {folder} ({error.strerror}): free space or correct the "
            "permissions"
        ) from None


def _slug(name: str) -> str:
    """A study's name as part of a folder name."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name.strip())
    return safe.strip(".-") or "study"


def _print_estimates(estimates: list[Estimate], as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print(json.dumps([asdict(row) for row in estimates], indent=2))
        return
    headers = ("model", "trials", "requests", "prompt tokens (about)", "answer tokens (at most)")
    table = [
        (row.model, (row.trials, row.requests, row.prompt_tokens, row.answer_tokens))
        for row in estimates
    ]
    if len(estimates) > 1:
        table.append(("all", tuple(map(sum, zip(*(n for _, n in table), strict=True)))))  # type: ignore[arg-type]
    print_table(headers, [[name, *(f"{n:,}" for n in numbers)] for name, numbers in table])


@app.command()
def report(
    folder: Folder,
    reveal: Reveal = False,
    judge: Annotated[
        str | None,
        typer.Option(help="Report this judge's verdicts (default: each dataset's primary judge)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write report.html and summary.json from the stored results of a study.

    This works while the study is still running. Unsafe text is redacted unless
    --reveal is given.

    Example: leadline report results
    """
    report = _write_report(folder, reveal, judge)
    if as_json:
        print((folder / "summary.json").read_text(encoding="utf-8"))
        return
    for line in [*report.findings, *report.cautions]:
        say(f"- {line}")
    say(f"Open {report.html}")


@app.command()
def judge(
    folder: Folder,
    judge: JudgeOption,
    as_json: Json = False,
) -> None:
    """Judge the stored answers of a study with another judge.

    No answer is generated again. If this judge judged some of the answers
    before, only those without a verdict are sent to it.

    Examples:

      leadline judge results --judge refusal

      leadline judge results --judge 'qwen3guard: {model: guard, url: http://localhost:8001/v1}'
    """
    from ..analysis.results import results
    from ..judging.rejudge import rejudge, stored_study
    from ..store import Store

    with Store(folder) as store:
        study = stored_study(store)
    pick = parse_judge(judge, study.datasets[0].judge if study else None, study)
    with stoppable(), progress_bar() as listener:
        progress = rejudge(folder, pick, listener)
    if as_json:
        print(results(folder).cells(pick.label).to_json(orient="records", indent=2))
    else:
        say(f"{pick.label} judged {progress.done[pick.label]} answers")
        say(f"To report them: leadline report {folder} --judge {pick.label}")
    if progress.unscored:
        reason = f" (first reason: {progress.notes[0]})" if progress.notes else ""
        warn(f"{progress.unscored} answers are unscored{reason}")
        raise typer.Exit(EXIT_FAILED)


@app.command("list")
def list_(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND", help="What to list: attacks, datasets, judges, models or measures."
        ),
    ],
    as_json: Json = False,
) -> None:
    """List the attacks, datasets, judges, models or depth measures that can be used.

    Plug-ins of other installed packages are included. Each row shows what an
    entry needs and where it was published.

    Examples:

      leadline list attacks

      leadline list measures --json
    """
    from .. import catalogue

    rows = catalogue.rows(kind)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    headers = catalogue.columns(kind)
    print_table(headers, [[_shown(row[header]) for header in headers] for row in rows])


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
