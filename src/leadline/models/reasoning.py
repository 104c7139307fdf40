"""Reasoning formats: the delimiters with which models write a thought and an answer.

`header_tail` below is the text that the chat template's generation prompt adds after the last
message. It may open a thought, or contain a complete empty one. That decides which delimiters a
response prefix still needs, and whether a completion starts in the thought or in the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..records import LeadlineError, ResponsePrefix
from ..registry import unknown

EFFORTS = ("low", "medium", "high")
Place = Literal["before", "thought", "answer"]


@dataclass(frozen=True, slots=True)
class Format:
    """The delimiters and chat template arguments of one reasoning format.

    `open`, `close` and `empty_thought` are the strings to write: the start of a thought, its end
    up to the start of the answer, and a complete empty thought. `open_pattern`, `close_pattern`
    and `markup_pattern` are regular expressions to parse completions: the same two delimiters,
    and markup to remove from a thought or an answer. `template_marker` is a string that occurs in
    the chat templates of this format. `starts_open`: if `header_tail` is unknown, the thought is
    already open. `on` and `off` are template arguments that turn thinking on and off.
    """

    name: str
    open: str = ""
    close: str = ""
    empty_thought: str = ""
    open_pattern: str = ""
    close_pattern: str = ""
    markup_pattern: str = ""
    template_marker: str = ""
    starts_open: bool = False
    on: Mapping[str, Any] = field(default_factory=lambda: {"enable_thinking": True})
    off: Mapping[str, Any] = field(default_factory=lambda: {"enable_thinking": False})

    def switch(self, thinking: str) -> dict[str, Any]:
        """Chat template arguments for a thinking mode: default, on, off, an effort (low, medium,
        high), or a budget in tokens ("1024")."""
        if thinking.isdigit():
            return {**self.on, "thinking_budget": int(thinking)}
        if thinking in EFFORTS:
            return {**self.on, "reasoning_effort": thinking}
        return dict({"on": self.on, "off": self.off}.get(thinking, {}))

    @property
    def marks(self) -> str:
        """All delimiters in one string: decoding keeps a special token that occurs in it."""
        return self.open + self.close + self.empty_thought + self.markup_pattern


_XML: dict[str, Any] = {
    "open": "<think>\n",
    "close": "\n</think>\n\n",
    "empty_thought": "<think>\n\n</think>\n\n",
    "open_pattern": "<think>",
    "close_pattern": "</think>",
    "template_marker": "</think>",
    "on": {"enable_thinking": True, "thinking": True},
    "off": {"enable_thinking": False, "thinking": False},
}

# From specific to general: `detect` prefers the first format whose marker it finds.
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(
            "harmony",
            open="<|channel|>analysis<|message|>",
            close="<|end|><|start|>assistant<|channel|>final<|message|>",
            empty_thought="<|channel|>final<|message|>",
            open_pattern=r"<\|channel\|>analysis<\|message\|>",
            # The commentary channel is shown to the user, so it belongs to the answer.
            close_pattern=r"(?:<\|end\|>)?(?:<\|start\|>assistant)?"
            r"<\|channel\|>(?:final|commentary)[^\n]{0,100}?<\|message\|>",
            # Later messages of the same turn, and a header truncated by the length limit.
            markup_pattern=r"(?:<\|(?:end|return|call)\|>)?(?:<\|start\|>assistant)?"
            r"<\|channel\|>[^\n]{0,100}?(?:<\|message\|>|$)"
            r"|<\|(?:end|return|call)\|>(?:<\|start\|>\w*)?",
            template_marker="<|channel|>analysis<|message|>",
        ),
        Format(
            "seed",
            open="<seed:think>",
            close="</seed:think>",
            empty_thought="<seed:think></seed:think>",
            open_pattern="<seed:think>",
            close_pattern="</seed:think>",
            markup_pattern="<seed:cot_budget_reflect>.*?</seed:cot_budget_reflect>",
            template_marker="<seed:think>",
            off={"thinking_budget": 0},
        ),
        Format(
            "mistral",
            open="[THINK]",
            close="[/THINK]",
            empty_thought="[THINK][/THINK]",
            open_pattern=r"\[THINK\]",
            close_pattern=r"\[/THINK\]",
            template_marker="[THINK]",
        ),
        Format("think", **_XML),
        Format("think_open", starts_open=True, **_XML),
        Format("none", close="\n\n"),
    )
}


def get(name: str) -> Format:
    """The format of that name. Raises LeadlineError, with the nearest names, if there is none."""
    if name not in FORMATS:
        raise LeadlineError(unknown("reasoning format", name, FORMATS))
    return FORMATS[name]


def detect(chat_template: str | None, rendered_generation_prompt: str) -> str:
    """Guess the format's name from a chat template and the generation prompt that it renders."""
    template = chat_template or ""
    candidates = [
        f for f in FORMATS.values() if f.template_marker and f.template_marker in template
    ]
    tail = rendered_generation_prompt.rstrip()
    for f in candidates:
        if f.starts_open == tail.endswith(f.open.strip()):
            return f.name
    return candidates[0].name if candidates else "none"


def render(format: Format, prefix: ResponsePrefix, header_tail: str = "") -> str:
    """The text of `prefix` in this format, to be appended after `header_tail`.

    If the thought is None and there is an answer, the format's empty thought precedes the answer,
    unless the header already contains one. Raises LeadlineError for an open thought with an answer.
    """
    thought = prefix.thought or ""
    place = _place(format, header_tail)
    opening = "" if place == "thought" else format.open
    if prefix.thought_open:
        if prefix.answer:
            raise LeadlineError(
                "a response prefix has both an open thought and an answer: "
                "drop `thought_open` or the answer"
            )
        return opening + thought
    if thought:
        return opening + thought + format.close + prefix.answer
    if place == "answer" or (prefix.thought is None and not prefix.answer):
        return prefix.answer
    return (format.close if place == "thought" else format.empty_thought) + prefix.answer


def reopened(format: Format, header_tail: str) -> str:
    """`header_tail` without the complete thought that the template wrote into it (thinking off),
    so that another thought can replace it."""
    if not format.close_pattern or _place(format, header_tail) != "answer":
        return header_tail
    first = re.search(f"{format.open_pattern}|{format.close_pattern}", header_tail)
    return header_tail[: first.start()] if first else header_tail


def split(format: Format, header_tail: str, prefix_text: str, completion: str) -> tuple[str, str]:
    """Split a completion into (thought, answer); neither contains the prefix.

    The first closing delimiter ends the thought: a later one is part of the answer. If the thought
    never ends, the answer is empty. White space is removed next to delimiters in the completion,
    but kept where the completion continues the prefix.
    """
    if not format.close_pattern:
        return "", completion
    place = _place(format, header_tail, prefix_text)
    thought, answer = "", completion
    if place == "before":
        # If the header is unknown it may have opened the thought, so a closing delimiter without
        # an opening one counts anywhere; else only at the start.
        closing = (
            rf"\s*(?:{format.close_pattern})"
            if header_tail
            else f"(?s:.*?)(?:{format.close_pattern})"
        )
        if begun := re.match(rf"\s*(?:{format.open_pattern})\s*", completion):
            place, completion = "thought", completion[begun.end() :]
        elif re.match(closing, completion):
            place = "thought"
    elif place == "thought" and not prefix_text:
        # Some models repeat the opening delimiter that their template has written.
        begun = re.match(rf"\s*(?:{format.open_pattern})\s*", completion)
        completion = completion[begun.end() :] if begun else completion
    if place == "thought":
        ended = re.search(format.close_pattern, completion)
        thought = completion[: ended.start()].rstrip() if ended else completion
        answer = completion[ended.end() :].lstrip() if ended else ""
    return _remove_markup(format.markup_pattern, thought), _remove_markup(
        format.markup_pattern, answer
    )


def _place(format: Format, header_tail: str, prefix_text: str = "") -> Place:
    """Where a completion starts: before any thought, in the thought, or in the answer."""
    if not format.close_pattern:
        return "before"
    text = (header_tail or (format.open if format.starts_open else "")) + prefix_text
    first = re.search(f"{format.open_pattern}|{format.close_pattern}", text)
    if not first:
        return "before"
    begun = re.fullmatch(format.open_pattern, first[0])
    return (
        "thought"
        if begun and not re.search(format.close_pattern, text[first.end() :])
        else "answer"
    )


def _remove_markup(pattern: str, text: str) -> str:
    """`text` without the matches of `pattern`; the parts between them are joined by newlines."""
    if not pattern:
        return text
    return "\n".join(part for part in re.split(pattern, text, flags=re.DOTALL) if part)
