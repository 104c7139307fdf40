"""The schema of depth.json: the depth measures of one or more models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ... import registry
from ...records import LeadlineError
from ...text import plain

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
_AGAIN = "run leadline depth again to rewrite it"


class Strict(BaseModel):
    """A base class: instances are frozen, and numbers must be finite."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class Point(Strict):
    """A value of one model over `n` prompts, with its 95% interval; None where not known.

    The points of a measure derive from this class and add fields such as the dose or position.
    """

    model: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: Count = 0

    @property
    def known(self) -> float:
        """The value as a float. `parse` drops points without a value; for those it is 0."""
        return 0.0 if self.value is None else self.value

    @property
    def direct(self) -> bool:
        """Whether this is the ASR of direct requests to the unchanged model."""
        return False


class Rate(Point):
    """An attack success rate (ASR): the share of `n` harmful prompts with an unsafe answer."""

    value: Share | None = None
    low: Share | None = None
    high: Share | None = None


class Position(Point):
    """A mean over answers at one token position, counted from 0."""

    position: Count


class D50(Strict):
    """The dose at which half of `n` prompts are broken, in `unit`s (tokens, steps).

    Nothing is extrapolated: `value` is None where D50 is above the largest dose tried (`censored`
    "above"), or at or below the smallest ("below"); `at` is that dose, otherwise the largest dose.
    `low` and `high` are a 95% interval; None where an end is outside of the doses tried.
    `first_passage` is the dose at which half of the prompts have been broken by that dose or a
    smaller one. `note` is the reason where D50 is not defined; empty otherwise.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    censored: Literal["above", "below"] | None = None
    at: int | float | None = None
    unit: str = ""
    n: Count = 0
    examples_per_step: Count | None = None
    first_passage: float | None = None
    first_passage_low: float | None = None
    first_passage_high: float | None = None
    note: str = ""


P = TypeVar("P", bound=Point)


class Depth(Strict):
    """The content of depth.json. `points` holds the lists of points of every registered measure
    (top-level keys of the file), `d50` is by model and measure, `skipped` by measure."""

    leadline: str = ""
    models: list[str] = []
    base: str | None = None
    dataset: str = ""
    budget: str = ""
    created: str = ""
    points: dict[str, list[Any]] = {}
    d50: dict[str, dict[str, D50]] = {}
    settings: dict[str, Any] = {}
    skipped: dict[str, str] = {}

    def of(self, name: str, kind: type[P], model: str | None = None) -> list[P]:
        """The points of the list `name`, whose type is `kind`; with `model`, only that model's."""
        points = cast(list[P], self.points.get(name, []))
        return points if model is None else [p for p in points if p.model == model]

    @property
    def names(self) -> list[str]:
        """`models`, followed by other models that have points."""
        measured = (point.model for points in self.points.values() for point in points)
        return list(dict.fromkeys([*self.models, *measured]))

    def having(self, points: Iterable[Point]) -> list[str]:
        """The models that have any of these points, in the order of `names`."""
        found = {point.model for point in points}
        return [name for name in self.names if name in found]

    def direct(self, model: str) -> Point | None:
        """The ASR of direct requests, from the first measure that has it; None where none has."""
        points = (point for each in self.points.values() for point in each)
        return next((point for point in points if point.direct and point.model == model), None)


def sections() -> list[registry.Section]:
    """The sections of every registered measure, in the order of the page."""
    return [section for plugin in registry.plugins("measure") for section in plugin.sections]


def parse(data: Mapping[str, Any], where: str = "depth data") -> Depth:
    """Validate the content of depth.json, and drop points without a value.

    Raises LeadlineError with the first invalid field; `where` is the start of its message.
    """
    data = plain(dict(data))
    lists = {name: kind for section in sections() for name, kind in section.points.items()}
    points: dict[str, list[Any]] = {}
    name = ""
    try:
        for name, kind in lists.items():
            adapter: TypeAdapter[list[Any]] = TypeAdapter(list[kind])  # type: ignore[valid-type]
            read = adapter.validate_python(data.get(name, []))
            points[name] = [point for point in read if point.value is not None]
        name = ""
        rest = {key: value for key, value in data.items() if key in Depth.model_fields}
        return Depth.model_validate({**rest, "points": points})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in (*([name] if name else []), *first["loc"]))
        raise LeadlineError(f"{where}: {field}: {first['msg']}: {_AGAIN}") from None


def read_depth(path: Path) -> Depth:
    """Read depth.json. Raises LeadlineError for a file that is missing, is not JSON, or does not
    match the schema."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise LeadlineError(
            f"no depth measures at {path}: run leadline depth MODEL --out {path.parent}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise LeadlineError(f"{path} cannot be read as JSON ({reason}): {_AGAIN}") from None
    if not isinstance(data, dict):
        raise LeadlineError(f"{path} contains a {type(data).__name__}, not an object: {_AGAIN}")
    return parse(data, str(path))
