"""The commands that list, count, compare and erase people: duplicates, export, erase, stats, audit."""

from __future__ import annotations

import csv
import io
import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import app
from commands import duplicates, export
from commands.duplicates import blocks_of, pairs_above
from settings import PROJECT
from store.audit_log import AuditLog, lines_of
from store.encryption import Keyring
from store.records import Enrolment
from store.sqlite import SqliteStore
from tests.support.stores import a_store, a_template, commanded


@pytest.mark.parametrize("least", [0.2, 0.5, 0.9, -0.1])
def test_every_pair_that_brute_force_finds_is_found_and_no_other(monkeypatch: pytest.MonkeyPatch, least: float) -> None:
    monkeypatch.setattr(duplicates, "BLOCK_ROWS", 64)
    monkeypatch.setattr(duplicates, "BLOCK_COLUMNS", 128)
    generator = np.random.default_rng(1)
    rows = generator.normal(size=(500, 64))
    for copy in range(40):
        rows[copy + 400] = rows[copy * 7] + generator.normal(size=64) * 0.05 * (copy + 1)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    expected = {(i, j) for i, j in zip(*np.nonzero(np.triu(rows @ rows.T, 1) >= least), strict=True) if j > i}
    cosines = rows @ rows.T
    close = {(i, j) for i, j in expected if abs(cosines[i, j] - least) < 1e-6}
    found = {(i, j) for i, j, _ in pairs_above(rows, least, iter(blocks_of(500)))}
    assert found - close == expected - close


def test_the_blocks_hold_every_pair_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "BLOCK_ROWS", 3)
    monkeypatch.setattr(duplicates, "BLOCK_COLUMNS", 5)
    pairs = [
        (i, j) for top, left in blocks_of(17) for i in range(top, min(top + 3, 17))
        for j in range(left, min(left + 5, 17)) if j > i
    ]  # fmt: skip
    assert sorted(pairs) == [(i, j) for i in range(17) for j in range(i + 1, 17)]


def test_people_who_look_alike_are_listed_and_the_erased_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = a_store(tmp_path, 1, 2, 3)
    store.append(4, [Enrolment(name, a_template(1), "m", 0.0) for name in ("twin", "erased twin")])
    store.erase(6, "erased twin")
    rows = list(csv.reader(io.StringIO(commanded(tmp_path, capsys, "duplicates", "--least", "0.9"))))
    assert rows == [["user_id", "other_user_id", "similarity"], ["person-1", "twin", "1.0000"]]


def test_a_person_is_no_duplicate_of_themselves_and_is_listed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = a_store(tmp_path, 1, 2)
    photos = [Enrolment("person-1", a_template(1), "m", 0.0, photo_id=name) for name in ("a", "b")]
    store.append(3, [*photos, Enrolment("twin", a_template(1), "m", 0.0)])
    store.append(6, [Enrolment("person-2", a_template(1), "m", 0.0, photo_id="c")])
    store.remove_photo(7, 6)
    rows = list(csv.reader(io.StringIO(commanded(tmp_path, capsys, "duplicates", "--least", "0.9"))))
    assert rows[1:] == [["person-1", "twin", "1.0000"]]


# --- export, erase, stats ---


def test_an_export_names_everybody_and_no_template_unless_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_store(tmp_path, 1, 2).erase(3, "person-2")
    rows = list(csv.DictReader(io.StringIO(commanded(tmp_path, capsys, "export"))))
    assert rows == [{"user_id": "person-1", "enrolled_at": "1970-01-01T00:16:41Z", "model": "m", "photo": "1"}]
    out = tmp_path / "people.jsonl"
    commanded(tmp_path, capsys, "export", "--embeddings", "--format", "jsonl", "--out", str(out))
    person = json.loads(out.read_text())
    assert np.allclose(person["embedding"], a_template(1), atol=1e-6)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


def test_an_export_has_each_photos_number_by_which_it_can_be_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = a_store(tmp_path, 1, 2)
    store.append(3, [Enrolment("person-1", a_template(3), "m", 0.0, photo_id=name) for name in ("a", "b")])
    store.remove_photo(5, 3)
    store.append(6, [Enrolment("person-1", a_template(4), "m", 0.0, photo_id="c")])
    for form in ("csv", "jsonl"):
        told = commanded(tmp_path, capsys, "export", "--format", form).splitlines()
        rows = list(csv.DictReader(told)) if form == "csv" else [json.loads(line) for line in told]
        assert [(row["user_id"], int(row["photo"])) for row in rows] == [
            ("person-1", 1),
            ("person-2", 1),
            ("person-1", 3),
            ("person-1", 4),
        ]
    person = store.find_person("person-1")
    assert person is not None
    assert [photo.number for photo in person.photos] == [1, 3, 4]


def test_an_export_that_fails_leaves_the_file_of_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "people.csv"
    out.write_text("of before")
    out.chmod(0o644)
    a_store(tmp_path, 1)
    monkeypatch.setattr(export, "utc", lambda moment: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        commanded(tmp_path, capsys, "export", "--out", str(out))
    monkeypatch.undo()
    assert out.read_text() == "of before"
    assert sorted(path.name for path in tmp_path.glob("*people.csv*")) == ["people.csv"]
    commanded(tmp_path, capsys, "export", "--out", str(out))
    assert out.read_text().count("\n") == 2
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


def test_who_reads_no_further_is_told_nothing_more(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    store.append(1, [Enrolment(f"p{number}", a_template(1), "m", 1.0) for number in range(3000)])
    command = f"{sys.executable} app.py export --data-dir {tmp_path} --log-level WARNING | head -n 1"
    ended = subprocess.run(command, shell=True, check=False, cwd=PROJECT, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("user_id,enrolled_at,model,photo\n", "")


def test_people_are_erased_only_after_a_yes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = a_store(tmp_path, 1, 2, 3)
    monkeypatch.setattr(sys, "stdin", io.StringIO("no\n"))
    commanded(tmp_path, capsys, "erase", "person-1", status=1)
    assert store.find_person("person-1") is not None
    (tmp_path / "list").write_text("person-2\nnobody\n")
    assert app.main(["erase", "person-1", "--from", str(tmp_path / "list"), "--yes", "--data-dir", str(tmp_path)]) == 1
    assert "nobody: nobody is enrolled" in capsys.readouterr().err
    assert [stored.user_id for stored in store.embeddings(0)] == ["person-3"]
    assert [line["user_id"] for _, line in lines_of(tmp_path / "audit")] == ["person-1", "person-2"]


def test_nobody_is_asked_to_erase_people_who_are_not_enrolled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_store(tmp_path, 1)
    assert app.main(["erase", "nobody", "--data-dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "nobody: nobody is enrolled" in said
    assert "for good?" not in said
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    assert app.main(["erase", "nobody", "person-1", "--data-dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "Erase 1 person for good?" in said
    assert "1 person erased" in said


def test_the_counts_are_those_of_the_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = a_store(tmp_path, 1, 2, 3)
    store.append(4, [Enrolment("other", a_template(9), "another model", 5000.0)])
    store.erase(5, "person-3")
    store.append(6, [Enrolment("person-1", a_template(1), "m", 0.0, photo_id="a")])
    out = commanded(tmp_path, capsys, "stats")
    for line in (
        "enrolled: 3",
        "photos: 4",
        "with m: 3",
        "with another model: 1",
        "erased: 1",
        "log: 6",
        "1970-01-01T01:23:20Z",
    ):
        assert line in out


def test_the_counts_tell_a_key_that_is_missing_from_a_record_that_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keyring = Keyring((bytes(32),))
    store = SqliteStore(tmp_path / "faces.sqlite3", keyring)
    store.prepare()
    store.append(1, [Enrolment("sealed", a_template(1), "m", 1.0)])
    store.fill([*store.documents(1), {"seq": 2, "user_id": "damaged", "embedding": b""}], [], replace=True)
    store.close()
    out = commanded(tmp_path, capsys, "stats")
    for line in (f"sealed with the key {keyring.names[0]}", "TEMPLATE_KEYS does not hold): 1", "(unreadable): 1"):
        assert line in out


def test_pairs_are_listed_the_most_similar_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, template = a_store(tmp_path), a_template(1)
    for place, distance in enumerate((0.0, 0.3, 0.1, 0.2), 1):
        other = template + distance * a_template(2)
        store.append(place, [Enrolment(f"at {distance}", (other / np.linalg.norm(other)).astype(np.float32), "m", 0.0)])
    rows = list(csv.DictReader(io.StringIO(commanded(tmp_path, capsys, "duplicates", "--least", "0.9"))))
    assert len(rows) == 6
    assert [row["similarity"] for row in rows] == sorted((row["similarity"] for row in rows), reverse=True)


def test_an_interrupted_search_for_duplicates_lists_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_store(tmp_path, 1, 2).append(3, [Enrolment("twin", a_template(1), "m", 0.0)])

    def interrupted(*given: object) -> Iterator[tuple[int, int, float]]:
        yield from pairs_above(*given)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(duplicates, "pairs_above", interrupted)
    assert "person-1,twin,1.0000" in commanded(tmp_path, capsys, "duplicates", "--least", "0.9", status=130)


# --- audit ---


def test_the_audit_command_says_what_it_does_not_find(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    receipt = AuditLog(tmp_path / "audit", 365).record("erase", user_id="somebody")
    assert json.loads(commanded(tmp_path, capsys, "audit", "--receipt", str(receipt)))["user_id"] == "somebody"
    for flag in ("--receipt", "--user-id"):
        assert app.main(["audit", flag, "nope", "--data-dir", str(tmp_path)]) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "nope" in shown.err
        assert "AUDIT_DAYS" in shown.err
    assert app.main(["audit", "--receipt", str(receipt), "--user-id", "nope", "--data-dir", str(tmp_path)]) == 1
