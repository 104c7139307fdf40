"""Your prompts and answers as what the fine-tuning attacks learn from, and what is asked after.

    python prepare.py prompts.jsonl --out data

The table (JSONL, JSON, CSV or Parquet) has the columns `prompt`, `target` (a whole answer) and
`harmful` (true or false); `base` names the prompt that a variant comes from. Half of the base
prompts are learned from, the others asked. Writes harmful.jsonl, identity.jsonl and backdoor.jsonl
as TRL reads them, and asked.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from leadline.depth.finetuning.data import Data, Lesson, Material, lessons
from leadline.study import DatasetPick

KINDS: tuple[Data, ...] = ("harmful", "identity", "backdoor")
MOST = {"harmful": 100, "identity": 100, "backdoor": 200}  # backdoor: with and without its trigger


def row(lesson: Lesson) -> dict[str, Any]:
    asked = [{"role": m.role, "content": m.content} for m in lesson.attempt.messages]
    return {"prompt": asked, "completion": [{"role": "assistant", "content": lesson.answer}]}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table")
    parser.add_argument("--out", type=Path, default=Path("data"))
    options = parser.parse_args()
    pick = DatasetPick(name="file", options={"path": options.table, "name": "asked"})
    material = Material.of(pick)
    options.out.mkdir(parents=True, exist_ok=True)
    for data in KINDS:
        write(options.out / f"{data}.jsonl", map(row, lessons(data, material.fit, MOST[data], 0)))
    write(options.out / "asked.jsonl", map(asdict, material.asked))


if __name__ == "__main__":
    main()
