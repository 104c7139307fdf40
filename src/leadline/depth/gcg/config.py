"""Settings of a suffix search."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ...records import LeadlineError


@dataclass(frozen=True)
class GCGConfig:
    """`candidates` are drawn each step, each with `replace` tokens out of the `topk` best by
    gradient of their positions. `target_tokens` cuts the targets (None: whole).

    `retokenize` drops candidates whose text gives other tokens than they are; `ascii_only` keeps
    to printable ASCII. `memory_mib` bounds what the forwards over candidates hold (None: 32 on a
    processor, a quarter of what is free on a GPU). `probe` is probe sampling: most candidates are
    only estimated, which is faster and changes the trajectory. With a judge, answers of
    `answer_tokens` are judged before the first step and after every `judge_every` steps.
    """

    steps: int = 250
    candidates: int = 512
    topk: int = 256
    replace: int = 1
    suffix: str = "! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! !"
    target_tokens: int | None = 32
    ascii_only: bool = True
    retokenize: bool = True
    probe: bool = False
    memory_mib: int | None = None
    judge_every: int = 10
    answer_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if type(value) is int and value < 1 and each.name not in ("seed", "steps"):
                raise LeadlineError(f"gcg: {each.name} is {value}: it must be at least 1")
        if not self.suffix.strip() or self.suffix != self.suffix.strip():
            raise LeadlineError(
                f"gcg: the initial suffix {self.suffix!r} is empty or has spaces around it"
            )
