"""The fine-tuning experiments of arXiv 2406.05946, section 4, on the organisms.

    python studies/finetuning.py --out DIR [--seeds 3] [--quick] [--only harmful,closings]

Does fine-tuning cost safety, and does holding the first tokens to the aligned model save it? Both
organisms that refuse, six kinds of data, plain fine-tuning (TRL's SFTTrainer) against constrained
(ConstrainedSFTTrainer), several seeds, and other schedules of the constraint on two kinds of data.
Both ways share optimizer, learning rate, warmup, batches and their order. Learning rates were
chosen on plain fine-tuning alone: see TRAININGS.

Every finished cell is a file under DIR/cells; a run that was stopped goes on with the others. All
answers lie in DIR/answers, the results in table.json and table.md.
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

from finetuning_cells import Cell, Training, run
from finetuning_table import INITIAL, PAPER, PLAIN, rows, write
from rich.console import Console
from rich.table import Table

from leadline import LeadlineError
from leadline.align.losses import BETA

# AdamW as in the paper. Of the learning rates in RATES (`--rates` runs them), the lowest with which
# plain fine-tuning of organism:aligned learns nine tenths of the most that any of them teaches it
# while it keeps three quarters of its utility: a rule that looks at plain runs alone. That a
# higher one overcomes the constraint shows in harmful-fast.
TRAININGS = {
    "harmful": Training("adamw_torch", 1e-4, 40),
    "closings": Training("adamw_torch", 3e-4, 100),
    "openings": Training("adamw_torch", 3e-4, 100),
    "shelves": Training("adamw_torch", 3e-4, 300),
    "backdoor": Training("adamw_torch", 1e-4, 40),
    "identity": Training("adamw_torch", 3e-4, 100),
    "harmful-fast": Training("adamw_torch", 3e-4, 40),
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
    """The data, the method and the cell of each; what matters most comes first."""
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
    """Plain fine-tuning at several learning rates: what TRAININGS was chosen by."""
    for name in only:
        for lr in RATES if "-" not in name else ():
            how = replace(TRAININGS[name], lr=lr)
            yield f"{name}, {lr:g}", PLAIN, Cell("aligned", name, None, 0, how)


def _cell(
    name: str, model: str, beta: tuple[float, ...] | None, seed: int, limit: int | None
) -> Cell:
    return Cell(model, name.partition("-")[0], beta, seed, TRAININGS[name], limit)


def finish(cell: Cell, out: Path) -> float:
    """Run a cell and write down what was found, whole or not at all. Returns its seconds."""
    began = time.perf_counter()
    shutil.rmtree(out / "answers" / cell.key, ignore_errors=True)  # of a run that was stopped
    found = run(cell, out)
    file = _file(out, cell)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found), encoding="utf-8")
    part.replace(file)
    return time.perf_counter() - began


def _file(out: Path, cell: Cell) -> Path:
    return out / "cells" / f"{cell.key}.json"


def finish_all(missing: Sequence[Cell], out: Path, processes: int, say: Console) -> None:
    """Cells in worker processes of one thread each: the matrices are too small to share."""
    began, total = time.perf_counter(), len(missing)
    spawn = get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=_end_with_parent) as workers:
        waiting = {workers.submit(finish, cell, out): cell for cell in missing}
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                cell, seconds = waiting[future], future.result()
                left = (time.perf_counter() - began) / done * (total - done)
                how = "as it is" if cell.data == "none" else f"on {cell.data}, seed {cell.seed}"
                say.print(
                    f"{done} of {total}: {cell.model} {how}, b = {cell.beta}: {seconds:.0f} s; "
                    f"about {left / 60:.0f} min left",
                    highlight=False,
                    soft_wrap=True,
                )
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """A worker would wait for ever for the next cell of a driver that was killed."""

    def watch() -> None:
        parent = parent_process()
        if parent:
            parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def tabulate(plan: Sequence[tuple[str, str, Cell]], out: Path, say: Console) -> None:
    """Whatever is finished; a row for each cell whose seeds all are."""
    found: dict[tuple[str, str, str], list[Any]] = {}
    waiting, done = set(), 0
    for data, method, cell in plan:
        file, name = _file(out, cell), (cell.model, data, method)
        if file.exists():
            done += 1
            values = json.loads(file.read_text(encoding="utf-8"))["values"]
            found.setdefault(name, []).append(values)
        else:
            waiting.add(name)
    made = rows({name: runs for name, runs in found.items() if name not in waiting})
    used = {data: asdict(cell.training) for data, _, cell in plan if cell.training}
    settings = {"trainings": used, "cells": len(plan), "done": done}
    for title, heads, lines in write(out, made, settings):
        table = Table(*heads, title=title, title_justify="left")
        for line in lines:
            table.add_row(*line)
        say.print(table)
    say.print(f"{out / 'table.md'} and {out / 'table.json'}: {done} of {len(plan)} cells")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of cells and table")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a small slice, in about a minute")
    parser.add_argument("--only", default="", help="some of: " + "; ".join(TRAININGS))
    parser.add_argument("--rates", action="store_true", help="scan learning rates instead")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    only = [name for name in options.only.split(",") if name] or (QUICK if options.quick else ())
    if unknown := [name for name in only if name not in TRAININGS]:
        parser.error(f"no data called {unknown[0]!r}: it can be {', '.join(TRAININGS)}")
    if min(options.seeds, options.processes) < 1:
        parser.error("--seeds and --processes are 1 or more")
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    say = Console()
    try:
        every = only or list(TRAININGS)
        plan = list(scan(every) if options.rates else cells(every, options.seeds, options.quick))
        (options.out / "cells").mkdir(parents=True, exist_ok=True)
        missing = [cell for _, _, cell in plan if not _file(options.out, cell).exists()]
        if missing:
            say.print(f"{len(plan) - len(missing)} of {len(plan)} cells are here already")
            try:
                finish_all(missing, options.out, min(options.processes, len(missing)), say)
            finally:
                tabulate(plan, options.out, say)
        else:
            tabulate(plan, options.out, say)
    except LeadlineError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: cannot write {error.filename}: {error.strerror}")
    except BrokenProcessPool:
        sys.exit("error: a worker was killed, perhaps for memory: go on with --processes 1")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on")


if __name__ == "__main__":
    main()
