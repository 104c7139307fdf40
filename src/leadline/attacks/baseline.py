"""The request without an attack, and prefilling: a response prefix that starts to comply."""

from __future__ import annotations

from ..records import Attempt, LeadlineError, NotApplicable, Prompt, ResponsePrefix
from ..registry import attack


@attack("direct", family="direct", source="no attack, the baseline")
def direct(prompt: Prompt) -> str:
    """The request, unchanged."""
    return prompt.text


@attack(
    "prefill",
    family="prefill",
    source="Qi et al. 2025 (arXiv 2406.05946), section 3; Andriushchenko et al. 2024 "
    "(arXiv 2404.02151)",
    needs=("response_prefix",),
)
def prefill(prompt: Prompt, *, k: int | None = None, text: str = "Sure, here is") -> Attempt:
    """A response prefix: the first k tokens of the prompt's target, or a fixed text (`text`)."""
    if k is not None and not (type(k) is int and k >= 0):
        raise LeadlineError(f"k must be a number of tokens, at least 0, not {k!r}")
    if not isinstance(text, str):
        raise LeadlineError(f"text must be the start of an answer, not {text!r}")
    if k is None:
        return Attempt.ask(prompt.text, prefix=ResponsePrefix(answer=text))
    if not prompt.target:
        raise NotApplicable("prefill with k needs a harmful answer, and the prompt has no target")
    return Attempt.ask(prompt.text, prefix=ResponsePrefix(answer=prompt.target, tokens=k))
