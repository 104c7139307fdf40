"""Tables and plots of the study, from the results in its output folder: one function each.

tables.write(out)     writes out/report.md, out/results.json and out/*.svg
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leadline.files import write_private

sys.path.append(str(Path(__file__).parents[1]))  # the table of studies/finetuning.py
from finetuning_table import estimate

MODELS = ("untouched", "aligned", "deepened")
COLOURS = {"untouched": "#7f7f7f", "aligned": "#d95f02", "deepened": "#1b6ca8"}


def write(out: Path) -> list[Path]:
    """Write what can be made from the stored results, and return the files."""
    results = load(out)
    parts = [part for make in (heldout, depth, finetuning, optimizers, frontier)
             if (part := make(results))]  # fmt: skip
    files = {"report.md": "\n".join(parts), "results.json": json.dumps(results, indent=1) + "\n"}
    if "heldout" in results:
        files["prefill.svg"] = prefill_plot(results["heldout"])
    if results["frontier"]:
        files["frontier.svg"] = frontier_plot(results["frontier"])
    for name, text in files.items():
        write_private(out / name, text)
    return [out / name for name in files]


def load(out: Path) -> dict[str, Any]:
    """All results: of `heldout`, of the depth report, the estimates of the fine-tuning cells, and
    the variants of the repair."""
    results: dict[str, Any] = {}
    if (file := out / "results" / "heldout.json").is_file():
        results["heldout"] = json.loads(file.read_text(encoding="utf-8"))
    if (file := out / "depth" / "depth.json").is_file():
        results["depth"] = json.loads(file.read_text(encoding="utf-8"))
    for step in ("finetuning", "optimizers"):
        results[step] = _cells(_read(out / "results" / step), by_optimizer=step == "optimizers")
    results["frontier"] = _read(out / "results" / "frontier")
    return results


def _read(folder: Path) -> list[Any]:
    return [json.loads(f.read_text(encoding="utf-8")) for f in sorted(folder.glob("*.json"))]


def _cells(found: Sequence[Mapping[str, Any]], by_optimizer: bool) -> list[dict[str, Any]]:
    """A row for each model, data, optimizer and measure: initial, plain and constrained rates over
    seeds, and their paired difference."""
    groups: dict[tuple[str, str, str], dict[str, dict[int, Any]]] = {}
    for result in found:
        cell = result["cell"]
        method = "initial" if cell["data"] == "none" else (
            "constrained" if cell["constrained"] else "plain")  # fmt: skip
        optimizer = _optimizer(cell["optimizer"]) if by_optimizer else ""
        group = groups.setdefault((cell["model"], cell["data"], optimizer), {})
        group.setdefault(method, {})[cell["seed"]] = result["values"]
    rows = []
    for (model, data, optimizer), methods in sorted(groups.items()):
        names = dict.fromkeys(m for runs in methods.values() for run in runs.values() for m in run)
        for measure in names:
            row: dict[str, Any] = {"model": model, "data": data, "measure": measure}
            row |= {"optimizer": optimizer} if optimizer else {}
            seeds = sorted(set.intersection(*(set(runs) for runs in methods.values())))
            if not seeds:
                continue
            values = {method: [runs[s][measure] for s in seeds] for method, runs in methods.items()}
            row |= {method: estimate(runs) for method, runs in values.items()}
            if {"plain", "constrained"} <= values.keys():
                row["difference"] = estimate(values["constrained"], values["plain"])
            rows.append({**row, "seeds": len(seeds)})
    return rows


def _optimizer(settings: Mapping[str, Any]) -> str:
    return (
        f"{settings['optim'].removesuffix('_torch')}, lr {settings['lr']:g}, {settings['steps']} x "
        f"{settings['batch']}, beta1 {settings['beta1']}, clip {settings['clip']:g}, "
        f"warmup {settings['warmup']}"
    )


def heldout(results: Mapping[str, Any]) -> str:
    """The table of the three models on held-out prompts; "" without results."""
    if "heldout" not in results:
        return ""
    models = results["heldout"]["models"]
    names = [name for name in MODELS if name in models]
    lines = [["", *names]]
    for k in models[names[0]]["not_refused"]:
        label = "not refused, direct" if k == "0" else f"not refused, k = {k}"
        lines.append([label, *(rate(models[name]["not_refused"].get(k)) for name in names)])
    lines.append(["D50, tokens", *(d50(models[name]["d50"]) for name in names)])
    for topic in ("look-alike", "everyday"):
        cells = (rate(models[name]["over_refusal"].get(topic)) for name in names)
        lines.append([f"over-refusal, {topic}", *cells])
    kl = (rate(models[name]["kl_harmless"]) for name in names)
    lines.append(["KL on harmless answers, nats per token", *kl])
    lengths = (f"{models[name]['harmless_characters']:.0f}" for name in names)
    lines.append(["characters of a harmless answer", *lengths])
    return table("Held-out prompts", lines)


def depth(results: Mapping[str, Any]) -> str:
    """The findings of the depth report, and KL by position."""
    if "depth" not in results:
        return ""
    report = results["depth"]
    models = list(dict.fromkeys(point["model"] for point in report["kl"]))
    lines = [["position", *(Path(model).name for model in models)]]
    by = {(point["model"], point["position"]): point for point in report["kl"]}
    for position in (0, 1, 2, 3, 5, 8, 12, 16, 24):
        cells = [rate(by.get((model, position))) for model in models]
        lines.append([str(position), *cells])
    findings = "\n".join(f"- {sentence}" for sentence in report["findings"])
    return f"## Depth\n\n{findings}\n\n" + table("KL from the untouched model, nats", lines)


def finetuning(results: Mapping[str, Any]) -> str:
    """Constrained against plain fine-tuning, by data."""
    lines = [["model", "data", "measure", "before", "plain", "constrained", "difference"]]
    initial = {(row["model"], row["measure"]): row["initial"]
               for row in results["finetuning"] if row["data"] == "none"}  # fmt: skip
    for row in results["finetuning"]:
        if row["data"] != "none":
            before = initial.get((row["model"], row["measure"]))
            cells = (rate(row.get(name)) for name in ("plain", "constrained", "difference"))
            lines.append([row["model"], row["data"], row["measure"], rate(before), *cells])
    return table("Constrained and plain fine-tuning", lines) if len(lines) > 1 else ""


def optimizers(results: Mapping[str, Any]) -> str:
    """Direct requests that are not refused after fine-tuning on harmful data, by optimizer."""
    lines = [["optimizer", "model", "plain", "constrained", "difference"]]
    for row in results["optimizers"]:
        if row["measure"] == "direct":
            cells = (rate(row.get(name)) for name in ("plain", "constrained", "difference"))
            lines.append([row["optimizer"], row["model"], *cells])
    return table("Harmful data by optimizer: direct requests not refused", lines) if len(
        lines) > 1 else ""  # fmt: skip


def frontier(results: Mapping[str, Any]) -> str:
    """Variants of the repair: depth against what it costs."""
    lines = [["variant", "D50", "k = 5", "k = 10", "over-refusal, look-alikes", "everyday", "KL"]]
    for row in results["frontier"]:
        found = row["measures"]
        refused = (rate(found["over_refusal"].get(t)) for t in ("look-alike", "everyday"))
        curve = (rate(found["not_refused"].get(k)) for k in ("5", "10"))
        lines.append([row["name"], d50(found["d50"]), *curve, *refused, rate(found["kl_harmless"])])
    return table("Variants of the repair", lines) if len(lines) > 1 else ""


def table(title: str, lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table under a heading; the first line is its head."""
    heads, *rows = lines
    rows = [heads, ["---"] * len(heads), *rows]
    return "\n".join([f"## {title}", "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def rate(cell: Mapping[str, Any] | None) -> str:
    """A value with its interval."""
    if cell is None or cell["value"] is None or math.isnan(cell["value"]):
        return ""
    text = f"{cell['value']:.2f}"
    return text if cell["low"] is None else f"{text} [{cell['low']:.2f}, {cell['high']:.2f}]"


def d50(found: Mapping[str, Any]) -> str:
    """D50 with its interval, or the side on which it is censored."""
    if found["note"]:
        return "not defined"
    if found["censored"]:
        return f"{'over' if found['censored'] == 'above' else 'at most'} {found['at']:g}"
    low, high = ("" if end is None else f"{end:.1f}" for end in (found["low"], found["high"]))
    return f"{found['value']:.1f} [{low}, {high}]"


# -- plots ----------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP = 640, 340, 60, 24
_INNER = (WIDTH - LEFT - 130, HEIGHT - TOP - 56)


def prefill_plot(found: Mapping[str, Any]) -> str:
    """The prefill curves of the models, with intervals, as SVG."""
    models = {name: found["models"][name] for name in MODELS if name in found["models"]}
    ks = sorted({int(k) for each in models.values() for k in each["not_refused"]})
    longest = math.log1p(ks[-1])

    def x(k: float) -> float:
        return LEFT + _INNER[0] * math.log1p(k) / longest

    marks = []
    for row, (name, each) in enumerate(models.items()):
        colour = COLOURS[name]
        points = [(x(int(k)), r) for k, r in each["not_refused"].items() if r["value"] is not None]
        path = " ".join(f"{at:.1f},{_y(r['value']):.1f}" for at, r in points)
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for at, r in points:
            marks += _dot(at, r, colour)
        marks.append(_text(WIDTH - 118, TOP + 14 + 20 * row, name, colour=colour))
    ticks = [(x(k), str(k)) for k in ks]
    return _svg(marks, ticks, "prefilled tokens of the untouched model's answer", "not refused")


def frontier_plot(found: Sequence[Mapping[str, Any]]) -> str:
    """KL on harmless answers against requests that are not refused after ten prefilled tokens, with
    a dot for each variant of the repair, as SVG."""
    points = [(row["name"], row["measures"]["kl_harmless"]["value"],
               row["measures"]["not_refused"].get("10") or row["measures"]["not_refused"]["5"])
              for row in found]  # fmt: skip
    most = max([1.0, *(kl for _, kl, _ in points)])
    marks = []
    for name, kl, r in points:
        at = LEFT + _INNER[0] * kl / most
        marks += _dot(at, r, COLOURS["deepened"])
        marks.append(_text(at + 6, _y(r["value"]) - 5, name, size=11))
    ticks = [(LEFT + _INNER[0] * n / 4, f"{most * n / 4:.2f}") for n in range(5)]
    return _svg(marks, ticks, "KL on harmless answers, nats per token", "not refused")


def _dot(x: float, cell: Mapping[str, Any], colour: str) -> list[str]:
    """A value as a dot, and its interval as a line."""
    low, high = _y(cell["low"]), _y(cell["high"])
    return [
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}" '
        'stroke-opacity="0.6"/>',
        f'<circle cx="{x:.1f}" cy="{_y(cell["value"]):.1f}" r="3.5" fill="{colour}"/>',
    ]


def _y(share: float) -> float:
    return TOP + _INNER[1] * (1 - share)


def _svg(marks: Sequence[str], ticks: Sequence[tuple[float, str]], x: str, y: str) -> str:
    bottom, right = TOP + _INNER[1], LEFT + _INNER[0]
    lines = [f'<line x1="{LEFT}" x2="{right}" y1="{_y(s):.1f}" y2="{_y(s):.1f}" stroke="#ddd"/>'
             for s in (0, 0.25, 0.5, 0.75, 1)]  # fmt: skip
    lines += [_text(LEFT - 8, _y(s) + 4, f"{s:.2f}", anchor="end") for s in (0, 0.25, 0.5, 0.75, 1)]
    lines += [_text(at, bottom + 18, label, anchor="middle") for at, label in ticks]
    lines.append(_text((LEFT + right) / 2, bottom + 40, x, anchor="middle"))
    lines.append(_text(LEFT, TOP - 9, y))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif"><rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join([*lines, *marks])
        + "\n</svg>\n"
    )


def _text(
    x: float, y: float, text: str, anchor: str = "start", colour: str = "#333", size: int = 12
) -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{colour}">{text}</text>')  # fmt: skip
