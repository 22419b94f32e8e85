"""The report of a bulk: a CSV with a line for each photo, which the next run reads to continue."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from commands.bulk.photo_list import Photo
from commands.bulk.processing import read_photo
from settings import Settings

# A photo with one of these codes is done; every other code but `duplicate_face` is a refusal.
DONE = ("enrolled", "photo_added", "reembedded")


@dataclass(frozen=True)
class ReportLine:
    """What became of one photo; `code` is one of `DONE`, or says why not."""

    path: str
    sha256: str
    code: str
    user_id: str
    message: str


class Report:
    """A CSV with one line for each photo that is done, so that it is not done again. Of several the last counts.

    Args:
        path: the file, made if it is missing; mode 0600.

    Raises:
        OSError: it cannot be read or written.
        ValueError: the file is not such a report.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns = [field.name for field in fields(ReportLine)]
        self.lines: dict[str, ReportLine] = {}
        self._added: set[str] = set()
        if path.exists() and path.stat().st_size:
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]  # a killed run may leave half a line, which is written again
            rows = list(csv.reader(io.StringIO(whole.decode("utf-8", "surrogateescape"), newline="")))
            if not rows or rows[0] != self._columns or any(len(row) != len(self._columns) for row in rows):
                raise ValueError(f"{path} is no report of this command")
            self.lines = {row[0]: ReportLine(*row) for row in rows[1:]}
            os.truncate(path, len(whole))
        # surrogateescape: a file's name may hold bytes that are not text.
        self._file = path.open("a", newline="", encoding="utf-8", errors="surrogateescape")
        path.chmod(0o600)
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not self.lines and path.stat().st_size == 0:
            self._writer.writerow(self._columns)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def has_refused(self, photo: Photo, settings: Settings) -> bool:
        """Whether this photo was refused before; another photo under the same name was not."""
        line = self.lines.get(str(photo.path))
        if line is None or line.code in DONE:
            return False
        try:
            return line.sha256 == hashlib.sha256(read_photo(photo, settings)).hexdigest()
        except OSError:
            return not line.sha256

    def add(self, lines: Iterable[ReportLine]) -> None:
        """Add lines, durably."""
        for line in lines:
            self.lines[line.path] = line
            self._added.add(line.path)
            self._writer.writerow([line.path, line.sha256, line.code, line.user_id, line.message])
        self._file.flush()
        os.fsync(self._file.fileno())

    def summary(self) -> str:
        """How many photos have which code, in this run and in earlier ones."""
        this_run = Counter(line.code for path, line in self.lines.items() if path in self._added)
        earlier = Counter(line.code for path, line in self.lines.items() if path not in self._added)
        parts = []
        for title, counts in (("This run:", this_run), ("Earlier runs, not done again:", earlier)):
            if counts:
                parts += [title, *(f"{count:8} {code}" for code, count in counts.most_common())]
        return "\n".join([*(parts or ["No photo was left to do."]), f"Report: {self.path}"]) + "\n"


def report_path(given: Path | None, settings: Settings, name: str) -> Path:
    """Where a command's report lies: where the operator says, or under `name` in DATA_DIR, which is made if needed."""
    if given is not None:
        return given
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return settings.data_dir / name
