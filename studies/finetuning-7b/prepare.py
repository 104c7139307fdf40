"""Make training data of fine-tuning attacks, and evaluation prompts, from your prompts and answers.

    python prepare.py prompts.jsonl --out data

The table (JSONL, JSON, CSV or Parquet) has the columns `prompt`, `target` (a complete answer) and
`harmful` (true or false); `base` names the prompt that a variant is derived from. Half of the base
prompts are trained on, the others are for evaluation. Writes harmful.jsonl, identity.jsonl and
backdoor.jsonl in TRL's format, and test.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from leadline.depth.finetuning.config import Data
from leadline.depth.finetuning.data import FinetuningPrompts, TrainingExample, training_examples
from leadline.study import DatasetPick

KINDS: tuple[Data, ...] = ("harmful", "identity", "backdoor")
LIMITS = {"harmful": 100, "identity": 100, "backdoor": 200}  # backdoor: with and without trigger


def row(example: TrainingExample) -> dict[str, Any]:
    """A training example in TRL's conversational prompt-completion format."""
    prompt = [{"role": m.role, "content": m.content} for m in example.attempt.messages]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": example.answer}]}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", help="a JSONL, JSON, CSV or Parquet file")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder (default: data)")
    options = parser.parse_args()
    pick = DatasetPick(name="file", options={"path": options.table, "name": "test"})
    prompts = FinetuningPrompts.of(pick)
    options.out.mkdir(parents=True, exist_ok=True)
    for data in KINDS:
        examples = training_examples(data, prompts.train, LIMITS[data], 0)
        write(options.out / f"{data}.jsonl", map(row, examples))
    write(options.out / "test.jsonl", map(asdict, prompts.test))


if __name__ == "__main__":
    main()
