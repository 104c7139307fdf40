"""The generated tables of the documentation are up to date."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
SCRIPT = runpy.run_path(str(DOCS / "tables.py"))


@pytest.mark.parametrize("name", SCRIPT["TABLES"])
def test_the_generated_tables_are_up_to_date(name):
    page = DOCS / name
    if SCRIPT["updated"](page) != page.read_text(encoding="utf-8"):
        pytest.fail(f"the table in docs/{name} is out of date: run `make docs`")
