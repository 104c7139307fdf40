"""The command `matters`: what goes with the safety of the models of a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._app import Json, app, print_table, say

if TYPE_CHECKING:
    from ..analysis.intervals import Interval
    from ..matters.answers import Answers


@app.command()
def matters(
    folder: Annotated[Path, typer.Argument(help="The results folder of a study.")],
    judge: Annotated[
        str | None,
        typer.Option(help="Use this judge's verdicts (default: each dataset's primary judge)."),
    ] = None,
    tables: Annotated[
        bool, typer.Option("--tables", help="Print the tables behind the sentences, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what goes with the safety of the models of a study: characteristics and attacks.

    Compares matched pairs of models prompt by prompt, regresses over models
    with their cards, ranks models and kinds of attack, and measures what
    response prefixes, jailbreaks and gradient search add to direct requests.
    Prints at most ten sentences, which the data support, and what could not be
    answered. Writes matters.json to the results folder.

    Examples:

      leadline matters results

      leadline matters results --tables
    """
    from ..files import write_private
    from ..matters.answers import what_matters

    found = what_matters(folder, judge)
    text = json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n"
    write_private(folder / "matters.json", text)
    if as_json:
        print(text, end="")
        return
    if tables:
        _print_tables(found)
    for sentence in found.sentences:
        say(f"- {sentence.text}")
    if found.unanswered:
        say("Not answered by this study:")
        for line in found.unanswered:
            say(f"- {line}")
    say(f"Numbers and intervals: {folder / 'matters.json'}")


def _print_tables(found: Answers) -> None:
    print_table(
        ("model, safest first", "ASR over shared attacks", "ranks it can hold"),
        [[row.name, _percent(row.rate), f"{row.first} to {row.last}"] for row in found.ranking],
    )
    print_table(
        ("matched pairs", "more", "less", "difference of ASR, points"),
        [[row.characteristic, row.more, row.less, _points(row.found.difference)]
         for row in found.matched],
    )  # fmt: skip
    print_table(
        ("characteristic", "log odds ratio", "Holm p", "by", "coverage", "power"),
        [[e.unit, "{:+.2f} [{:+.2f}, {:+.2f}]".format(*e.estimate), f"{e.p_holm:.3f}", e.kind,
          f"{e.coverage:.2f}", f"{e.power:.2f}"] for e in found.factors.effects],
    )  # fmt: skip
    print_table(
        ("technique", "models", "attacks", "ratio to direct", "difference, points"),
        [[t.name, str(t.models), str(t.attacks), "{:.2f} [{:.2f}, {:.2f}]".format(*t.ratio),
          _points(t.found.difference)] for t in found.techniques],
    )  # fmt: skip


def _percent(found: Interval) -> str:
    return "{:.1f}% [{:.1f}, {:.1f}]".format(*(100 * x for x in found))


def _points(found: Interval) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in found))
