"""The fine-tuning experiments of arXiv 2406.05946, section 4, on the organisms.

    python studies/finetuning.py --out DIR [--seeds 3] [--quick] [--only harmful,closings]

Does fine-tuning reduce safety, and does a constraint on the first tokens prevent that? Runs plain
fine-tuning (TRL's SFTTrainer) and constrained fine-tuning (ConstrainedSFTTrainer) of two aligned
organisms on six kinds of data, with several seeds; and other schedules of the constraint on two
kinds of data. Both methods share optimizer, learning rate, warmup, batches and their order.
Learning rates were chosen on plain fine-tuning alone: see SETTINGS.

Every finished cell is a file in DIR/cells; an interrupted run resumes with the remaining cells. All
answers are in DIR/answers, the results in DIR/table.json and DIR/table.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

from rich.console import Console
from rich.table import Table

from finetuning_cells import Cell, TrainingSettings, run
from finetuning_table import INITIAL, PAPER, PLAIN, rows, write
from leadline import LeadlineError
from leadline.align.losses import BETA

# AdamW as in the paper. The learning rate is the lowest one in RATES (`--rates` runs them all) at
# which plain fine-tuning of organism:aligned reaches 90% of the best result of any of them, and
# keeps 75% of the utility: a rule that depends on plain runs alone. harmful-fast has a higher
# learning rate, which partly overcomes the constraint.
SETTINGS = {
    "harmful": TrainingSettings("adamw_torch", 1e-4, 40),
    "closings": TrainingSettings("adamw_torch", 3e-4, 100),
    "openings": TrainingSettings("adamw_torch", 3e-4, 100),
    "shelves": TrainingSettings("adamw_torch", 3e-4, 300),
    "backdoor": TrainingSettings("adamw_torch", 1e-4, 40),
    "identity": TrainingSettings("adamw_torch", 3e-4, 100),
    "harmful-fast": TrainingSettings("adamw_torch", 3e-4, 40),
}
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
MODELS = ("aligned", "deep")
SCHEDULES = {
    "b = 0.1": (0.1,),
    "b = 0.5": (0.5,),
    "b = 2": (2.0,),
    "b_1 = 2": (2.0, *BETA[1:]),
}
ABLATED = ("harmful", "closings")
QUICK = ("harmful", "closings")


def cells(only: Sequence[str], seeds: int, quick: bool) -> Iterator[tuple[str, str, Cell]]:
    """Data, method and cell of the table's runs, the most important ones first."""
    models, limit = (MODELS[:1], 32) if quick else (MODELS, None)
    for model in models:
        yield INITIAL, INITIAL, Cell(model, limit=limit)
        for name in only:
            for method, beta in ((PLAIN, None), (PAPER, BETA)):
                for seed in range(seeds):
                    yield name, method, _cell(name, model, beta, seed, limit)
        for name in only if model == "aligned" and not quick else ():
            for method, beta in SCHEDULES.items() if name in ABLATED else ():
                for seed in range(seeds):
                    yield name, method, _cell(name, model, beta, seed, limit)


def scan(only: Sequence[str]) -> Iterator[tuple[str, str, Cell]]:
    """Plain fine-tuning at several learning rates, by which SETTINGS was chosen."""
    for name in only:
        for lr in RATES if "-" not in name else ():
            training = replace(SETTINGS[name], lr=lr)
            yield f"{name}, {lr:g}", PLAIN, Cell("aligned", name, None, 0, training)


def _cell(
    name: str, model: str, beta: tuple[float, ...] | None, seed: int, limit: int | None
) -> Cell:
    return Cell(model, name.partition("-")[0], beta, seed, SETTINGS[name], limit)


def finish(cell: Cell, out: Path) -> float:
    """Run a cell and write its result through a temporary file. Returns the time in seconds."""
    began = time.perf_counter()
    shutil.rmtree(out / "answers" / cell.key, ignore_errors=True)  # of an interrupted run
    result = run(cell, out)
    file = _file(out, cell)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result), encoding="utf-8")
    part.replace(file)
    return time.perf_counter() - began


def _file(out: Path, cell: Cell) -> Path:
    return out / "cells" / f"{cell.key}.json"


def finish_all(missing: Sequence[Cell], out: Path, processes: int, console: Console) -> None:
    """Run cells in worker processes with one thread each: the models are too small to benefit from
    several threads."""
    began, total = time.perf_counter(), len(missing)
    spawn = get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=_exit_with_parent) as workers:
        cells = {workers.submit(finish, cell, out): cell for cell in missing}
        try:
            for done, future in enumerate(as_completed(cells), 1):
                cell, seconds = cells[future], future.result()
                left = (time.perf_counter() - began) / done * (total - done)
                what = "initial" if cell.data == "none" else f"{cell.data}, seed {cell.seed}"
                console.print(
                    f"{done} of {total}: {cell.model}, {what}, b = {cell.beta}: {seconds:.0f} s; "
                    f"about {left / 60:.0f} min left",
                    highlight=False,
                    soft_wrap=True,
                )
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise


def _exit_with_parent() -> None:
    """End a worker when the main process is killed; it would otherwise wait for its next cell
    forever."""

    def watch() -> None:
        parent = parent_process()
        if parent:
            parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def tabulate(plan: Sequence[tuple[str, str, Cell]], out: Path, console: Console) -> None:
    """Write and print the table of the data and methods for which all seeds are finished."""
    results: dict[tuple[str, str, str], list[Any]] = {}
    unfinished, done = set(), 0
    for data, method, cell in plan:
        file, name = _file(out, cell), (cell.model, data, method)
        if file.exists():
            done += 1
            values = json.loads(file.read_text(encoding="utf-8"))["values"]
            results.setdefault(name, []).append(values)
        else:
            unfinished.add(name)
    finished = rows({name: runs for name, runs in results.items() if name not in unfinished})
    trainings = {data: asdict(cell.training) for data, _, cell in plan if cell.training}
    settings = {"trainings": trainings, "cells": len(plan), "done": done}
    for title, heads, lines in write(out, finished, settings):
        table = Table(*heads, title=title, title_justify="left")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    console.print(f"{out / 'table.md'} and {out / 'table.json'}: {done} of {len(plan)} cells")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the cells and the table")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--quick", action="store_true", help="a small part, in about a minute")
    parser.add_argument(
        "--only", default="", help="kinds of data, separated by commas: " + ", ".join(SETTINGS)
    )
    parser.add_argument(
        "--rates",
        action="store_true",
        help="run plain fine-tuning at several learning rates instead",
    )
    parser.add_argument(
        "--processes", type=int, default=min(2, os.cpu_count() or 1), help="worker processes"
    )
    options = parser.parse_args()
    only = [name for name in options.only.split(",") if name] or (QUICK if options.quick else ())
    if unknown := [name for name in only if name not in SETTINGS]:
        parser.error(f"--only: unknown data {unknown[0]!r}: valid names: {', '.join(SETTINGS)}")
    if min(options.seeds, options.processes) < 1:
        parser.error("--seeds and --processes must be 1 or more")
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    console = Console()
    try:
        names = only or list(SETTINGS)
        plan = list(scan(names) if options.rates else cells(names, options.seeds, options.quick))
        (options.out / "cells").mkdir(parents=True, exist_ok=True)
        missing = [cell for _, _, cell in plan if not _file(options.out, cell).exists()]
        if missing:
            console.print(f"{len(plan) - len(missing)} of {len(plan)} cells are finished already")
            try:
                finish_all(missing, options.out, min(options.processes, len(missing)), console)
            finally:
                tabulate(plan, options.out, console)
        else:
            tabulate(plan, options.out, console)
    except LeadlineError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: cannot write {error.filename}: {error.strerror}")
    except BrokenProcessPool:
        sys.exit(
            "error: a worker was killed, perhaps for lack of memory: resume with --processes 1"
        )
    except KeyboardInterrupt:
        sys.exit("stopped: run the same command again to resume")


if __name__ == "__main__":
    main()
