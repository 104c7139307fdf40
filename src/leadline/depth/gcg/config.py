"""Settings of a suffix search."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ...records import LeadlineError


@dataclass(frozen=True)
class GCGConfig:
    """Settings of a GCG search.

    Each of `steps` steps draws `candidates` suffixes, in each of which `replace` tokens are
    replaced by one of the `topk` tokens with the best gradient at that position. Targets are
    truncated to `target_tokens` tokens (None: not at all).

    `retokenize` drops candidates whose text tokenizes to other ids; `ascii_only` allows printable
    ASCII only. `memory_mib` limits the memory of a forward pass over candidates (None: 32 on a CPU,
    a quarter of the free memory on a GPU). `probe` turns on probe sampling, which only estimates
    the loss of most candidates: faster, but not the same search. With a judge, answers of at most
    `answer_tokens` tokens are judged before the first step and after every `judge_every` steps.
    Raises LeadlineError for invalid values.
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
                f"gcg: suffix is {self.suffix!r}: it must not be empty or have spaces around it"
            )
