"""Evaluation during `leadline deepen` and `leadline finetune`: which SafetyCallback they use.

`deepen` always checks over-refusal, on a small fixed set of harmless requests, and restores the
last weights whose over-refusal was within its bound: a model that refuses everything is no repair.
"""

from __future__ import annotations

from typing import Any

from ..records import LeadlineError
from .before_after import named_harmless
from .settings import EvaluationConfig

_EVERY = 0.25  # share of the steps between two checks
_REQUESTS = 48  # harmless requests of a check
_REFUSAL_TOKENS = 48  # enough to see a refusal
_TARGETS = (1, 5, 10)  # numbers of prefilled tokens that target_asr is about


def callback_arguments(
    evaluation: EvaluationConfig | None, dataset: Any, harmless: Any, *, deepen: bool
) -> dict[str, Any] | None:
    """Arguments of a SafetyCallback, as JSON values; None where nothing is watched.

    `dataset` has the harmful requests (None: there are none), and `harmless` the harmless ones.
    Raises LeadlineError where the evaluation needs harmful requests.
    """
    if evaluation is None:
        return None
    wants_asr = evaluation.every is not None or evaluation.target_asr is not None
    if not (wants_asr or deepen):
        return None
    if wants_asr and dataset is None:
        raise LeadlineError(
            "--watch and --target-asr need harmful requests: give --dataset, such as "
            "'harmbench: {path: harmbench.csv}'"
        )
    datasets = [dataset] if wants_asr else []
    if deepen:
        datasets.append(named_harmless(harmless, limit=_REQUESTS).model_dump())
    target = evaluation.target_asr
    stop_above: dict[str, float] | None = dict(evaluation.stop_above)
    if not stop_above and wants_asr and (evaluation.on_breach or not deepen):
        stop_above = None  # the callback's default, which a model to be deepened may exceed
    return {
        "every": evaluation.every or _EVERY,
        "datasets": datasets,
        "attacks": ["direct", {"prefill": {"k": list(_TARGETS)}}] if wants_asr else ["direct"],
        "judges": [evaluation.judge] if wants_asr and evaluation.judge is not None else [],
        "sampling": {
            "temperature": 0,
            "max_tokens": evaluation.max_tokens if wants_asr else _REFUSAL_TOKENS,
        },
        "limit": evaluation.limit if wants_asr else None,
        "stop_above": stop_above,
        "max_rise": {"over_refusal": evaluation.max_over_refusal / 100} if deepen else {},
        "stop_below": {} if target is None else {f"prefill(k={k})": target / 100 for k in _TARGETS},
        "on_breach": evaluation.on_breach or ("rollback" if deepen else "warn"),
    }
