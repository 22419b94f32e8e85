"""Writes and reads one block of templates as a file, plain or sealed; used only if every checksum matches.

A plain file holds a header, one digest for every 256 rows, and the block's arrays. It is mapped, not read, so that only
the searched part takes memory. A sealed file holds the header and pages of 256 rows, each of them sealed; it is read
into memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import mmap
import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gallery.templates import Block, layout
from store.encryption import SEAL_BYTES, Keyring, SealError

log = logging.getLogger(__name__)

MAGIC = b"face gallery v2\n"
SEALED_MAGIC = b"face gallery sealed v2\n"
HEADER_PLACE = "gallery header"
PAGE_ROWS = 256
DIGEST_BYTES = 32
ALIGNMENT = 4096
# These large arrays stay in a plain file. The small ones are copied to memory, where erasing a person changes them.
MAPPED = ("rows", "codes")


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        identity: which store's and model's gallery the block belongs to.
        index: the block's number, from 0.
        count: how many rows it has.
        last: the place in the log of the last entry that was applied before writing.
        checkpoint: the store's `checkpoint` at that place.
        previous: the digest of the header of the block before; empty for the first block.
        set_aside: user_id -> places and reasons of the records that are not searched.
        texts: offset -> user_id, for the user_ids that are not canonical UUIDs.
    """

    identity: str
    index: int
    count: int
    last: int
    checkpoint: str
    previous: str
    set_aside: Mapping[str, list[tuple[int, str]]]
    texts: Mapping[str, str]

    @classmethod
    def read(cls, text: bytes) -> Header:
        """Read what `to_bytes` returned; DamagedError if another version wrote it."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise DamagedError("its header was written by another version") from error

    def to_bytes(self) -> bytes:
        """Return the header as it is written to the file."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @property
    def digest(self) -> str:
        """The SHA-256 of the header; the next block's header names it."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


class DamagedError(OSError):
    """A file cannot be used; the message says why."""


class SavedBlock(Block):
    """A block that is also in a file: erasing a row erases it in both.

    Args:
        path: where the file is.
        file: the file, kept open: another process may put another file in its place, with other rows at these offsets.
        header: the file's header.
        arrays: by name, the arrays that `templates.layout` describes.
    """

    def __init__(self, path: Path, file: BinaryIO, header: Header, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        super().__init__(arrays, {int(offset): text for offset, text in header.texts.items()})
        self.header = header
        self._path = path
        self._file = file

    def wipe(self, offset: int) -> None:
        """Erase a row, first for searches and then in the file; remove the file if that fails."""
        self.mark_erased(offset)
        try:
            # Other processes of this machine erase the same row, or another row of its page.
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                self._overwrite(offset)
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
        except OSError as error:
            log.warning("A person cannot be erased from the snapshot (%s), so its file is removed.", error)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                    self._path.unlink()

    @abstractmethod
    def _overwrite(self, offset: int) -> None:
        """Erase a row in the file, and the parts of it that `mark_erased` leaves in memory."""


class MappedBlock(SavedBlock):
    """A block in a plain file: rows and codes are mapped, the other arrays are in memory.

    Args:
        path: the file, checked against its digests.
        dimension: d of the templates.

    Raises:
        DamagedError: the file has changed since it was written.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, dimension: int) -> None:
        file = path.open("r+b", buffering=0)
        if not os.fstat(file.fileno()).st_size:
            raise DamagedError("it is empty")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header, self._digests_at = _read_header(content)
        self._starts, size = _positions(header.count, self._digests_at, dimension)
        if len(content) != size:
            raise DamagedError("its size has changed")
        self._in_file: dict[str, npt.NDArray[Any]] = {
            name: np.frombuffer(content, dtype, int(np.prod(shape)), self._starts[name]).reshape(shape)
            for name, (dtype, shape) in layout(dimension, header.count).items()
        }
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = b"".join(pool.map(self._digest, range(_pages(header.count))))
        if digests != content[self._digests_at : self._digests_at + len(digests)]:
            raise DamagedError("its content does not match its digests")
        arrays = {name: array if name in MAPPED else array.copy() for name, array in self._in_file.items()}
        super().__init__(path, file, header, arrays)

    def _digest(self, page: int) -> bytes:
        return _digest_of(array[_rows_of(page)] for array in self._in_file.values())

    def _overwrite(self, offset: int) -> None:
        for name, array in self._in_file.items():
            if name == "places":
                continue  # they stay ascending
            erased = _erased_row(name, array)
            _write_all(self._file.fileno(), erased.tobytes(), self._starts[name] + offset * erased.nbytes)
        page = offset // PAGE_ROWS
        _write_all(self._file.fileno(), self._digest(page), self._digests_at + page * DIGEST_BYTES)


class SealedBlock(SavedBlock):
    """A block in a sealed file, read into memory.

    The file is SEALED_MAGIC, the header's length in eight bytes, the header, and the pages: 256 rows of each array, one
    array behind the other. A page is sealed to its number and to this header, so that no page of another file opens.

    Args:
        path: the file.
        dimension: d of the templates.
        keyring: opens it.

    Raises:
        DamagedError: the file has changed, or is sealed with a key that is not here.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, dimension: int, keyring: Keyring) -> None:
        file = path.open("r+b", buffering=0)
        sealed_header, self._pages_at = _read_sealed_header(file)
        header = Header.read(_opened(keyring, sealed_header, HEADER_PLACE))
        self._keyring, self._dimension, self._count = keyring, dimension, header.count
        self._place = _pages_place(sealed_header)
        self._row_bytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout(dimension, 1).values())
        arrays = Block.empty(dimension, header.count).arrays
        for page in range(_pages(header.count)):
            for name, rows in self._read(file, page).items():
                arrays[name][_rows_of(page)] = rows
        super().__init__(path, file, header, arrays)

    def _position(self, page: int) -> int:
        """Return where a page begins in the file; for the number of pages, where the file ends."""
        return self._pages_at + min(page * PAGE_ROWS, self._count) * self._row_bytes + page * SEAL_BYTES

    def _read(self, file: BinaryIO, page: int) -> dict[str, npt.NDArray[Any]]:
        start, end = self._position(page), self._position(page + 1)
        sealed = os.pread(file.fileno(), end - start, start)
        content = bytearray(_opened(self._keyring, sealed, f"{self._place} {page}"))
        arrays = {}
        position = 0
        for name, (dtype, shape) in layout(self._dimension, len(content) // self._row_bytes).items():
            arrays[name] = np.frombuffer(content, dtype, math.prod(shape), position).reshape(shape)
            position += arrays[name].nbytes
        return arrays

    def _overwrite(self, offset: int) -> None:
        for name in MAPPED:
            self.arrays[name][offset] = 0
        page, row = divmod(offset, PAGE_ROWS)
        # Read the page from the file, not from memory: another process may have erased other rows in it.
        arrays = self._read(self._file, page)
        for name, array in arrays.items():
            if name != "places":  # they stay ascending
                array[row] = _erased_row(name, array)[0]
        sealed = self._keyring.seal(_packed(arrays), f"{self._place} {page}")
        _write_all(self._file.fileno(), sealed, self._position(page))


def open_block(path: Path, dimension: int, keyring: Keyring) -> SavedBlock:
    """Open a file, sealed if there are keys; raises as `MappedBlock` and `SealedBlock` do."""
    return SealedBlock(path, dimension, keyring) if keyring else MappedBlock(path, dimension)


def write_block(descriptor: int, block: Block, header: Header, dimension: int, keyring: Keyring) -> None:
    """Write the first `header.count` rows of a block into an empty file, sealed if there are keys; OSError."""
    if keyring:
        _write_sealed(descriptor, block, header, keyring)
    else:
        _write_plain(descriptor, block, header, dimension)


def is_current(path: Path, keyring: Keyring) -> bool:
    """Whether a file is as `write_block` would write it: sealed with the first key, or plain without keys; OSError."""
    with path.open("rb") as file:
        if not keyring:
            return file.read(len(MAGIC)) == MAGIC
        return file.read(len(SEALED_MAGIC)) == SEALED_MAGIC and keyring.is_current(file.read(64)[8:])


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def _pages(count: int) -> int:
    return -(-count // PAGE_ROWS)


def _rows_of(page: int) -> slice:
    return slice(page * PAGE_ROWS, (page + 1) * PAGE_ROWS)


def _positions(count: int, digests_at: int, dimension: int) -> tuple[dict[str, int], int]:
    """Return where each array begins in the file, and the file's size."""
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


def _write_plain(descriptor: int, block: Block, header: Header, dimension: int) -> None:
    text = header.to_bytes()
    start = MAGIC + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text
    starts, _ = _positions(header.count, len(start), dimension)
    _write_all(descriptor, start, 0)
    for page in range(_pages(header.count)):
        # A copy: a row may be erased meanwhile, and the digest must match what is written.
        arrays = {name: array[: header.count][_rows_of(page)].copy() for name, array in block.arrays.items()}
        for name, array in arrays.items():
            _write_all(descriptor, array.tobytes(), starts[name] + page * PAGE_ROWS * array[:1].nbytes)
        _write_all(descriptor, _digest_of(arrays.values()), len(start) + page * DIGEST_BYTES)


def _write_sealed(descriptor: int, block: Block, header: Header, keyring: Keyring) -> None:
    sealed = keyring.seal(header.to_bytes(), HEADER_PLACE)
    place = _pages_place(sealed)
    data = SEALED_MAGIC + len(sealed).to_bytes(8, "little") + sealed
    position = 0
    for page in range(_pages(header.count)):
        _write_all(descriptor, data, position)
        position += len(data)
        arrays = {name: array[: header.count][_rows_of(page)] for name, array in block.arrays.items()}
        data = keyring.seal(_packed(arrays), f"{place} {page}")
    _write_all(descriptor, data, position)


def _pages_place(sealed_header: bytes) -> str:
    # From the sealed bytes: they differ between any two files, even if the headers say the same.
    return f"gallery {hashlib.sha256(sealed_header).hexdigest()}"


def _packed(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    return b"".join(array.tobytes() for array in arrays.values())


def _erased_row(name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.full_like(array[:1], -np.inf if name == "residuals" else 0)


def _opened(keyring: Keyring, sealed: bytes, place: str) -> bytes:
    try:
        return keyring.open(sealed, place)
    except SealError as error:
        raise DamagedError(str(error)) from error


def _read_sealed_header(file: BinaryIO) -> tuple[bytes, int]:
    """Return the header, sealed, and where the pages begin."""
    start = len(SEALED_MAGIC) + 8
    begin = os.pread(file.fileno(), start, 0)
    length = int.from_bytes(begin[-8:], "little")
    if not begin.startswith(SEALED_MAGIC) or length > os.fstat(file.fileno()).st_size:
        raise DamagedError("it is not sealed, or its header is damaged")
    return os.pread(file.fileno(), length, start), start + length


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
    return Header.read(text), start + length
