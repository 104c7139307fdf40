"""The store: one SQLite file per study, with its trials, responses and verdicts.

Texts are in `responses`, once per key; the tables that statistics scan (`trials`, `verdicts`) have
small rows. One thread writes and commits every half second, so a killed process loses at most the
last half second. Other processes can read at any time.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .files import private_file, private_folder
from .records import LeadlineError, Prompt, Response, Verdict
from .secret import scrub, without_secrets
from .text import one_line, shorten

FILE = "leadline.sqlite"
COMMIT_SECONDS = 0.5
_BACKLOG = 20_000  # uncommitted trials above which the engine pauses

_PARTS = {  # tables of trials; each has a copy past_NAME for what other studies left in this file
    "trials": """
  cell INTEGER, prompt INTEGER, sample INTEGER, key BLOB, outcome TEXT, reason TEXT,
  recipe BLOB, PRIMARY KEY(cell, prompt, sample)""",
    "verdicts": """
  cell INTEGER, prompt INTEGER, sample INTEGER, judge INTEGER,
  unsafe INTEGER, refusal INTEGER, score REAL, utility REAL,
  thought_unsafe INTEGER, answer_unsafe INTEGER, categories TEXT, outcome TEXT,
  PRIMARY KEY(cell, prompt, sample, judge)""",
    "words": """
  cell INTEGER, prompt INTEGER, sample INTEGER, judge INTEGER, text TEXT,
  PRIMARY KEY(cell, prompt, sample, judge)""",
}
_PROMPT_COLUMNS = """
  id INTEGER PRIMARY KEY, dataset TEXT, name TEXT, base TEXT, category TEXT, harmful INTEGER,
  text TEXT, context TEXT, target TEXT"""
_PART_TABLES = "\n".join(
    f"CREATE TABLE IF NOT EXISTS {past}{name}({columns}) WITHOUT ROWID;"
    for past in ("", "past_")
    for name, columns in _PARTS.items()
)

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS prompts({_PROMPT_COLUMNS}, UNIQUE(dataset, name));
CREATE TABLE IF NOT EXISTS past_prompts({_PROMPT_COLUMNS});
CREATE INDEX IF NOT EXISTS past_prompts_name ON past_prompts(dataset, name);
CREATE TABLE IF NOT EXISTS cells(
  id INTEGER PRIMARY KEY, model TEXT, thinking TEXT, dataset TEXT, attack TEXT,
  pool TEXT, UNIQUE(model, thinking, dataset, attack));
CREATE TABLE IF NOT EXISTS judges(
  id INTEGER PRIMARY KEY, name TEXT, settings TEXT, caution TEXT, UNIQUE(name, settings));
CREATE TABLE IF NOT EXISTS primary_judges(dataset TEXT PRIMARY KEY, judge INTEGER);
CREATE TABLE IF NOT EXISTS responses(
  key BLOB PRIMARY KEY, request TEXT, prefix TEXT, thought TEXT, answer TEXT, finish TEXT,
  error TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, seconds REAL);
{_PART_TABLES}

-- one row per trial, with names and the verdict of its dataset's primary judge; verdict is what
-- the answer does (refused, complied, off_topic, degenerate)
CREATE VIEW IF NOT EXISTS outcomes AS
  SELECT c.model, c.thinking, c.dataset, c.attack, c.pool, p.name AS prompt, p.base, p.category,
         p.harmful, t.sample, t.outcome, t.reason, t.key, j.name AS judge, v.unsafe, v.refusal,
         nullif(v.outcome, '') AS verdict, v.score, v.utility, v.thought_unsafe, v.answer_unsafe,
         v.categories
  FROM trials t JOIN cells c ON c.id = t.cell JOIN prompts p ON p.id = t.prompt
  LEFT JOIN primary_judges pj ON pj.dataset = c.dataset LEFT JOIN judges j ON j.id = pj.judge
  LEFT JOIN verdicts v ON v.cell = t.cell AND v.prompt = t.prompt AND v.sample = t.sample
                      AND v.judge = pj.judge;
"""

# A prompt p of the store is the same as a wanted one w.
_SAME_NAME = "w.dataset = p.dataset AND w.name = p.name"
_SAME_CONTENT = " AND ".join(
    f"w.{column} IS p.{column}" for column in ("text", "context", "target", "harmful")
)

# The writes of a transaction, in this order: statement and number of columns.
_WRITES = {
    "responses": ("INSERT OR REPLACE INTO responses VALUES", 10),
    "trials": ("INSERT OR REPLACE INTO trials VALUES", 7),
    "stale": ("DELETE FROM verdicts WHERE cell=? AND prompt=? AND sample=?", 3),
    "stale_words": ("DELETE FROM words WHERE cell=? AND prompt=? AND sample=?", 3),
    "verdicts": ("INSERT OR REPLACE INTO verdicts VALUES", 12),
    "words": ("INSERT OR REPLACE INTO words VALUES", 5),
}
_ROWS_PER_STATEMENT = 100  # few statements: each one releases and reacquires the GIL


def _insert_rows(db: sqlite3.Connection, table: str, rows: list[tuple[Any, ...]]) -> None:
    statement, columns = _WRITES[table]
    if statement.startswith("DELETE"):
        db.executemany(statement, rows)
        return
    placeholders = f"({','.join('?' * columns)})"
    for i in range(0, len(rows), _ROWS_PER_STATEMENT):
        chunk = rows[i : i + _ROWS_PER_STATEMENT]
        sql = f"{statement} {','.join([placeholders] * len(chunk))}"
        db.execute(sql, list(itertools.chain.from_iterable(chunk)))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # e.g. a name that is too long
        return False


@cache
def _columns() -> dict[str, set[str]]:
    """The columns of each table of the schema."""
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript(_SCHEMA)
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        return {name: _columns_of(db, name) for name in names}


def _columns_of(db: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in db.execute(f"PRAGMA table_info({table})")}


def _check_columns(db: sqlite3.Connection) -> None:
    """Raise ValueError if the file is another program's, or another version's with other tables."""
    for table, columns in _columns().items():
        stored = _columns_of(db, table)
        if not stored and table.startswith("past_"):
            continue  # a store from before trials were set aside: the table is created
        if not stored:
            raise ValueError(f"it has no table {table}, so it is not a store of this version")
        if missing := columns - stored:
            raise ValueError(
                f"its table {table} has no column {min(missing)}, so it was written by another "
                "version of Leadline"
            )


class Place(NamedTuple):
    """The primary key of a trial: row ids of its cell and prompt, and the sample's number."""

    cell: int
    prompt: int
    sample: int


class StoredTrial(NamedTuple):
    """The stored state of a trial. `key` is the key of its request; for a model-assisted attack,
    the key of its recipe. `judged` are the ids of the judges whose verdict is scored."""

    key: bytes
    outcome: str
    judged: frozenset[int]


class Store:
    """The SQLite file of a study, in `folder`; read-only unless `write=True`.

    Raises LeadlineError if there is no store to read, if the file is not a store, or if another
    run is writing to it.
    """

    def __init__(self, folder: Path, *, write: bool = False) -> None:
        self.folder = Path(folder)
        self.path = self.folder / FILE
        self.pending: dict[bytes, Response] = {}  # responses that are not yet committed
        self._rows: dict[str, list[tuple[Any, ...]]] = {table: [] for table in _WRITES}
        self._ids: dict[tuple[str, ...], int] = {}
        self._rows_lock = threading.Lock()
        self._writing = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if write:
            try:
                private_folder(self.folder)
                lock = private_file(self.folder / ".lock")
                self._lock = open(lock, "w")  # noqa: SIM115 (held until close)
            except OSError as error:
                raise LeadlineError(
                    f"cannot write to {shorten(str(self.folder), 100)} ({error.strerror}): use "
                    "another --out"
                ) from None
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._lock.close()
                raise LeadlineError(
                    f"another leadline run is writing to {self.folder}: wait for it, stop it, or "
                    "use another --out"
                ) from None
        elif not _is_file(self.path):
            raise LeadlineError(
                f"no study at {shorten(str(self.folder), 100)} (it has no {FILE}): give the "
                "output folder of `leadline run`"
            )
        try:
            if write:  # SQLite gives its -wal and -shm files the mode of this one
                private_file(self.path)
                for suffix in ("-wal", "-shm"):
                    if (part := self.path.with_name(FILE + suffix)).exists():
                        private_file(part)
            self._db = self._connect(write)
        except BaseException as error:
            if write:
                self._lock.close()
            if isinstance(error, OSError):
                raise LeadlineError(
                    f"cannot write to {shorten(str(self.folder), 100)} ({error.strerror}): use "
                    "another --out"
                ) from None
            raise
        if write:
            self._wake = threading.Event()
            self._closing = False
            self._thread = threading.Thread(target=self._write, name="leadline-store", daemon=True)
            self._thread.start()

    def _connect(self, write: bool) -> sqlite3.Connection:
        try:
            mode = "rw" if write else "ro"
            uri = self.path.resolve().as_uri()
            db = sqlite3.connect(
                f"{uri}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False,
                timeout=60,
            )  # fmt: skip
            if write:
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("PRAGMA synchronous=NORMAL")
            tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if tables or not write:  # a file without tables is a new store
                _check_columns(db)
            if write:
                db.executescript(f"BEGIN; {_SCHEMA} COMMIT")  # a full disk leaves no half of it
        except (sqlite3.Error, ValueError) as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (
                sqlite3.SQLITE_FULL,
                sqlite3.SQLITE_IOERR,
            ):
                raise LeadlineError(
                    f"cannot write to {self.path} ({one_line(error)}): free space, or use another "
                    "--out"
                ) from None
            raise LeadlineError(
                f"{self.path} cannot be opened as a store ({one_line(error)}): move the file "
                "away, or use another --out"
            ) from None
        return db

    # -- the parts of a study -------------------------------------------------------------------

    def describe(self, name: str, value: Any) -> None:
        """Store a piece of metadata (the study file, a model's card) as JSON."""
        self._db.execute(
            "INSERT OR REPLACE INTO meta VALUES(?,?)", (name, scrub(json.dumps(value)))
        )

    def description(self, name: str, default: Any = None) -> Any:
        """The metadata that `describe` stored under a name."""
        row = self._db.execute("SELECT value FROM meta WHERE name=?", (name,)).fetchone()
        try:
            return json.loads(row[0]) if row else default
        except (ValueError, TypeError) as error:
            raise LeadlineError(
                f"{self.path} is damaged (its entry {name!r} is not JSON: {error}): restore the "
                "file, or run the study again with another --out"
            ) from None

    def prompt_ids(
        self, prompts: Iterable[Prompt], cells: Sequence[int] | None = None
    ) -> dict[tuple[str, str], int]:
        """Insert or update prompts; returns the row ids of all current prompts by (dataset, id).

        A prompt is the same as a stored one only if its text, context and target are the same too;
        another one takes its place, and the old one is set aside with its trials. `cells` are those
        of the current study: all other trials and prompts are set aside as well (None: they stay).
        What was set aside comes back when a study needs it again.
        """
        rows = {
            (p.dataset, p.id): (
                p.dataset, p.id, p.base or p.id, p.category, p.harmful, p.text, p.context, p.target,
            )
            for p in prompts
        }  # fmt: skip
        db = self._db
        db.execute("CREATE TEMP TABLE IF NOT EXISTS wanted AS SELECT * FROM prompts WHERE 0")
        db.execute("CREATE UNIQUE INDEX IF NOT EXISTS temp.wanted_name ON wanted(dataset, name)")
        db.execute("CREATE TEMP TABLE IF NOT EXISTS kept(id INTEGER PRIMARY KEY)")
        db.execute("BEGIN IMMEDIATE")
        db.executemany(f"INSERT INTO wanted VALUES(NULL{',?' * 8})", rows.values())
        kept = self.query("SELECT id FROM cells") if cells is None else [(id,) for id in cells]
        db.executemany("INSERT INTO kept VALUES(?)", kept)
        self._exchange_prompts(everything=cells is not None)
        self._exchange_trials()
        db.execute("DELETE FROM wanted")
        db.execute("DELETE FROM kept")
        db.execute("COMMIT")
        stored = db.execute("SELECT dataset, name, id FROM prompts")
        return {(dataset, name): id for dataset, name, id in stored}

    def _exchange_prompts(self, *, everything: bool) -> None:
        """Set aside the prompts that wanted ones replace (or, with `everything`, all that are not
        wanted), bring back those that were set aside, and insert the rest."""
        named = f"SELECT 1 FROM wanted w WHERE {_SAME_NAME}"
        wanted = f"{named} AND {_SAME_CONTENT}"
        replaced = "" if everything else f"AND EXISTS ({named})"
        self._move("prompts", "past_prompts", f"NOT EXISTS ({wanted}) {replaced}")
        self._move("past_prompts", "prompts", f"EXISTS ({wanted})")
        self._db.execute(
            "UPDATE prompts AS p SET base = w.base, category = w.category FROM wanted w "
            f"WHERE {_SAME_NAME} AND (p.base, p.category) IS NOT (w.base, w.category)"
        )
        ((last,),) = self.query(
            "SELECT max(coalesce((SELECT max(id) FROM prompts), 0), "
            "coalesce((SELECT max(id) FROM past_prompts), 0))"
        )
        self._db.execute(
            "INSERT INTO prompts SELECT ? + row_number() OVER (ORDER BY w.rowid), dataset, name, "
            "base, category, harmful, text, context, target FROM wanted w "
            f"WHERE NOT EXISTS (SELECT 1 FROM prompts p WHERE {_SAME_NAME}) ORDER BY w.rowid",
            (last,),
        )

    def _exchange_trials(self) -> None:
        """Set aside the trials of other cells and prompts, and bring back those of these ones."""
        current = "cell IN (SELECT id FROM kept) AND prompt IN (SELECT id FROM prompts)"
        for table in _PARTS:
            self._move(f"past_{table}", table, current)
            self._move(table, f"past_{table}", f"NOT ({current})")

    def _move(self, source: str, target: str, condition: str) -> None:
        moved = self._db.execute(
            f"INSERT OR REPLACE INTO {target} SELECT * FROM {source} AS p WHERE {condition}"
        )
        if moved.rowcount:
            self._db.execute(f"DELETE FROM {source} AS p WHERE {condition}")

    def drop_samples(self, samples: int, cell: int | None = None) -> None:
        """Delete the trials of a cell (None: of all) with this sample number or a higher one. Their
        responses stay, so that they cost no request if they are needed again."""
        where = "sample >= ?" if cell is None else "sample >= ? AND cell = ?"
        values = (samples,) if cell is None else (samples, cell)
        for table in _PARTS:
            self._db.execute(f"DELETE FROM {table} WHERE {where}", values)

    def cell_id(
        self, model: str, thinking: str, dataset: str, attack: str, pool: str = "one"
    ) -> int:
        """The row id of a cell (one combination of these names), inserted if new. With `pool`
        "any", a prompt counts as unsafe if any of its samples is."""
        names = {"model": model, "thinking": thinking, "dataset": dataset, "attack": attack}
        return self._id("cells", names, pool=pool)

    def judge_id(self, name: str, settings: Any, caution: str = "") -> int:
        """The row id of a judge with these settings, inserted if new. `caution` is what a reader of
        its verdicts must know (see `registry.judge`)."""
        settings = scrub(json.dumps(without_secrets(settings), sort_keys=True))
        names = {"name": name, "settings": settings}
        return self._id("judges", names, caution=caution)

    def primary_judge(self, dataset: str, judge: int) -> None:
        """Set the judge whose verdicts the report shows for a dataset."""
        self._db.execute("INSERT OR REPLACE INTO primary_judges VALUES(?,?)", (dataset, judge))

    def _id(self, table: str, names: dict[str, str], **more: str) -> int:
        """The row id for these names, inserted if new; cached."""
        cache_key = (table, *names.values())
        if cache_key in self._ids:
            return self._ids[cache_key]
        fields, values = ",".join([*names, *more]), [*names.values(), *more.values()]
        placeholders = ",".join("?" * len(values))
        self._db.execute(f"INSERT OR IGNORE INTO {table}({fields}) VALUES({placeholders})", values)
        condition = " AND ".join(f"{name}=?" for name in names)
        row = self._db.execute(f"SELECT id FROM {table} WHERE {condition}", [*names.values()])
        return self._ids.setdefault(cache_key, int(row.fetchone()[0]))

    # -- look-ups during a run ------------------------------------------------------------------

    def answered(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of the keys that have a response, committed or not."""
        # Pending ones first: the query then finds those that the writer commits in between.
        pending = {key for key in keys if key in self.pending}
        placeholders = ",".join("?" * len(keys))
        committed = self._db.execute(
            f"SELECT key FROM responses WHERE key IN ({placeholders})", keys
        )
        return pending | {key for (key,) in committed}

    def stored(self, places: Sequence[Place]) -> dict[Place, StoredTrial]:
        """The committed trials among these, with their scored judges."""
        rows = self._db.execute(
            f"WITH want(c, p, s) AS (VALUES {','.join(['(?,?,?)'] * len(places))}) "
            "SELECT t.cell, t.prompt, t.sample, coalesce(t.recipe, t.key, x''), t.outcome, "
            "(SELECT group_concat(v.judge) FROM verdicts v "
            "WHERE v.cell=t.cell AND v.prompt=t.prompt AND v.sample=t.sample "
            "AND v.unsafe IS NOT NULL) "
            "FROM want CROSS JOIN trials t ON t.cell=c AND t.prompt=p AND t.sample=s",
            [part for place in places for part in place],
        )
        return {
            Place(c, p, s): StoredTrial(key, outcome, frozenset(map(int, judges.split(","))))
            if judges
            else StoredTrial(key, outcome, frozenset())
            for c, p, s, key, outcome, judges in rows
        }

    def response(self, key: bytes) -> Response | None:
        """The response stored under a key, committed or not; None if there is none."""
        if pending := self.pending.get(key):
            return pending
        row = self._db.execute(
            "SELECT answer, thought, finish, error, prefix, prompt_tokens, completion_tokens, "
            "seconds FROM responses WHERE key=?",
            (key,),
        ).fetchone()
        return Response(*row) if row else None

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a SQL query on committed data."""
        try:
            return self._db.execute(sql, parameters).fetchall()
        except sqlite3.DatabaseError as error:
            if type(error) is sqlite3.DatabaseError:  # a damaged file; subclasses: wrong SQL, locks
                raise LeadlineError(f"{self.path} is damaged ({error}): restore it") from None
            raise

    # -- writes during a run --------------------------------------------------------------------

    def put_response(self, key: bytes, request: str, response: Response) -> None:
        """Store a response with its request (as JSON) under the request's key."""
        self.pending[key] = response
        r = response
        row = (key, request, r.prefix, r.thought, r.answer, r.finish, r.error)
        self._put("responses", (*row, r.prompt_tokens, r.completion_tokens, r.seconds))

    def put_trial(
        self,
        place: Place,
        key: bytes,
        outcome: str,
        reason: str = "",
        *,
        recipe: bytes = b"",
        stale: bool = False,
    ) -> None:
        """Store a trial's outcome and the key of its request.

        `recipe` is a hash of everything that decides the request of a model-assisted attack, which
        is made again only when this changes. With `stale`, the row belonged to another request:
        its verdicts are deleted."""
        if stale:
            self._put("stale", place)
            self._put("stale_words", place)
        self._put("trials", (*place, key or None, outcome, reason or None, recipe or None))

    def put_verdict(
        self, place: Place, judge: int, verdict: Verdict, *, again: bool = False
    ) -> None:
        """Store a judge's verdict. With `again`, the trial has a verdict without a score: the
        judge's earlier text is replaced even if the new one is empty."""
        v = verdict
        parts = (v.unsafe, v.refusal, v.score, v.utility, v.thought_unsafe, v.answer_unsafe)
        self._put("verdicts", (*place, judge, *parts, ",".join(v.categories) or None, v.outcome))
        if v.text or again:
            self._put("words", (*place, judge, v.text))

    def _put(self, table: str, row: tuple[Any, ...]) -> None:
        if self._error:
            self._raise_error()
        texts = "\0".join([value for value in row if isinstance(value, str)])
        if scrub(texts) != texts:
            row = tuple(scrub(value) if isinstance(value, str) else value for value in row)
        with self._rows_lock:
            self._rows[table].append(row)

    @property
    def behind(self) -> bool:
        """Whether so many trials are uncommitted that the engine should pause."""
        return len(self._rows["trials"]) > _BACKLOG

    def flush(self) -> None:
        """Wait until all writes are committed. Raises LeadlineError if the writer failed."""
        while (self._writing or any(self._rows.values())) and not self._error:
            self._wake.set()
            time.sleep(0.002)
        if self._error:
            self._raise_error()

    def _raise_error(self) -> NoReturn:
        raise LeadlineError(
            f"cannot write to {self.path}: {self._error}; committed results are kept: fix the "
            "cause and run the same command again to resume"
        )

    def _write(self) -> None:
        try:
            with closing(self._connect(write=True)) as db:
                while not self._write_batch(db):
                    pass
        except BaseException as error:
            self._error = error
            self._writing = False

    def _write_batch(self, db: sqlite3.Connection) -> bool:
        """Wait, then commit the waiting rows. Returns whether the store is closing."""
        self._wake.wait(COMMIT_SECONDS)
        self._wake.clear()
        done = self._closing  # read before _rows: all rows put before close() are in it
        with self._rows_lock:
            rows, self._rows = self._rows, {table: [] for table in _WRITES}
            self._writing = True
        if any(rows.values()):
            db.execute("BEGIN IMMEDIATE")
            for table, batch in rows.items():
                _insert_rows(db, table, batch)
            db.execute("COMMIT")
        for row in rows["responses"]:
            self.pending.pop(row[0], None)
        self._writing = False
        return done

    def close(self) -> None:
        """Commit all writes and close the file. Raises LeadlineError if the writer failed."""
        if self._thread:
            self._closing = True
            self._wake.set()
            self._thread.join()
            self._lock.close()
        self._db.close()
        if self._error:
            self._raise_error()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
