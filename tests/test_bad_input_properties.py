"""No study file, dataset file or server reply, however garbled, gives a traceback."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leadline import Study, run

from .server import Server
from .test_bad_input import command

bounded = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

NAMES = ["targets", "datasets", "attacks", "judges", "attacker", "sampling", "limits", "seed",
         "name", "model", "url", "prefix", "card", "thinking", "extra_body", "limit", "path",
         "columns", "k", "text", "temperature", "top_p", "samples", "direct", "prefill", "guild",
         "file", "refusal", "panel", "bon", "family:style", "organism:base", "http://127.0.0.1:9",
         "base64", "options", "check", "on", "[/red]"]  # fmt: skip
scalars = st.one_of(
    st.sampled_from(NAMES), st.none(), st.booleans(), st.integers(), st.floats(), st.dates(),
    st.text(max_size=8), st.binary(max_size=4), st.sampled_from([2**63, 2**64, -(2**70), 1e400]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
    ),
    max_leaves=8,
)

GOOD: dict[str, Any] = {
    "name": "mine",
    "targets": [{"model": "m", "url": "http://127.0.0.1:9/v1", "thinking": ["on"],
                 "extra_body": {"a": 1}, "card": {"size": "8B"}}],
    "datasets": [{"guild": {"limit": 2, "attacks": ["direct"]}}],
    "attacks": ["direct", {"prefill": {"k": [1, 2]}}, "family:style"],
    "judges": [{"refusal": {"name": "r"}}, {"panel": {"judges": ["refusal", "guild"]}}],
    "sampling": {"temperature": 0.5, "top_p": 0.9, "max_tokens": 5, "samples": 2},
    "limits": {"concurrency": 2, "timeout": 5, "retries": 1},
    "seed": 3,
}  # fmt: skip


def places(value: Any) -> list[tuple[Any, ...]]:
    """The paths of all values inside of a value."""
    found, stack = [], [((), value)]
    while stack:
        at, inner = stack.pop()
        if at:
            found.append(at)
        if isinstance(inner, dict):
            stack += [((*at, k), v) for k, v in inner.items()]
        elif isinstance(inner, list):
            stack += [((*at, i), v) for i, v in enumerate(inner)]
    return sorted(found, key=str)


def replaced(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A copy of a value with another one at a path."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for part in at[:-1]:
        inner = inner[part]
    inner[at[-1]] = new
    return copy


def garble(raw: bytes, seed: int) -> bytes:
    """The bytes with a few of them changed, removed or repeated."""
    rng, data = random.Random(seed), bytearray(raw)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at : at + rng.randint(1, 20)]
        elif kind == 2:
            data[at:at] = rng.choice([b"{", b"[", b'"', b"'", b": ", b"\n", b",", b"&a ", b"*a ",
                                      b"\t", b"\x00", b"!!int ", b"- ", b"\\",
                                      b"\xff"])  # fmt: skip
        else:
            data[at:at] = data[at : at + 30]
    return bytes(data)


def dry_run(text: bytes) -> None:
    """A dry run of a study file with these bytes gives a table or one line."""
    Path("study.yaml").write_bytes(text)
    ran = command("run", "study.yaml", "--dry-run")
    assert ran.status in (0, 2)
    if ran.status == 2:
        assert ran.err.splitlines()[-1].startswith("leadline: ")


@given(at=st.sampled_from(places(GOOD)), value=values)
@bounded
def test_a_study_with_any_value_anywhere(tmp_path_factory, at, value):
    with folder(tmp_path_factory):
        dry_run(yaml.safe_dump(replaced(GOOD, at, value)).encode("utf-8", "replace"))


@given(seed=st.integers(0, 2**32))
@bounded
def test_a_garbled_study_file(tmp_path_factory, seed):
    with folder(tmp_path_factory):
        dry_run(garble(yaml.safe_dump(GOOD).encode(), seed))


@contextlib.contextmanager
def folder(factory: pytest.TempPathFactory) -> Any:
    with contextlib.chdir(factory.getbasetemp()):
        yield


TABLES = {
    "csv": b'id,prompt,category,harmful\n1,"a ""b""\nc",x,true\n2,d,y,false\n3,"e, f",z,1\n',
    "jsonl": b'{"id": 1, "prompt": "a\\u00e9"}\n{"id": "2", "prompt": "b", "harmful": false}\n',
    "json": b'{"data": [{"id": 1, "prompt": "a"}, {"id": 2, "prompt": "b", "target": null}]}',
}


@pytest.mark.parametrize("kind", TABLES)
@given(seed=st.integers(0, 2**32))
@bounded
def test_a_garbled_dataset_file(tmp_path_factory, kind, seed):
    with folder(tmp_path_factory):
        Path(f"table.{kind}").write_bytes(garble(TABLES[kind], seed))
        dry_run(
            b"targets: [{model: m, url: 'http://127.0.0.1:9/v1'}]\n"
            b"datasets: [{file: {path: table.%s}}]\n" % kind.encode()
        )


cells = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)


@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["id", "prompt", "harmful", "category", "target", "x"]), cells,
            max_size=4,
        ) | cells,
        max_size=4,
    )
)  # fmt: skip
@bounded
def test_a_dataset_with_any_cells(tmp_path_factory, rows):
    with folder(tmp_path_factory):
        Path("table.json").write_text(json.dumps(rows))
        dry_run(
            b"targets: [{model: m, url: 'http://127.0.0.1:9/v1'}]\n"
            b"datasets: [{file: {path: table.json}}]\n"
        )


# -- servers ------------------------------------------------------------------------------------

REPLY: dict[str, Any] = {
    "id": "x",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello",
                                         "reasoning_content": "hm"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 4},
}  # fmt: skip
replies = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["length", "content_filter", "error", 2**63, 2**64, -1, "\x1b[2J", "[/red]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["choices", "message", "content", "error", "usage",
                                           "code", "text", "finish_reason"]), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip


@given(at=st.sampled_from(places(REPLY)), value=replies, status=st.sampled_from([200, 200, 400]))
@settings(bounded, max_examples=80)
def test_a_reply_with_any_value_anywhere(tmp_path_factory, at, value, status):
    study_with_reply(tmp_path_factory, json.dumps(replaced(REPLY, at, value)).encode(), status)


@given(seed=st.integers(0, 2**32), status=st.sampled_from([200, 200, 400]))
@settings(bounded, max_examples=80)
def test_a_garbled_reply(tmp_path_factory, seed, status):
    study_with_reply(tmp_path_factory, garble(orjson.dumps(REPLY), seed), status)


@pytest.fixture(scope="module", autouse=True)
def garbled_server() -> Any:
    """One server for all replies of this module, and a good one."""
    with Server() as bad, Server() as good:
        SERVERS["bad"], SERVERS["good"] = bad, good
        yield


SERVERS: dict[str, Server] = {}


def study_with_reply(factory: pytest.TempPathFactory, raw: bytes, status: int) -> None:
    """A study whose first target replies with these bytes runs to its end, its other target is
    complete, and both have a report."""
    from aiohttp import web

    async def answer(request: Any, body: Any) -> web.Response:
        return web.Response(body=raw, status=status, content_type="application/json")

    SERVERS["bad"]._answer = answer  # type: ignore[method-assign]
    out = factory.mktemp("out")
    study = Study(
        targets=[{"model": "m", "name": "bad", "url": SERVERS["bad"].url},
                 {"model": "m", "name": "good", "url": SERVERS["good"].url}],
        datasets=[{"guild": {"limit": 2}}], attacks=["direct"], limits={"retries": 0},
    )  # fmt: skip
    results = run(study, out)
    rows = dict(results.query("SELECT model, count(*) FROM outcomes GROUP BY 1"))
    assert rows == {"bad": 2, "good": 2}
    ((answered,),) = results.query(
        "SELECT count(*) FROM outcomes WHERE model='good' AND outcome='answered'"
    )
    assert answered == 2
    assert command("report", out).status == 0
