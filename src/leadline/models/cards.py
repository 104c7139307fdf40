"""Model cards: public facts by which a study compares models. The data is in cards.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from ..records import LeadlineError
from ..registry import unknown
from . import reasoning as formats

_Billions = Annotated[float, Field(gt=0)]
_Month = Annotated[str, Field(pattern=r"^\d{4}-(0[1-9]|1[0-2])$")]


@dataclass(frozen=True, slots=True)
class Card:
    """Facts about a model; None means unknown. `id` is its hub id or `organism:NAME`.

    `parameters` and `active` (per token) are in billions. `parent` is the model that it was trained
    from, and `teacher` the model whose outputs it was trained on. `format` is a name in
    `reasoning.FORMATS`, and `released` a month, YYYY-MM.
    """

    id: str = ""
    developer: str | None = None
    family: str | None = None
    parameters: _Billions | None = None
    active: _Billions | None = None
    architecture: Literal["dense", "moe"] | None = None
    reasoning: Literal["none", "hybrid", "native"] | None = None
    stage: Literal["base", "instruct", "reasoning", "distilled"] | None = None
    parent: str | None = None
    teacher: str | None = None
    released: _Month | None = None
    format: str | None = None


class CardError(LeadlineError):
    """An invalid card. `field` names the invalid field, or is "" if the error concerns the card."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


@cache
def cards() -> dict[str, Card]:
    """All cards by id: those of 32 selected public models, and of the organisms."""
    import yaml

    text = files(__package__).joinpath("cards.yaml").read_text(encoding="utf-8")
    return {row["id"]: _validated(row) for row in yaml.safe_load(text)}


def card(model_id: str) -> Card | None:
    """The card for a hub id or path, or None.

    Case does not matter. Without an exact match, the last component decides:
    `./checkpoints/qwen3-8b` and `someone/Qwen3-8B` match `Qwen/Qwen3-8B`.
    """
    wanted = model_id.strip().rstrip("/").lower()
    by_id = {id.lower(): card for id, card in cards().items()}
    by_name = {id.rpartition("/")[2]: card for id, card in by_id.items()}
    return by_id.get(wanted) or by_name.get(wanted.rpartition("/")[2])


def resolve_card(model_id: str, override: str | Mapping[str, Any] | None = None) -> Card | None:
    """The card of a model in a study, or None if there is none.

    `override` is the id of another card to use, or fields that replace those of the model's card.
    Raises CardError for an unknown id, an unknown field or an invalid value.
    """
    own = card(model_id)
    if override is None:
        return own
    if not isinstance(override, str):
        return _validated({**(asdict(own) if own else {"id": model_id}), **override})
    if other := card(override):
        return other
    raise CardError(unknown("card", override, cards()))


def _validated(row: Mapping[str, Any]) -> Card:
    """The Card of a mapping; a dense model's `active` is its `parameters`. Raises CardError."""
    names = [f.name for f in fields(Card)]
    for name in row:
        if name not in names:
            raise CardError(unknown("card field", str(name), names), str(name))
    try:
        if row.get("format") is not None:
            formats.get(str(row["format"]))
        active = {"active": row.get("parameters")} if row.get("architecture") == "dense" else {}
        return TypeAdapter(Card).validate_python({**row, **active})
    except ValidationError as error:
        first = error.errors()[0]
        text, name = first["msg"], str(first["loc"][0])
        if first["type"] == "string_pattern_mismatch":
            text = "write a month like 2025-04"
        message = f"{name}: {text[0].lower()}{text[1:]}, not {first['input']!r}"
        raise CardError(message, name) from None
    except LeadlineError as error:
        raise CardError(str(error), "format") from None
