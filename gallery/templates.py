"""Keeps templates in memory and searches them exactly: scans 8-bit codes, and decides in float32.

Reading a float32 row takes four times as long as reading its 8-bit code. So a search reads the codes of everybody, and
the float32 rows of the few people whom the codes cannot rule out. It misses nobody. With x = s·c + r (a row, its
scale, its code and its rounding residual) and q = t·b + p (the same of the probe),

    ⟨x, q⟩ = s·t·⟨c, b⟩ + ⟨s·c, p⟩ + ⟨r, q⟩  ≤  s·t·⟨c, b⟩ + (‖x‖ + ‖r‖)·‖p‖ + ‖r‖·‖q‖

by Cauchy and Schwarz. ⟨c, b⟩ is an exact integer, and ‖r‖ is kept with each row (about 0.008 for 512 dimensions). A
row whose upper bound is below the best cosine that float32 has confirmed cannot be the best; every other row is decided
in float32. So the result, ties included, is the same as comparing the probe with every row in float32.

Readers take no lock. They hold an immutable `Templates`: rows are only added behind its count, and an erased row is
marked before it is overwritten.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import simsimd

Template: TypeAlias = npt.NDArray[np.float32]

BLOCK_ROWS = 65_536
# Templates are L2-normalised; this is above every norm that a tolerance admits.
_MAX_NORM = 1.01
_ERASED = np.float32(-np.inf)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NIL_UUID = str(uuid.UUID(int=0))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A search result; `cosine` lies in -1 to 1."""

    user_id: str
    cosine: float


def person_score(cosines: npt.NDArray[np.floating]) -> float:
    """Return one person's score from the cosines of all their photos: half the best and half the mean; at most 1.

    The best alone would let more strangers pass with every photo (5 photos: 4 times as many at the same threshold); the
    mean alone misses more people whose photos differ. With this the false match rate stays that of one photo, and the
    misses at it fall from 4.4 % to 1.7 % with three photos (docs/concepts.md).
    """
    return min(1.0, float(cosines.max() + cosines.mean()) / 2)


def search_people(
    find_rows: Callable[[int | None], list[Candidate]],
    score_people: Callable[[Mapping[str, float]], Iterable[Candidate]],
    k: int | None,
    least: float,
) -> list[Candidate]:
    """Search people by their photos: return the `k` best (all, for None) whose score is at least `least`.

    Args:
        find_rows: returns the n rows with the highest cosines of at least `least` (all, for None), the best first.
        score_people: returns the scores of people, given the best cosine that was found of each.
        k: how many at most.
        least: the lowest score that counts.

    Returns:
        The best first. No person scores higher than the best of their photos, so nobody is missed.
    """
    wanted = k
    while True:
        rows = find_rows(wanted)
        best: dict[str, float] = {}
        for row in rows:
            best.setdefault(row.user_id, row.cosine)
        people: list[Candidate] = []
        unscored = list(best.items())
        at_once = k or max(1, len(unscored))
        while unscored and not (len(people) >= at_once and people[at_once - 1].cosine >= unscored[0][1]):
            scored = score_people(dict(unscored[:at_once]))
            people += [one for one in scored if one.cosine >= least]
            people.sort(key=lambda one: -one.cosine)
            unscored = unscored[at_once:]
        if wanted is None or k is None or len(rows) < wanted:
            return people[:k]
        if len(people) >= k and people[k - 1].cosine >= rows[-1].cosine:
            return people[:k]
        wanted *= 4


@dataclass(frozen=True)
class Probe:
    """A template to search for, in float32 and as a code.

    Attributes:
        vector: float32[d], L2-normalised.
        code: int8[1, d], b above.
        scale: t above.
        per_residual: the factor of a row's ‖r‖ in the bound.
        slack: what the bound adds for every row, the rounding of float32 included.
    """

    vector: Template
    code: npt.NDArray[np.int8]
    scale: np.float32
    per_residual: np.float32
    slack: np.float32

    @classmethod
    def of(cls, vector: Template) -> Probe:
        """Make the probe of float32[d], L2-normalised."""
        codes, scales, residuals = coded(vector[None])
        residual = float(residuals[0])
        # A float32 sum of d products is off by at most d·2⁻²⁴ of the norms' product (Higham 2002, section 3.1), and
        # the bound's own five operations by 2⁻²⁴ each. Doubled, for the tolerance of the norms.
        rounding = 2 * (len(vector) + 16) * 2.0**-24
        return cls(
            vector, codes, scales[0], np.float32(_MAX_NORM + residual), np.float32(_MAX_NORM * residual + rounding)
        )


def coded(vectors: Template, largest: int = 127) -> tuple[npt.NDArray[np.int8], Template, Template]:
    """Return codes int8[n, d] up to +-`largest`, scales float32[n], and float32[n] that no residual's norm exceeds."""
    scales = np.abs(vectors).max(axis=1) / np.float32(largest)
    codes = np.rint(vectors / scales[:, None]).clip(-largest, largest).astype(np.int8)
    residuals = vectors - scales[:, None] * codes
    # float32 is off by at most 2⁻²⁴ of each component above, and by d·2⁻²⁴ of the sum here.
    norms: npt.NDArray[np.float32] = np.sqrt(np.vecdot(residuals, residuals)) * np.float32(1 + 1e-4) + np.float32(1e-6)
    return codes, scales, norms


def id_bytes(user_id: str) -> bytes:
    """Return the 16 bytes by which a person's rows are found: a canonical UUID's own, or a digest of any other text."""
    if _is_uuid(user_id):
        return bytes.fromhex(user_id.replace("-", ""))
    return hashlib.blake2b(user_id.encode(errors="surrogatepass"), digest_size=16).digest()


def _is_uuid(user_id: str) -> bool:
    # The UUID of all zeros would read as an erased row.
    return _UUID.fullmatch(user_id) is not None and user_id != _NIL_UUID


class Block:
    """Room for a fixed number of templates.

    Args:
        arrays: by name, the arrays that `layout` describes; zero in the rows that are not filled.
        texts: offset -> user_id, for the user_ids that are not canonical UUIDs.
    """

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], texts: Mapping[int, str] | None = None) -> None:
        self.arrays = arrays
        self.texts = dict(texts or {})
        self._rows, self._codes, self._scales, self._residuals, self._heads, self._tails, self._places = (
            arrays[name] for name in ("rows", "codes", "scales", "residuals", "heads", "tails", "places")
        )

    @classmethod
    def empty(cls, dimension: int, capacity: int = BLOCK_ROWS) -> Block:
        """Make a block in memory; rows that are never filled take no memory."""
        return cls({name: np.zeros(shape, dtype) for name, (dtype, shape) in layout(dimension, capacity).items()})

    @classmethod
    def with_room(cls, filled: Block, dimension: int) -> Block:
        """Make a block in memory that begins with the rows of another block, and has room for more."""
        block = cls.empty(dimension)
        for name, array in filled.arrays.items():
            block.arrays[name][: len(array)] = array
        block.texts = dict(filled.texts)
        return block

    def fill(self, offset: int, vectors: Template, user_ids: Sequence[str], places: Sequence[int]) -> None:
        """Write float32[n, d] templates from row `offset` on; readers must not count them yet."""
        end = offset + len(vectors)
        codes, scales, residuals = coded(vectors)
        self._rows[offset:end], self._codes[offset:end] = vectors, codes
        self._scales[offset:end], self._residuals[offset:end] = scales, residuals
        ids = np.frombuffer(b"".join(map(id_bytes, user_ids)), "<u8").reshape(-1, 2)
        self._heads[offset:end], self._tails[offset:end] = ids.T
        self._places[offset:end] = places
        self.texts.update((at, user_id) for at, user_id in enumerate(user_ids, offset) if not _is_uuid(user_id))

    def wipe(self, offset: int) -> None:
        """Erase a row for good; a running search never sees half of it."""
        self.mark_erased(offset)
        self._rows[offset] = 0
        self._codes[offset] = 0

    def mark_erased(self, offset: int) -> None:
        """Remove a row from every search that begins now, and forget its user_id."""
        self._residuals[offset] = _ERASED
        self._scales[offset] = self._heads[offset] = self._tails[offset] = 0
        self.texts.pop(offset, None)

    def upper_bounds(self, probe: Probe, rows: slice) -> Template:
        """Return float32[n]: for each of n rows an upper bound of its cosine to the probe; -inf if erased."""
        products = simsimd.cdist(probe.code, self._codes[rows], "dot", out_dtype="float32")
        bounds: npt.NDArray[np.float32] = np.asarray(products)[0]
        bounds *= self._scales[rows]
        bounds *= probe.scale
        bounds += self._residuals[rows] * probe.per_residual
        bounds += probe.slack
        return bounds

    def cosines(self, probe: Probe, offsets: npt.NDArray[np.intp]) -> Template:
        """Return float32[len(offsets)]: the cosines to these rows, -inf if erased."""
        # `vecdot`, not `@`: it sums every row in the same way wherever it is, so that equal rows score equally.
        found: npt.NDArray[np.float32] = np.vecdot(self._rows[offsets], probe.vector)
        # Checked after the rows were copied: erasing marks a row before it overwrites it.
        found[self._residuals[offsets] == _ERASED] = -np.inf
        return found

    def find(self, id_: bytes, used: int) -> list[int]:
        """Return the offsets of the rows with these `id_bytes`."""
        head, tail = np.frombuffer(id_, "<u8")
        offsets = np.flatnonzero(self._heads[:used] == head)
        found: list[int] = offsets[self._tails[offsets] == tail].tolist()
        return found

    def find_any(self, ids: Collection[bytes], used: int) -> list[int]:
        """Return the offsets of the rows whose `id_bytes` are among `ids`."""
        heads = np.array([np.frombuffer(id_, "<u8")[0] for id_ in ids], np.uint64)
        return [at for at in map(int, np.flatnonzero(np.isin(self._heads[:used], heads))) if self._id(at) in ids]

    def heads(self, used: int) -> npt.NDArray[np.uint64]:
        """Return uint64[used]: the first halves of the rows' `id_bytes`, 0 if erased."""
        return np.asarray(self._heads[:used], np.uint64)

    def place(self, offset: int) -> int:
        """Return the place in the log of a row's record, erased or not."""
        return int(self._places[offset])

    def first_after(self, place: int, used: int) -> int:
        """Return the offset of the first row whose record has a higher place in the log; `used` if there is none."""
        return int(np.searchsorted(self._places[:used], place, side="right"))

    def template(self, offset: int) -> Template:
        """Return float32[d], a copy of a row; zeros if it is erased."""
        return np.array(self._rows[offset], np.float32)

    def user_id(self, offset: int) -> str | None:
        """Return the user_id of a row; None when it is erased."""
        text = self.texts.get(offset)
        if text is not None:
            return text
        id_ = self._id(offset)
        return str(uuid.UUID(bytes=id_)) if any(id_) else None

    def _id(self, offset: int) -> bytes:
        return bytes(self._heads[offset].tobytes() + self._tails[offset].tobytes())

    def erased(self, used: int) -> list[int]:
        """Return the offsets of the erased rows."""
        return [int(offset) for offset in np.flatnonzero(self._residuals[:used] == _ERASED)]


def layout(dimension: int, capacity: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Describe a block's arrays: name -> dtype and shape.

    2,592 bytes a row at 512 dimensions; a search reads 520 of them for every row. A block that is copied while rows are
    erased must be copied in this order: then a row that is erased meanwhile is seen as erased at the end.
    """
    return {
        "heads": (np.dtype("<u8"), (capacity,)),  # the first halves of the rows' `id_bytes`
        "tails": (np.dtype("<u8"), (capacity,)),
        "places": (np.dtype("<i8"), (capacity,)),  # ascending; an erased row keeps its place
        "rows": (np.dtype("<f4"), (capacity, dimension)),
        "codes": (np.dtype("i1"), (capacity, dimension)),
        "scales": (np.dtype("<f4"), (capacity,)),
        "residuals": (np.dtype("<f4"), (capacity,)),
    }


@dataclass(frozen=True, slots=True)
class Templates:
    """What one reader searches: the first `count` rows of some blocks, all of them full but the last."""

    dimension: int
    blocks: tuple[Block, ...] = ()
    count: int = 0

    def extended(self, vectors: Template, user_ids: Sequence[str], places: Sequence[int]) -> Templates:
        """Return these templates and more behind them; only the newest `Templates` may be extended.

        Args:
            vectors: float32[n, d], L2-normalised.
            user_ids: n of them.
            places: their records' places in the log, ascending.
        """
        blocks, count = self.blocks, self.count
        done = 0
        while done < len(vectors):
            offset = count % BLOCK_ROWS
            if offset == 0:
                blocks = (*blocks, Block.empty(self.dimension))
            n = min(BLOCK_ROWS - offset, len(vectors) - done)
            part = slice(done, done + n)
            blocks[-1].fill(offset, vectors[part], user_ids[part], places[part])
            done, count = done + n, count + n
        return Templates(self.dimension, blocks, count)

    def used(self, block: int) -> int:
        """Return how many rows of a block are counted."""
        return min(BLOCK_ROWS, self.count - block * BLOCK_ROWS)

    def search(self, vector: Template, k: int | None = 1, least: float = -np.inf, first: int = 0) -> list[Candidate]:
        """Return the `k` best candidates (all, for None) whose cosine is at least `least`.

        Args:
            vector: float32[d], L2-normalised.
            k: how many at most.
            least: the lowest cosine that counts.
            first: the first row to search.

        Returns:
            The best first, and of equals the earliest enrolled first; cosines as float32 sums them.
        """
        probe = Probe.of(vector)
        cosines, rows = np.empty(0, np.float32), np.empty(0, np.intp)
        for index, block in list(enumerate(self.blocks))[first // BLOCK_ROWS :]:
            start, used = max(0, first - index * BLOCK_ROWS), self.used(index)
            if start >= used:
                continue
            bounds = block.upper_bounds(probe, slice(start, used))
            if k is not None and len(rows) < k < len(bounds):
                # No cosine is confirmed yet that could rule rows out: confirm those of the k most promising rows.
                promising = np.argpartition(bounds, -k)[-k:] if k > 1 else np.argmax(bounds, keepdims=True)
                confirmed = np.concatenate([cosines, block.cosines(probe, promising + start)])
                bar = max(least, float(np.partition(confirmed, -k)[-k]))
            else:
                bar = least if k is None or len(rows) < k else max(least, float(cosines[-1]))
            offsets = np.flatnonzero(bounds >= bar) + start
            if not len(offsets):
                continue
            found = block.cosines(probe, offsets)
            keep = (found >= least) & (found > -np.inf)
            cosines = np.concatenate([cosines, found[keep]])
            rows = np.concatenate([rows, offsets[keep] + index * BLOCK_ROWS])
            order = np.lexsort((rows, -cosines))[:k]
            cosines, rows = cosines[order], rows[order]
        named = ((self.user_id(int(row)), float(cosine)) for row, cosine in zip(rows, cosines, strict=True))
        # A row without a user_id was erased meanwhile.
        return [Candidate(user_id, min(1.0, cosine)) for user_id, cosine in named if user_id is not None]

    def find(self, user_id: str) -> list[int]:
        """Return the rows of a person, in the order of the log: one for each photo."""
        id_ = id_bytes(user_id)
        return [
            index * BLOCK_ROWS + offset
            for index, block in enumerate(self.blocks)
            for offset in block.find(id_, self.used(index))
        ]

    def first_after(self, place: int) -> int:
        """Return the first row whose record has a higher place in the log; `count` if there is none."""
        for index in reversed(range(len(self.blocks))):
            offset = self.blocks[index].first_after(place, self.used(index))
            if offset > 0:
                return index * BLOCK_ROWS + offset
        return 0

    def row_at(self, place: int) -> int | None:
        """Return the row of the record at a place in the log; None if it has none, or is erased."""
        row = self.first_after(place) - 1
        if row < 0 or self.place(row) != place or self.user_id(row) is None:
            return None
        return row

    def place(self, row: int) -> int:
        """Return the place in the log of a row's record."""
        return self.blocks[row // BLOCK_ROWS].place(row % BLOCK_ROWS)

    def template(self, row: int) -> Template:
        """Return float32[d], a copy of a row; zeros if it is erased."""
        return self.blocks[row // BLOCK_ROWS].template(row % BLOCK_ROWS)

    def cosine(self, row: int, vector: Template) -> float | None:
        """Return the cosine to one row; None when it is erased."""
        block, offset = self.blocks[row // BLOCK_ROWS], row % BLOCK_ROWS
        cosine = float(block.cosines(Probe.of(vector), np.array([offset]))[0])
        return None if cosine == -np.inf else min(1.0, cosine)

    def people_with_several(self) -> dict[str, int]:
        """Return the people who have more than one row, and how many."""
        if not self.blocks:
            return {}
        heads = np.concatenate([block.heads(self.used(index)) for index, block in enumerate(self.blocks)])
        values, counts = np.unique(heads, return_counts=True)
        repeated = values[(counts > 1) & (values != 0)]
        found = Counter(self.user_id(int(row)) for row in np.flatnonzero(np.isin(heads, repeated)))
        return {user_id: count for user_id, count in found.items() if user_id is not None and count > 1}

    def user_id(self, row: int) -> str | None:
        """Return the user_id of a row; None when it is erased."""
        return self.blocks[row // BLOCK_ROWS].user_id(row % BLOCK_ROWS)
