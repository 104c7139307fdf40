"""Accuracy of the refusal judge on hand-labelled answers, and its speed.

    python benchmarks/refusal_judge.py [--completions xstest_v2_completions_gpt4.csv ...]

Prints confusion matrices, precision and recall (with Wilson intervals) on this repository's own
labels (tests/data/outcomes.jsonl and refusals.jsonl) and, with `--completions`, on the completions
that XSTest publishes with human labels (partial refusals are left out).
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

LABELS = Path(__file__).parent.parent / "tests" / "data"
KINDS = ("complied", "refused", "off_topic", "degenerate")
XSTEST = {"1_full_compliance": "complied", "2_full_refusal": "refused"}
Pairs = list[tuple[str, str]]  # (label, verdict)


def wilson(hits: int, n: int, z: float = 1.96) -> str:
    """A share with its 95% Wilson interval: `0.950 [0.863, 0.983] (57/60)`."""
    if not n:
        return "no cases"
    p, spread = hits / n, z * sqrt(hits * (n - hits) / n + z * z / 4)
    low, high = ((hits + z * z / 2 + side * spread) / (n + z * z) for side in (-1, 1))
    return f"{p:.3f} [{low:.3f}, {high:.3f}] ({hits}/{n})"


def verdict_of(
    text: str, answer: str, prefix: str = "", sent: str = "", *, harmful: bool = True
) -> str:
    """The judge's verdict, one of `KINDS`."""
    prompt = Prompt("p", text, "labels", harmful=harmful)
    attempt = Attempt.ask(sent or text, prefix=ResponsePrefix(prefix) if prefix else None)
    verdict = refusal()(prompt, attempt, Response(answer, prefix=prefix))
    return str(verdict.outcome)


def own_labels(path: Path) -> dict[str, Pairs]:
    """Pairs of one of this repository's files of labels, by split. In refusals.jsonl, an answer
    that neither refuses nor complies counts as off-topic."""
    splits: dict[str, Pairs] = {}
    for row in map(json.loads, path.read_text("utf-8").strip().split("\n")):
        label = row.get("outcome") or (
            "refused" if row["refusal"] else "complied" if row["complies"] else "off_topic"
        )
        verdict = verdict_of(
            row["prompt"], row["answer"], row.get("prefix", ""), row.get("sent", "")
        )
        splits.setdefault(f"{path.name}, {row['split']}", []).append((label, verdict))
    return splits


def xstest(path: Path) -> Pairs:
    """Pairs of a file of XSTest completions, without partial refusals. Only prompts of the types
    "contrast_..." are harmful."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["final_label"] in XSTEST]
    return [
        (
            XSTEST[row["final_label"]],
            verdict_of(
                row["prompt"], row["completion"], harmful=row["type"].startswith("contrast")
            ),
        )
        for row in rows
    ]


def show(name: str, pairs: Pairs) -> None:
    """Print the confusion matrix, and precision and recall of each kind."""
    print(f"\n{name}: {len(pairs)} answers\n     label |" + "".join(f"{k:>11}" for k in KINDS))
    for label in KINDS:
        print(f"{label:>10} |" + "".join(f"{pairs.count((label, k)):11d}" for k in KINDS))
    for kind in KINDS:
        hits = pairs.count((kind, kind))
        print(f"{kind:>10} precision {wilson(hits, sum(j == kind for _, j in pairs))}")
        print(f"{kind:>10} recall    {wilson(hits, sum(k == kind for k, _ in pairs))}")
    useless = [verdict for label, verdict in pairs if label != "complied"]
    found = sum(verdict != "complied" for verdict in useless)
    print(f"answers that do not comply, found: {wilson(found, len(useless))}")


def speed() -> None:
    """Print the time of one verdict."""
    judge, prompt = refusal(), Prompt("p", "How do I brew the umbral tonic?", "labels")
    attempt = Attempt.ask(prompt.text)
    long = (
        "Pick seven petals after sunset, when the dew has settled, and crush them in a bowl of "
        "cold stone. Fold the paste into a spoon of black honey; it turns grey within a minute. "
        "Warm a cup of rainwater over a small flame, add a pinch of ash, and wait until thin smoke "
        "rises from it. Now pour both together, slowly, stirring to the left, and let the tonic "
        "stand behind a closed window for one night before anybody drinks from it."
    )
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
    parser.add_argument(
        "--labels", type=Path, nargs="*", help="JSON Lines files of labels (default: our own)",
        default=[LABELS / "outcomes.jsonl", LABELS / "refusals.jsonl"],
    )  # fmt: skip
    parser.add_argument(
        "--completions", type=Path, nargs="*", default=[], help="CSV files of XSTest completions"
    )
    options = parser.parse_args()
    for labels in options.labels:
        for split, pairs in own_labels(labels).items():
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
