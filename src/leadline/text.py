"""Text that others wrote, made fit to show: model output is never trusted.

Jinja's autoescape keeps it from being HTML; this keeps it from hiding (control characters, terminal
codes, reversed or invisible writing), from ending a script tag, and unsafe text from the page.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

# All of Unicode's controls and invisible format characters, but for newline, tab and the two
# joiners (U+200C, U+200D) that Persian, Hindi and emoji are written with.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e0fff]"
)


def visible(text: str) -> str:
    """Hidden characters as a mark that can be seen: a bidi override becomes ⟨U+202E⟩."""
    return _HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def shorten(text: str, most: int) -> str:
    """At most that many characters, saying how many more there are."""
    return text if len(text) <= most else f"{text[:most]} … [{len(text) - most} more characters]"


def one_line(error: BaseException) -> str:
    """The first sentence of an error: transformers writes paragraphs."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def redact(text: str) -> str:
    """What stands in place of unsafe text; nothing stays nothing."""
    return f"[redacted: {len(text)} characters; --reveal shows it]" if text else ""


def script_json(value: Any) -> str:
    """JSON that can stand in a script tag: it holds no tag, no comment and no line separator."""
    text = json.dumps(plain(value), allow_nan=False, separators=(",", ":"))
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text  # json.dumps has escaped everything beyond ASCII, U+2028 too


def script_code(code: str) -> str:
    """JavaScript that can stand in a script tag. Both sequences occur only inside its strings and
    regular expressions, where the backslash changes nothing."""
    code = code.replace("\r\n", "\n").replace("\r", "\n")  # as a browser reads, and hashes, it
    return re.sub("</(?=script)", r"<\\/", code, flags=re.IGNORECASE).replace("<!--", r"<\!--")


def plain(value: Any) -> Any:
    """The same as JSON can hold it: numpy numbers as Python's, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percent(share: float) -> str:
    """0.973 is 97%; next to 0 and 1 with one decimal, so that only 0 and 1 read as 0% and 100%."""
    value = 100 * share
    near_end = 0 < value < 1 or 99 < value < 100
    return f"{min(max(value, 0.1), 99.9):.1f}%" if near_end else f"{value:.0f}%"


def span(low: float, high: float) -> str:
    """An interval: [90%, 99%]."""
    return f"[{percent(low)}, {percent(high)}]"
