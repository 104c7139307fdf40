"""What `leadline list` prints: every plug-in of a kind, as rows; for models their cards as well."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from . import organism, registry
from .models.cards import Card, cards
from .records import LeadlineError

_OF_MODELS = ("name", "developer", "family", "size", "reasoning", "stage")


def rows(what: str) -> list[dict[str, Any]]:
    """One row per plug-in: name, family (attacks), rows (datasets), summary, needs, source.

    Of models: the ways to reach one, the organisms, and the cards, with all that a card says
    (parameters in billions).
    """
    if what not in registry.KINDS:
        raise LeadlineError(registry.unknown("list", what, registry.KINDS))
    found = [_row(plugin) for plugin in registry.plugins(registry.KINDS[what])]
    if what != "models":
        return found
    blank: dict[str, Any] = {f.name: None for f in fields(Card) if f.name != "id"}
    blank |= {"family": "any", "size": ""}
    ours = [f"organism:{name}" for name in organism.names()]
    known = [cards().get(name, Card(name)) for name in ours]
    known += [card for name, card in cards().items() if not name.startswith("organism:")]
    return [blank | row for row in found] + [_card(card) for card in known]


def columns(what: str) -> tuple[str, ...]:
    """The fields of a row that a table shows."""
    return _OF_MODELS if what == "models" else tuple(rows(what)[0])


def _row(plugin: registry.Plugin) -> dict[str, Any]:
    row: dict[str, Any] = {"name": plugin.name}
    if isinstance(plugin, registry.AttackPlugin):
        row["family"] = plugin.family
    if isinstance(plugin, registry.DatasetPlugin):
        row |= {"rows": plugin.rows, "licence": plugin.licence}
    return row | {
        "summary": plugin.summary,
        "needs": list(plugin.needs),
        "source": plugin.source,
    }


def _card(card: Card) -> dict[str, Any]:
    known = asdict(card)
    name = known.pop("id")
    ours = name.startswith("organism:")
    origin = [f"from {card.parent}"] if card.parent else []
    origin += [f"by {card.teacher}"] if card.teacher else []
    return {
        "name": name,
        **known,
        "size": _size(card),
        "summary": ", ".join(origin),
        "needs": ["leadline[local]"] if ours else [],
        "source": "leadline organism train" if ours else f"https://huggingface.co/{name}",
    }


def _size(card: Card) -> str:
    """`8.2B`; `30.5B (3.3B)`, the active parameters in brackets; `365k`."""
    if card.parameters is None:
        return ""
    if card.parameters < 0.001:
        return f"{card.parameters * 1e6:.0f}k"
    active = f" ({card.active:g}B)" if card.active and card.active != card.parameters else ""
    return f"{card.parameters:g}B{active}"
