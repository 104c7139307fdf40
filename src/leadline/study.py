"""The study file: what to cross with what. Its errors name the line, what is wrong and the mend."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic import BaseModel, Field, PrivateAttr, ValidationError, model_validator

from . import records, registry
from .models.spec import Limits, ModelSpec, Strict, wrong
from .records import Judge, LeadlineError, Model


class Pick(Strict):
    """A plug-in chosen by name with options: `name` or `name: {option: value}` in the file."""

    kind: ClassVar[registry.Kind]
    general: ClassVar[tuple[str, ...]] = ()  # options that the engine takes for every plug-in
    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and len(value) == 1 and "name" not in value:
            ((name, options),) = value.items()
            if options is not None and not isinstance(options, dict):
                raise wrong(f"the options of {name!r} are written {name}: {{option: value}}")
            return {"name": str(name), "options": options or {}}
        if isinstance(value, dict) and set(value) <= {"name", "options"}:
            return value
        raise wrong(f"write a {cls.kind} as its name, or as name: {{option: value}}")

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

    @classmethod
    def parse(cls, text: str) -> Self:
        """A plug-in as one writes it in a study file, from one line: `refusal`, or
        `qwen3guard: {model: guard, url: http://...}`. Raises LeadlineError."""
        try:
            return cls.model_validate(yaml.safe_load(text))
        except ValidationError as error:
            raise LeadlineError(f"{cls.kind} {text!r}: {_sentence(error.errors()[0])}") from None
        except yaml.YAMLError:
            raise LeadlineError(
                f"{cls.kind} {text!r} is not valid YAML: write a name, or 'NAME: {{option: value}}'"
            ) from None

    def plugins(self) -> list[registry.Plugin]:
        try:
            return [registry.get(self.kind, self.name)]
        except LeadlineError as error:
            raise wrong(str(error)) from None


class DatasetPick(Pick):
    kind = "dataset"
    general = ("limit", "name", "attacks")

    @property
    def attacks(self) -> list[AttackPick] | None:
        """What is asked of this dataset in place of the study's attacks."""
        given = self.options.get("attacks")
        return None if given is None else [AttackPick.model_validate(pick) for pick in given]

    @model_validator(mode="after")
    def _limit(self) -> DatasetPick:
        limit = self.options.get("limit")
        if limit is not None and not (isinstance(limit, int) and limit >= 1):
            raise wrong(f"limit is a number of prompts, not {limit!r}", self.name, "limit")
        return self

    @model_validator(mode="after")
    def _attacks(self) -> DatasetPick:
        given = self.options.get("attacks", ["direct"])
        if not isinstance(given, list) or not given:
            raise wrong("attacks: write a list like [direct, base64]", self.name, "attacks")
        for index, pick in enumerate(given):
            try:
                AttackPick.model_validate(pick)
            except ValidationError as error:
                first = error.errors()[0]
                inside = first.get("ctx", {}).get("inside", ())
                raise wrong(_sentence(first), self.name, "attacks", index, *inside) from None
        return self


class AttackPick(Pick):
    kind = "attack"

    def plugins(self) -> list[registry.Plugin]:
        """One attack, or all of `family:NAME` or `battery:NAME`."""
        group, _, name = self.name.partition(":")
        if group not in ("family", "battery"):
            return super().plugins()
        every = [(p, p.family if group == "family" else p.battery)
                 for p in registry.plugins("attack")]  # fmt: skip
        if found := [p for p, own in every if own == name]:
            return found
        raise wrong(registry.unknown(f"attack {group}", name, {own for _, own in every} - {""}))

    def variants(self) -> Iterator[tuple[str, registry.Plugin, dict[str, Any]]]:
        """(label, plug-in, options) of each combination: a list of values is a sweep."""
        values = [v if isinstance(v, list) else [v] for v in self.options.values()]
        for plugin in self.plugins():
            for chosen in itertools.product(*values):
                options = dict(zip(self.options, chosen, strict=True))
                inside = ", ".join(f"{k}={v}" for k, v in options.items())
                yield f"{plugin.name}({inside})" if inside else plugin.name, plugin, options


class JudgePick(Pick):
    kind = "judge"
    general = ("check", "name")

    @property
    def label(self) -> str:
        """Its name in results."""
        return str(self.options.get("name") or self.name)

    @property
    def spec(self) -> ModelSpec | None:
        """The model that the judge asks, if it needs one."""
        if "model" not in self.plugins()[0].needs:
            return None
        return ModelSpec(**{k: v for k, v in self.options.items() if k in ModelSpec.model_fields})

    @property
    def members(self) -> list[JudgePick]:
        """The judges that it is made of, if it is a panel."""
        if "judges" not in self.plugins()[0].needs:
            return []
        return [JudgePick.model_validate(given) for given in self.options["judges"]]

    @property
    def own_options(self) -> dict[str, Any]:
        others = {*self.general, *(ModelSpec.model_fields if self.spec else ())}
        return {k: v for k, v in self.options.items() if k not in others}

    @property
    def settings(self) -> dict[str, Any]:
        """What the store keeps of it: a verdict with other settings is another judge's."""
        return {k: v for k, v in self.options.items() if k not in self.general}

    @property
    def deciding(self) -> dict[str, Any]:
        """What of its settings decides its verdicts, and not where its model runs."""
        beside = ModelSpec.model_fields.keys() - {"model", "revision"}
        kept = {k: v for k, v in self.settings.items() if k not in beside}
        if members := self.members:
            kept["judges"] = [{m.name: m.deciding} for m in members]
        return kept

    def build(self, connect: Callable[[JudgePick], Model]) -> Judge:
        """The judge; `connect` gives the model of a pick (its own or a member's) that asks one.

        Raises LeadlineError for options that the judge doesn't take."""
        options = self.own_options
        if self.spec:
            options["model"] = connect(self)
        if members := self.members:
            options["judges"] = {m.label: m.build(connect) for m in members}
        try:
            built: Judge = self.plugins()[0].function(**options)
        except (LeadlineError, TypeError) as error:
            raise LeadlineError(f"judge {self.label}: {error}") from None
        return built

    @model_validator(mode="after")
    def _model(self) -> JudgePick:
        if "model" in self.plugins()[0].needs and not self.options.get("model"):
            raise wrong(
                f"the judge {self.name!r} asks a model: write "
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
        given = self.options.get("judges")
        if not isinstance(given, list) or not given:
            raise wrong(f"the judge {self.name!r} is made of others: write judges: [NAME, ...]")
        try:
            labels = [member.label for member in self.members]
        except ValidationError as error:
            raise wrong(_sentence(error.errors()[0]), self.name, "judges") from None
        if twice := {label for label in labels if labels.count(label) > 1}:
            raise wrong(f"two judges are called {twice.pop()!r}: give one of them another name:",
                        self.name, "judges")  # fmt: skip
        return self


class Sampling(Strict):
    """How answers are sampled. `samples` asks every trial that many times."""

    temperature: float = Field(default=0.0, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    max_tokens: int = Field(default=512, ge=1)
    samples: int = Field(default=1, ge=1)

    def record(self, seed: int) -> records.Sampling:
        known = {f.name for f in fields(records.Sampling)}
        settings = {k: v for k, v in self.model_dump().items() if k in known}
        return records.Sampling(**settings, seed=seed)


class Study(Strict):
    """What to cross with what: targets x datasets x attacks, judged.

    From a file with `Study.load(path)`, or in Python: `Study(targets=["organism:aligned"],
    datasets=["guild"], attacks=["direct", "prefill"])`. Relative paths are looked for beside the
    study file first, then in the working directory.
    """

    name: str = "study"
    targets: list[ModelSpec] = Field(min_length=1)
    datasets: list[DatasetPick] = Field(min_length=1)
    attacks: list[AttackPick] = Field(default=[AttackPick(name="direct")], min_length=1)
    judges: list[JudgePick] = Field(default_factory=list)
    attacker: ModelSpec | None = None
    sampling: Sampling = Sampling()
    limits: Limits = Limits()
    seed: int = 0
    _folder: Path = PrivateAttr(default=Path())

    @model_validator(mode="after")
    def _labels(self) -> Study:
        seen: set[str] = set()
        for target in self.targets:
            if target.label in seen:
                raise wrong(
                    f"two targets are called {target.label!r}: give each its own name:", "targets"
                )
            seen.add(target.label)
        return self

    def locate(self, path: str) -> Path:
        """A path of the file: beside the study file if it is there, else as it stands."""
        beside = self._folder / Path(path).expanduser()
        return beside if beside.exists() else Path(path).expanduser()

    @staticmethod
    def load(path: str | Path) -> Study:
        """Read a study file. Raises LeadlineError: `study.yaml:7: attacks: unknown attack ...`."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            tree = yaml.compose(text, Loader=yaml.SafeLoader)
            data = yaml.safe_load(text)
        except OSError as error:
            raise LeadlineError(f"cannot read {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise LeadlineError(f"{path} is not UTF-8 text: save it as UTF-8") from None
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise LeadlineError(f"{path}:{line}: not valid YAML: {error.problem}") from None
        except yaml.YAMLError as error:
            raise LeadlineError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict):
            raise LeadlineError(f"{path}:1: a study file is a mapping: targets, datasets, attacks")
        try:
            study = Study.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            inside = first.get("ctx", {}).get("inside", ())
            at = [p for p in (*first["loc"], *inside) if p != "options"]
            line = _line(tree, at)
            where = ".".join(str(p) for p in first["loc"]) or "study"
            raise LeadlineError(f"{path}:{line}: {where}: {_sentence(first)}") from None
        study._folder = path.resolve().parent
        return study


def _sentence(error: Any) -> str:
    """pydantic's finding in our words, with the nearest valid name."""
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
    given = error.get("input")
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool | None) else ""
    return message[0].lower() + message[1:] + shown


def _line(node: yaml.Node | None, at: list[Any]) -> int:
    """The line of the innermost part of the file that the path reaches."""
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
