"""Whether an answer states a short, exact fact."""

from __future__ import annotations

import re
import unicodedata

from ..records import Prompt, Response

# A number, a Chinese or Japanese character (written without spaces), or a word.
_TOKEN = re.compile(
    r"\d+(?:[.,]\d+)*|[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+"
)


def correctness(prompt: Prompt, response: Response) -> float | None:
    """1.0 where the answer contains one of the prompt's accepted answers as whole words, without
    regard to case, width and punctuation; 0.0 where it does not; None for a prompt without them."""
    if not prompt.answers:
        return None
    words = _words(response.answer)
    return float(any(_contains(words, _words(accepted)) for accepted in prompt.answers))


def _words(text: str) -> list[str]:
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def _contains(words: list[str], part: list[str]) -> bool:
    size = len(part)
    return any(words[i : i + size] == part for i in range(len(words) - size + 1))
