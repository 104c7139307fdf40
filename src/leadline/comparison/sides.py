"""What one model did on each prompt: read from a store, or from a baseline file.

A baseline file holds numbers by prompt and no text: prompts are identified by a hash of their
content, so that it can be committed to a repository and compared with any later run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..analysis.sums import Measure, Sums, sums
from ..files import write_private
from ..records import LeadlineError
from ..registry import unknown
from ..store import FILE, Store
from ..text import one_line

if TYPE_CHECKING:
    import numpy as np

_FORMAT = 1
MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True)
class Prompts:
    """The prompts of a dataset, at the same index: `keys` are hashes of their content, `bases` the
    numbers of their base prompts, `categories` their categories."""

    keys: tuple[str, ...]
    bases: tuple[int, ...]
    categories: tuple[str, ...]

    @cached_property
    def index(self) -> dict[str, int]:
        """The index of each key."""
        return {key: at for at, key in enumerate(self.keys)}


@dataclass(frozen=True, eq=False)
class Cell:
    """One measure of one attack on a dataset. `sums.prompt` are indices into its `Prompts`."""

    measure: Measure
    sums: Sums


@dataclass(frozen=True)
class Side:
    """One of the two models of a comparison.

    `name` is its model (and thinking mode, if not the default), `source` the folder or file it was
    read from. `judges` are the judges of its datasets, with their settings.
    """

    name: str
    source: str
    judges: Mapping[str, str]
    prompts: Mapping[str, Prompts]
    cells: tuple[Cell, ...]

    @staticmethod
    def read(source: str, judge: str | None = None) -> Side:
        """The side that a user names: `FOLDER`, `FOLDER::MODEL`, `FOLDER::MODEL::THINKING`, or a
        baseline file. Raises LeadlineError where there is none or more than one such model."""
        path, _, model = source.partition("::")
        if Path(path).is_dir():
            return _from_store(Path(path), model, judge)
        if not Path(path).is_file():
            raise LeadlineError(
                f"{path}: no such file or folder: give a results folder of `leadline run`, or a "
                "file of `leadline baseline`"
            )
        side = _from_file(Path(path))
        if model and model != side.name:
            raise LeadlineError(f"{path} holds {side.name}, not {model}")
        if judge and (other := set(side.judges.values()) - {judge}):
            names = ", ".join(sorted(other))
            raise LeadlineError(f"{path} holds verdicts of {names}, not of {judge}")
        return side

    def write(self, file: Path) -> None:
        """Write a baseline file. Raises LeadlineError where that is not possible."""
        cells = []
        for cell in self.cells:
            own = cell.sums
            arrays = {"prompts": own.prompt, "attempts": own.attempts, "scored": own.scored,
                      "total": own.total}  # fmt: skip
            cells.append({
                "measure": cell.measure, "dataset": own.dataset, "attack": own.attack,
                "any": own.any, **{name: _packed(values) for name, values in arrays.items()},
            })  # fmt: skip
        content = {
            "leadline_baseline": _FORMAT,
            "model": self.name,
            "judges": dict(self.judges),
            "prompts": {
                dataset: {"keys": prompts.keys, "bases": _packed_ints(prompts.bases),
                          "categories": _packed_names(prompts.categories)}
                for dataset, prompts in self.prompts.items()
            },
            "cells": cells,
        }  # fmt: skip
        write_private(file, json.dumps(content, separators=(",", ":")) + "\n")


def models(folder: Path) -> list[tuple[str, str]]:
    """The models and thinking modes in a results folder, in the order of the study."""
    with Store(folder) as store:
        return store.query("SELECT model, thinking FROM cells GROUP BY 1, 2 ORDER BY min(id)")


def _from_store(folder: Path, wanted: str, judge: str | None) -> Side:
    if not (folder / FILE).is_file():
        raise LeadlineError(
            f"{folder} has no {FILE}: give the results folder of `leadline run`, or a file of "
            "`leadline baseline`"
        )
    found = {side_name(model, thinking): (model, thinking) for model, thinking in models(folder)}
    if not found:
        raise LeadlineError(f"{folder} has no results yet: run its study first")
    if wanted and wanted not in found:
        raise LeadlineError(f"in {folder}: {unknown('model', wanted, found)}")
    if not wanted and len(found) > 1:
        raise LeadlineError(
            f"{folder} has the results of {len(found)} models: name one, such as "
            f"{folder}::{next(iter(found))} (there are {', '.join(found)})"
        )
    name = wanted or next(iter(found))
    with Store(folder) as store:
        cells = [
            (measure, own)
            for measure in MEASURES
            for own in sums(store, measure, judge, model=found[name])
            if own.n.any()
        ]
        prompts, index = _prompts(store, {own.dataset for _, own in cells})
        judges = _judges(store, judge, prompts)
    return Side(
        name,
        str(folder),
        judges,
        prompts,
        tuple(Cell(measure, _renumbered(own, index, prompts)) for measure, own in cells),
    )


def side_name(model: str, thinking: str) -> str:
    """The name of a model in a thinking mode."""
    return model if thinking == "default" else f"{model}::{thinking}"


def _renumbered(own: Sums, index: Mapping[int, int], prompts: Mapping[str, Prompts]) -> Sums:
    """The sums with the indices and base prompts of `Prompts`, in place of the store's."""
    import numpy as np

    at = np.array([index[id] for id in own.prompt.tolist()], dtype=np.int64)
    return replace(own, prompt=at, base=np.array(prompts[own.dataset].bases)[at])


def _prompts(store: Store, datasets: set[str]) -> tuple[dict[str, Prompts], dict[int, int]]:
    """The prompts of each dataset, and their indices there by row id."""
    found: dict[str, list[tuple[str, int, str]]] = {dataset: [] for dataset in sorted(datasets)}
    index: dict[int, int] = {}
    seen: dict[str, int] = {}
    bases: dict[str, dict[str, int]] = {}
    for id, dataset, name, base, category, *content in store.query(
        "SELECT id, dataset, name, base, category, text, context, target, harmful FROM prompts "
        "ORDER BY id"
    ):
        if dataset not in found:
            continue
        key = blake2b(json.dumps([dataset, *content]).encode(), digest_size=8).hexdigest()
        # Equal prompts of one dataset are told apart by their order.
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 1:
            key = f"{key}-{seen[key]}"
        index[id] = len(found[dataset])
        names = bases.setdefault(dataset, {})
        number = names.setdefault(base or name, len(names))
        found[dataset].append((key, number, category))
    return {name: Prompts(*zip(*rows, strict=True)) for name, rows in found.items() if rows}, index


def _judges(store: Store, judge: str | None, prompts: Mapping[str, Prompts]) -> dict[str, str]:
    """Name and settings of the judge whose verdicts are used, by dataset."""
    if judge is not None:
        where, values = "j.id = (SELECT MAX(id) FROM judges WHERE name = ?)", [judge]
    else:
        where, values = "j.id = p.judge", []
    rows = store.query(
        f"SELECT p.dataset, j.name, j.settings FROM primary_judges p JOIN judges j ON {where}",
        values,
    )
    return {
        dataset: name if settings in (None, "", "{}") else f"{name} {settings}"
        for dataset, name, settings in rows
        if dataset in prompts
    }


# -- baseline files -------------------------------------------------------------------------------


def _packed(values: np.ndarray[Any, Any]) -> Any:
    """Numbers as a list of integers where they are; one number if all are equal."""
    numbers = [int(v) if float(v).is_integer() else float(v) for v in values.tolist()]
    return numbers[0] if len(numbers) > 1 and len(set(numbers)) == 1 else numbers


def _packed_ints(values: tuple[int, ...]) -> Any:
    """None for 0, 1, 2, ...: every prompt is its own base prompt."""
    order = {value: at for at, value in enumerate(dict.fromkeys(values))}
    numbers = [order[value] for value in values]
    return None if numbers == list(range(len(numbers))) else numbers


def _packed_names(values: tuple[str, ...]) -> dict[str, Any]:
    names = {value: at for at, value in enumerate(dict.fromkeys(values))}
    return {"names": list(names), "of": [names[value] for value in values]}


def _from_file(file: Path) -> Side:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["leadline_baseline"]
        if version != _FORMAT:
            raise LeadlineError(
                f"{file} has the format {version}, and this version of Leadline reads {_FORMAT}: "
                "write it again with `leadline baseline`"
            )
        prompts = {name: _unpacked_prompts(each) for name, each in content["prompts"].items()}
        cells = tuple(_unpacked_cell(each, prompts, content["model"]) for each in content["cells"])
        judges = {str(dataset): str(name) for dataset, name in content["judges"].items()}
        return Side(str(content["model"]), str(file), judges, prompts, cells)
    except LeadlineError:
        raise
    except RecursionError:
        raise LeadlineError(f"{file} is not a baseline file: it is nested too deep") from None
    except (OSError, UnicodeDecodeError, LookupError, TypeError, ValueError, AttributeError) as e:
        raise LeadlineError(
            f"{file} is not a baseline file ({one_line(e)}): write one with `leadline baseline`"
        ) from None


def _unpacked_prompts(packed: Mapping[str, Any]) -> Prompts:
    keys = tuple(map(str, packed["keys"]))
    bases = packed["bases"] if packed["bases"] is not None else list(range(len(keys)))
    names, of = packed["categories"]["names"], packed["categories"]["of"]
    if not len(keys) == len(bases) == len(of):
        raise ValueError("its prompts have lists of different lengths")
    return Prompts(keys, tuple(map(int, bases)), tuple(str(names[at]) for at in of))


def _unpacked_cell(packed: Mapping[str, Any], prompts: Mapping[str, Prompts], model: str) -> Cell:
    import numpy as np

    if packed["measure"] not in MEASURES:
        raise ValueError(f"its measure is {packed['measure']!r}")
    bases = prompts[packed["dataset"]].bases
    names = ("prompts", "attempts", "scored", "total")
    size = max((len(packed[name]) for name in names if isinstance(packed[name], list)), default=0)
    arrays = {
        name: np.array(
            packed[name] if isinstance(packed[name], list) else [packed[name]] * size, dtype=float
        )
        for name in names
    }
    at = arrays.pop("prompts").astype(np.int64)
    if any(len(values) != len(at) for values in arrays.values()):
        raise ValueError("a cell has lists of different lengths")
    if len(at) and not (at.min() >= 0 and at.max() < len(bases)):
        raise ValueError("a cell refers to a prompt that is not there")
    if not all(np.isfinite(values).all() for values in arrays.values()):
        raise ValueError("a cell has a number that is not finite")
    if (arrays["scored"] > arrays["attempts"]).any() or (arrays["total"] > arrays["scored"]).any():
        raise ValueError("a cell has more verdicts than attempts")
    if min((float(values.min()) for values in arrays.values() if len(values)), default=0) < 0:
        raise ValueError("a cell has a negative number")
    own = Sums(
        str(model), "", str(packed["dataset"]), str(packed["attack"]), bool(packed["any"]), at,
        np.array([bases[i] for i in at.tolist()], dtype=np.int64), **arrays,
    )  # fmt: skip
    return Cell(packed["measure"], own)
