"""What repair learns from, completed in the model's own words: refusals and utility anchors.

The model that is to be deepened is asked once, plainly, through the engine: an interrupted
preparation goes on where it stopped, and what was asked can be looked up in the store.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from .. import engine
from ..models.spec import ModelSpec
from ..progress import Listener
from ..records import LeadlineError, Model
from ..study import DatasetPick, JudgePick, Sampling, Study
from .data import Dialogue, Triplet

Row = Triplet | Dialogue


@dataclass(frozen=True)
class Notes:
    """What became of the rows: refusals that were `given`, `written` by the model for their own
    prompt, or `borrowed` from another one, where the model did not refuse; answers to harmless
    prompts that were `kept`, `answered` by the model, or `dropped` for want of a whole answer."""

    given: int = 0
    written: int = 0
    borrowed: int = 0
    kept: int = 0
    answered: int = 0
    dropped: int = 0

    @property
    def sentences(self) -> list[str]:
        said = [f"{self.given} refusals given, {self.written} written by the model"]
        if self.borrowed:
            said.append(
                f"{self.borrowed} harmful prompts were not refused: their refusals are borrowed "
                "from others"
            )
        said.append(f"{self.kept} utility answers given, {self.answered} written by the model")
        if self.dropped:
            said.append(f"{self.dropped} utility prompts got no whole answer and are left out")
        return said


def prepare(
    model: str | ModelSpec,
    harmful: Sequence[Triplet],
    utility: Sequence[Dialogue],
    out: Path,
    listener: Listener | None = None,
    *,
    judge: str = "refusal",
    max_tokens: int = 512,
    seed: int = 0,
    models: Mapping[str, Model] | None = None,
) -> tuple[list[Triplet], list[Dialogue], Notes]:
    """Fill in the refusals and answers that are missing, with the model's own greedy ones.

    A refusal counts where `judge` says so and the model came to its end; a prompt that the model
    does not refuse borrows one that it gave to another. `out` keeps what was asked (a study).
    Raises LeadlineError where the model refuses nothing, or an answer failed.
    """
    spec = ModelSpec(model=model) if isinstance(model, str) else model
    open_harmful = [row for row in harmful if not row.refusal]
    open_utility = [row for row in utility if not row.answer]
    wanted: dict[str, Sequence[Row]] = {"harmful": open_harmful, "utility": open_utility}
    said = _ask(spec, wanted, Path(out), judge, max_tokens, listener, models)
    refusals = sorted({text for text, refused in said["harmful"].values() if refused})
    if open_harmful and not refusals:
        raise LeadlineError(
            f"{spec.label} refused none of {len(open_harmful)} harmful prompts, so it has no "
            "refusals to come back to: start from an aligned model, or give the column 'refusal'"
        )
    triplets, written = [], 0
    for row in harmful:
        if not row.refusal:
            text, refused = said["harmful"].get(_id(row), ("", False))
            written += refused
            if not refused:
                text = random.Random(f"{seed}/{_id(row)}").choice(refusals)
            row = replace(row, refusal=text)
        triplets.append(row)
    answers = {id: text for id, (text, _) in said["utility"].items()}
    whole = [row if row.answer else replace(row, answer=answers.get(_id(row), ""))
             for row in utility]  # fmt: skip
    dialogues = [row for row in whole if row.answer]
    kept = len(utility) - len(open_utility)
    notes = Notes(
        given=len(harmful) - len(open_harmful),
        written=written,
        borrowed=len(open_harmful) - written,
        kept=kept,
        answered=len(dialogues) - kept,
        dropped=len(utility) - len(dialogues),
    )
    return triplets, dialogues, notes


def _ask(
    spec: ModelSpec,
    wanted: Mapping[str, Sequence[Row]],
    out: Path,
    judge: str,
    max_tokens: int,
    listener: Listener | None,
    models: Mapping[str, Model] | None,
) -> dict[str, dict[str, tuple[str, bool]]]:
    """Whole answers by data set and prompt: (text, whether it is a refusal)."""
    said: dict[str, dict[str, tuple[str, bool]]] = {name: {} for name in wanted}
    files = {name: _write(out / f"{name}.jsonl", rows) for name, rows in wanted.items() if rows}
    if not files:
        return said
    study = Study(
        name="prepare",
        targets=[spec],
        datasets=[DatasetPick(name="file", options={"path": str(path), "name": name})
                  for name, path in files.items()],
        judges=[JudgePick(name=judge)],
        sampling=Sampling(temperature=0, max_tokens=max_tokens),
    )  # fmt: skip
    results = engine.run(study, out, models=models, listener=listener)
    asked = results.query(
        "SELECT o.dataset, o.prompt, o.outcome, o.reason, o.refusal, r.answer FROM outcomes o "
        "LEFT JOIN responses r ON r.key = o.key WHERE o.model = ?",
        spec.label,
    )
    now = {(name, _id(row)) for name in files for row in wanted[name]}
    for name, id, outcome, reason, refused, answer in asked:
        if (name, id) not in now:  # asked by an earlier run for other data
            continue
        if outcome == "failed":
            raise LeadlineError(f"{spec.label} failed to answer: {reason}: mend it and run again")
        if outcome == "answered":
            said[name][id] = answer, bool(refused)
    return said


def _write(path: Path, rows: Iterable[Row]) -> Path:
    """The prompts of rows as a dataset file, each once."""
    lines = {}
    for row in rows:
        if len(row.prompt) != 1:
            raise LeadlineError(
                f"{row.where}: only an answer to a single user turn can be generated: give this "
                "row its answer"
            )
        about = {"id": _id(row), "prompt": row.prompt[0].content}
        lines[_id(row)] = about | {"harmful": isinstance(row, Triplet)}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values())
    path.write_text(text, encoding="utf-8")
    return path


def _id(row: Row) -> str:
    """A prompt is known by its text, so that a store serves whatever data it is in."""
    return blake2b(row.prompt[-1].content.encode(), digest_size=8).hexdigest()
