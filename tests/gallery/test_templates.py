"""A search gives the same result as comparing with every row in float32, whatever the rows are."""

from __future__ import annotations

import uuid

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.base import Template
from gallery.templates import Block, Candidate, Probe, Templates, id_bytes


def normalised(vectors: npt.NDArray[np.floating]) -> Template:
    unit: Template = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    return unit


def people(n: int, d: int, seed: int = 0) -> Template:
    return normalised(np.random.default_rng(seed).normal(size=(n, d)))


def enrolled(vectors: Template, at_once: int = 1000) -> Templates:
    templates = Templates(vectors.shape[1])
    for start in range(0, len(vectors), at_once):
        part = vectors[start : start + at_once]
        ids = [an_id(start + row) for row in range(len(part))]
        templates = templates.extended(part, ids, range(start + 1, start + len(part) + 1))
    return templates


def an_id(row: int) -> str:
    return str(uuid.UUID(int=(row + 1) << 70))


def brute_force(
    vectors: Template, probe: Template, k: int | None, least: float, gone: frozenset[int]
) -> list[Candidate]:
    cosines = np.vecdot(vectors, probe)
    rows = [row for row in np.lexsort((np.arange(len(vectors)), -cosines)) if cosines[row] >= least and row not in gone]
    return [Candidate(an_id(int(row)), min(1.0, float(cosines[row]))) for row in rows[:k]]


# Few different values, so that ties and near-ties are many; spikes, whose codes are the coarsest.
def crowds(d: int) -> st.SearchStrategy[Template]:
    component = st.sampled_from([-1.0, -0.3, -1e-3, 0.0, 1e-6, 1e-3, 0.25, 0.2500001, 1.0, 40.0])
    rows = st.lists(st.lists(component, min_size=d, max_size=d).filter(any), min_size=1, max_size=40)
    return rows.map(lambda all_: normalised(np.array(all_)))


@given(crowds(6), st.data())
@settings(max_examples=300, deadline=None)
def test_a_search_is_what_comparing_with_every_row_in_float32_is(vectors: Template, data: st.DataObject) -> None:
    templates = enrolled(vectors, data.draw(st.sampled_from([1, 3, 100])))
    gone = data.draw(st.frozensets(st.integers(0, len(vectors) - 1), max_size=5))
    for row in gone:
        templates.blocks[0].wipe(row)
    probe = data.draw(st.one_of(st.sampled_from(list(vectors)), crowds(6).map(lambda all_: all_[0])))
    k = data.draw(st.sampled_from([1, 2, 7, None]))
    least = data.draw(st.sampled_from([-np.inf, 0.0, 0.5, 0.9999999]))
    assert templates.search(probe, k, least) == brute_force(vectors, probe, k, least, gone)


@pytest.mark.parametrize("d", [1, 2, 3, 128, 512, 2048])
def test_no_cosine_is_above_its_bound(d: int) -> None:
    rng = np.random.default_rng(d)
    spiky = normalised(rng.normal(size=(500, d)) ** 5 + 1e-9)
    same_sign = normalised(np.abs(rng.normal(size=(500, d))))
    vectors = np.concatenate([people(2000, d), spiky, same_sign, -same_sign])
    templates = enrolled(vectors)
    for vector in np.concatenate([vectors[::200], people(30, d, 1)]):
        probe = Probe.of(vector)
        bounds = templates.blocks[0].upper_bounds(probe, slice(0, len(vectors)))
        assert (bounds >= np.vecdot(vectors, vector)).all()
        # ... and a bound that rules nobody out would be no use.
        assert d < 128 or np.median(bounds - np.vecdot(vectors[:2000].astype(np.float64), vector)[:1].max()) < 1


def test_the_codes_rule_out_nearly_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = people(20_000, 512)
    templates = enrolled(vectors, 20_000)
    compared: list[int] = []
    compare = Block.cosines

    def counted(self: Block, probe: Probe, offsets: npt.NDArray[np.intp]) -> Template:
        compared.append(len(offsets))
        return compare(self, probe, offsets)

    monkeypatch.setattr(Block, "cosines", counted)
    for probe in people(50, 512, 1):
        templates.search(probe)
    assert sum(compared) < 50 * 100


def test_a_search_over_several_blocks_is_what_comparing_with_every_row_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gallery.templates.BLOCK_ROWS", 64)
    vectors = people(64 * 3 + 17, 16)
    vectors[[3, 64, 130, 200]] = vectors[70]
    templates = enrolled(vectors, 50)
    assert [templates.used(block) for block in range(4)] == [64, 64, 64, 17]
    gone = frozenset({3, 63, 64, 191})
    for row in gone:
        templates.blocks[row // 64].wipe(row % 64)
    for probe in [*vectors[::10], *people(50, 16, 1)]:
        for k in (1, 5, None):
            for least in (-np.inf, 0.4):
                assert templates.search(probe, k, least) == brute_force(vectors, probe, k, least, gone)


@pytest.mark.parametrize("first", [0, 1, 63, 64, 65, 128, 208, 209, 500])
def test_a_search_from_a_row_on_ignores_the_rows_before_it(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gallery.templates.BLOCK_ROWS", 64)
    vectors = people(209, 16)
    templates = enrolled(vectors)
    for probe in people(20, 16, 1):
        expected = brute_force(vectors, probe, 3, -np.inf, frozenset(range(first)))
        assert templates.search(probe, 3, first=first) == expected


def test_an_older_view_never_sees_who_came_later() -> None:
    vectors = people(10, 32)
    older = enrolled(vectors[:5])
    newer = older.extended(vectors[5:], [an_id(row) for row in range(5, 10)], range(6, 11))
    assert {one.user_id for one in older.search(vectors[9], None)} == {an_id(row) for row in range(5)}
    assert newer.search(vectors[9])[0].user_id == an_id(9)


@pytest.mark.parametrize(
    "user_id", ["older-42", "", "ÄÖ\udc80", str(uuid.UUID(int=0)), "F5431309-4CC2-4F29-8207-04CB07A20138"]
)
def test_a_user_id_of_any_text_is_kept_found_and_forgotten(user_id: str) -> None:
    vectors = people(3, 32)
    templates = Templates(32).extended(vectors, [an_id(0), user_id, user_id], [1, 2, 3])
    assert templates.search(vectors[1])[0].user_id == user_id
    assert templates.find(user_id) == [1, 2]
    assert templates.blocks[0].find_any({id_bytes(user_id)}, 3) == [1, 2]
    templates.blocks[0].wipe(1)
    assert templates.find(user_id) == [2]
    assert templates.user_id(1) is None
    assert templates.cosine(1, vectors[1]) is None


def test_an_erased_row_leaves_nothing_behind() -> None:
    templates = enrolled(people(3, 32))
    block = templates.blocks[0]
    block.wipe(1)
    assert not any(array[1].any() for name, array in block.arrays.items() if name not in ("residuals", "places"))
    assert block.erased(3) == [1]
