"""A report is of everything that its folder holds: results of earlier calls are kept.

Results are kept where they are of the same dataset, judge and version, of a model that has not
changed since, and, for measures that compare with a base model, of the same base.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ..registry import MeasurePlugin, plugins

log = logging.getLogger("leadline")

NOT_REQUESTED = "not requested"


def with_earlier(data: dict[str, Any], file: Path) -> dict[str, Any]:
    """The content of depth.json with what the existing `file` holds beside it. What this call
    measured replaces earlier results of the same measure and model."""
    earlier = _read(file)
    if earlier is None:
        return data
    if data["source"] != earlier.get("source"):
        log.warning(
            "%s was a report on another dataset or judge, or of another version: it is replaced. "
            "The trials stay, and the earlier command with another --out keeps both reports", file
        )  # fmt: skip
        return data
    merged = {**data, "skipped": dict(data["skipped"]), "settings": dict(data["settings"])}
    kept: set[str] = set()
    for plugin in plugins("measure"):
        kept |= _keep(plugin, merged, earlier)
    if kept:
        others = [m for m in earlier["models"] if m in kept and m not in data["models"]]
        merged["models"] = [*data["models"], *others]
        merged["base"] = data["base"] or earlier["base"]
        budgets = dict.fromkeys([*earlier["budget"].split(", "), *data["budget"].split(", ")])
        merged["budget"] = ", ".join(budgets)
        merged["revisions"] = {**earlier["revisions"], **data["revisions"]}
    return merged


def _read(file: Path) -> dict[str, Any] | None:
    try:
        earlier = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return earlier if isinstance(earlier, dict) else None


def _keep(plugin: MeasurePlugin, data: dict[str, Any], earlier: dict[str, Any]) -> set[str]:
    """Add the earlier results of a measure to `data`; returns the models that they are of."""
    lists = [name for section in plugin.sections for name in section.points]
    base = earlier["base"]
    if "base" in plugin.needs and (
        data["base"] not in (None, base) or _changed(base, data, earlier)
    ):
        return set()
    measured = {point["model"] for name in lists for point in data[name]}
    found: set[str] = set()
    for name in lists:
        old = [
            point
            for point in earlier.get(name, [])
            if point["model"] not in measured and not _changed(point["model"], data, earlier)
        ]
        found |= {point["model"] for point in old}
        data[name] = [*old, *data[name]]
    if not found:
        return found
    for model in found:
        own = earlier["d50"].get(model, {}).items()
        own = {name: d50 for name, d50 in own if name.partition(":")[0] == plugin.name}
        if own:
            data["d50"] = {**data["d50"], model: {**own, **data["d50"].get(model, {})}}
    if data["skipped"].get(plugin.name) == NOT_REQUESTED:
        del data["skipped"][plugin.name]
        if (reason := earlier["skipped"].get(plugin.name, NOT_REQUESTED)) != NOT_REQUESTED:
            data["skipped"][plugin.name] = reason
    _keep_settings(plugin.name, data["settings"], earlier["settings"], sorted(found))
    return found


def _changed(model: str, data: dict[str, Any], earlier: dict[str, Any]) -> bool:
    """Whether this call found other weights under a name than the earlier one."""
    revision = earlier["revisions"].get(model)
    return bool(data["revisions"].get(model, revision) != revision)


def _keep_settings(
    measure: str, settings: dict[str, Any], earlier: dict[str, Any], models: list[str]
) -> None:
    """Where this call measured with other settings than the earlier one, both are kept."""
    old, new = earlier.get(measure), settings.get(measure)
    if not isinstance(old, dict) or not isinstance(new, dict):
        settings[measure] = new if new is not None else old
        return
    differing = {name: value for name, value in old.items() if new.get(name, value) != value}
    settings[measure] = {**old, **new}
    if differing:
        settings[measure][f"of {', '.join(models)}"] = differing
