"""All that a plug-in needs: the decorators, and the types that they work with.

    from leadline.plugins import Prompt, attack

    @attack("shout", family="style", source="...")
    def shout(prompt: Prompt) -> str: ...

See docs/plugins.md for a package of your own.
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
from .registry import Section, attack, dataset, judge, measure, model

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
    "attack",
    "dataset",
    "judge",
    "measure",
    "model",
]
