"""Writes and reads the audit log: who enrolled, verified, compared and erased whom, in a chain that shows gaps."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# What the first line of a log names as the digest of the line before it.
FIRST_PREVIOUS = "0" * 64
# A wrong clock must not delete the log. A new file deletes old ones only if the file before it was written within this
# many days, and then at most so many of them, or this share of all.
MAX_PAUSE_DAYS = 7
MAX_DROPPED = 2
MAX_DROPPED_SHARE = 0.02
# Anybody can send requests that are refused, so only so many of them a minute leave a line.
MAX_REFUSALS_PER_MINUTE = 60
DAY_S = 86400


class AuditError(ValueError):
    """The chain of the log is broken; the message says where."""


class AuditLog:
    """One JSON object a line, a file a day (UTC), mode 0600; any number of threads and processes of one machine.

    Each line names the SHA-256 of the line before it, also across files, and a file's first line names its file
    (`begins`). So `lines_of` notices a line that was changed, removed or inserted. Only the end can be cut off
    unnoticed, and whole days at the beginning, as `keep_days` does. The log holds no photo, template or similarity.

    A file is named after its day. When the clock has gone back by more than a day, the name begins with the newest day
    in the folder (`2030-01-01.2026-11-23.jsonl`), so that the order of the names is the order of the chain.

    Args:
        folder: where the files are.
        keep_days: older files are deleted.
    """

    def __init__(self, folder: Path, keep_days: int) -> None:
        self._folder = folder
        self._keep_days = keep_days
        self._thread_lock = threading.Lock()
        self._end: tuple[Path, int, str] | None = None
        self._minute = self._refusals = self._left_out = 0
        self.lost = 0

    def record_refusal(self, event: str, **fields: str | None) -> str | None:
        """Append a line about a request whose API key was refused, as `record` does, but not without bound.

        The first line after those that were left out tells their number (`left_out`).
        """
        with self._thread_lock:
            minute = int(time.monotonic() // 60)
            if minute != self._minute:
                self._minute, self._refusals = minute, 0
            self._refusals += 1
            if self._refusals > MAX_REFUSALS_PER_MINUTE:
                self._left_out += 1
                if self._refusals == MAX_REFUSALS_PER_MINUTE + 1:
                    logger.warning("API keys are refused too often: the audit log leaves out more lines this minute")
                return None
            left_out, self._left_out = self._left_out, 0
        return self.record(event, **fields, left_out=str(left_out) if left_out else None)

    def record(self, event: str, **fields: str | None) -> str | None:
        """Append one line.

        Returns:
            The line's SHA-256, by which it can be found again; None if the line could not be written. That is logged
            and counted in `lost`, and does not stop the request.
        """
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
        try:
            with self._locked():
                files = _files(self._folder)
                path = self._folder / f"{_stem(files, now)}.jsonl"
                known = {name: value for name, value in fields.items() if value is not None}
                previous = self._last_digest(files)
                begins = {} if path.exists() and path.stat().st_size else {"begins": path.stem}
                line = {"time": stamp, "event": event, **known, **begins, "previous": previous}
                text = json.dumps(line, ensure_ascii=True).encode()
                digest = hashlib.sha256(text).hexdigest()
                descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                try:
                    _append(descriptor, text + b"\n")
                    if event == "erase":
                        os.fsync(descriptor)  # the digest of an erasure is a receipt
                    self._end = (path, os.fstat(descriptor).st_size, digest)
                finally:
                    os.close(descriptor)
                if path not in files:
                    self._drop_old(files, now)
        except OSError as error:
            self.lost += 1
            logger.error("The audit log cannot be written (%s): %d lines are lost", error.strerror, self.lost)  # noqa: TRY400
            return None
        return digest

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._thread_lock, (self._folder / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _last_digest(self, files: list[Path]) -> str:
        """Return the digest of the last line, whichever process wrote it."""
        for newest in reversed(files):
            if self._end is not None and self._end[:2] == (newest, newest.stat().st_size):
                return self._end[2]
            line = _last_line(newest)
            if line:
                return hashlib.sha256(line).hexdigest()
        return FIRST_PREVIOUS

    def _drop_old(self, files: list[Path], now: float) -> None:
        # The days on which files were written: the name of a later file may begin with a day from the future.
        if files and files[-1].stem[-10:] < _day(now - MAX_PAUSE_DAYS * DAY_S):
            return
        oldest = _day(now - self._keep_days * DAY_S)
        # The last expired file and all before it: the chain may lose its beginning, but nothing in the middle.
        expired = max((count for count, file in enumerate(files, 1) if file.stem[-10:] < oldest), default=0)
        for file in files[: min(expired, max(MAX_DROPPED, int(MAX_DROPPED_SHARE * len(files))))]:
            file.unlink(missing_ok=True)


def _day(moment: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(moment))


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"), key=lambda path: path.stem)


def _stem(files: list[Path], now: float) -> str:
    """Return the name of the file to write to: the newest file, or one that sorts behind it."""
    newest = files[-1].stem if files else ""
    return max(newest, _day(now) if newest <= _day(now + DAY_S) else f"{newest[:10]}.{_day(now)}")


def _last_line(path: Path) -> bytes:
    """Return the last whole line, empty if there is none; remove a half line that a power cut left."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        while size:
            start = max(0, size - 65536)
            file.seek(start)
            tail = file.read(size - start)
            whole = tail[: tail.rfind(b"\n") + 1]
            if len(whole) < len(tail):
                logger.warning("The last line of %s is not complete and is removed", path)
                file.truncate(start + len(whole))
            if whole:
                return whole.splitlines()[-1]
            size = start
    return b""


def lines_of(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line's digest and content, in order, checking the chain.

    Raises:
        AuditError: a line was changed, removed or inserted.
    """
    previous = None
    files = _files(folder)
    for path in files:
        with path.open("rb") as file:
            for number, written in enumerate(file, 1):
                if path == files[-1] and not written.endswith(b"\n"):
                    return  # a process is writing it now, or a power cut has cut it off
                text = written.removesuffix(b"\n")
                try:
                    line = json.loads(text)
                    named = line["previous"]
                    begins = line.get("begins")
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise AuditError(f"{path.name}, line {number} is not a line of an audit log") from error
                if begins != (path.stem if number == 1 else None):
                    raise AuditError(f"{path.name} does not begin with its line {number}")
                if previous is not None and named != previous:
                    raise AuditError(f"{path.name}, line {number} does not follow the line before it")
                previous = hashlib.sha256(text).hexdigest()
                yield previous, line


def _append(descriptor: int, data: bytes) -> None:
    """Append all of `data` or nothing: half a line would break the chain."""
    size = os.fstat(descriptor).st_size
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError:
        os.ftruncate(descriptor, size)
        raise
