"""The suite is deselected unless pytest runs with `-m servers` (make test-servers).

What the tests find out is written into results.json, and from there into docs/servers.md."""

from __future__ import annotations

import json
import os
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import serving
from .serving import ROOT, SERVERS, Model, Served

RESULTS = Path(__file__).with_name("results.json")
found = pytest.StashKey[dict[str, Any]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if "servers" not in config.option.markexpr:
        config.hook.pytest_deselected(items=here)
        items[:] = [item for item in items if item not in here]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[found] = {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Replace the results of the tests that ran, and the tables made from them."""
    if session.testsfailed or not (new := session.config.stash[found]):
        return
    old = json.loads(RESULTS.read_text("utf-8"))
    for name, results in new.items():  # after a run of some of the tests, the others' results stay
        if old.get(name, {}).get("version") == results["version"]:
            new[name] = old[name] | results
    RESULTS.write_text(json.dumps(old | new, indent=1, sort_keys=True) + "\n", "utf-8")
    tables = runpy.run_path(str(ROOT / "docs" / "tables.py"))
    page = ROOT / "docs" / "servers.md"
    page.write_text(tables["updated"](page), "utf-8")


@pytest.fixture(scope="session")
def model() -> Model:
    return serving.find_model()


@pytest.fixture(scope="session", params=SERVERS)
def served(
    request: pytest.FixtureRequest, model: Model, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Each server in turn."""
    os.environ["LEADLINE_TEST_KEY"] = serving.KEY
    with SERVERS[request.param](model, tmp_path_factory.mktemp("logs")) as running:
        yield running


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function that notes what a server does, under the name of the test."""

    def note(served: Served, key: str, value: str) -> None:
        results = request.config.stash[found].setdefault(served.name, {})
        results["version"] = served.version
        results[key] = {"is": value, "by": request.node.originalname}

    return note
