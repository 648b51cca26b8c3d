"""The ledger of all requests, in an SQLite file, and the reasons for which asking stops."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal


class Stopped(Exception):
    """Asking ended early, for a reason in one line. What was paid for is in the ledger, so asking
    again continues where it stopped."""


class Refused(Stopped):
    """Asking again would not help before the user has corrected a key, model, setting or file."""


class TooDear(Stopped):
    """The next request could exceed the limit on dollars."""


def for_terminal(text: str) -> str:
    """A text that others wrote, on one line, with U+FFFD for each character that is not printable,
    since such characters can control the terminal."""
    line = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in line)


SCHEMA = (  # SQLite keeps the text, comments too, in the file
    "\n"
    "CREATE TABLE IF NOT EXISTS requests (\n"
    "    id INTEGER PRIMARY KEY, key TEXT NOT NULL, run TEXT NOT NULL, model TEXT NOT NULL, "
    "url TEXT NOT NULL,\n"
    "    question TEXT NOT NULL,      -- version, messages and sampling settings, as JSON\n"
    "    pid INTEGER NOT NULL, sent REAL NOT NULL,\n"
    "    bound REAL NOT NULL,         -- dollars that it may cost at most, counted as spent until "
    "it is known better\n"
    "    outcome TEXT,                -- NULL: in flight, or killed there; complete; "
    "unreadable; lost: no reply; not charged:\n"
    "                                 -- refused, filtered (the question will never be answered)\n"
    "    reply TEXT, parsed TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, "
    "dollars REAL, seconds REAL);\n"
    "CREATE INDEX IF NOT EXISTS requests_by_key ON requests (key);\n"
    "CREATE TABLE IF NOT EXISTS spending (run TEXT PRIMARY KEY, dollars REAL NOT NULL);\n"
)
COLUMNS = """id, key, run, model, url, question, pid, sent, bound, outcome, reply, parsed,
prompt_tokens, completion_tokens, dollars, seconds"""
REPLIED = ("complete", "unreadable", "filtered")  # outcomes of requests that need not be sent again
# a reply in the ledger: its outcome; what was read of it if it is complete; and its text if that
# has to be read again (bytes if it is not UTF-8)
Kept = tuple[str, Any, str | bytes | None]


class Ledger:
    """All requests ever sent, in an SQLite file. A row is written before its request is sent, and
    completed when the reply comes. Threads and processes may share the file. It survives the death
    of a process at any moment; if the machine dies, the last few replies may be lost.

    path: the file, made when it is first needed; None for memory. run: whose requests `spent` and
    `totals` count. read_only: the file must exist, and is not changed. Every method raises Refused
    if the file cannot be used."""

    def __init__(self, path: str | Path | None, run: str = "", read_only: bool = False):
        self.path = path or "memory"
        self.run, self.read_only, self.lock = run, read_only, threading.RLock()
        self._db: sqlite3.Connection | None = None
        with self._refusing():
            folders = Path(path or ".").absolute().parents
            above = next(folder for folder in folders if folder.exists())
            if not above.is_dir():
                raise NotADirectoryError(f"{above} is no folder")
            there = read_only or (path and Path(path).exists())
        if there:
            _ = self.db  # opened now, so that a file that is no ledger is refused at once

    @property
    def db(self) -> sqlite3.Connection:
        """The connection, which is opened when it is first needed."""
        with self.lock, self._refusing():
            if self._db is None:
                self._db = self._open()
            return self._db

    def _open(self) -> sqlite3.Connection:
        if self.path == "memory":
            return _prepared(_connect(":memory:"))
        path = Path(self.path)
        if self.read_only:
            return self._examined(path)
        if path.exists():
            self._examined(path).close()
        path.parent.mkdir(parents=True, exist_ok=True)
        return _prepared(_connect(path.resolve().as_uri()))

    def _examined(self, path: Path) -> sqlite3.Connection:
        """A connection that cannot write. The file must be a sound ledger; it may be empty unless
        the ledger is read-only. Raises SQLite's errors if it is damaged or something else. The file
        stays as it is, and nothing is left beside it."""
        while True:
            logged = _has_log(path)
            mode = "?mode=ro" if logged else "?mode=ro&immutable=1"
            db = _connect(path.resolve().as_uri() + mode)
            try:
                if self.read_only or db.execute("SELECT 1 FROM sqlite_master").fetchone():
                    db.execute(f"SELECT {COLUMNS} FROM requests LIMIT 1")
                (found,) = db.execute("PRAGMA integrity_check(1)").fetchone()
                if found != "ok":
                    raise sqlite3.DatabaseError(f"damaged: {found}")
                return db
            except BaseException as error:
                db.close()
                changed = logged != _has_log(path)  # a process began to write, or the last ended
                if not (changed and isinstance(error, sqlite3.DatabaseError)):
                    raise

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Stands around every use of the file. Raises Refused, with a reason in one line, if the
        file cannot be read or written. It takes no lock, since Control-C between this function and
        its caller would leave it locked."""
        try:
            yield
        except (sqlite3.DatabaseError, OSError) as error:
            if isinstance(error, sqlite3.ProgrammingError):
                raise
            told = for_terminal(str(error))[:200]
            raise Refused(
                f"{self.path} cannot be used as a cache of judgments ({told}); {_remedy(error)}"
            ) from None

    def replies(self, keys: Iterable[str]) -> dict[str, list[Kept]]:
        """The replies that are complete, unreadable or filtered, by key, the oldest first."""
        keys = list(keys)
        found: dict[str, list[Kept]] = {key: [] for key in keys}
        for at in range(0, len(keys), 500):
            part = keys[at : at + 500]
            query = f"""SELECT key, outcome, CASE WHEN outcome = 'complete' THEN parsed END,
                               CASE WHEN outcome = 'unreadable' OR parsed IS NULL THEN reply END
                        FROM requests WHERE key IN ({",".join("?" * len(part))})
                        AND outcome IN {REPLIED} ORDER BY id"""
            with self.lock, self._refusing():
                for key, outcome, parsed, reply in self.db.execute(query, part):
                    found[key].append((outcome, _value(parsed), reply))
        return found

    def spent(self) -> float:
        """Dollars that this run has spent. A request whose cost is not known counts with the most
        that it can have cost."""
        with self.lock, self._refusing():
            (dollars,) = self.db.execute(
                "SELECT TOTAL(dollars) FROM spending WHERE run = ?", (self.run,)
            ).fetchone()
        return max(0.0, dollars)  # up to rounding

    def models(self, teacher: bool) -> list[str]:
        """The models that were asked a teacher's questions, or else a judge's."""
        sql = """SELECT DISTINCT model FROM requests
                 WHERE (json_extract(question, '$.version') LIKE 'teacher%') = ?"""
        with self.lock, self._refusing():
            return [model for (model,) in self.db.execute(sql, (teacher,))]

    def totals(self) -> dict[str, float]:
        """Requests sent in this run, how many of them were never answered, tokens, dollars known to
        be paid, and the most that the others can have cost."""
        query = """SELECT COUNT(*) AS requests,
                   COALESCE(SUM(outcome IS NULL OR outcome = 'lost'), 0) AS unanswered,
                   COALESCE(SUM(prompt_tokens), 0) AS prompt_tokens,
                   COALESCE(SUM(completion_tokens), 0) AS completion_tokens,
                   COALESCE(SUM(dollars), 0) AS dollars,
                   COALESCE(SUM(CASE WHEN dollars IS NULL THEN bound END), 0)
                       AS dollars_unknown_at_most
                   FROM requests WHERE run = ?"""
        with self.lock, self._refusing():
            found = self.db.execute(query, (self.run,))
            names = [column[0] for column in found.description]
            return dict(zip(names, found.fetchone(), strict=True))

    def reserve(
        self, row: dict[str, Any], known: int, limit: float, patience: float
    ) -> int | Literal["answered", "busy", "too dear"]:
        """The id of a new row for a request that is about to be sent. No row is written, and the
        result is "answered", if there are more replies than the `known` ones; "busy", if another
        living process sent the same request less than `patience` seconds ago; "too dear", if the
        row's bound could take this run past the limit in dollars."""
        with self._transaction():
            others = self.db.execute(
                "SELECT outcome, pid, sent FROM requests WHERE key = ?", (row["key"],)
            ).fetchall()
            if sum(outcome in REPLIED for outcome, _, _ in others) > known:
                return "answered"
            for outcome, pid, sent in others:
                recent = outcome is None and row["sent"] - sent < patience
                if recent and pid != os.getpid() and _alive(pid):
                    return "busy"
            if self.spent() + row["bound"] > limit:
                return "too dear"
            row = {**row, "run": self.run, "pid": os.getpid()}
            sql = f"INSERT INTO requests ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})"
            number = self.db.execute(sql, list(row.values())).lastrowid
            assert number is not None, "every INSERT has a row"
            self._spend(row["bound"])
            return number

    def complete(self, number: int, bound: float, **columns: Any) -> None:
        """Write what became of a request. If its dollars are known, they replace its bound in what
        is spent."""
        assignments = ", ".join(f"{name} = ?" for name in columns)
        with self._transaction():
            self.db.execute(
                f"UPDATE requests SET {assignments} WHERE id = ?", [*columns.values(), number]
            )
            if columns.get("dollars") is not None:
                self._spend(columns["dollars"] - bound)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self.lock, self._refusing():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self.db.in_transaction:  # a full disk ends it by itself
                    self.db.execute("ROLLBACK")
                raise
            self.db.execute("COMMIT")

    def _spend(self, dollars: float) -> None:
        sql = """INSERT INTO spending VALUES (?, ?)
                 ON CONFLICT (run) DO UPDATE SET dollars = dollars + excluded.dollars"""
        self.db.execute(sql, (self.run, dollars))


def _remedy(error: Exception) -> str:
    """What the user can do about an error of SQLite or of the system."""
    # SQLite's errors that come without a code are raised by Python, which found a damaged text
    damage = sqlite3.SQLITE_CORRUPT if isinstance(error, sqlite3.Error) else 0
    return {
        sqlite3.SQLITE_FULL: "make room for it, and go on",
        sqlite3.SQLITE_IOERR: "see to it that the disk works and has room, and go on",
        sqlite3.SQLITE_BUSY: "another program holds it: wait for its end, or choose another file",
        sqlite3.SQLITE_READONLY: "make it writable, or choose another file",
        sqlite3.SQLITE_CORRUPT: "put back a copy of it, or choose another file",
    }.get(getattr(error, "sqlite_errorcode", damage) & 0xFF, "choose another file")


def _has_log(path: Path) -> bool:
    """Whether SQLite's log holds something: a process is writing, or was killed while it did."""
    try:
        return Path(f"{path}-wal").stat().st_size > 0
    except FileNotFoundError:
        return False


def _connect(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, timeout=60, isolation_level=None, check_same_thread=False, uri=True)


def _prepared(db: sqlite3.Connection) -> sqlite3.Connection:
    """The connection, with the tables made. Another process may be making them, and SQLite does not
    wait by itself when it changes the mode of the journal."""
    last = time.monotonic() + 5
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.executescript(SCHEMA)
            return db
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > last:
                raise
        time.sleep(0.05)


def _value(parsed: str | bytes | None) -> Any:
    """What the ledger keeps as JSON; None if it keeps nothing."""
    try:
        return None if parsed is None else json.loads(parsed)
    except (ValueError, RecursionError):
        raise sqlite3.DatabaseError("damaged: what was read of a reply is no JSON") from None


def _alive(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie, which sends nothing."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:
        return True  # of another user, or there is no such file system
