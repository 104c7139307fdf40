"""Commands for studies: demo, run, report, judge, list."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._app import FAILED, Json, Reveal, app, print_table, progress_bar, stoppable
from .judges import JudgeOption

if TYPE_CHECKING:
    from ..plan import Estimate


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the reports.")] = Path("leadline-demo"),
    reveal: Reveal = False,
) -> None:
    """Run attacks on four tiny models (organisms), and measure how deep their safety is.

    The models, of an invented world, ship with Leadline: nothing is downloaded, and all texts are
    harmless. Takes about a minute and writes two reports.

    Example: leadline demo --out leadline-demo
    """
    from importlib.resources import as_file, files

    from .. import organism
    from ..depth.run import measure_depth

    with as_file(files("leadline") / "demo.yaml") as study:
        _run(study, out, limit=None, dry_run=False, as_json=False, reveal=reveal)
    names = [f"organism:{name}" for name in organism.names()]
    with stoppable(), progress_bar() as listener:
        report = measure_depth(
            names, "organism:base", out=out / "depth", budget="quick", listener=listener
        )
    for finding in report.findings[:3]:
        print(f"- {finding}")
    print(f"Open {report.html}")


@app.command()
def run(
    study: Annotated[Path, typer.Argument(help="Study file (YAML).")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results (default: the study's name).")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only count trials, requests and tokens; send nothing."),
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use at most this many prompts of each dataset.")
    ] = None,
    reveal: Reveal = False,
    as_json: Json = False,
) -> None:
    """Run a study, or resume one that was stopped: stored responses are not generated again.

    Examples:

      leadline run study.yaml --dry-run

      leadline run study.yaml --out results --limit 20
    """
    _run(study, out, limit=limit, dry_run=dry_run, as_json=as_json, reveal=reveal)


def _run(
    file: Path, out: Path | None, *, limit: int | None, dry_run: bool, as_json: bool, reveal: bool
) -> None:
    from .. import engine, plan
    from ..study import Study

    study = Study.load(file)
    if dry_run:
        _print_estimates(plan.estimate(plan.load(study, limit, counting=True)), as_json)
        return
    folder = out or Path(f"leadline-{_slug(study.name)}")
    with stoppable(), progress_bar() as listener:
        results = engine.run(study, folder, limit=limit, listener=listener)
    from ..report.study.page import write_report

    page = write_report(folder, reveal=reveal)
    if as_json:
        print((folder / "summary.json").read_text(encoding="utf-8"))
    else:
        for finding in page.findings[:3]:
            print(f"- {finding}")
        print(f"Open {page.html}")
    failed, unscored = results.failed(), results.progress.unscored if results.progress else 0
    if unscored:
        print(
            f"leadline: {unscored} responses could not be scored: see the report", file=sys.stderr
        )
    if failed:
        print(
            f"leadline: {failed} trials failed: run the same command again to retry only these",
            file=sys.stderr,
        )
        raise typer.Exit(FAILED)


def _slug(name: str) -> str:
    kept = "".join(c if c.isalnum() or c in "-_." else "-" for c in name.strip())
    return kept.strip(".-") or "study"


def _print_estimates(rows: list[Estimate], as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    heads = ("model", "trials", "requests", "prompt tokens (about)", "answer tokens (at most)")
    table = [
        (row.model, (row.trials, row.requests, row.prompt_tokens, row.answer_tokens))
        for row in rows
    ]
    if len(rows) > 1:
        table.append(("all", tuple(map(sum, zip(*(n for _, n in table), strict=True)))))  # type: ignore[arg-type]
    print_table(heads, [[name, *(f"{n:,}" for n in numbers)] for name, numbers in table])


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Results folder of leadline run.")],
    reveal: Reveal = False,
    judge: Annotated[str | None, typer.Option(help="Show the verdicts of this judge.")] = None,
    as_json: Json = False,
) -> None:
    """Write report.html and summary.json of a study, which may still be running.

    Example: leadline report results
    """
    from ..report.study.page import write_report

    page = write_report(folder, reveal=reveal, judge=judge)
    if as_json:
        print((folder / "summary.json").read_text(encoding="utf-8"))
        return
    for finding in page.findings:
        print(f"- {finding}")
    print(f"Open {page.html}")


@app.command()
def judge(
    folder: Annotated[Path, typer.Argument(help="Results folder of leadline run.")],
    judge: JudgeOption,
    as_json: Json = False,
) -> None:
    """Judge the stored responses of a study with another judge; nothing is generated.

    Responses that this judge has scored before are skipped, unscored ones are judged again.

    Examples:

      leadline judge results --judge refusal

      leadline judge results --judge 'qwen3guard: {model: guard, url: http://localhost:8001/v1}'
    """
    from ..analysis.results import results
    from ..judging.rejudge import rejudge
    from ..study import JudgePick

    pick = JudgePick.parse(judge)
    with stoppable(), progress_bar() as listener:
        progress = rejudge(folder, pick, listener)
    if as_json:
        print(results(folder).cells(pick.label).to_json(orient="records", indent=2))
    else:
        print(f"{pick.label} judged {progress.done[pick.label]} responses")
        print(f"To show them: leadline report {folder} --judge {pick.label}")
    if progress.unscored:
        why = f" (the first: {progress.notes[0]})" if progress.notes else ""
        print(f"leadline: {progress.unscored} responses could not be scored{why}", file=sys.stderr)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="attacks, datasets, judges, models or measures.")],
    as_json: Json = False,
) -> None:
    """List all attacks, datasets, judges, models or depth measures, with their sources.

    Example: leadline list attacks --json
    """
    from .. import catalogue

    rows = catalogue.rows(what)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    heads = catalogue.columns(what)
    print_table(heads, [[_shown(row[head]) for head in heads] for row in rows])


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
