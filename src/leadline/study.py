"""The study file: targets, datasets, attacks, judges and settings, validated with pydantic.

Errors name the file's line, what is wrong there and how to fix it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from datetime import date, time
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import yaml
from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from . import records, registry
from .models.spec import Limits, ModelSpec, Strict, wrong
from .records import Judge, LeadlineError, Model
from .secret import without_secrets
from .text import one_line, shorten

_DEEPEST = 50  # nesting of a study file
_MOST_VALUES = 1_000_000  # in a study file, with YAML aliases written out


def _check_values(data: Any) -> None:
    """Raise `wrong` for a value that JSON cannot express, so that it could not be stored or sent.

    YAML also has dates, bytes, NaN, integers of any size, keys that are not text, and aliases that
    refer to their own parent or multiply."""
    found = 0
    stack: list[tuple[Any, tuple[Any, ...]]] = [(data, ())]
    while stack:
        value, at = stack.pop()
        found += 1
        if found > _MOST_VALUES:
            raise wrong(f"the study has more than {_MOST_VALUES:,} values", *at[:1])
        if len(at) > _DEEPEST:
            raise wrong(f"values are nested more than {_DEEPEST} deep", *at[:1])
        if isinstance(value, dict):
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise wrong(f"the key {key!r} is not text: put it in quotes", *at)
                _check_value(key, at)
                stack.append((inner, (*at, key)))
        elif isinstance(value, list):
            stack.extend((inner, (*at, i)) for i, inner in enumerate(value))
        else:
            _check_value(value, at)


def _check_value(value: Any, at: tuple[Any, ...]) -> None:
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            raise wrong(f"{value[:50]!r} holds a character that is not text", *at)
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise wrong("an integer of more than 64 bits: use a smaller one", *at)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise wrong(f"{value} is not a finite number", *at)
    elif isinstance(value, date | time):
        raise wrong(f"{value} is a date in YAML: put it in quotes", *at)
    elif isinstance(value, bytes | set):
        raise wrong(f"a value of type {type(value).__name__}: use text, numbers or lists", *at)


UNNAMED = "study"
"""The name of a study that has none: one that was built in Python, or read from study.yaml."""


class Pick(Strict):
    """A plug-in with options, written `name` or `name: {option: value}` in the study file."""

    kind: ClassVar[registry.Kind]
    general: ClassVar[tuple[str, ...]] = ()  # options for every plug-in, handled by the engine
    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        if cls.kind == "judge":
            without_secrets(value)  # an error message may show a value
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and len(value) == 1 and "name" not in value:
            ((name, options),) = value.items()
            if options is not None and not isinstance(options, dict):
                raise wrong(f"write the options of {name!r} as {name}: {{option: value}}")
            return {"name": str(name), "options": options or {}}
        if isinstance(value, dict) and set(value) <= {"name", "options"}:
            return value
        raise wrong(f"each {cls.kind} must be a name, or name: {{option: value}}")

    @model_validator(mode="after")
    def _known(self) -> Pick:
        for plugin in self.plugins():
            valid = {*plugin.options, *self.general} - {"rng", "model", "assist"}
            if "model" in plugin.needs:
                valid |= set(ModelSpec.model_fields)
            for option in self.options:
                if option not in valid:
                    what = f"option of {plugin.name}"
                    raise wrong(registry.unknown(what, option, valid), self.name, option)
        return self

    @model_validator(mode="before")
    @classmethod
    def _values(cls, value: Any) -> Any:
        _check_values(value)
        return value

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse one line of YAML, written as in a study file: `refusal`, or
        `qwen3guard: {model: guard, url: http://...}`. Raises LeadlineError."""
        shown = shorten(text, 100)
        try:
            return cls.model_validate(_yaml(text, f"{cls.kind} {shown!r}")[1])
        except ValidationError as error:
            raise LeadlineError(f"{cls.kind} {shown!r}: {_sentence(error.errors()[0])}") from None

    def plugins(self) -> Sequence[registry.Plugin]:
        """The registered plug-ins that this entry names."""
        try:
            return [registry.get(self.kind, self.name)]
        except LeadlineError as error:
            raise wrong(str(error)) from None


class DatasetPick(Pick):
    """A dataset of the study. It also takes the options `limit`, `name`, `attacks` and `judges`."""

    kind = "dataset"
    general = ("limit", "name", "attacks", "judges")

    def plugins(self) -> Sequence[registry.DatasetPlugin]:
        """The registered dataset, as a list of one."""
        return cast(Sequence[registry.DatasetPlugin], super().plugins())

    @property
    def judge(self) -> JudgePick:
        """The dataset's own judge, for studies that name none."""
        return JudgePick(name=self.plugins()[0].judge)

    @property
    def attacks(self) -> list[AttackPick] | None:
        """The attacks that replace the study's for this dataset; None: the study's apply."""
        own = self.options.get("attacks")
        return None if own is None else [AttackPick.model_validate(pick) for pick in own]

    @property
    def judges(self) -> list[JudgePick] | None:
        """The judges that replace the study's for this dataset; None: the study's apply."""
        own = self.options.get("judges")
        return None if own is None else [JudgePick.model_validate(pick) for pick in own]

    @model_validator(mode="after")
    def _limit(self) -> DatasetPick:
        limit = self.options.get("limit")
        if limit is not None and not (isinstance(limit, int) and limit >= 1):
            message = f"limit must be a number of prompts, at least 1, not {limit!r}"
            raise wrong(message, self.name, "limit")
        return self

    @model_validator(mode="after")
    def _picks(self) -> DatasetPick:
        kinds: tuple[tuple[str, type[Pick], str], ...] = (
            ("attacks", AttackPick, "[direct, base64]"), ("judges", JudgePick, "[refusal]"),
        )  # fmt: skip
        for option, kind, example in kinds:
            if option not in self.options:
                continue
            own = self.options[option]
            if not isinstance(own, list) or not own:
                raise wrong(f"{option} must be a list such as {example}", self.name, option)
            for index, pick in enumerate(own):
                try:
                    kind.model_validate(pick)
                except ValidationError as error:
                    first = error.errors()[0]
                    inside = first.get("ctx", {}).get("inside", ())
                    raise wrong(_sentence(first), self.name, option, index, *inside) from None
        return self


class AttackPick(Pick):
    """An attack of the study, or a group of attacks; a list as an option's value is a sweep."""

    kind = "attack"

    def plugins(self) -> Sequence[registry.AttackPlugin]:
        """One attack, or all attacks of `family:NAME` or `battery:NAME`."""
        grouping, _, name = self.name.partition(":")
        if grouping not in ("family", "battery"):
            return cast(Sequence[registry.AttackPlugin], super().plugins())
        grouped = [(p, p.family if grouping == "family" else p.battery)
                   for p in registry.plugins("attack")]  # fmt: skip
        if members := [p for p, group in grouped if group == name]:
            return members
        valid = {group for _, group in grouped} - {""}
        raise wrong(registry.unknown(f"attack {grouping}", name, valid))

    @model_validator(mode="after")
    def _sweeps(self) -> AttackPick:
        for option, value in self.options.items():
            if value == []:
                raise wrong("the list of values is empty: no attack would run", self.name, option)
        return self

    def variants(self) -> Iterator[tuple[str, registry.AttackPlugin, dict[str, Any]]]:
        """Yield (label, plug-in, options) for each combination of option values."""
        values = [v if isinstance(v, list) else [v] for v in self.options.values()]
        for plugin in self.plugins():
            for combination in itertools.product(*values):
                options = dict(zip(self.options, combination, strict=True))
                shown = ", ".join(f"{k}={v}" for k, v in options.items())
                yield f"{plugin.name}({shown})" if shown else plugin.name, plugin, options


class JudgePick(Pick):
    """A judge of the study. It also takes the options `name` and `check` (a judge-check file)."""

    kind = "judge"
    general = ("check", "name")

    @property
    def label(self) -> str:
        """The judge's name in results."""
        return str(self.options.get("name") or self.name)

    @property
    def spec(self) -> ModelSpec | None:
        """The model that the judge calls; None if it calls none."""
        if "model" not in self.plugins()[0].needs:
            return None
        return ModelSpec(**{k: v for k, v in self.options.items() if k in ModelSpec.model_fields})

    @property
    def members(self) -> list[JudgePick]:
        """The member judges of a panel; [] for any other judge."""
        if "judges" not in self.plugins()[0].needs:
            return []
        return [JudgePick.model_validate(member) for member in self.options["judges"]]

    @property
    def caution(self) -> str:
        """What the judge's verdicts do not say ("": they are about content). A panel has a caution
        if all of its members have one."""
        cautions = [member.caution for member in self.members]
        if cautions:
            return cautions[0] if all(cautions) else ""
        return cast(registry.JudgePlugin, self.plugins()[0]).caution

    @property
    def factory_options(self) -> dict[str, Any]:
        """The options that are arguments of the judge's factory."""
        others = {*self.general, *(ModelSpec.model_fields if self.spec else ())}
        return {k: v for k, v in self.options.items() if k not in others}

    @property
    def settings(self) -> dict[str, Any]:
        """The options that the store records. Verdicts with different settings are kept as those
        of different judges."""
        return {k: v for k, v in self.options.items() if k not in self.general}

    @property
    def verdict_settings(self) -> dict[str, Any]:
        """The settings that decide verdicts: without the address and the runtime of the model."""
        runtime = ModelSpec.model_fields.keys() - {"model", "revision"}
        decisive = {k: v for k, v in self.settings.items() if k not in runtime}
        if members := self.members:
            decisive["judges"] = [{m.name: m.verdict_settings} for m in members]
        return decisive

    def build(self, connect: Callable[[JudgePick], Model]) -> Judge:
        """Build the judge. `connect` returns the model of a pick that calls one (this pick or a
        member of a panel). Raises LeadlineError for options that the judge does not accept."""
        options = self.factory_options
        if self.spec:
            options["model"] = connect(self)
        if members := self.members:
            options["judges"] = {m.label: m.build(connect) for m in members}
        try:
            judge: Judge = self.plugins()[0].function(**options)
        except (LeadlineError, TypeError) as error:
            raise LeadlineError(f"judge {self.label}: {error}") from None
        except (Exception, SystemExit) as error:
            raise LeadlineError(
                f"judge {self.label}: {type(error).__name__}: {one_line(error)}: check its options"
            ) from error
        if not callable(judge):
            raise LeadlineError(
                f"judge {self.label}: its factory returned a {type(judge).__name__}, not a function"
            )
        return judge

    @model_validator(mode="after")
    def _model(self) -> JudgePick:
        if "model" in self.plugins()[0].needs and not self.options.get("model"):
            raise wrong(
                f"the judge {self.name!r} needs a model: write "
                f"{self.name}: {{model: NAME, url: http://...}}"
            )
        try:
            _ = self.spec
        except ValidationError as error:
            first = error.errors()[0]
            raise wrong(_sentence(first), self.name, *map(str, first["loc"])) from None
        return self

    @model_validator(mode="after")
    def _members(self) -> JudgePick:
        if "judges" not in self.plugins()[0].needs:
            return self
        members = self.options.get("judges")
        if not isinstance(members, list) or not members:
            raise wrong(
                f"the judge {self.name!r} combines other judges: name them with judges: [NAME, ...]"
            )
        try:
            labels = [member.label for member in self.members]
        except ValidationError as error:
            raise wrong(_sentence(error.errors()[0]), self.name, "judges") from None
        if duplicates := {label for label in labels if labels.count(label) > 1}:
            raise wrong(
                f"two judges are called {duplicates.pop()!r}: set name: for one of them",
                self.name, "judges",
            )  # fmt: skip
        return self


class Sampling(Strict):
    """The decoding settings of a study. `samples` is the number of responses per prompt."""

    temperature: float = Field(default=0.0, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    max_tokens: int = Field(default=512, ge=1)
    samples: int = Field(default=1, ge=1)

    def record(self, seed: int) -> records.Sampling:
        """The settings of one request, with the study's seed."""
        names = {f.name for f in fields(records.Sampling)}
        settings = {k: v for k, v in self.model_dump().items() if k in names}
        return records.Sampling(**settings, seed=seed)


class Study(Strict):
    """A study: targets x datasets x attacks, and the judges of the responses. A study file without
    a `name` has the file's.

    Read one from a file with `Study.load(path)`, or build it in Python:
    `Study(targets=["organism:aligned"], datasets=["guild"], attacks=["direct", "prefill"])`.
    docs/studies.md explains the fields. Relative paths are resolved against the study file's
    folder first, then against the working directory.
    """

    name: str = UNNAMED
    targets: list[ModelSpec] = Field(min_length=1)
    datasets: list[DatasetPick] = Field(min_length=1)
    attacks: list[AttackPick] = Field(
        default_factory=lambda: [AttackPick(name="direct")], min_length=1
    )
    judges: list[JudgePick] = Field(default_factory=list)
    attacker: ModelSpec | None = None
    sampling: Sampling = Sampling()
    limits: Limits = Limits()
    seed: int = 0
    _folder: Path = PrivateAttr(default=Path())

    @model_validator(mode="before")
    @classmethod
    def _values(cls, value: Any) -> Any:
        _check_values(value)
        return value

    @field_validator("judges", mode="before")
    @classmethod
    def _one_judge(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _labels(self) -> Study:
        seen: set[str] = set()
        for target in self.targets:
            if target.label in seen:
                raise wrong(
                    f"two targets are called {target.label!r}: set name: for one of them", "targets"
                )
            seen.add(target.label)
        return self

    @property
    def description(self) -> dict[str, Any]:
        """The study as JSON values, without the secrets of its models."""
        data = self.model_dump(mode="json")
        secret = ("targets", "datasets", "judges", "attacker")
        return data | {k: without_secrets(data[k]) for k in secret}

    def locate(self, path: str) -> Path:
        """Resolve a path of the study file: relative to the file's folder if it exists there,
        otherwise relative to the working directory."""
        try:
            expanded = Path(path).expanduser()
            in_folder = self._folder / expanded
            return in_folder if in_folder.exists() else expanded
        except (OSError, ValueError, RuntimeError) as error:  # too long, NUL, "~nobody"
            raise LeadlineError(
                f"{shorten(path, 100)!r} is not a path that can be read: {one_line(error)}"
            ) from None

    @staticmethod
    def load(path: str | Path) -> Study:
        """Read a study file. Raises LeadlineError: `study.yaml:7: attacks: unknown attack ...`."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise LeadlineError(f"cannot read {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise LeadlineError(f"{path} is not UTF-8 text: save it as UTF-8") from None
        tree, data = _yaml(text, str(path))
        if not isinstance(data, dict):
            raise LeadlineError(
                f"{path}:1: a study file is a mapping with targets:, datasets: and attacks:"
            )
        try:
            study = Study.model_validate({"name": path.stem, **data})
        except ValidationError as error:
            first = error.errors()[0]
            inside = first.get("ctx", {}).get("inside", ())
            at = [p for p in (*first["loc"], *inside) if p != "options"]
            line = _line(tree, at)
            where = ".".join(str(p) for p in first["loc"] or inside) or "study"
            raise LeadlineError(f"{path}:{line}: {where}: {_sentence(first)}") from None
        study._folder = path.resolve().parent
        return study


def _yaml(text: str, where: str) -> tuple[yaml.Node | None, Any]:
    """YAML as nodes (with line numbers) and as data. Raises LeadlineError, also for a key that a
    mapping has twice: YAML parsers silently keep one of the two values."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_keys(tree, where)
        return tree, yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = shorten(" ".join(str(error.problem or error.context).split()), 200)
        raise LeadlineError(f"{where}:{line}: not valid YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise LeadlineError(f"{where}: not valid YAML: {one_line(error)}") from None
    except RecursionError:
        raise LeadlineError(
            f"{where}: the YAML is nested too deeply: use at most {_DEEPEST} levels"
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        # PyYAML raises these for values such as the date 2024-13-45 or "!!bool maybe".
        raise LeadlineError(f"{where}: not valid YAML: {one_line(error)}") from None


def _check_keys(tree: yaml.Node | None, where: str) -> None:
    """Raise LeadlineError for a mapping with a duplicate key."""
    nodes, visited = [tree], set()
    while nodes:
        node = nodes.pop()
        if id(node) in visited or not isinstance(node, yaml.CollectionNode):
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes.extend(node.value)
            continue
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            nodes.append(value)
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise LeadlineError(
                    f"{where}:{line}: the key {shorten(key.value, 50)!r} is given twice (first in "
                    f"line {lines[name]}): remove one of the two"
                )
            lines[name] = line


def _sentence(error: Any) -> str:
    """A pydantic error as one sentence, with the closest valid name for an unknown field."""
    kind, name = error["type"], str(error["loc"][-1]) if error["loc"] else ""
    if kind == "extra_forbidden":
        inside = error["loc"][0] if len(error["loc"]) > 1 else ""
        shapes: dict[Any, type[BaseModel]] = {
            "": Study, "targets": ModelSpec, "attacker": ModelSpec, "sampling": Sampling,
            "limits": Limits,
        }  # fmt: skip
        return registry.unknown("field", name, shapes.get(inside, ModelSpec).model_fields)
    if kind == "missing":
        return f"{name!r} is missing"
    if kind == "leadline":
        return str(error["ctx"]["message"])
    message = str(error["msg"])
    value = error.get("input")
    scalar = isinstance(value, str | int | float | bool | None)
    shown = f", not {shorten(repr(value), 100)}" if scalar else ""
    return message[:1].lower() + " ".join(message[1:].split()) + shown


def _line(node: yaml.Node | None, at: list[Any]) -> int:
    """The line number of the YAML node at a path of keys and indexes; where the path ends early,
    of the last node on it."""
    line = node.start_mark.line + 1 if node else 1
    for part in at:
        if isinstance(node, yaml.MappingNode):
            pairs = [(k, v) for k, v in node.value if k.value == str(part)]
            if not pairs:
                break
            key, node = pairs[0]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            if part >= len(node.value):
                break
            node = node.value[part]
            line = node.start_mark.line + 1
        elif not isinstance(node, yaml.Node):
            break
    return line
