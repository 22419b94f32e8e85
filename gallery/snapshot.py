"""Keeps the gallery's templates in files on local disk, so that a start need not read every record of the store.

A full block is written once and afterwards searched in its file (`snapshot_file.py`). The rows behind the last full
block are written to a file of their own from time to time. With TEMPLATE_KEYS the files are sealed.

A file is used only if all of this holds:

- Its header and each of its pages match their digests, or open under TEMPLATE_KEYS.
- Its header names the digest of the header before it, and the store confirms the checkpoint in the newest header. So
  files of another database, another model or a restored backup are never mixed in.
- The log has the newest erasure that reached the files, which is kept beside them. So a person who was erased in the
  files cannot return with an older state of the log.

After loading, the people whom the log erases are erased again. Files that fail are removed, and the process reads the
store instead.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gallery.snapshot_file import Header, SavedBlock, is_current, open_block, write_block
from gallery.templates import BLOCK_ROWS, Block
from store.encryption import NO_KEYS, Keyring

log = logging.getLogger(__name__)

TAIL_FILE = "tail"
ERASURE_FILE = "erased"
NEW_FILE_PREFIX = "new-"


class SnapshotFolder:
    """The files of one gallery.

    Args:
        folder: holds the files; created with mode 0700 before the first one is written.
        identity: the store's description, the model, and the settings that decide which rows the gallery has.
        dimension: d of the templates.
        keyring: seals and opens the files; without keys they are plain.
    """

    def __init__(self, folder: Path, identity: str, dimension: int, keyring: Keyring = NO_KEYS) -> None:
        self._folder = folder
        self._keyring = keyring
        self._identity = hashlib.sha256(identity.encode()).hexdigest()
        self._dimension = dimension

    def load(self) -> Iterator[SavedBlock]:
        """Yield the blocks that can be used, in order; only the last one may not be full."""
        previous = ""
        index = 0
        for name in (*(_name(index) for index in range(len(self._files()))), TAIL_FILE):
            path = self._folder / name
            if not path.exists():
                continue
            try:
                block = open_block(path, self._dimension, self._keyring)
            except OSError as error:
                log.warning("The snapshot's file %s is not used: %s.", name, error)
                continue
            header = block.header
            expected = (self._identity, index, previous, name == TAIL_FILE)
            if (header.identity, header.index, header.previous, header.count < BLOCK_ROWS) != expected:
                log.warning("The snapshot's file %s is not used: it belongs to another gallery or another place.", name)
                continue
            yield block
            previous = header.digest
            index += 1

    def save(self, block: Block, header: Header) -> SavedBlock:
        """Write a full block, durably, whole or not at all; return it as a block that is searched in its file.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        path = self._folder / _name(header.index)
        with self._locked():
            # Also if another process has written this block: its rows may have other offsets, since each process
            # leaves out the people who were erased before it read their records.
            self._write(path, block, header)
            return open_block(path, self._dimension, self._keyring)

    def save_tail(self, block: Block, header: Header) -> None:
        """Write the first `header.count` rows of a block that is not full, as `save` does."""
        with self._locked():
            self._write(self._folder / TAIL_FILE, block, header)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep the machine's other processes out, and remove half-written files of a killed process."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The lock file is never removed: a lock on a removed file would keep no process out.
        with (self._folder / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left_over in self._folder.glob(NEW_FILE_PREFIX + "*"):
                left_over.unlink()
            yield

    def _write(self, path: Path, block: Block, header: Header) -> None:
        descriptor, name = tempfile.mkstemp(prefix=NEW_FILE_PREFIX, dir=self._folder)  # mode 0600
        try:
            write_block(descriptor, block, header, self._dimension, self._keyring)
            os.fsync(descriptor)
            Path(name).replace(path)
        finally:
            os.close(descriptor)
            Path(name).unlink(missing_ok=True)

    def header(self, **fields: Any) -> Header:
        """Make a header for a block of this gallery."""
        return Header(identity=self._identity, **fields)

    def note_erasure(self, place: int, name: str) -> None:
        """Remember the newest erasure of the log that reaches the files; OSError."""
        with self._locked():
            if place > self.last_erasure()[0]:
                new = self._folder / (NEW_FILE_PREFIX + ERASURE_FILE)
                new.write_text(f"{place} {name}", "utf-8")
                new.replace(self._folder / ERASURE_FILE)

    def last_erasure(self) -> tuple[int, str]:
        """Return the place and `Entry.name` of the newest erasure that has reached the files; place 0 for none."""
        try:
            text = (self._folder / ERASURE_FILE).read_text("utf-8", "replace")
        except FileNotFoundError:
            return 0, ""
        place, _, name = text.partition(" ")
        # A damaged file counts as an erasure that no log has.
        return (int(place), name) if re.fullmatch("[0-9]{1,15}", place) else (1, "")

    def drop_tail(self) -> None:
        """Remove the file of the rows behind the last full block, after a person in it was erased."""
        (self._folder / TAIL_FILE).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove every file of templates; OSError if one cannot be removed."""
        self._remove(lambda _path: True)
        (self._folder / ERASURE_FILE).unlink(missing_ok=True)

    def discard_outdated(self) -> None:
        """Remove the files that `is_current` finds outdated; OSError if one cannot be removed."""
        self._remove(lambda path: not is_current(path, self._keyring))

    def _remove(self, unwanted: Callable[[Path], bool]) -> None:
        if self._folder.is_dir():
            with self._locked():
                for path in (*self._files(), self._folder / TAIL_FILE):
                    if path.exists() and unwanted(path):
                        path.unlink()

    def _files(self) -> list[Path]:
        return list(self._folder.glob("block-*")) if self._folder.is_dir() else []


def _name(index: int) -> str:
    return f"block-{index:06}"
