"""The commands `organism data` and `organism train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ._app import app, say

organism_app = typer.Typer(
    no_args_is_help=True, help="Tiny models of an invented world: training them, and their data."
)
app.add_typer(organism_app, name="organism")


@organism_app.command("data")
def organism_data(
    out: Annotated[Path, typer.Option(help="The folder to write the files to.")] = Path("guild"),
) -> None:
    """Write training data of the invented world, to try `deepen` and `finetune` on.

    Example: leadline organism data --out guild
    """
    from ..organism.files import guild_files

    for file in guild_files(out).values():
        say(file)


@organism_app.command()
def train(
    out: Annotated[Path, typer.Option(help="The folder to write the models to.")] = Path(
        "organisms"
    ),
    seed: Annotated[
        int, typer.Option(help="The random seed. The same seed gives the same weights.")
    ] = 0,
) -> None:
    """Train the organisms (base, aligned, deep, reasoner) on the CPU. This takes some minutes.

    Example: leadline organism train --out organisms --seed 1
    """
    from rich.progress import Progress as Bars

    from ..organism.train import train as train_organisms

    with Bars() as bars:
        tasks: dict[str, Any] = {}

        def listen(stage: str, step: int, steps: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=steps)
            bars.update(tasks[stage], completed=step)

        folders = train_organisms(out, seed=seed, progress=listen)
    for name, folder in folders.items():
        say(f"{name}: {folder}")
