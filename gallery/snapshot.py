"""Owns the gallery's snapshot: its templates in files beside the store, so that a start need not read every record.

Full blocks are written once and searched in their files (`saved_block.py`) from then on; the rows that do not fill a
block yet are written to a file of their own now and then. With TEMPLATE_KEYS the files are sealed.

What makes it safe to believe a file: its header and every page of it have digests, or are sealed; each header names the
digest of the one before, and the newest a checkpoint that the store must confirm, so that files of another database,
another model or a restored backup are never mixed in; and whom the log erases is erased again after loading. Whoever is
erased in the files must be erased by the log, too, and not be back with an older state of it: the newest erasure that
reached the files is kept beside them. Whatever fails is thrown away, and read from the store instead.
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

TAIL = "tail"
ERASED = "erased"
NEW = "new-"


class SnapshotFolder:
    """The files of one gallery.

    Args:
        folder: where; made with mode 0700 when it is first written to.
        identity: the store's description, the model and what else decides which rows the gallery has.
        dimension: of its templates.
        keyring: seals the files and opens them; without keys they are plain.
    """

    def __init__(self, folder: Path, identity: str, dimension: int, keyring: Keyring = NO_KEYS) -> None:
        self._folder = folder
        self._keyring = keyring
        self._identity = hashlib.sha256(identity.encode()).hexdigest()
        self._dimension = dimension

    def load(self) -> Iterator[SavedBlock]:
        """Yield the blocks in order, the last of them perhaps not full; as many as can be believed."""
        previous = ""
        index = 0
        for name in (*(_name(index) for index in range(len(self._files()))), TAIL):
            path = self._folder / name
            if not path.exists():
                continue
            try:
                block = open_block(path, self._dimension, self._keyring)
            except OSError as error:
                log.warning("The snapshot's file %s is not used: %s.", name, error)
                continue
            header = block.header
            expected = (self._identity, index, previous, name == TAIL)
            if (header.identity, header.index, header.previous, header.count < BLOCK_ROWS) != expected:
                log.warning(
                    "The snapshot's file %s is not used: it does not belong to this gallery, or not here.", name
                )
                continue
            yield block
            previous = header.digest
            index += 1

    def save(self, block: Block, header: Header) -> SavedBlock:
        """Write a full block, durably and at once or not at all; return it mapped.

        Raises:
            OSError: there is no room, or the folder cannot be written to.
        """
        path = self._folder / _name(header.index)
        with self._locked():
            # Even where another process has written this block: its rows may stand at other offsets, since each leaves
            # out whoever was erased before it read of them.
            self._write(path, block, header)
            return open_block(path, self._dimension, self._keyring)

    def save_tail(self, block: Block, header: Header) -> None:
        """Write the first `header.count` rows of a block that is not full, as `save` does."""
        with self._locked():
            self._write(self._folder / TAIL, block, header)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep the machine's other processes out, and remove what a killed one left half-written."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Never removed: whoever waits for a removed file keeps nobody out.
        with (self._folder / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left_over in self._folder.glob(NEW + "*"):
                left_over.unlink()
            yield

    def _write(self, path: Path, block: Block, header: Header) -> None:
        descriptor, name = tempfile.mkstemp(prefix=NEW, dir=self._folder)  # mode 0600
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
        """Keep which erasure of the log reaches the files now, unless a later one has reached them; OSError."""
        with self._locked():
            if place > self.last_erasure()[0]:
                new = self._folder / (NEW + ERASED)
                new.write_text(f"{place} {name}", "utf-8")
                new.replace(self._folder / ERASED)

    def last_erasure(self) -> tuple[int, str]:
        """Return the place and `Entry.name` of the newest erasure that has reached the files; place 0 for none."""
        try:
            text = (self._folder / ERASED).read_text("utf-8", "replace")
        except FileNotFoundError:
            return 0, ""
        place, _, name = text.partition(" ")
        # Damaged: as an erasure that no log has.
        return (int(place), name) if re.fullmatch("[0-9]{1,15}", place) else (1, "")

    def drop_tail(self) -> None:
        """Remove the file of the rows that fill no block: somebody in it was erased."""
        (self._folder / TAIL).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove every file of templates; OSError if one stays."""
        self._remove(lambda _path: True)
        (self._folder / ERASED).unlink(missing_ok=True)

    def discard_outdated(self) -> None:
        """Remove the plain files where there are keys, and those under older keys; OSError if one stays."""
        self._remove(lambda path: not is_current(path, self._keyring))

    def _remove(self, unwanted: Callable[[Path], bool]) -> None:
        if self._folder.is_dir():
            with self._locked():
                for path in (*self._files(), self._folder / TAIL):
                    if path.exists() and unwanted(path):
                        path.unlink()

    def _files(self) -> list[Path]:
        return list(self._folder.glob("block-*")) if self._folder.is_dir() else []


def _name(index: int) -> str:
    return f"block-{index:06}"
