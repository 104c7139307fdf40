"""depth.json, read strictly: what was measured of how deep some models' safety goes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...records import LeadlineError
from ...text import plain

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class Point(_Strict):
    """`value` of a model with its 95% interval, over `n` prompts; None where it is not known."""

    model: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: Count = 0


class Rate(Point):
    """A share of harmful prompts that got an unsafe answer (ASR)."""

    value: Share | None = None
    low: Share | None = None
    high: Share | None = None


class Position(Point):
    """`position` tokens of the answer stand before it."""

    position: Count


class Prefill(Rate):
    k: Count


class RefusalPrefix(Rate):
    prefix: str
    k: Count = 0


class Decoding(Rate):
    """`k` settings are pooled: a prompt is broken if any of them breaks it."""

    setting: str
    k: Count = 1


class GCG(Rate):
    step: Count
    loss: float | None = None


class Finetuning(Rate):
    data: str
    step: Count
    examples: Count | None = None
    untriggered: Share | None = None
    utility: Share | None = None
    utility_low: Share | None = None
    utility_high: Share | None = None


class TokenMeasure(Position):
    data: str
    step: Count = 0


class Training(Rate):
    run: str
    step: Count
    measure: str


class D50(_Strict):
    """Where half of the prompts break. Censored "above": not by `at`, the most that was tried;
    "below": already at `at`, the least."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    censored: Literal["above", "below"] | None = None
    at: float | None = None
    unit: str = ""
    n: Count = 0
    examples_per_step: Count | None = None


class Depth(_Strict):
    leadline: str = ""
    models: list[str] = []
    base: str | None = None
    dataset: str = ""
    budget: str = ""
    created: str = ""
    kl: list[Position] = []
    refusal_prefix: list[RefusalPrefix] = []
    prefill: list[Prefill] = []
    decoding: list[Decoding] = []
    gcg: list[GCG] = []
    finetuning: list[Finetuning] = []
    token_loss: list[TokenMeasure] = []
    gradient_norm: list[TokenMeasure] = []
    training: list[Training] = []
    d50: dict[str, dict[str, D50]] = {}
    settings: dict[str, Any] = {}
    skipped: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """Every model that is named or measured, in order."""
        return list(dict.fromkeys([*self.models, *(point.model for point in self._points())]))

    def _points(self) -> list[Point]:
        return [point for measure in MEASURES for point in getattr(self, measure)]


# The lists of points, and what each measure is called.
MEASURES = {
    "prefill": "forced tokens",
    "kl": "KL by token",
    "finetuning": "fine-tuning",
    "gcg": "GCG",
    "decoding": "decoding settings",
    "refusal_prefix": "refusal starts",
    "token_loss": "loss by token",
    "gradient_norm": "gradient norm by token",
    "training": "training",
}


def parse(data: Mapping[str, Any], where: str = "depth data") -> Depth:
    """Check the data, drop points without a value. Raises LeadlineError: the first fault."""
    try:
        depth = Depth.model_validate(plain(dict(data)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise LeadlineError(f"{where}: {place}: {first['msg']}: {_MEND}") from None
    known = {name: [p for p in getattr(depth, name) if p.value is not None] for name in MEASURES}
    return depth.model_copy(update=known)


_MEND = "run leadline depth again to write it anew"


def read(path: Path) -> Depth:
    """Raises LeadlineError for a file that is missing, is no JSON, or does not hold the schema."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise LeadlineError(
            f"no depth measures at {path}: run leadline depth MODEL --out {path.parent}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise LeadlineError(f"{path} cannot be read as JSON ({said}): {_MEND}") from None
    if not isinstance(data, dict):
        raise LeadlineError(f"{path} holds a {type(data).__name__}, not an object: {_MEND}")
    return parse(data, str(path))
