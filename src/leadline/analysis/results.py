"""What a study found, as data frames: the Python face of a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..store import Store

if TYPE_CHECKING:
    import pandas

    from ..progress import Progress


class Results:
    """The results of the study in a folder. `progress` is that of the run that just ended."""

    def __init__(self, folder: Path, progress: Progress | None = None) -> None:
        self.folder = folder
        self.progress = progress
        Store(folder).close()  # says at once where there is no study

    def cells(self, judge: str | None = None) -> pandas.DataFrame:
        """One row per model x thinking x dataset x attack: n, unsafe, asr, low, high, ..."""
        from . import rates

        with Store(self.folder) as store:
            return rates.cells(store, judge)

    def pooled(self, judge: str | None = None) -> pandas.DataFrame:
        """Mean ASR over datasets per model x attack, with ratio and difference to `direct`."""
        from . import rates

        with Store(self.folder) as store:
            return rates.pooled(store, judge)

    def cot_max(self, judge: str | None = None) -> pandas.DataFrame:
        """The greatest ASR over the chain-of-thought attacks, per model."""
        from . import rates

        with Store(self.folder) as store:
            return rates.cot_max(store, judge)

    def any_attack(self, judge: str | None = None) -> pandas.DataFrame:
        """The share of prompts that at least one attack breaks, per model."""
        from . import rates

        with Store(self.folder) as store:
            return rates.any_attack(store, judge)

    def over_refusal(self, judge: str | None = None) -> pandas.DataFrame:
        """Refusals of harmless prompts, and how right the answers to them are."""
        from . import rates

        with Store(self.folder) as store:
            return rates.over_refusal(store, judge)

    def query(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Read the store with SQL (tables and views: docs/results.md)."""
        with Store(self.folder) as store:
            return store.query(sql, parameters)

    def failed(self) -> int:
        """How many trials have failed, to be tried again by the next run."""
        return int(self.query("SELECT count(*) FROM trials WHERE outcome = 'failed'")[0][0])


def results(folder: str | Path) -> Results:
    """The results that `leadline.run` or `leadline run` left in a folder."""
    return Results(Path(folder))
