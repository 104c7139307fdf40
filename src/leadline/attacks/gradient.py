"""Transfer of GCG: suffixes from a gradient search on other models, appended to the request.

Leadline ships no suffixes: the option `suffixes` names a file, from a paper's repository or from
your own search.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from ..records import Attempt, LeadlineError, NotApplicable, Prompt
from ..registry import attack


@attack(
    "gcg_transfer_harmbench",
    family="gradient",
    source="Mazeika et al. 2024, HarmBench (arXiv 2402.04249): GCG-T",
    needs=("suffixes",),
    battery="strongreject",
    pool="any",
)
def gcg_transfer_harmbench(prompt: Prompt, *, suffixes: str | None = None) -> list[Attempt]:
    """The request followed by suffixes that HarmBench optimized on several open models."""
    return _suffixed(prompt, suffixes)


@attack(
    "gcg_transfer_universal_attacks",
    family="gradient",
    source="Zou et al. 2023, Universal and Transferable Adversarial Attacks (arXiv 2307.15043)",
    needs=("suffixes",),
    battery="strongreject",
    pool="any",
)
def gcg_transfer_universal_attacks(prompt: Prompt, *, suffixes: str | None = None) -> list[Attempt]:
    """The request followed by suffixes that were optimized for many requests at once."""
    return _suffixed(prompt, suffixes)


def _suffixed(prompt: Prompt, suffixes: str | None) -> list[Attempt]:
    if not suffixes:
        raise NotApplicable(
            "no suffix file: set suffixes: PATH (a JSON list, JSONL, or one suffix per line)"
        )
    path = Path(suffixes).expanduser()
    try:
        changed = path.stat().st_mtime_ns
    except OSError as error:
        raise _unreadable(path, error) from None
    return [Attempt.ask(f"{prompt.text} {suffix}") for suffix in _read(path, changed)]


@lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> tuple[str, ...]:
    """The suffixes of a file; spaces in them are kept.

    `.json`: a list of strings. `.jsonl`: a string, or an object with `suffix`, per line. Any other
    name: one suffix per line. `changed`, the modification time, makes the cache read a file again
    after it was written. Raises LeadlineError for a file that cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError:
        raise LeadlineError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if path.suffix == ".json":
        data = _parsed(path, 1, text)
        rows = [(1, row) for row in data] if isinstance(data, list) else [(1, None)]
    elif path.suffix == ".jsonl":
        rows = [(n, _parsed(path, n, line)) for n, line in lines]
    else:
        rows = list(lines)
    suffixes = [(n, row.get("suffix") if isinstance(row, dict) else row) for n, row in rows]
    for n, suffix in suffixes:
        if not isinstance(suffix, str) or not suffix.strip():
            raise LeadlineError(f"{path}:{n}: a suffix must be a non-empty string")
    if not suffixes:
        raise LeadlineError(f"{path}:1: the file has no suffixes: add at least one")
    return tuple(str(suffix) for _, suffix in suffixes)


def _unreadable(path: Path, error: OSError) -> LeadlineError:
    return LeadlineError(
        f"cannot read the suffix file {path} ({error.strerror}): check the option suffixes"
    )


def _parsed(path: Path, first: int, text: str) -> object:
    """The JSON value of a text that starts at line `first` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first + error.lineno - 1
        raise LeadlineError(f"{path}:{line}: not valid JSON: {error.msg}") from None
