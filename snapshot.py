"""Owns the gallery's snapshot: its templates in files beside the store, so that a start need not read every record.

A file holds one block of templates: a header, one digest for every 256 rows, and the block's arrays. Full blocks are
mapped rather than read, so that only what is searched takes memory; the rows that do not fill a block yet are written
to a file of their own now and then.

What makes it safe to believe a file: its header and every page of it have SHA-256 digests; each header names the digest
of the one before, and the newest a checkpoint that the store must confirm, so that files of another database, another
model or a restored backup are never mixed in; and whom the log erases is erased again after loading. Whatever fails
is thrown away, and read from the store instead.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from templates import BLOCK_ROWS, Block, layout

log = logging.getLogger(__name__)

MAGIC = b"face gallery v1\n"
PAGE_ROWS = 256
DIGEST_BYTES = 32
ALIGNMENT = 4096
# What is large stays in the file. The rest is small, and its copy in memory is written to when somebody is erased.
MAPPED = ("rows", "codes")
TAIL = "tail"
NEW = "new-"


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        identity: of which store's and model's gallery it is a part.
        index: the block's number, from 0.
        count: its rows.
        last: the place in the log of the last entry that is applied in it.
        checkpoint: what the store says of the log up to there.
        previous: the digest of the header of the block before; empty for the first.
        set_aside: user_id -> the places and reasons of their records that are not searched.
        texts: offset -> user_id, of user_ids that are no canonical UUIDs.
    """

    identity: str
    index: int
    count: int
    last: int
    checkpoint: str
    previous: str
    set_aside: Mapping[str, list[tuple[int, str]]]
    texts: Mapping[str, str]

    def to_bytes(self) -> bytes:
        """Return the header as it stands in the file."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @property
    def digest(self) -> str:
        """The SHA-256 of the header, by which the next block names it."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


class DamagedError(OSError):
    """A file that cannot be believed; the message says why."""


class SavedBlock(Block):
    """A block in a file: rows and codes mapped, the rest of it in memory.

    Args:
        path: the file, checked against its digests.

    Raises:
        DamagedError: it is not what it was when it was written.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, dimension: int) -> None:
        self._path = path
        # Kept open: under this name there may be another file soon, with other people at other offsets.
        self._file = path.open("r+b", buffering=0)
        if not os.fstat(self._file.fileno()).st_size:
            raise DamagedError("it is empty")
        content = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self.header, self._digests_at = _read_header(content)
        self._starts, size = _positions(self.header.count, self._digests_at, dimension)
        if len(content) != size:
            raise DamagedError("it has another size than it had")
        self._in_file: dict[str, npt.NDArray[Any]] = {
            name: np.frombuffer(content, dtype, int(np.prod(shape)), self._starts[name]).reshape(shape)
            for name, (dtype, shape) in layout(dimension, self.header.count).items()
        }
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = b"".join(pool.map(self._digest, range(_pages(self.header.count))))
        if digests != content[self._digests_at : self._digests_at + len(digests)]:
            raise DamagedError("its content does not match its digests")
        super().__init__(
            {name: array if name in MAPPED else array.copy() for name, array in self._in_file.items()},
            {int(offset): text for offset, text in self.header.texts.items()},
        )

    def _digest(self, page: int) -> bytes:
        return _digest_of(array[_rows_of(page)] for array in self._in_file.values())

    def wipe(self, offset: int) -> None:
        """Erase a row, first for searches and then in the file; a file in which it cannot be erased is removed."""
        self.mark_erased(offset)
        try:
            # Other processes of this machine erase the same row, or another in its page.
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                self._overwrite(offset)
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
        except OSError as error:
            log.warning("A person cannot be erased from the snapshot (%s): its file is removed.", error)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                    self._path.unlink()

    def _overwrite(self, offset: int) -> None:
        for name, array in self._in_file.items():
            erased = np.full_like(array[:1], -np.inf if name == "residuals" else 0)
            _write_all(self._file.fileno(), erased.tobytes(), self._starts[name] + offset * erased.nbytes)
        page = offset // PAGE_ROWS
        _write_all(self._file.fileno(), self._digest(page), self._digests_at + page * DIGEST_BYTES)


class SnapshotFolder:
    """The files of one gallery.

    Args:
        folder: where; made with mode 0700 when it is first written to.
        identity: the store's description, the model and what else decides which rows the gallery has.
        dimension: of its templates.
    """

    def __init__(self, folder: Path, identity: str, dimension: int) -> None:
        self._folder = folder
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
                block = SavedBlock(path, self._dimension)
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
            return SavedBlock(path, self._dimension)

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
            _write(descriptor, block, header, self._dimension)
            os.fsync(descriptor)
            Path(name).replace(path)
        finally:
            os.close(descriptor)
            Path(name).unlink(missing_ok=True)

    def header(self, **fields: Any) -> Header:
        """Make a header for a block of this gallery."""
        return Header(identity=self._identity, **fields)

    def drop_tail(self) -> None:
        """Remove the file of the rows that fill no block: somebody in it was erased."""
        (self._folder / TAIL).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove every file of templates."""
        if self._folder.is_dir():
            with self._locked():
                for path in (*self._files(), self._folder / TAIL):
                    with suppress(OSError):
                        path.unlink()

    def _files(self) -> list[Path]:
        return list(self._folder.glob("block-*")) if self._folder.is_dir() else []


def _name(index: int) -> str:
    return f"block-{index:06}"


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def _pages(count: int) -> int:
    return -(-count // PAGE_ROWS)


def _rows_of(page: int) -> slice:
    return slice(page * PAGE_ROWS, (page + 1) * PAGE_ROWS)


def _positions(count: int, digests_at: int, dimension: int) -> tuple[dict[str, int], int]:
    """Return where in the file each array begins, and the file's size."""
    starts = {}
    end = digests_at + _pages(count) * DIGEST_BYTES
    for name, (dtype, shape) in layout(dimension, count).items():
        starts[name] = _aligned(end)
        end = starts[name] + dtype.itemsize * int(np.prod(shape))
    return starts, end


def _digest_of(arrays: Iterable[npt.NDArray[Any]]) -> bytes:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.data)
    return digest.digest()


def _write(descriptor: int, block: Block, header: Header, dimension: int) -> None:
    text = header.to_bytes()
    start = MAGIC + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text
    starts, _ = _positions(header.count, len(start), dimension)
    _write_all(descriptor, start, 0)
    for page in range(_pages(header.count)):
        # A copy: somebody may be erased meanwhile, and the digest must be that of what is written.
        arrays = {name: array[: header.count][_rows_of(page)].copy() for name, array in block.arrays.items()}
        for name, array in arrays.items():
            _write_all(descriptor, array.tobytes(), starts[name] + page * PAGE_ROWS * array[:1].nbytes)
        _write_all(descriptor, _digest_of(arrays.values()), len(start) + page * DIGEST_BYTES)


def _write_all(descriptor: int, data: bytes, position: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, position)
        data, position = data[written:], position + written


def _read_header(data: Any) -> tuple[Header, int]:
    """Return the header and where the digests begin."""
    start = len(MAGIC) + 8 + DIGEST_BYTES
    length = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 8], "little")
    text = bytes(data[start : start + length])
    if data[: len(MAGIC)] != MAGIC or hashlib.sha256(text).digest() != data[start - DIGEST_BYTES : start]:
        raise DamagedError("its header is damaged")
    return Header(**json.loads(text)), start + length
