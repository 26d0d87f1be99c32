"""Groups that owners keep with their models: a log call is kept whole and once, or not at all.

Lines are appended to files, and SQLite knows nothing of files. So the lengths that they had are noted before, and the
note goes in the transaction that remembers the call. A note that is there at the start is of a call that was cut short:
its files are cut back, nobody was answered, and the same call again is done anew.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path
from typing import Any

from fitrl_serverless import wire
from fitrl_serverless.server.answers import Once, do_once
from fitrl_serverless.server.database import Database
from fitrl_serverless.server.errors import not_found
from fitrl_serverless.server.registry import Registry


class Logs:
    """What is kept in run folders, where `fitrl show` and `fitrl plot` find it.

    Args:
        database: of the server.
        registry: of the server.
    """

    def __init__(self, database: Database, registry: Registry) -> None:
        self._database = database
        self._registry = registry
        self._lock = threading.Lock()  # one note at a time

    def keep(self, owner: str, body: wire.LogGroups, once: Once) -> None:
        """Keep groups with an owner's model, at its newest step.

        Raises:
            RefusedError: 404.
            DataError: groups that cannot be read.
        """
        model = self._registry.get(owner, body.model_id)
        groups = wire.groups_from_wire(body.trajectory_groups)
        run, step = self._registry.run(model), self._registry.newest_step(model)
        files = [run.run_dir / "history.jsonl", run.run_dir / "trajectories" / body.split / f"{step:04d}.jsonl"]

        def work(connection: sqlite3.Connection) -> Any:
            if connection.execute("SELECT 1 FROM models WHERE id = ?", (model.id,)).fetchone() is None:
                raise not_found("model of this id")  # deleted in between, its folder too
            run.log(groups, split=body.split, step=step)
            for path in files:
                _flush(path)
            connection.execute("DELETE FROM unfinished_logs")

        with self._lock:
            self.cut_back()  # of a call whose files could not be cut back then
            self._note(files)
            try:
                do_once(self._database, once, work)
            finally:
                self.cut_back()  # nothing, once the call is remembered

    def cut_back(self) -> None:
        """Take away what an unfinished call has written."""
        notes = self._database.rows("SELECT path, length FROM unfinished_logs")
        if not notes:
            return
        for row in notes:
            path = self._registry.root / row["path"]
            if not path.is_file():
                continue
            if row["length"] is None:
                path.unlink()
            else:
                os.truncate(path, row["length"])
                _flush(path)
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM unfinished_logs")

    def _note(self, files: list[Path]) -> None:
        lengths = [
            (str(path.relative_to(self._registry.root)), path.stat().st_size if path.is_file() else None)
            for path in files
        ]
        with self._database.transaction() as connection:
            connection.executemany("INSERT INTO unfinished_logs (path, length) VALUES (?, ?)", lengths)


def _flush(path: Path) -> None:
    """Have a file on the disk itself; one that was not written to is not there."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
