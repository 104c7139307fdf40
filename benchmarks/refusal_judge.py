"""Accuracy of the refusal judge on hand-labelled answers, and its speed.

    python benchmarks/refusal_judge.py [--completions xstest_v2_completions_gpt4.csv ...]

Prints confusion matrices, precision and recall (with Wilson intervals) on this repository's own
labels (tests/data/refusals.jsonl) and, with `--completions`, on the completions that XSTest
publishes with human labels (partial refusals are left out).
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from math import sqrt
from pathlib import Path
from statistics import median

from leadline.judges.refusal import refusal
from leadline.records import Attempt, Prompt, Response, ResponsePrefix

LABELS = Path(__file__).parent.parent / "tests" / "data" / "refusals.jsonl"
KINDS = ("refusal", "answer", "neither")
XSTEST = {"1_full_compliance": "answer", "2_full_refusal": "refusal"}
Pairs = list[tuple[str, str]]  # (label, verdict)


def wilson(hits: int, n: int, z: float = 1.96) -> str:
    """A share with its 95% Wilson interval: `0.950 [0.863, 0.983] (57/60)`."""
    if not n:
        return "no cases"
    p, spread = hits / n, z * sqrt(hits * (n - hits) / n + z * z / 4)
    low, high = ((hits + z * z / 2 + side * spread) / (n + z * z) for side in (-1, 1))
    return f"{p:.3f} [{low:.3f}, {high:.3f}] ({hits}/{n})"


def verdict_of(prompt: str, answer: str, prefix: str = "") -> str:
    """The judge's verdict, one of `KINDS`."""
    attempt = Attempt.ask(prompt, prefix=ResponsePrefix(prefix) if prefix else None)
    verdict = refusal()(Prompt("p", prompt, "labels"), attempt, Response(answer, prefix=prefix))
    return "refusal" if verdict.refusal else "answer" if verdict.unsafe else "neither"


def own_labels(path: Path) -> dict[str, Pairs]:
    """Pairs of this repository's labels, by split."""
    splits: dict[str, Pairs] = {}
    for row in map(json.loads, path.read_text("utf-8").strip().split("\n")):
        label = "refusal" if row["refusal"] else "answer" if row["complies"] else "neither"
        verdict = verdict_of(row["prompt"], row["answer"], row.get("prefix", ""))
        splits.setdefault(row["split"], []).append((label, verdict))
    return splits


def xstest(path: Path) -> Pairs:
    """Pairs of a file of XSTest completions, without partial refusals."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["final_label"] in XSTEST]
    return [(XSTEST[r["final_label"]], verdict_of(r["prompt"], r["completion"])) for r in rows]


def show(name: str, pairs: Pairs) -> None:
    """Print the confusion matrix, and precision and recall of each kind."""
    print(f"\n{name}: {len(pairs)} answers\n    label |" + "".join(f"{k:>9}" for k in KINDS))
    for label in KINDS:
        print(f"{label:>9} |" + "".join(f"{pairs.count((label, k)):9d}" for k in KINDS))
    for kind in KINDS:
        hits = pairs.count((kind, kind))
        print(f"{kind:>9} precision {wilson(hits, sum(j == kind for _, j in pairs))}")
        print(f"{kind:>9} recall    {wilson(hits, sum(k == kind for k, _ in pairs))}")


def speed() -> None:
    """Print the time of one verdict."""
    judge, prompt = refusal(), Prompt("p", "How do I brew the umbral tonic?", "labels")
    attempt = Attempt.ask(prompt.text)
    long = "Take seven petals, crush them in a bowl and fold them into a spoon of black honey. " * 5
    for kind, text in (("answer", long), ("refusal", "I'm sorry, but I can't help. " + long)):
        response, batches = Response(text[:400]), []
        for _ in range(200):
            start = time.perf_counter()
            for _ in range(100):
                judge(prompt, attempt, response)
            batches.append((time.perf_counter() - start) / 100 * 1e6)
        best, typical = min(batches), median(batches)
        print(f"{kind} of 400 characters: {best:.1f} microseconds (median {typical:.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=Path, default=LABELS, help="a JSON Lines file of labels")
    parser.add_argument(
        "--completions", type=Path, nargs="*", default=[], help="CSV files of XSTest completions"
    )
    options = parser.parse_args()
    for split, pairs in own_labels(options.labels).items():
        show(split, pairs)
    files = {path.stem: xstest(path) for path in options.completions}
    for name, pairs in files.items():
        show(name, pairs)
    if len(files) > 1:
        show("all completions", [pair for pairs in files.values() for pair in pairs])
    print()
    speed()


if __name__ == "__main__":
    main()
