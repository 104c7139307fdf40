"""The results of a study as data frames: the Python interface to a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..store import Store

if TYPE_CHECKING:
    import pandas

    from ..progress import Progress


class Results:
    """The results of the study in a folder. `progress` is the final progress of the run that
    returned them; None if they were read from a folder. Raises LeadlineError if the folder has no
    study. With `judge`, the methods use that judge's verdicts instead of the primary judge's; the
    columns are explained in docs/results.md."""

    def __init__(self, folder: Path, progress: Progress | None = None) -> None:
        self.folder = folder
        self.progress = progress
        Store(folder).close()  # raises if there is no study

    def cells(self, judge: str | None = None) -> pandas.DataFrame:
        """The ASR of each model x thinking x dataset x attack, with counts and intervals."""
        from . import rates

        with Store(self.folder) as store:
            return rates.cells(store, judge)

    def pooled(self, judge: str | None = None) -> pandas.DataFrame:
        """The mean ASR over datasets per model x thinking x attack, with intervals."""
        from . import rates

        with Store(self.folder) as store:
            return rates.pooled(store, judge)

    def cot_max(self, judge: str | None = None) -> pandas.DataFrame:
        """The maximum ASR over the chain-of-thought attacks per model x thinking."""
        from . import rates

        with Store(self.folder) as store:
            return rates.cot_max(store, judge)

    def any_attack(self, judge: str | None = None) -> pandas.DataFrame:
        """The share of prompts that at least one attack breaks per model x thinking."""
        from . import rates

        with Store(self.folder) as store:
            return rates.any_attack(store, judge)

    def over_refusal(self, judge: str | None = None) -> pandas.DataFrame:
        """The refusal rate on harmless prompts and the utility of the answers to them."""
        from . import rates

        with Store(self.folder) as store:
            return rates.over_refusal(store, judge)

    def query(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """The rows of a SQL query on the store (tables and views: docs/results.md)."""
        with Store(self.folder) as store:
            return store.query(sql, parameters)

    def failed(self) -> int:
        """The number of failed trials, which the next run retries."""
        return int(self.query("SELECT count(*) FROM trials WHERE outcome = 'failed'")[0][0])


def results(folder: str | Path) -> Results:
    """The results in the output folder of `leadline.run` or `leadline run`."""
    return Results(Path(folder))
