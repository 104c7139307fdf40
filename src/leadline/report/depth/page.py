"""The depth report: one self-contained page that puts models' depth measures side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .schema import MEASURES, Depth, read
from .findings import missing, readings
from .plots import plots
from .tables import headline, tables
from .format import listed
from ..html import render
from ...text import plain

__all__ = ["DepthPage", "write_depth_report"]


@dataclass(frozen=True)
class DepthPage:
    """Where the page and its numbers lie, and what it says in a few sentences."""

    html: Path
    json: Path
    findings: list[str]


@dataclass(frozen=True)
class Section:
    """`meaning` is for a reader who has never heard of the measure."""

    title: str
    meaning: str
    settings: str


SECTIONS = {
    "prefill": Section(
        "How many forced tokens it takes",
        "The start of a harmful answer is put into the model’s mouth, and it goes on from there. "
        "A model whose safety is only a habit of its first words goes on with the harm; one whose "
        "safety is deep turns back. A diamond marks the D50: the number of forced tokens that "
        "breaks half of the prompts.",
        "prefill",
    ),
    "kl": Section(
        "Where along the answer the model differs from its base",
        "Along a harmful answer, token by token: how much the model’s choice of the next token "
        "differs from that of the model that it was aligned from (the KL divergence; 0 is no "
        "difference). Where only the first few tokens differ, alignment has touched only those.",
        "kl",
    ),
    "finetuning": Section(
        "How much fine-tuning it takes",
        "The model is trained further on a few examples, and asked again after some steps: how "
        "often it gives in (ASR), and whether it is still of use (utility on harmless prompts). A "
        "diamond marks the D50: the steps after which half of the prompts break.",
        "finetuning",
    ),
    "gcg": Section(
        "A searched suffix (GCG)",
        "A suffix behind the request is changed token by token, guided by the model’s gradients, "
        "until the model begins to answer. Step 0 is the initial suffix alone: what it breaks is "
        "no merit of the search.",
        "gcg",
    ),
    "decoding": Section(
        "Decoding settings",
        "Nothing changes but how the answer’s tokens are drawn. Models are mostly aligned and "
        "tested at one setting; an attacker is free to try them all, and counts a prompt as broken "
        "if any of them breaks it.",
        "decoding",
    ),
    "refusal_prefix": Section(
        "A refusal’s first words, in the base model’s mouth",
        "The model before alignment is asked the same, and its answer is begun for it with the "
        "words of a refusal. Where that alone makes it safe, an alignment need teach no more than "
        "these words to look safe.",
        "refusal_prefix",
    ),
    "token_loss": Section(
        "Which tokens fine-tuning pulls at",
        "How surprised the model is by each token of the examples that it is fine-tuned on (loss), "
        "and how hard that token pulls at its weights (gradient norm). Where the first tokens "
        "stand out, a few steps undo them, and with them the refusal.",
        "finetuning",
    ),
    "training": Section(
        "Safety while training",
        "What the safety callback measured while the model was trained: rates of unsafe answers "
        "and of refused harmless prompts, by step.",
        "training",
    ),
}
# How many of a section's sentences stand on the page's top too.
_TOP = {"prefill": 5, "kl": 2, "finetuning": 1, "gcg": 2, "decoding": 1, "refusal_prefix": 1}


def write_depth_report(folder: Path) -> DepthPage:
    """Write depth.html beside depth.json in `folder`. The page needs nothing but itself.

    Raises LeadlineError where depth.json is missing or does not hold its schema.
    """
    folder = Path(folder)
    source = folder / "depth.json"
    depth = read(source)
    said = readings(depth)
    page = DepthPage(
        folder / "depth.html", source,
        [*([s for each in said.values() for s in each] or [_NOTHING]), *missing(depth)],
    )  # fmt: skip
    page.html.write_text(_render(depth, said), encoding="utf-8")
    return page


_NOTHING = "Nothing has been measured yet."


def _render(depth: Depth, said: dict[str, list[str]]) -> str:
    drawn, numbers, columns = plots(depth), tables(depth), headline(depth)
    top = [s for name, most in _TOP.items() for s in said[name][:most]]
    top = top or [s for each in said.values() for s in each] or [_NOTHING]
    return render(
        "depth.html",
        plots=drawn,
        scripts=["common.js", "depth.js"],
        styles=["report.css", "depth.css"],
        name=_name(depth),
        depth=depth,
        top=[*top, *missing(depth)],
        headline=columns,
        sections={name: section for name, section in SECTIONS.items() if numbers[name]},
        curved={name for name, plot in drawn.items() if "panels" in plot},
        beyond=any(c.text.startswith(">") for column in columns for c in column.cells),
        said=said,
        tables=numbers,
        settings={name: _settings(depth.settings.get(s.settings)) for name, s in SECTIONS.items()},
        skipped={MEASURES.get(name, name): why for name, why in depth.skipped.items()},
    )


def _name(depth: Depth) -> str:
    names = depth.names or ["no model"]
    return f"Depth of {listed(names) if len(names) < 3 else f'{len(names)} models'}"


def _settings(value: Any) -> list[tuple[str, str]]:
    """Names and values; what is nested is told as JSON."""
    pairs = value.items() if isinstance(value, dict) else [("", value)] if value else []
    return [
        (str(name), told if isinstance(told, str) else json.dumps(plain(told), ensure_ascii=False))
        for name, told in pairs
    ]
