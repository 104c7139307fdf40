"""The one plug-in mechanism: a decorator registers a function under a name.

    @attack("rot_13", family="encoding", source="Wei et al. 2023")
    def rot_13(prompt: Prompt) -> str: ...

Our own plug-ins are the modules of `leadline/{attacks,datasets,judges,models}` and
`leadline/depth/measures`; third-party packages name theirs under the entry-point group `leadline`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, overload

from .records import LeadlineError, Prompt

Kind = Literal["attack", "dataset", "judge", "model", "measure"]
KINDS: Mapping[str, Kind] = {
    "attacks": "attack",
    "datasets": "dataset",
    "judges": "judge",
    "models": "model",
    "measures": "measure",
}
"""The kinds of plug-ins, by the plural that `leadline list` takes."""

_PACKAGES: dict[Kind, str] = {
    "attack": "attacks",
    "dataset": "datasets",
    "judge": "judges",
    "model": "models",
    "measure": "depth.measures",
}


@dataclass(frozen=True)
class Plugin:
    """A registered function and what users are told about it.

    `needs` says what it cannot run without ("response_prefix", "attacker", "model", "base", ...).
    """

    kind: ClassVar[Kind]
    name: str
    function: Callable[..., Any]
    source: str
    needs: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The first paragraph of the function's docstring, as one line."""
        return (inspect.getdoc(self.function) or "").split("\n\n")[0].replace("\n", " ")

    @property
    def group(self) -> str:
        """What plug-ins of one kind are sorted by before their names."""
        return ""

    @cached_property
    def options(self) -> dict[str, Any]:
        """Keyword-only parameters of the function, which a study file may set, with defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


@dataclass(frozen=True)
class AttackPlugin(Plugin):
    """See `attack`."""

    kind = "attack"
    family: str
    decode: Callable[..., str | Awaitable[str]] | None
    battery: str
    pool: Literal["one", "any"]

    @property
    def group(self) -> str:
        return self.family


@dataclass(frozen=True)
class DatasetPlugin(Plugin):
    """See `dataset`."""

    kind = "dataset"
    judge: str
    licence: str
    rows: int | None
    outline: Callable[..., Iterable[Prompt]] | None


@dataclass(frozen=True)
class JudgePlugin(Plugin):
    """See `judge`."""

    kind = "judge"


@dataclass(frozen=True)
class ModelPlugin(Plugin):
    """See `model`."""

    kind = "model"


@dataclass(frozen=True)
class Section:
    """A section of the depth report: what it shows of one measure, and how.

    `points` maps each list of points that the section shows (a key of depth.json) to the type of
    its points (see `report.depth.schema.Point`), the section's own first. `label` names the
    measure within a sentence; `meaning` explains it to a reader who has never heard of it. The
    functions take a `report.depth.schema.Depth`: `findings` returns sentences without their full
    stop, `plot` the data of a plot (None: nothing to show), `tables` a list of
    `report.depth.tables.Table`, `columns` a list of `report.depth.tables.Column` for the summary
    table. `top` of the sentences are repeated at the top of the page.
    """

    name: str
    label: str
    title: str
    meaning: str
    points: Mapping[str, type[Any]]
    findings: Callable[[Any], list[str]]
    plot: Callable[[Any], dict[str, Any] | None]
    tables: Callable[[Any], list[Any]]
    columns: Callable[[Any], list[Any]] = lambda depth: []
    settings: str = ""
    top: int = 1


@dataclass(frozen=True)
class MeasurePlugin(Plugin):
    """See `measure`."""

    kind = "measure"
    sections: tuple[Section, ...]
    order: float


_plugins: dict[tuple[Kind, str], Plugin] = {}


def _register(plugin: Plugin) -> None:
    earlier = _plugins.get((plugin.kind, plugin.name))
    if earlier:
        ours, theirs = _location(plugin), _location(earlier)
        if ours != theirs or _importing(plugin):
            where = f"{theirs} and {ours}" if ours != theirs else f"twice in {ours}"
            raise LeadlineError(
                f"the {plugin.kind} {plugin.name!r} is registered more than once ({where}): "
                "rename one of them, or uninstall its package"
            )
    _plugins[plugin.kind, plugin.name] = plugin


def _location(plugin: Plugin) -> str:
    return f"{plugin.function.__module__}.{plugin.function.__qualname__}"


def _importing(plugin: Plugin) -> bool:
    """Whether the plug-in's module is imported for the first time (and not reloaded, where the
    same functions are registered again)."""
    module = sys.modules.get(plugin.function.__module__)
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


Decorator = Callable[[Any], Any]


def attack(
    name: str,
    *,
    family: str,
    source: str,
    needs: tuple[str, ...] = (),
    decode: Callable[..., str | Awaitable[str]] | None = None,
    battery: str = "",
    pool: Literal["one", "any"] = "one",
) -> Decorator:
    """Register `function(prompt: Prompt, *, options...) -> str | Attempt | list[Attempt]`.

    A string is sent as one user turn. A list holds several attempts on one prompt, the same number
    for every prompt; with `pool="any"` the prompt counts as broken if any of them breaks it. A
    keyword-only parameter `rng` receives a `random.Random` seeded by the study's seed, the prompt
    and the attack. `decode` turns an encoded answer into text before it is judged. `battery` is
    the published collection that the attack belongs to ("strongreject", "sorrybench"). Raise
    NotApplicable where a prompt lacks what the attack needs.

    An attack that asks other models is `async`, takes a keyword-only `assist: Assist` and makes
    one attempt; it raises AttemptFailed where they fail. So may its `decode(answer, assist)`.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _register(AttackPlugin(name, function, source, needs, family, decode, battery, pool))
        return function

    return register


def dataset(
    name: str,
    *,
    source: str,
    needs: tuple[str, ...] = (),
    judge: str = "refusal",
    licence: str = "",
    rows: int | None = None,
    outline: Callable[..., Iterable[Prompt]] | None = None,
) -> Decorator:
    """Register `function(*, path=None, options...) -> Iterable[Prompt]`.

    `judge` is the judge of studies that name none; `rows` the published number of rows. `outline`
    takes the same options and yields the published prompts without texts, for datasets whose size
    depends on the options.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _register(DatasetPlugin(name, function, source, needs, judge, licence, rows, outline))
        return function

    return register


def judge(name: str, *, source: str, needs: tuple[str, ...] = ()) -> Decorator:
    """Register a factory `function(*, options...) -> Judge`. With "model" in `needs` it receives
    the model that the study file describes among its options as `model`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _register(JudgePlugin(name, function, source, needs))
        return function

    return register


def model(name: str, *, source: str, needs: tuple[str, ...] = ()) -> Decorator:
    """Register a factory `function(spec, limits, locate) -> Model` for one way to reach a model."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _register(ModelPlugin(name, function, source, needs))
        return function

    return register


def measure(
    name: str,
    *,
    source: str,
    sections: tuple[Section, ...],
    needs: tuple[str, ...] = (),
    order: float = 100,
) -> Decorator:
    """Register a depth measure `function(session: leadline.depth.session.Session) -> None`.

    It adds points to the session, for every model. `needs` may hold "base" (a base model was
    given) and "targets" (prompts have target answers); without them the measure is skipped and
    the report says why. `sections` show the points; `order` is their place on the page.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        known = tuple(s if s.settings else replace(s, settings=s.name) for s in sections)
        _register(MeasurePlugin(name, function, source, needs, known, order))
        return function

    return register


@cache
def _load(kind: Kind) -> None:
    """Import every module that holds plug-ins of a kind: ours by folder, others' by entry point.
    Models register in their package's `__init__`, since the modules behind them are heavy."""
    package = importlib.import_module(f"leadline.{_PACKAGES[kind]}")
    for module in pkgutil.iter_modules(package.__path__):
        if kind != "model" and not module.name.startswith("_"):
            importlib.import_module(f"{package.__name__}.{module.name}")
    _load_entry_points()


@cache
def _load_entry_points() -> None:
    for point in entry_points(group="leadline"):
        try:
            point.load()
        except LeadlineError:
            raise
        except Exception as error:
            raise LeadlineError(
                f"the plug-in {point.name!r} ({point.value}) does not load: "
                f"{type(error).__name__}: {error}; fix or uninstall that package"
            ) from error


@overload
def plugins(kind: Literal["attack"]) -> list[AttackPlugin]: ...
@overload
def plugins(kind: Literal["dataset"]) -> list[DatasetPlugin]: ...
@overload
def plugins(kind: Literal["judge"]) -> list[JudgePlugin]: ...
@overload
def plugins(kind: Literal["model"]) -> list[ModelPlugin]: ...
@overload
def plugins(kind: Literal["measure"]) -> list[MeasurePlugin]: ...
@overload
def plugins(kind: Kind) -> list[Plugin]: ...
def plugins(kind: Kind) -> list[Any]:
    """All plug-ins of a kind: attacks by family and name, measures in their order on the page,
    the others by name."""
    _load(kind)
    found = [p for (k, _), p in _plugins.items() if k == kind]
    return sorted(found, key=lambda p: (getattr(p, "order", 0), p.group, p.name))


@overload
def get(kind: Literal["attack"], name: str) -> AttackPlugin: ...
@overload
def get(kind: Literal["dataset"], name: str) -> DatasetPlugin: ...
@overload
def get(kind: Literal["judge"], name: str) -> JudgePlugin: ...
@overload
def get(kind: Literal["model"], name: str) -> ModelPlugin: ...
@overload
def get(kind: Literal["measure"], name: str) -> MeasurePlugin: ...
@overload
def get(kind: Kind, name: str) -> Plugin: ...
def get(kind: Kind, name: str) -> Any:
    """The plug-in of that name. Raises LeadlineError, which suggests the closest names."""
    _load(kind)
    if (kind, name) in _plugins:
        return _plugins[kind, name]
    raise LeadlineError(unknown(kind, name, [p.name for p in plugins(kind)]))


def unknown(what: str, name: str, valid: Iterable[str]) -> str:
    """An error text: `unknown attack 'base46': did you mean 'base64'?`"""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    if near:
        return f"unknown {what} {name!r}: did you mean {' or '.join(map(repr, near))}?"
    return f"unknown {what} {name!r}: it can be {', '.join(valid) or 'nothing here'}"
