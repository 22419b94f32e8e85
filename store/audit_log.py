"""Owns the audit log: who enrolled, verified, compared and erased whom and when, in a chain that shows every gap."""

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

logger = logging.getLogger("face_api")

START = "0" * 64
# A clock that jumped ahead must not take the log away: of the oldest days a new one drops so many at most, or a share.
MAX_DROPPED, MAX_DROPPED_SHARE = 2, 0.02


class AuditError(ValueError):
    """A log whose chain is broken; the message says where."""


class AuditLog:
    """One JSON object a line, a file a day (UTC), mode 0600; any number of threads and processes of one machine.

    Each line names the SHA-256 of the line before it, also across files, and a file's first line says so (`begins`):
    a line which was changed, taken out or put in is noticed (by `lines_of`); only the end can be cut off, and whole
    days at the beginning, as retention does. There is no photo, no template and no similarity in it.

    A file is called by its day. When the clock has gone back by more than a day, the name begins with the newest day
    that there is (`2030-01-01.2026-11-23.jsonl`), so that files in the order of their names are in the chain's order.

    Args:
        folder: where the files lie.
        keep_days: files of days before that many are deleted.
    """

    def __init__(self, folder: Path, keep_days: int) -> None:
        self._folder = folder
        self._keep_days = keep_days
        self._thread_lock = threading.Lock()
        self._end: tuple[Path, int, str] | None = None
        self.lost = 0

    def record(self, event: str, **fields: str | None) -> str | None:
        """Append one line.

        Returns:
            The line's SHA-256, by which it can be found again; None if it could not be written, which is logged and
            counted in `lost` but stops nobody.
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
                        os.fsync(descriptor)  # its digest is somebody's receipt
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
        """The digest of the last line that anybody has written."""
        for newest in reversed(files):
            if self._end is not None and self._end[:2] == (newest, newest.stat().st_size):
                return self._end[2]
            line = _last_line(newest)
            if line:
                return hashlib.sha256(line).hexdigest()
        return START

    def _drop_old(self, files: list[Path], now: float) -> None:
        oldest = _day(now - self._keep_days * 86400)
        # The last of them, and all before it: the chain may lose its beginning, but nothing within.
        expired = max((count for count, file in enumerate(files, 1) if file.stem[-10:] < oldest), default=0)
        for file in files[: min(expired, max(MAX_DROPPED, int(MAX_DROPPED_SHARE * len(files))))]:
            file.unlink(missing_ok=True)


def _day(moment: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(moment))


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"), key=lambda path: path.stem)


def _stem(files: list[Path], now: float) -> str:
    """The name of the file to write to: never before the newest there is."""
    newest = files[-1].stem if files else ""
    return max(newest, _day(now) if newest <= _day(now + 86400) else f"{newest[:10]}.{_day(now)}")


def _last_line(path: Path) -> bytes:
    """The last whole line, empty if there is none; what a power cut left behind it is taken out."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        while size:
            start = max(0, size - 65536)
            file.seek(start)
            tail = file.read(size - start)
            whole = tail[: tail.rfind(b"\n") + 1]
            if len(whole) < len(tail):
                logger.warning("The last line of %s is not whole, and is taken out", path)
                file.truncate(start + len(whole))
            if whole:
                return whole.splitlines()[-1]
            size = start
    return b""


def lines_of(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line's digest and content, in order, checking the chain.

    Raises:
        AuditError: a line was changed, taken out or put in.
    """
    previous = None
    files = _files(folder)
    for path in files:
        with path.open("rb") as file:
            for number, written in enumerate(file, 1):
                if path == files[-1] and not written.endswith(b"\n"):
                    return  # it is being written, or a power cut has cut it off
                text = written.removesuffix(b"\n")
                try:
                    line = json.loads(text)
                    named = line["previous"]
                    begins = line.get("begins")
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise AuditError(f"{path.name}, line {number} is no line of this log") from error
                if begins != (path.stem if number == 1 else None):
                    raise AuditError(f"{path.name} does not begin with its line {number}")
                if previous is not None and named != previous:
                    raise AuditError(f"{path.name}, line {number} does not follow the line before it")
                previous = hashlib.sha256(text).hexdigest()
                yield previous, line


def _append(descriptor: int, data: bytes) -> None:
    """Append all of it or nothing: half a line would break the chain."""
    size = os.fstat(descriptor).st_size
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError:
        os.ftruncate(descriptor, size)
        raise
