"""Bad input to every command: each gives one line that says what is wrong, never a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from leadline import Study, registry, run
from leadline.cli import main
from leadline.records import (
    Attempt,
    LeadlineError,
    Message,
    Prompt,
    Response,
    ResponsePrefix,
    Verdict,
)
from leadline.registry import attack, judge
from leadline.store import FILE, Store

from .server import Server


class Ran(NamedTuple):
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str


def command(*arguments: object) -> Ran:
    """Run `leadline` in this process. Fails if it raises, or prints a traceback or the line that
    reports a bug."""
    earlier, sys.argv = sys.argv, ["leadline", *map(str, arguments)]
    out, err, status = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        sys.argv = earlier
    ran = Ran(status, out.getvalue(), err.getvalue())
    for text in (ran.out, ran.err):
        assert "Traceback" not in text, text
        assert "this is a bug" not in text, text
    return ran


def error_of(*arguments: object) -> str:
    """The one line that a command prints to stderr when it fails with status 2."""
    ran = command(*arguments)
    assert ran.status == 2, ran
    (line,) = ran.err.splitlines()
    assert line.startswith("leadline: "), line
    assert len(line) < 1000, line
    return line


GOOD = "targets: [{model: m, url: 'http://127.0.0.1:9/v1'}]\ndatasets: [guild]\n"
TARGET = "targets: [{model: m, url: 'http://127.0.0.1:9/v1', %s}]\ndatasets: [guild]\n"
BIG = 2**64

STUDIES = {
    # YAML
    "deep lists": ("targets: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    "deep mappings": ("a: " + "{a: " * 3000 + "1" + "}" * 3000, "nested too deeply"),
    "deep blocks": ("".join(" " * i + "a:\n" for i in range(1500)), "nested too deeply"),
    "60 levels": (TARGET % ("extra_body: " + "{a: " * 60 + "1" + "}" * 60), "more than 50 deep"),
    "own parent": (TARGET % "extra_body: &a {a: *a}", "deep"),
    "laughs": (
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
        "more than 1,000,000 values",
    ),
    "twice": (GOOD + "seed: 1\nname: x\nseed: 2\n", "study.yaml:5: the key 'seed' is given twice"),
    "twice inside": (
        GOOD + "sampling:\n  temperature: 1\n  temperature: 0\n",
        "study.yaml:5: the key 'temperature' is given twice (first in line 4)",
    ),
    "twice in flow": (TARGET % "name: a, name: b", "study.yaml:1: the key 'name' is given twice"),
    "twice, quoted": (GOOD + "name: a\n'name': b\n", "study.yaml:4: the key 'name' is given"),
    "unhashable key": (GOOD + "? [1, 2]\n: 3\n", "not valid YAML"),
    "undefined alias": (GOOD + "name: *nothing\n", "study.yaml:3: not valid YAML"),
    "python object": (GOOD + "name: !!python/object/apply:os.system ['false']\n", "not valid YAML"),
    "no bool": (GOOD + "name: !!bool maybe\n", "not valid YAML"),
    "no int": (GOOD + "name: !!int maybe\n", "not valid YAML"),
    "no float": (GOOD + "name: !!float maybe\n", "not valid YAML"),
    "no timestamp": (GOOD + "name: !!timestamp maybe\n", "not valid YAML"),
    "no month": (GOOD + "name: 2024-13-45\n", "not valid YAML"),
    "5,000 digits": (GOOD + f"seed: {'9' * 5000}\n", "not valid YAML"),
    "two documents": (GOOD + "---\n" + GOOD, "not valid YAML"),
    "tab": ("targets:\n\t- a\n", "not valid YAML"),
    "control": (GOOD + "name: a\x07b\n", "not valid YAML"),
    "directive": ("%YAML 9.9\n---\n" + GOOD, "not valid YAML"),
    "empty": ("", "a study file is a mapping"),
    "null": ("null", "a study file is a mapping"),
    "text": ("hello", "a study file is a mapping"),
    "list": ("[1, 2]", "a study file is a mapping"),
    "set": ("!!set {a, b}", "a study file is a mapping"),
    "omap": ("!!omap [a: 1]", "a study file is a mapping"),
    # values
    "long seed": (GOOD + f"seed: {BIG}\n", "study.yaml:3: seed: an integer of more than 64 bits"),
    "long negative seed": (GOOD + f"seed: -{BIG}\n", "more than 64 bits"),
    "long limit": (GOOD.replace("guild", f"guild: {{limit: {BIG}}}"), "more than 64 bits"),
    "long k": (GOOD + f"attacks: [{{prefill: {{k: {BIG}}}}}]\n", "more than 64 bits"),
    "long in sweep": (GOOD + f"attacks: [{{prefill: {{k: [1, {BIG}]}}}}]\n", "more than 64 bits"),
    "long in body": (TARGET % f"extra_body: {{a: {BIG}}}", "extra_body"),
    "long top_k": (GOOD + f"sampling: {{top_k: {BIG}}}\n", "more than 64 bits"),
    "long samples": (GOOD + f"sampling: {{samples: {BIG}}}\n", "more than 64 bits"),
    "long timeout": (GOOD + f"limits: {{timeout: {BIG}}}\n", "more than 64 bits"),
    "date in body": (TARGET % "extra_body: {a: 2024-05-01}", "is a date in YAML: put it in quotes"),
    "time in body": (TARGET % "extra_body: {a: 2024-05-01T10:00:00Z}", "is a date in YAML"),
    "bytes in body": (TARGET % "extra_body: {a: !!binary aGVsbG8=}", "type bytes"),
    "set in body": (TARGET % "extra_body: {a: !!set {b, c}}", "type set"),
    "number as key": (TARGET % "extra_body: {1: a}", "the key 1 is not text"),
    "bool as key": (TARGET % "extra_body: {on: a}", "the key True is not text"),
    "null as key": (TARGET % "extra_body: {~: a}", "the key None is not text"),
    "date as key": (TARGET % "extra_body: {2024-05-01: a}", "is not text"),
    "nan in body": (TARGET % "extra_body: {a: .nan}", "not a finite number"),
    "infinite temperature": (
        GOOD + "sampling: {temperature: .inf}\n",
        "study.yaml:3: sampling.temperature: inf is not a finite number",
    ),
    "nan temperature": (GOOD + "sampling: {temperature: .nan}\n", "not a finite number"),
    "negative temperature": (GOOD + "sampling: {temperature: -1}\n", "greater than or equal to 0"),
    "infinite timeout": (GOOD + "limits: {timeout: .inf}\n", "not a finite number"),
    "nan top_p": (GOOD + "sampling: {top_p: .nan}\n", "not a finite number"),
    "half a surrogate pair": (GOOD + 'name: "\\ud800"\n', "a character that is not text"),
    "NUL in path": (GOOD.replace("guild", 'file: {path: "a\\0b"}'), "character that is not text"),
    "NUL in model": ('targets: ["a\\0b"]\ndatasets: [guild]\n', "character that is not text"),
    # structure
    "targets a number": ("targets: 5\ndatasets: [guild]\n", "targets"),
    "target a number": ("targets: [5]\ndatasets: [guild]\n", "targets"),
    "target null": ("targets: [null]\ndatasets: [guild]\n", "targets"),
    "target empty": ("targets: ['']\ndatasets: [guild]\n", "targets"),
    "dataset a number": ("targets: [m]\ndatasets: [5]\n", "datasets"),
    "dataset nested": ("targets: [m]\ndatasets: [[guild]]\n", "datasets"),
    "dataset null": ("targets: [m]\ndatasets: [null]\n", "datasets"),
    "dataset option a list": ("targets: [m]\ndatasets: [{guild: [1]}]\n", "datasets"),
    "dataset limit text": ("targets: [m]\ndatasets: [{guild: {limit: all}}]\n", "limit must be"),
    "dataset attacks text": ("targets: [m]\ndatasets: [{guild: {attacks: direct}}]\n", "list"),
    "dataset name empty": ("targets: [m]\ndatasets: [{'': {}}]\n", "unknown dataset"),
    "attacks text": (GOOD + "attacks: direct\n", "attacks"),
    "attack null": (GOOD + "attacks: [null]\n", "attack must be"),
    "attack two keys": (GOOD + "attacks: [{prefill: {}, direct: {}}]\n", "attack must be"),
    "attack family empty": (GOOD + "attacks: ['family:']\n", "unknown attack family"),
    "empty sweep": (GOOD + "attacks: [{prefill: {k: []}}]\n", "the list of values is empty"),
    "judge null": (GOOD + "judges: [null]\n", "judge must be"),
    "judge model": (GOOD + "judges: [{qwen3guard: {model: 5, url: 'http://x'}}]\n", "judges"),
    "panel of itself": (GOOD + "judges: [{panel: {judges: panel}}]\n", "judges"),
    "attacker a list": (GOOD + "attacker: [a]\n", "attacker"),
    "limits a list": (GOOD + "limits: [1]\n", "limits"),
    "sampling text": (GOOD + "sampling: hot\n", "sampling"),
    "card a number": (TARGET % "card: 5", "card"),
    "thinking nested": (TARGET % "thinking: [[on]]", "thinking"),
    "no url": (TARGET.replace("'http://127.0.0.1:9/v1'", "'ftp://x'") % "name: a", "not an HTTP"),
    "concurrency 0": (TARGET % "concurrency: 0", "concurrency"),
    # options, which are checked when the datasets are loaded
    "negative k": (GOOD + "attacks: [{prefill: {k: -3}}]\n", "k must be a number of tokens"),
    "k text": (GOOD + "attacks: [{prefill: {k: five}}]\n", "k must be a number of tokens"),
    "k float": (GOOD + "attacks: [{prefill: {k: 1.5}}]\n", "k must be a number of tokens"),
    "k bool": (GOOD + "attacks: [{prefill: {k: true}}]\n", "k must be a number of tokens"),
    "prefill text": (GOOD + "attacks: [{prefill: {text: {a: b}}}]\n", "text must be"),
    "bon text": (GOOD + "attacks: [{bon: {n: many}}]\n", "bon"),
    "path a list": ("targets: [m]\ndatasets: [{file: {path: [a]}}]\n", "is not a path"),
    "path a folder": ("targets: [m]\ndatasets: [{file: {path: .}}]\n", "no file"),
    "path long": (f"targets: [m]\ndatasets: [{{file: {{path: {'a' * 400}.csv}}}}]\n", "path"),
    "path of nobody": ("targets: [m]\ndatasets: [{file: {path: ~nobody9/a.csv}}]\n", "path"),
    "path in a file": ("targets: [m]\ndatasets: [{file: {path: study.yaml/a.csv}}]\n", "not exist"),
    "columns a list": (
        "targets: [m]\ndatasets: [{file: {path: a.csv, columns: [a]}}]\n",
        "columns",
    ),
}


@pytest.mark.parametrize("case", STUDIES)
def test_a_bad_study_file_is_one_line(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    text, message = STUDIES[case]
    Path("study.yaml").write_text(text, encoding="utf-8")
    line = error_of("run", "study.yaml", "--dry-run")
    assert message in line, line


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"name: \x80", "not UTF-8"),
        ("targets: [m]".encode("utf-16"), "not"),
        (b"\x00" * 1000, "not valid YAML"),
        (os.urandom(2000), "study.yaml"),
    ],
)
def test_a_study_file_that_is_no_text(tmp_path, monkeypatch, raw, message):
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_bytes(raw)
    assert message in error_of("run", "study.yaml", "--dry-run")


@pytest.mark.parametrize("path", ["", ".", "missing.yaml", "a" * 400, "x/y.yaml", "/dev/null"])
def test_a_study_path_that_cannot_be_read(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    error_of("run", path, "--dry-run")


@pytest.mark.parametrize(
    "name", ["[/red]", "[bold]", "[link=http://x]a", "[/]", "[[", "[red", "\\[", "[on red]a[/]"]
)
def test_target_names_with_markup_are_shown_as_they_are(tmp_path, server, study_file, name):
    study = study_file(
        targets=[{"model": "m", "name": name, "url": server.url}],
        datasets=[{"guild": {"limit": 1}}], judges=[{"refusal": {"name": name}}],
    )  # fmt: skip
    shown = command("run", study, "--dry-run")
    assert shown.status == 0
    assert name in shown.out
    ran = command("run", study, "--out", tmp_path / "out")
    assert ran.status == 0, ran
    assert command("report", tmp_path / "out").status == 0


# -- datasets -----------------------------------------------------------------------------------

DATASETS = {
    "empty.csv": b"",
    "empty.json": b"",
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n  \n",
    "header.csv": b"prompt\n",
    "empty cell.csv": b"id,prompt\n1,\n",
    "ragged.csv": b"id,prompt\n1,a,b\n",
    "short.csv": b"id,prompt\n1\n",
    "quote.csv": b'id,prompt\n1,"a\n2,b\n',
    "quote inside.csv": b'id,prompt\n1,"a"b\n',
    "other columns.csv": b"a,b\n1,2\n",
    "twice.csv": b"id,prompt\n1,a\n1,b\n",
    "nul.csv": b"id,prompt\n1,a\x00b\n\x00\n",
    "latin.csv": b"prompt\n\xe9t\xe9\n",
    "utf16.csv": "prompt\nabc\n".encode("utf-16"),
    "harmful.csv": b"prompt,harmful\na,perhaps\n",
    "binary.csv": bytes(range(256)) * 20,
    "binary.json": bytes(range(256)) * 20,
    "binary.jsonl": bytes(range(256)) * 20,
    "binary.parquet": bytes(range(256)) * 20,
    "empty.parquet": b"",
    "magic.parquet": b"PAR1PAR1",
    "binary.csv.gz": bytes(range(256)),
    "empty.csv.gz": b"",
    "half.jsonl.gz": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03K",
    "null.json": b"null",
    "number.json": b"5",
    "text.json": b'"a"',
    "list.json": b"[1, 2]",
    "mixed.json": b'[{"prompt": "a"}, 5]',
    "nested.json": b'{"a": {"b": [1]}}',
    "uneven.json": b'{"prompt": ["a", "b"], "id": ["1"]}',
    "empty list.json": b"[]",
    "empty object.json": b"{}",
    "open.json": b'[{"prompt": "a"',
    "deep.json": b"[" * 100_000,
    "deep object.json": b'{"a":' * 100_000,
    "digits.json": b'[{"prompt": ' + b"9" * 5000 + b"}]",
    "nan.json": b'[{"prompt": NaN}]',
    "open.jsonl": b'{"prompt": "a"}\n{"prompt": \n',
    "list.jsonl": b'["a"]\n',
    "number.jsonl": b"5\n",
    "null.jsonl": b"null\n",
    "null prompt.jsonl": b'{"prompt": null}\n',
    "list prompt.jsonl": b'{"prompt": ["a", "b"]}\n',
    "object prompt.jsonl": b'{"prompt": {"a": 1}}\n',
    "surrogate.jsonl": b'{"prompt": "\\ud800"}\n',
    "surrogate column.jsonl": b'{"\\ud800": "a"}\n',
    "list id.jsonl": b'{"prompt": "a", "id": [1, 2]}\n',
    "deep.jsonl": b'{"prompt": ' + b"[" * 100_000 + b"\n",
    "table.xlsx": b"PK\x03\x04",
}


@pytest.mark.parametrize("name", DATASETS)
def test_a_bad_dataset_is_one_line_that_names_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(DATASETS[name])
    Path("study.yaml").write_text(GOOD.replace("guild", f"{{file: {{path: {name}}}}}"))
    assert name.split(".")[0] in error_of("run", "study.yaml", "--dry-run")


@pytest.mark.parametrize("name", ["labels.csv", "labels.json", "labels.jsonl", "labels.parquet"])
@pytest.mark.parametrize("raw", [b"", b"\xff", b"[[[[", b'{"prompt": 1}', b'prompt,label\n"a'])
def test_bad_labels_are_one_line(tmp_path, monkeypatch, name, raw):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(raw)
    error_of("judges", "check", name, "--judge", "refusal")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_cells_and_integers_of_any_length_are_read(tmp_path, server, study_file, suffix):
    file = tmp_path / f"long.{suffix}"
    text = "a" * 300_000
    if suffix == "csv":
        file.write_text(f'id,prompt\n{BIG},"{text}"\n')
    else:
        file.write_text(json.dumps({"id": BIG, "prompt": text, "category": BIG * BIG}) + "\n")
    study = study_file(
        targets=[{"model": "m", "url": server.url}], datasets=[{"file": {"path": str(file)}}]
    )
    assert command("run", study, "--out", tmp_path / "out").status == 0
    assert list(server.asked) == [text]


# -- options of commands ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("list", "nothing"),
        ("list", ""),
        ("report", "missing"),
        ("report", "a" * 400),
        ("report", "study.yaml"),
        ("report", "study.yaml/x"),
        ("judge", "missing", "--judge", "refusal"),
        ("judge", ".", "--judge", "refusal"),
        ("judge", ".", "--judge", "{"),
        ("judge", ".", "--judge", "[" * 3000),
        ("judge", ".", "--judge", ""),
        ("judge", ".", "--judge", "5"),
        ("judge", ".", "--judge", "refusal: {a: 2024-13-45}"),
        ("judge", ".", "--judge", "refusal: {name: a, name: b}"),
        ("judge", ".", "--judge", f"refusal: {{name: {BIG}}}"),
        ("judge", ".", "--judge", "refusal: {name: .inf}"),
        ("judge", ".", "--judge", "qwen3guard: {model: m, extra_body: {a: 2024-05-01}}"),
        ("judges", "agree", "missing", "a", "b"),
        ("judges", "check", "missing.csv", "--judge", "refusal"),
        ("judges", "check", "a" * 400 + ".csv", "--judge", "refusal"),
        ("judges", "check", "study.yaml", "--judge", "refusal", "--out", "no/folder/x.json"),
        ("depth", "missing/model/here"),
        ("depth", "organism:nothing"),
        ("depth", "organism:base", "--budget", "large"),
        ("depth", "organism:base", "--only", "nothing"),
        ("depth", "organism:base", "--dataset", "{"),
        ("depth", "organism:base", "--dataset", "file: {path: 5}"),
        ("depth", "organism:base", "--judge", "[" * 3000),
        ("depth", "organism:base", "--out", "study.yaml", "--budget", "quick", "--only", "prefill"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(GOOD)
    error_of(*arguments)


# -- folders and disks --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "out", ["file", "file/below", "x/" * 3 + "a" * 400, "/proc/leadline", "/dev/null", "locked/out"]
)
def test_an_output_folder_that_cannot_be_written(tmp_path, monkeypatch, study_file, out):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    if out == "locked/out":
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        Path("locked").mkdir(mode=0o500)
    study = study_file(targets=[{"model": "m", "url": "http://x"}], datasets=["guild"])
    assert "another --out" in error_of("run", study, "--out", out)


def test_a_study_name_of_400_characters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(GOOD + f"name: {'a' * 400}\n")
    assert "another --out" in error_of("run", "study.yaml")


def sqlite_of(statements: str) -> bytes:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(statements)
        return db.serialize()


def stored() -> bytes:
    """The store of a study with one trial, as bytes."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, Server() as server:
        study = Study(
            targets=[{"model": "m", "url": server.url}], datasets=[{"guild": {"limit": 1}}]
        )
        run(study, folder)
        return (Path(folder) / FILE).read_bytes()


SQLITE = {
    "empty": lambda: b"",
    "text": lambda: b"hello" * 100,
    "header only": lambda: b"SQLite format 3\x00",
    "foreign": lambda: sqlite_of("CREATE TABLE cookies(a, b); INSERT INTO cookies VALUES (1, 2)"),
    "foreign trials": lambda: sqlite_of("CREATE TABLE trials(a, b)"),
    "without tables": lambda: sqlite_of("PRAGMA user_version=7; CREATE TABLE a(b); DROP TABLE a"),
    "older": lambda: older("ALTER TABLE verdicts DROP COLUMN utility"),
    "without words": lambda: older("DROP TABLE words"),
    "half": lambda: stored()[:6000],
    "zeros inside": lambda: stored()[:4096] + bytes(len(stored()) - 4096),
    "noise inside": lambda: stored()[:4096] + b"\xaa" * (len(stored()) - 4096),
    "meta no JSON": lambda: older("UPDATE meta SET value='{'", drop=False),
    "meta null": lambda: older("UPDATE meta SET value=NULL", drop=False),
}


def older(statement: str, *, drop: bool = True) -> bytes:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.deserialize(stored().replace(b"\x02\x02", b"\x01\x01", 1))  # not WAL, which needs a file
        if drop:
            db.execute("DROP VIEW IF EXISTS outcomes")
        db.executescript(statement)
        db.commit()
        return db.serialize()


@pytest.mark.parametrize("case", SQLITE)
def test_a_store_that_cannot_be_read(tmp_path, study_file, case):
    raw = SQLITE[case]()
    study = study_file(targets=[{"model": "m", "url": "http://x"}], datasets=["guild"])
    for arguments in (
        ["report"], ["judge", "--judge", "refusal"], ["judges", "agree", "refusal", "guild"],
    ):  # fmt: skip
        (tmp_path / FILE).write_bytes(raw)
        place = len(arguments) if arguments[0] == "report" else 1 + (arguments[0] == "judges")
        error_of(*arguments[:place], tmp_path, *arguments[place:])
    if case not in ("empty", "without tables"):  # a run makes these a new store
        (tmp_path / FILE).write_bytes(raw)
        error_of("run", study, "--out", tmp_path)
        assert (tmp_path / FILE).exists()


def limited(tmp_path: Path, most: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `leadline` in a process that may write files of at most this size."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    program = [str(Path(sys.executable).parent / "leadline"), *map(str, arguments)]
    return subprocess.run(
        program, cwd=tmp_path, capture_output=True, text=True, check=False, preexec_fn=limit,
        timeout=120,
    )  # fmt: skip


def test_a_full_disk_is_one_line(tmp_path, server, study_file):
    study = study_file(targets=[{"model": "m", "url": server.url}], datasets=["guild"])
    for most in (0, 5000, 60_000):  # no store, half of a schema, half of the results
        ran = limited(tmp_path, most, "run", study, "--out", f"out{most}")
        assert ran.returncode == 2, ran.stderr
        assert "Traceback" not in ran.stderr
        assert "bug" not in ran.stderr
        assert len(ran.stderr.strip().splitlines()[-1]) < 500
    assert command("run", study, "--out", tmp_path / "out").status == 0
    ran = limited(tmp_path, 100_000, "report", "out")
    assert ran.returncode == 2
    assert "report" in ran.stderr
    assert "bug" not in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


# A program in a mount namespace of its own, whose file systems are gone when it ends.
ON_SMALL_DISKS = """
import json, subprocess, sys
from pathlib import Path
from leadline import results
from tests.test_bad_input import command

disk, study, *sizes = sys.argv[1:]
out = Path(disk) / "out"
for size in sizes:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk]).returncode:
        sys.exit(77)
    found = [command("run", study, "--out", out), command("report", out)]
    subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
    found.append(command("run", study, "--out", out))
    outcomes = results(out).query("SELECT DISTINCT outcome FROM trials ORDER BY 1")
    print(json.dumps([*found, outcomes, sorted(path.name for path in out.iterdir())]))
    subprocess.run(["umount", "--lazy", disk], check=True)
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare(1) of Linux")
def test_runs_on_full_disks_are_one_line_and_resume(tmp_path, server, study_file):
    server.answer = lambda text, body: f"{text} no" * 3
    study = study_file(
        targets=[{"model": "m", "url": server.url}], datasets=["guild"],
        attacks=["direct", "base64", {"prefill": {"k": [1, 5, 20]}}],
    )  # fmt: skip
    problems = {  # by the disk's size in KiB
        4: "free space, or use another --out",  # no store
        100: "free space, or use another --out",  # half of a schema
        300: "disk is full",
        400: "disk is full",  # half of the results
        800: "report.html (No space left on device): free space",
    }
    (disk := tmp_path / "disk").mkdir()
    ran = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", ON_SMALL_DISKS, disk, study,
         *map(str, problems)],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ran.returncode == 77 or ran.stderr.startswith("unshare: "):
        pytest.skip("mounting a file system is not permitted")
    assert ran.returncode == 0, ran.stderr
    for (size, problem), line in zip(problems.items(), ran.stdout.splitlines(), strict=True):
        (status, _, error), report, resumed, outcomes, files = json.loads(line)
        assert status == 2, size
        message = error.splitlines()[-1]
        assert message.startswith("leadline: ")
        assert problem in message
        assert report[0] == 2
        assert len(report[2].splitlines()) == 1
        if size == 800:
            assert message.endswith(f"leadline report {disk}/out")
        assert resumed[0] == 0, resumed
        assert outcomes == [["answered"], ["not_applicable"]]
        assert not any("part" in file for file in files)


# -- plug-ins -----------------------------------------------------------------------------------


@pytest.fixture
def plugin():
    """Registers plug-ins for one test."""
    for kind in registry.KINDS.values():
        registry.plugins(kind)
    before = dict(registry._plugins)
    yield registry
    registry._plugins.clear()
    registry._plugins.update(before)


class NoText:
    """A value that is not text, and cannot be shown either."""

    def __repr__(self) -> str:
        raise ValueError("no repr")


def leave() -> None:
    sys.exit(3)


MESSAGE = Message("user", "hello")
ATTACKS = {
    "empty list": [],
    "number": 5,
    "None": None,
    "bytes": b"a",
    "list of numbers": [5],
    "list of lists": [["a"]],
    "tuple": ("a", "b"),
    "mapping": {"a": 1},
    "class": Attempt,
    "no messages": Attempt(()),
    "strings as messages": Attempt(("hello",)),
    "number as text": Attempt((Message("user", 5),)),
    "None as text": Attempt((Message("user", None),)),
    "number as role": Attempt((Message(5, "a"),)),
    "surrogate": "a\ud800",
    "string as prefix": Attempt((MESSAGE,), "Sure"),
    "number as prefix text": Attempt((MESSAGE,), ResponsePrefix(5)),
    "negative tokens": Attempt((MESSAGE,), ResponsePrefix("a", tokens=-1)),
    "unknown setting": Attempt((MESSAGE,), None, {"heat": 1}),
    "text setting": Attempt((MESSAGE,), None, {"temperature": "hot"}),
    "nan setting": Attempt((MESSAGE,), None, {"temperature": float("nan")}),
    "long setting": Attempt((MESSAGE,), None, {"top_k": BIG}),
    "list of settings": Attempt((MESSAGE,), None, [1]),
    "no repr": NoText(),
    "sys.exit": leave,
}


@pytest.mark.parametrize("case", ATTACKS)
def test_an_attack_that_returns_something_else_is_named(tmp_path, server, plugin, caplog, case):
    value = ATTACKS[case]

    @attack("broken", family="test", source="this test")
    def broken(prompt):
        """Returns something else than attempts."""
        return value() if value is leave else value

    study = Study(
        targets=[{"model": "m", "url": server.url}], datasets=[{"guild": {"limit": 4}}],
        attacks=["direct", "broken"],
    )  # fmt: skip
    results = run(study, tmp_path)
    outcomes = dict(
        results.query("SELECT attack, group_concat(DISTINCT outcome) FROM outcomes GROUP BY attack")
    )
    assert outcomes == {"direct": "answered", "broken": "failed"}
    assert "the attack broken raised" in caplog.text
    if case == "string as prefix":
        assert "its prefix is a str, not a ResponsePrefix" in caplog.text
    assert command("report", tmp_path).status == 0


class Reluctant:
    """An awaitable that fails."""

    def __await__(self):
        yield from ()
        raise KeyError("k")


JUDGES = {
    "number": 7,
    "None": None,
    "bool": True,
    "text": "unsafe",
    "class": Verdict,
    "awaitable": Reluctant(),
    "unsafe text": Verdict(unsafe="yes"),
    "unsafe number": Verdict(unsafe=2),
    "refusal list": Verdict(unsafe=True, refusal=[]),
    "score text": Verdict(unsafe=True, score="high"),
    "score nan": Verdict(unsafe=True, score=float("nan")),
    "score long": Verdict(unsafe=True, score=BIG),
    "utility text": Verdict(unsafe=True, utility="useful"),
    "thought text": Verdict(unsafe=True, thought_unsafe="x"),
    "categories None": Verdict(unsafe=True, categories=None),
    "categories numbers": Verdict(unsafe=True, categories=(1,)),
    "categories text": Verdict(unsafe=True, categories="abc"),
    "text number": Verdict(unsafe=True, text=5),
    "text surrogate": Verdict(unsafe=True, text="\ud800"),
    "sys.exit": leave,
}


@pytest.mark.parametrize("case", JUDGES)
def test_a_judge_that_returns_something_else_is_named(tmp_path, server, plugin, case):
    value = JUDGES[case]

    @judge("broken", source="this test")
    def broken():
        """Returns something else than verdicts."""
        return lambda *a: value() if value is leave else value

    study = Study(
        targets=[{"model": "m", "url": server.url}], datasets=[{"guild": {"limit": 2}}],
        judges=["broken", "refusal"],
    )  # fmt: skip
    results = run(study, tmp_path)
    assert results.progress.unscored == 2
    note = results.progress.notes[0]
    assert note.startswith("the judge broken raised ")
    if not (isinstance(value, Verdict | Reluctant) or value is leave):
        assert note.endswith("not a Verdict")
    scored = results.query(
        "SELECT j.name, count(unsafe) FROM verdicts JOIN judges j ON j.id=judge GROUP BY 1"
    )
    assert dict(scored) == {"broken": 0, "refusal": 2}
    assert command("report", tmp_path).status == 0


@pytest.mark.parametrize(
    "value", [5, None, [5], ["a"], [None], "ab", [Prompt(1, "a", "x")], [Prompt("1", None, "x")],
              NoText(), leave],
)  # fmt: skip
def test_a_dataset_that_yields_something_else_is_named(tmp_path, plugin, study_file, value):
    @registry.dataset("broken", source="this test")
    def broken(*, path=None):
        """Yields something else than prompts."""
        return value() if value is leave else value

    study = study_file(targets=[{"model": "m", "url": "http://x"}], datasets=["broken"])
    assert "dataset broken" in error_of("run", study, "--out", tmp_path / "out")


@pytest.mark.parametrize("value", [5, None, "a", leave, NoText()])
def test_a_judge_factory_that_returns_something_else_is_named(
    tmp_path, server, plugin, study_file, value
):
    @judge("broken", source="this test")
    def broken():
        """Returns no judge."""
        return value() if value is leave else value

    study = study_file(
        targets=[{"model": "m", "url": server.url}], datasets=["guild"], judges=["broken"]
    )
    assert "judge broken" in error_of("run", study, "--out", tmp_path / "out")


@pytest.mark.parametrize("value", [5, None, "a", leave])
def test_a_model_factory_that_returns_something_else_is_named(tmp_path, plugin, study_file, value):
    @registry.model("broken", source="this test")
    def broken(spec, limits, locate):
        """Returns no model."""
        return value() if value is leave else value

    study = study_file(targets=["broken:a"], datasets=["guild"])
    assert "'broken'" in error_of("run", study, "--out", tmp_path / "out")


class Parrot:
    """A model that answers with anything."""

    name, concurrency, identity = "parrot", 1, {"name": "parrot"}

    def __init__(self, value: object) -> None:
        self.value = value

    async def prepare(self, *, prefix: bool) -> str:
        if self.value == "prepare":
            raise KeyError("prepare")
        return ""

    async def respond(self, request: object) -> Response:
        return self.value  # type: ignore[return-value]

    async def close(self) -> None:
        pass


class Raising(Parrot):
    """A model of which one member raises, or has a value of another type."""

    def __init__(self, member: str, value: object) -> None:
        super().__init__(Response("I cannot help with that."))
        self.member, self.wrong = member, value

    def __getattribute__(self, name: str) -> object:
        get = super().__getattribute__
        if name in ("__dict__", "__class__", "member") or name != get("__dict__").get("member"):
            return get(name)
        if self.wrong is ValueError:
            raise ValueError(f"no {name}")
        return self.wrong

    async def _number(self, **options: object) -> int:
        return 5

    async def _raise(self, **options: object) -> None:
        raise ValueError("broken")


RAISING = {
    "identity raises": ("identity", ValueError),
    "identity None": ("identity", None),
    "identity list": ("identity", [1]),
    "identity no JSON": ("identity", {"a": {1}}),
    "concurrency raises": ("concurrency", ValueError),
    "concurrency text": ("concurrency", "4"),
    "concurrency 0": ("concurrency", 0),
    "name None": ("name", None),
}


@pytest.mark.parametrize("case", RAISING)
def test_a_model_plug_in_with_a_wrong_property_is_named(tmp_path, plugin, study_file, case):
    registry.model("broken", source="this test")(lambda *arguments: Raising(*RAISING[case]))
    study = study_file(targets=["broken:a"], datasets=["guild"])
    line = error_of("run", study, "--out", tmp_path / "out")
    assert "the model plug-in 'broken' raised" in line
    in_memory = Study(targets=[{"model": "a"}], datasets=["guild"])
    with pytest.raises(LeadlineError, match="the model a raised"):
        run(in_memory, tmp_path / "b", models={"a": Raising(*RAISING[case])})


def test_a_model_plug_in_that_does_not_close_keeps_its_answers(tmp_path, plugin, caplog):
    model = Raising("", None)
    model.close = model._raise
    study = Study(targets=[{"model": "parrot"}], datasets=[{"guild": {"limit": 2}}])
    results = run(study, tmp_path, models={"parrot": model})
    assert results.query("SELECT outcome FROM trials") == [("answered",)] * 2
    assert "the model parrot raised ValueError when it closed: broken" in caplog.text


@pytest.mark.parametrize("prepare", ["_raise", "_number"])
def test_a_judge_whose_model_plug_in_does_not_load_is_named(
    tmp_path, server, plugin, study_file, prepare
):
    @registry.model("broken", source="this test")
    def broken(spec, limits, locate):
        """A model that does not load."""
        model = Raising("", None)
        model.prepare = getattr(model, prepare)
        return model

    pick = "llamaguard: {model: 'broken:a'}"
    study = study_file(
        targets=[{"model": "m", "url": server.url}], datasets=["guild"],
        judges=[{"llamaguard": {"model": "broken:a"}}],
    )  # fmt: skip
    ran = command("run", study, "--out", tmp_path / "out")
    assert ran.status == 2
    assert "judge llamaguard: the model parrot raised" in ran.err.splitlines()[-1]
    labels = tmp_path / "labels.csv"
    labels.write_text("prompt,response,label\na,b,safe\nc,d,unsafe\n")
    assert "the model parrot raised" in error_of("judges", "check", labels, "--judge", pick)


def test_a_measure_that_raises_is_named_and_the_others_go_on(tmp_path, plugin):
    section = replace(registry.get("measure", "gcg").sections[0], name="broken", points={})

    @registry.measure("broken", source="this test", sections=(section,), order=0)
    def broken(session):
        """Repeats a prompt in its message."""
        raise KeyError(session.prompts[0].text)

    ran = command("depth", "organism:aligned", "--base", "organism:base", "--budget", "quick",
                  "--only", "broken,kl", "--out", tmp_path)  # fmt: skip
    assert ran.status == 0, ran
    found = json.loads((tmp_path / "depth.json").read_text())
    assert found["kl"]
    assert found["skipped"]["broken"].startswith("the measure broken raised KeyError: ")
    assert "characters of prompt or answer" in found["skipped"]["broken"]


def test_an_error_anywhere_else_in_a_plug_in_names_its_package(tmp_path, plugin):
    def findings(depth):
        raise KeyError("broken")

    section = registry.get("measure", "kl").sections[0]
    section = replace(section, name="broken", points={}, findings=findings)
    registry.measure("broken", source="this test", sections=(section,))(lambda session: None)
    ran = command("depth", "organism:aligned", "--base", "organism:base", "--budget", "quick",
                  "--only", "kl", "--out", tmp_path)  # fmt: skip
    assert ran.status == 2
    line = ran.err.splitlines()[-1]
    assert line.startswith("leadline: the plug-in package 'tests' raised KeyError: 'broken': ")


@pytest.mark.parametrize("value", [5, None, "text", "prepare"])
def test_a_model_that_answers_something_else_fails_its_own_trials(tmp_path, server, value):
    study = Study(
        targets=[{"model": "parrot"}, {"model": "m", "url": server.url}],
        datasets=[{"guild": {"limit": 2}}],
    )
    results = run(study, tmp_path, models={"parrot": Parrot(value)})
    outcomes = results.query("SELECT model, outcome, count(*) FROM outcomes GROUP BY 1, 2")
    assert outcomes == [("m", "answered", 2), ("parrot", "failed", 2)]
    if value != "prepare":
        ((reason,),) = results.query("SELECT DISTINCT reason FROM outcomes WHERE reason <> ''")
        assert reason.endswith("not a Response")


# -- keys, signals, bugs ------------------------------------------------------------------------


def test_a_key_with_a_trailing_newline_is_stripped(tmp_path, server, study_file, monkeypatch):
    monkeypatch.setenv("GARDEN_KEY", "abc123\n")
    study = study_file(
        targets=[{"model": "m", "url": server.url, "api_key_env": "GARDEN_KEY"}],
        datasets=[{"guild": {"limit": 1}}],
    )
    assert command("run", study, "--out", tmp_path / "out").status == 0
    assert server.headers[-1]["Authorization"] == "Bearer abc123"


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_is_handled_as_ctrl_c(tmp_path, server, study_file, number, in_background):
    server.delay = 0.05
    study = study_file(
        targets=[{"model": "m", "url": server.url, "concurrency": 1}], datasets=["guild"]
    )
    program = [str(Path(sys.executable).parent / "leadline"), "run", str(study), "--out", "out"]
    environment = {**os.environ, "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}
    if in_background:  # as a script starts it: with SIGINT ignored
        program = ["sh", "-c", '"$@" & echo $!; wait $!', "sh", *program]
    process = subprocess.Popen(
        program, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout
    pid = int(process.stdout.readline()) if in_background else process.pid
    deadline = time.monotonic() + 60
    while sum(server.asked.values()) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    answered = sum(server.asked.values())
    os.kill(pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "leadline: interrupted; run the same command again to resume" in err
    assert "Traceback" not in err
    assert err.count("\x1b[?25l") == err.count("\x1b[?25h")  # the cursor is shown again
    with Store(tmp_path / "out") as store:
        ((kept,),) = store.query("SELECT count(*) FROM trials WHERE outcome='answered'")
    assert kept >= answered - 1


def test_any_other_exception_is_one_line_that_says_it_is_a_bug(monkeypatch, capsys):
    def broken(kind: str) -> None:
        raise ZeroDivisionError("this\ntest")

    monkeypatch.setattr("leadline.catalogue.rows", broken)
    monkeypatch.setattr(sys, "argv", ["leadline", "list", "attacks"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err == (
        "leadline: this is a bug in Leadline: ZeroDivisionError: this test; "
        "`leadline --verbose ...` shows the traceback to report\n"
    )
    monkeypatch.setattr(sys, "argv", ["leadline", "--verbose", "list", "attacks"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "Traceback (most recent call last)" in capsys.readouterr().err
