"""Make untrusted text (model output) safe to show, and format numbers.

Jinja's autoescaping covers HTML. These functions cover the rest: control characters, terminal
escapes, bidirectional and invisible characters, text inside script tags, and redaction.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from .secret import scrub

# Unicode's control characters and invisible format characters, except for newline, tab and the
# two joiners (U+200C, U+200D) that Persian, Hindi and emoji need.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e0fff]"
)


def visible(text: str) -> str:
    """Replace invisible characters by their code points: a bidi override becomes ⟨U+202E⟩."""
    return _HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def shown(value: object) -> str:
    """A value as one line of text for the terminal: names, errors and replies may hold terminal
    escapes, line breaks and secrets."""
    text = visible(scrub(str(value)))
    return text.replace("\n", "⟨U+000A⟩").replace("\t", "⟨U+0009⟩")


def shorten(text: str, most: int) -> str:
    """The first `most` characters, followed by the number of characters that were removed."""
    return text if len(text) <= most else f"{text[:most]} … [{len(text) - most} more characters]"


def one_line(error: BaseException) -> str:
    """An error's message as one line of at most 200 characters; its type if it has no message."""
    text = " ".join(scrub(str(error)).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


_NAME = re.compile(r"[\w.-]{1,30}", re.ASCII)


def is_name(value: object) -> bool:
    """Whether a cell or a column of a table is one short word, so that an error may repeat it."""
    return isinstance(value, str) and bool(_NAME.fullmatch(value))


def outline(value: object) -> str:
    """A cell of a table for an error message: a short word as it is, of anything else only the type
    and the length, since it may be part of a prompt or an answer."""
    if is_name(value):
        return repr(value)
    return f"{len(value)} characters" if isinstance(value, str) else f"a {type(value).__name__}"


def redact(text: str) -> str:
    """The placeholder shown instead of unsafe text; "" for an empty text."""
    return f"[redacted: {len(text)} characters; --reveal shows it]" if text else ""


def script_json(value: Any) -> str:
    """JSON that is safe inside a script tag: without tags, comments and line separators."""
    text = json.dumps(plain(value), allow_nan=False, separators=(",", ":"))
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text  # json.dumps escapes everything outside ASCII, including U+2028


def script_code(code: str) -> str:
    """JavaScript that is safe inside a script tag: `</script` and `<!--` are escaped. They occur
    only in strings and regular expressions, where the added backslash has no effect."""
    # A browser normalizes line ends before it hashes the script for the content security policy.
    code = code.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub("</(?=script)", r"<\\/", code, flags=re.IGNORECASE).replace("<!--", r"<\!--")


def plain(value: Any) -> Any:
    """The value in types that JSON supports: numpy scalars become Python numbers, NaN and
    infinity become None, tuples become lists, keys become strings."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percent(share: float) -> str:
    """A share as a percentage: 0.973 is 97%. Below 1% and above 99% it has one decimal, so that
    only exactly 0 and 1 are shown as 0% and 100%."""
    value = 100 * share
    near_end = 0 < value < 1 or 99 < value < 100
    return f"{min(max(value, 0.1), 99.9):.1f}%" if near_end else f"{value:.0f}%"


def span(low: float, high: float) -> str:
    """An interval of shares as percentages: [90%, 99%]."""
    return f"[{percent(low)}, {percent(high)}]"
