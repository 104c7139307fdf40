"""Stores for tests, written with the public interface of `Store`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leadline.records import Outcome, Prompt, Response, Verdict
from leadline.store import Place, Store


@dataclass(frozen=True)
class Row:
    """One trial: by default answered and judged safe, with unknown refusal."""

    prompt: str
    unsafe: bool | None = False
    refusal: bool | None = None
    utility: float | None = None
    model: str = "toy"
    thinking: str = "default"
    dataset: str = "guild"
    attack: str = "direct"
    sample: int = 0
    harmful: bool = True
    base: str = ""
    text: str = ""
    target: str = ""
    outcome: str = "answered"
    reason: str = ""
    answer: str = ""
    thought: str = ""
    prefix: str = ""
    judge: str = "guild"
    verdict: Outcome = ""
    caution: str = ""


def write_store(folder: Path, rows: Iterable[Row], **meta: Any) -> Store:
    """A store with these trials, opened read-only. A dataset's first judge is its primary one."""
    primary: set[str] = set()
    with Store(folder, write=True) as store:
        for name, value in meta.items():
            store.describe(name, value)
        rows = list(rows)
        ids = store.prompt_ids(
            {
                (r.dataset, r.prompt): Prompt(
                    r.prompt,
                    r.text or f"How do I brew the {r.prompt}?",
                    r.dataset,
                    "potion",
                    r.harmful,
                    target=r.target,
                    base=r.base,
                )
                for r in rows
            }.values()
        )
        for r in rows:
            cell = store.cell_id(r.model, r.thinking, r.dataset, r.attack)
            place = Place(cell, ids[r.dataset, r.prompt], r.sample)
            key = hashlib.blake2b(repr((place, r.answer)).encode(), digest_size=16).digest()
            judge = store.judge_id(r.judge, {}, r.caution)
            if r.dataset not in primary:
                store.primary_judge(r.dataset, judge)
                primary.add(r.dataset)
            if r.outcome in ("failed", "not_applicable"):
                store.put_trial(place, b"", r.outcome, r.reason)
                continue
            store.put_response(key, "{}", Response(r.answer, r.thought, prefix=r.prefix))
            store.put_trial(place, key, r.outcome, r.reason)
            verdict = Verdict(r.unsafe, r.refusal, None, r.utility, outcome=r.verdict)
            store.put_verdict(place, judge, verdict)
    return Store(folder)
