"""The plug-in registry: a decorator registers a function under a name.

    @attack("rot_13", family="encoding", source="Wei et al. 2023")
    def rot_13(prompt: Prompt) -> str: ...

Built-in plug-ins are the modules of `leadline/{attacks,datasets,judges,models}` and
`leadline/depth/measures`. Other packages declare theirs in the entry-point group `leadline`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import pkgutil
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Literal, overload

from .records import LeadlineError, Prompt
from .text import one_line

log = logging.getLogger("leadline")

Kind = Literal["attack", "dataset", "judge", "model", "measure"]
KINDS: Mapping[str, Kind] = {
    "attacks": "attack",
    "datasets": "dataset",
    "judges": "judge",
    "models": "model",
    "measures": "measure",
}
"""The kinds of plug-ins, by the plural that `leadline list` accepts."""

_PACKAGES: dict[Kind, str] = {
    "attack": "attacks",
    "dataset": "datasets",
    "judge": "judges",
    "model": "models",
    "measure": "depth.measures",
}


@dataclass(frozen=True)
class Plugin:
    """A registered function with its metadata; the base class of the five kinds.

    `name` is the name in study files and on the command line, `function` the decorated function,
    `source` the paper or repository that it comes from. `needs` lists its requirements, which
    `leadline list` shows. These have an effect: "response_prefix" (the target must continue a
    response prefix), "attacker" (the study must name an attacker model), "model" and "judges" (see
    `judge`), "base" and "targets" (see `measure`).
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
        """The group that plug-ins of one kind are sorted by, before their names."""
        return ""

    @cached_property
    def options(self) -> dict[str, Any]:
        """The function's keyword-only parameters with their defaults: the options that a study
        file may set (`rng`, `model` and `assist` are set by the engine)."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


@dataclass(frozen=True)
class AttackPlugin(Plugin):
    """A registered attack. The fields are the arguments of `attack`."""

    kind = "attack"
    family: str
    decode: Callable[..., str | Awaitable[str]] | None
    battery: str
    pool: Literal["one", "any"]

    @property
    def group(self) -> str:
        """The attack's family."""
        return self.family


@dataclass(frozen=True)
class DatasetPlugin(Plugin):
    """A registered dataset. The fields are the arguments of `dataset`."""

    kind = "dataset"
    judge: str
    licence: str
    rows: int | None
    outline: Callable[..., Iterable[Prompt]] | None


@dataclass(frozen=True)
class JudgePlugin(Plugin):
    """A registered judge factory. `caution` as in `judge`."""

    kind = "judge"
    caution: str


@dataclass(frozen=True)
class ModelPlugin(Plugin):
    """A registered model factory: one way to reach a model."""

    kind = "model"


@dataclass(frozen=True)
class Section:
    """A section of the depth report, which shows the results of one measure.

    `name` identifies the section on the page. `label` names the measure within a sentence, `title`
    is the heading, `meaning` explains the measure to a reader who does not know it. `points` maps
    each key of depth.json that the section shows to the type of its points (a subclass of
    `report.depth.schema.Point`); the section's own key comes first.

    The functions take a `report.depth.schema.Depth`. `findings` returns sentences without a final
    full stop, of which the first `top` are repeated in the summary at the top of the page. `plot`
    returns the data of a plot, or None if there is nothing to show. `tables` returns a list of
    `report.depth.tables.Table`, `columns` a list of `report.depth.tables.Column` for the summary
    table. `settings` is the key of the measure's settings in depth.json (default: `name`).
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
class Work:
    """An upper bound of what a depth measure does, for all models together.

    `text` says it in words: `answers` of at most `max_tokens` tokens, tokens that are `read`
    (forward passes without a gradient) and `trained` on (forward and backward passes).
    """

    text: str
    answers: int = 0
    max_tokens: int = 0
    read: int = 0
    trained: int = 0


@dataclass(frozen=True)
class MeasurePlugin(Plugin):
    """A registered depth measure. The fields are the arguments of `measure`."""

    kind = "measure"
    sections: tuple[Section, ...]
    order: float
    work: Callable[..., Work]
    limits: tuple[str, ...]


_plugins: dict[tuple[Kind, str], Plugin] = {}


def _register(plugin: Plugin) -> None:
    """Register a plug-in. Of two with one name, the first stays, with a warning; Leadline's own
    always stays. A duplicate within Leadline is an error."""
    _check_fields(plugin)
    earlier = _plugins.get((plugin.kind, plugin.name))
    if earlier and (_location(plugin) != _location(earlier) or _importing(plugin)):
        if is_own(plugin) and is_own(earlier):
            raise LeadlineError(
                f"the {plugin.kind} {plugin.name!r} is registered more than once "
                f"({_location(earlier)} and {_location(plugin)}): rename one of them"
            )
        kept, ignored = (plugin, earlier) if is_own(plugin) else (earlier, plugin)
        log.warning(
            "the %s %r is registered more than once: %s is used and %s is ignored: rename the "
            "second one, or uninstall its package",
            plugin.kind, plugin.name, _location(kept), _location(ignored),
        )  # fmt: skip
        plugin = kept
    _plugins[plugin.kind, plugin.name] = plugin


def is_own(plugin: Plugin) -> bool:
    """Whether a plug-in is part of Leadline, not of another package."""
    return _location(plugin).startswith("leadline.")


def _check_fields(plugin: Plugin) -> None:
    """Raise TypeError for a field whose type would fail later, e.g. when plug-ins are sorted."""
    if not callable(plugin.function):
        raise TypeError(f"{plugin.kind} {plugin.name!r}: {plugin.function!r} is not a function")
    _ = plugin.options  # raises for a function without a signature
    for field in fields(plugin):
        value = getattr(plugin, field.name)
        if field.type == "str" and not isinstance(value, str):
            raise TypeError(f"{plugin.kind} {plugin.name!r}: {field.name} must be a string")
    needs: object = plugin.needs
    if not isinstance(needs, tuple | list) or not all(isinstance(need, str) for need in needs):
        raise TypeError(f"{plugin.kind} {plugin.name!r}: needs must be a tuple of strings")
    if not isinstance(getattr(plugin, "order", 0), int | float):
        raise TypeError(f"{plugin.kind} {plugin.name!r}: order must be a number")
    if not isinstance(getattr(plugin, "rows", None), int | None):
        raise TypeError(f"{plugin.kind} {plugin.name!r}: rows must be a whole number")


def plugin_package(error: BaseException) -> str:
    """The package with plug-ins whose code raised an exception; "" if there is none, apart from
    Leadline itself."""
    packages = {_location(p).partition(".")[0] for p in _plugins.values() if not is_own(p)}
    for frame, _ in traceback.walk_tb(error.__traceback__):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in packages:
            return package
    return ""


def _location(plugin: Plugin) -> str:
    function = inspect.unwrap(plugin.function)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', None)}.{name}"


def _importing(plugin: Plugin) -> bool:
    """Whether the plug-in's module is being imported for the first time. A reload registers the
    same functions again, which is no conflict."""
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

    A string is sent as one user message. A list holds several attempts on one prompt, and must
    have the same length for every prompt. Keyword-only parameters are options that a study file can
    set; one named `rng` receives a `random.Random` seeded by the study's seed, the prompt and the
    attack. The function raises NotApplicable for a prompt that lacks what the attack requires.

    A model-assisted attack is `async`, takes a keyword-only `assist: Assist` (the models that it
    may call) and returns one attempt. It raises AttemptFailed if the attacker model fails.

    `family` groups attacks in results and in `family:NAME`; `source` is the paper or repository.
    `needs` lists requirements (see `Plugin`). `decode(answer)` turns an encoded answer into the
    text to judge; it raises ValueError where the answer is not encoded, which is then judged as it
    is. An async `decode(answer, assist)` may call the attacker model. `battery` is the published
    collection that the attack belongs to ("strongreject", "sorrybench"). With `pool="any"` the
    success of several attempts is counted per prompt: it is unsafe if any attempt got an unsafe
    answer.
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

    `path` is a local copy of the data; the other keyword-only parameters are options that a study
    file can set. The function raises LeadlineError if the data cannot be read. `source` is the
    paper or repository, `licence` the data's licence. `judge` names the judge of studies that name
    none. `rows` is the published number of rows; where it depends on the options, `outline` takes
    the same options and yields the published prompts without their texts. A dry run uses these two
    to count a dataset that is not on this machine.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _register(DatasetPlugin(name, function, source, needs, judge, licence, rows, outline))
        return function

    return register


def judge(name: str, *, source: str, needs: tuple[str, ...] = (), caution: str = "") -> Decorator:
    """Register a factory `function(*, options...) -> Judge`; keyword-only parameters are options.

    With "model" in `needs`, the judge's options in a study file also describe a model (as under
    `targets:`), which the factory receives as `model`, already built. With "judges" in `needs`, the
    option `judges` lists other judges, which it receives as a mapping from name to Judge.
    `source` is the paper or repository. `caution` is for judges that see the form of an answer and
    not its content: a sentence on what their verdicts do not say, which every report shows.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _register(JudgePlugin(name, function, source, needs, caution))
        return function

    return register


def model(name: str, *, source: str, needs: tuple[str, ...] = ()) -> Decorator:
    """Register a factory `function(spec, limits, locate) -> Model` for one way to reach a model.

    A target called `NAME:...` uses the factory registered under NAME. `spec` is a
    `models.spec.ModelSpec` (the target's fields in the study file), `limits` a
    `models.spec.Limits`, and `locate` resolves a path of the study file. The factory loads and
    sends nothing yet: `Model.prepare` does.
    """

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
    work: Callable[..., Work] = lambda session: Work("not estimated"),
    limits: tuple[str, ...] = (),
) -> Decorator:
    """Register a depth measure `function(session: leadline.depth.session.Session) -> None`.

    The function adds points to the session for every model. `needs` may contain "base" (a base
    model was given) and "targets" (prompts have target responses); if one of them is missing, the
    measure is skipped, and the report states the reason. `sections` show the points in the
    report, sorted by `order`. `work(session)` states what the measure does under
    `session.budget`; `limits` are the fields of `leadline.depth.budgets.Budget` that its work
    depends on, such as "prompts" or "gcg.steps", which a budget by time may reduce.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        complete = tuple(s if s.settings else replace(s, settings=s.name) for s in sections)
        _register(MeasurePlugin(name, function, source, needs, complete, order, work, limits))
        return function

    return register


@cache
def _load(kind: Kind) -> None:
    """Import every module with plug-ins of a kind: built-in ones by folder, others by entry point.
    Models register in their package's `__init__`, since their modules import heavy libraries."""
    package = importlib.import_module(f"leadline.{_PACKAGES[kind]}")
    for module in pkgutil.iter_modules(package.__path__):
        if kind != "model" and not module.name.startswith("_"):
            importlib.import_module(f"{package.__name__}.{module.name}")
    _load_entry_points()


@cache
def _load_entry_points() -> None:
    """Load the plug-ins of other packages. One that does not load is named in a warning."""
    for point in entry_points(group="leadline"):
        try:
            point.load()
        except (Exception, SystemExit) as error:
            log.warning(
                "the plug-in %r (%s) does not load and is ignored: %s: %s; fix or uninstall the "
                "package %s",
                point.name, point.value, type(error).__name__, one_line(error), _package(point),
            )  # fmt: skip
            log.debug("plug-in %s", point.name, exc_info=True)


def _package(point: EntryPoint) -> str:
    """The installed package of an entry point; its top-level module if that is unknown."""
    return point.dist.name if point.dist else point.value.partition(":")[0].partition(".")[0]


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
    """All plug-ins of a kind: attacks sorted by family and name, measures by their order in the
    report, the others by name."""
    _load(kind)
    of_kind = [p for (k, _), p in _plugins.items() if k == kind]
    return sorted(of_kind, key=lambda p: (getattr(p, "order", 0), p.group, p.name))


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
    """The plug-in of that name. Raises LeadlineError if there is none; the message suggests the
    closest names."""
    _load(kind)
    if (kind, name) in _plugins:
        return _plugins[kind, name]
    raise LeadlineError(unknown(kind, name, [p.name for p in plugins(kind)]))


def unknown(what: str, name: str, valid: Iterable[str]) -> str:
    """An error message: `unknown attack 'base46': did you mean 'base64'?` Without a similar name
    it lists all valid ones."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    if near:
        return f"unknown {what} {name!r}: did you mean {' or '.join(map(repr, near))}?"
    if not valid:
        return f"unknown {what} {name!r}: none are available"
    return f"unknown {what} {name!r}: valid names are {', '.join(valid)}"
