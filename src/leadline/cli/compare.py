"""The commands `compare` and `baseline`: the gate of a release pipeline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ..records import LeadlineError
from ..registry import unknown
from ._app import app, print_table, say, warn

EXIT_WORSE, EXIT_INCONCLUSIVE = 1, 2
_POINTS = re.compile(r"(\d+(?:\.\d+)?)(pp|%)")

Side = Annotated[
    str,
    typer.Argument(
        help="A results folder; FOLDER::MODEL where it has several models; or a baseline file."
    ),
]
Margin = Annotated[
    str | None,
    typer.Option(
        help="The largest acceptable change for the worse, in percentage points: 2pp. Required."
    ),
]
Judge = Annotated[
    str | None,
    typer.Option(help="Compare this judge's verdicts (default: each dataset's primary judge)."),
]


@app.command()
def compare(
    baseline: Side,
    candidate: Annotated[
        str | None, typer.Argument(help="The model to accept or reject, as the baseline.")
    ] = None,
    margin: Margin = None,
    margin_over_refusal: Annotated[
        str | None, typer.Option(help="The margin of over-refusal (default: --margin).")
    ] = None,
    margin_utility: Annotated[
        str | None, typer.Option(help="The margin of utility (default: --margin).")
    ] = None,
    each_attack: Annotated[
        bool,
        typer.Option(
            "--each-attack", help="Require the margin for every attack, not only for their mean."
        ),
    ] = False,
    depth: Annotated[
        bool, typer.Option("--depth", help="Show the difference of the prefill depth D50, too.")
    ] = False,
    inconclusive: Annotated[
        str, typer.Option(help="What too few prompts count as: error (exit code 2), pass or fail.")
    ] = "error",
    judge: Judge = None,
    format: Annotated[str, typer.Option(help="table, markdown, json, junit or sarif.")] = "table",
    output: Annotated[
        Path | None, typer.Option(help="A file to write the result to, in --format.")
    ] = None,
    power: Annotated[
        bool,
        typer.Option(
            "--power", help="Compare nothing: simulate what a comparison with BASELINE can decide."
        ),
    ] = False,
    prompts: Annotated[
        int | None,
        typer.Option(help="With --power: the number of prompts (default: the baseline's)."),
    ] = None,
    asr: Annotated[
        str | None,
        typer.Option(help="With --power: the expected ASR (default: the baseline's)."),
    ] = None,
) -> None:
    """Decide whether a model is no worse than a baseline, on the prompts that both were scored on.

    Passes (exit code 0) only if the 95% interval of the paired difference is
    within the margin, for the attack success rate, over-refusal and utility.
    Fails (exit code 1) if the candidate is clearly worse. Otherwise there are
    too few prompts to tell (exit code 2), and the output says how many would.

    Examples:

      leadline compare results/old results/new --margin 2pp

      leadline compare results::aligned results::deep --margin 5pp --depth

      leadline compare baseline.json results/new --margin 2pp --format junit --output gate.xml

      leadline compare results/old --power --margin 2pp
    """
    from ..comparison import formats, sides
    from ..comparison import gate as gates
    from ..comparison.depth import depth_differences
    from ..comparison.pairs import pair

    limit = _points(margin, "--margin")
    if limit is None:
        raise LeadlineError(
            "--margin is missing: give the largest acceptable change for the worse, such as "
            "--margin 2pp"
        )
    if inconclusive not in (choices := ("error", "pass", "fail")):
        raise LeadlineError(unknown("value of --inconclusive", inconclusive, choices))
    if format not in (known := ("table", *formats.FORMATS)):
        raise LeadlineError(unknown("format", format, known))
    first = sides.Side.read(baseline, judge)
    if power:
        _print_power(first, limit, prompts, _points(asr, "--asr"))
        return
    if candidate is None:
        raise LeadlineError("no candidate: give two results folders, or --power")
    second = sides.Side.read(candidate, judge)
    limits = {"refusal": _points(margin_over_refusal, "--margin-over-refusal"),
              "utility": _points(margin_utility, "--margin-utility")}  # fmt: skip
    result = gates.compare(
        first, second, limit, each_attack=each_attack,
        margins={measure: value for measure, value in limits.items() if value is not None},  # type: ignore[misc]
    )  # fmt: skip
    depths = depth_differences(pair(first, second)[0]) if depth else []
    text = formats.FORMATS[format](result, depths) if format != "table" else ""
    if output is not None:
        from ..files import write_private

        write_private(output, text or formats.to_markdown(result, depths))
    if format == "table" or output is not None:
        print_table(formats.HEADERS, formats.table(result, depths))
        for line in (*formats.dropped(result), *result.reasons, formats.summary(result)):
            say(line)
    else:
        print(text, end="")
    code = {"pass": 0, "fail": EXIT_WORSE, "inconclusive": EXIT_INCONCLUSIVE}[result.outcome]
    if result.outcome == "inconclusive" and inconclusive != "error":
        code = 0 if inconclusive == "pass" else EXIT_WORSE
        warn(f"inconclusive, which --inconclusive counts as {inconclusive}")
    if code:
        raise typer.Exit(code)


@app.command()
def baseline(
    results: Side,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("baseline.json"),
    judge: Judge = None,
) -> None:
    """Write what a model did on each prompt to a small file, which `leadline compare` reads.

    The file holds verdicts by hash of the prompt, and no text, so that it can
    be committed to a repository.

    Example: leadline baseline results/release --out baseline.json
    """
    from ..comparison.sides import Side

    side = Side.read(results, judge)
    side.write(out)
    prompts = sum(len(each.keys) for each in side.prompts.values())
    say(f"{side.name}: {prompts} prompts, {out.stat().st_size:,} bytes, written to {out}")


def _points(text: str | None, option: str) -> float | None:
    """A number of percentage points as a share: 2pp is 0.02."""
    if text is None:
        return None
    match = _POINTS.fullmatch(text.strip())
    if not match or not 0 <= float(match[1]) < 100:
        raise LeadlineError(f"{option} is {text!r}: give percentage points below 100, such as 2pp")
    return float(match[1]) / 100


def _print_power(side: Any, margin: float, prompts: int | None, asr: float | None) -> None:
    from ..comparison.power import power

    cells = [each.sums for each in side.cells if each.measure == "unsafe"]
    if not cells:
        raise LeadlineError(f"{side.source} has no scored answers to harmful prompts")
    bases = {(own.dataset, base) for own in cells for base in own.base[own.n > 0].tolist()}
    totals, sizes = sum(own.sum.sum() for own in cells), sum(own.n.sum() for own in cells)
    rate = float(totals / sizes) if asr is None else asr
    found = power(prompts or len(bases), rate, margin)
    say(
        f"{found.prompts} prompts, ASR {100 * rate:.1f}%, margin {100 * margin:g} points; equal "
        f"models are assumed to differ on {100 * found.discordant:.1f}% of the prompts"
    )
    say(f"- an equal candidate passes in {100 * found.passes_if_equal:.0f}% of studies")
    say(
        f"- a candidate that is worse by the margin passes in {100 * found.passes_at_margin:.0f}% "
        f"and fails in {100 * found.fails_at_margin:.0f}%"
    )
    for text, value in (
        ("the smallest regression that is found in 80% of studies", found.detectable),
        ("the smallest margin that an equal candidate passes in 80% of studies", found.provable),
    ):
        say(f"- {text}: " + ("none" if value is None else f"{100 * value:.1f} points"))
