"""The rows that `leadline list` prints: plug-ins of one kind; for models also the model cards."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from . import organism, registry
from .models.cards import Card, cards
from .records import LeadlineError

_MODEL_COLUMNS = ("name", "developer", "family", "size", "reasoning", "stage")


def rows(what: str) -> list[dict[str, Any]]:
    """One row per plug-in: name, family (attacks), rows and licence (datasets), summary, needs,
    source.

    `what` is "attacks", "datasets", "judges", "models" or "measures". For "models": the ways to
    reach a model, the organisms, and the model cards, with all fields of a card (`parameters` in
    billions). Raises LeadlineError for an unknown kind.
    """
    if what not in registry.KINDS:
        raise LeadlineError(registry.unknown("list", what, registry.KINDS))
    plugin_rows = [_row(plugin) for plugin in registry.plugins(registry.KINDS[what])]
    if what != "models":
        return plugin_rows
    blank: dict[str, Any] = {f.name: None for f in fields(Card) if f.name != "id"}
    blank |= {"family": "any", "size": ""}
    organisms = [f"organism:{name}" for name in organism.names()]
    listed = [cards().get(name, Card(name)) for name in organisms]
    listed += [card for name, card in cards().items() if not name.startswith("organism:")]
    return [blank | row for row in plugin_rows] + [_card(card) for card in listed]


def columns(what: str) -> tuple[str, ...]:
    """The fields of a row that the printed table shows."""
    return _MODEL_COLUMNS if what == "models" else tuple(rows(what)[0])


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
    fields_of_card = asdict(card)
    name = fields_of_card.pop("id")
    is_organism = name.startswith("organism:")
    origin = [f"from {card.parent}"] if card.parent else []
    origin += [f"by {card.teacher}"] if card.teacher else []
    return {
        "name": name,
        **fields_of_card,
        "size": _size(card),
        "summary": ", ".join(origin),
        "needs": ["leadline[local]"] if is_organism else [],
        "source": "leadline organism train" if is_organism else f"https://huggingface.co/{name}",
    }


def _size(card: Card) -> str:
    """`8.2B`, `365k`, or `30.5B (3.3B)` with the active parameters in parentheses."""
    if card.parameters is None:
        return ""
    if card.parameters < 0.001:
        return f"{card.parameters * 1e6:.0f}k"
    active = f" ({card.active:g}B)" if card.active and card.active != card.parameters else ""
    return f"{card.parameters:g}B{active}"
