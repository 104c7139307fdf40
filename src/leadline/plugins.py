"""The public interface for plug-ins: the decorators and the types in their signatures.

    from leadline.plugins import Prompt, attack

    @attack("shout", family="style", source="...")
    def shout(prompt: Prompt) -> str: ...

docs/plugins.md explains how to package plug-ins.
"""

from .records import (
    Assist,
    Attempt,
    AttemptFailed,
    Judge,
    LeadlineError,
    Message,
    Model,
    NotApplicable,
    Prompt,
    Request,
    Response,
    ResponsePrefix,
    Sampling,
    Verdict,
)
from .registry import Section, Work, attack, dataset, judge, measure, model

__all__ = [
    "Assist",
    "Attempt",
    "AttemptFailed",
    "Judge",
    "LeadlineError",
    "Message",
    "Model",
    "NotApplicable",
    "Prompt",
    "Request",
    "Response",
    "ResponsePrefix",
    "Sampling",
    "Section",
    "Verdict",
    "Work",
    "attack",
    "dataset",
    "judge",
    "measure",
    "model",
]
