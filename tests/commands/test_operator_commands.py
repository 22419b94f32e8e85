"""The operator's commands on everybody enrolled: import, duplicates, export, erase, stats, reembed."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

import app
from commands import duplicates, export
from commands.bulk import processing
from commands.bulk.import_photos import Importer, photos_to_do
from commands.bulk.photo_list import Photo, find_photos
from commands.bulk.processing import process_photos
from commands.bulk.reembed import bring_up_to_date
from commands.bulk.report import Report, ReportLine
from commands.duplicates import blocks_of, pairs_above
from engines.base import Engine, Face, Template
from gallery.decisions import Gallery
from photos.pixels import Pixels
from settings import PROJECT, Settings
from store.audit_log import lines_of
from store.encryption import Keyring
from store.records import Enrolment
from store.sqlite import SqliteStore
from tests.support.fakes import ScriptedAttributes, ScriptedEngine, a_photo, jpeg, write_tiny_pack


def a_template(seed: int, dimension: int = 64) -> Template:
    vector = np.random.default_rng(seed).normal(size=dimension)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def a_store(folder: Path, *seeds: int) -> SqliteStore:
    store = SqliteStore(folder / "faces.sqlite3")
    store.prepare()
    if seeds:
        store.append(1, [Enrolment(f"person-{seed}", a_template(seed), "m", 1000.0 + seed) for seed in seeds])
    return store


def commanded(folder: Path, capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert app.main([*words, "--data-dir", str(folder)]) == status
    return capsys.readouterr().out


# --- import ---


class ByBrightness(ScriptedEngine):
    """A model for which everybody is as bright as their photo."""

    def embed(self, image: Pixels, face: Face) -> Template:
        seed = round(float(image[:8, :8].mean()) / 16)
        vector = np.random.default_rng(seed).normal(size=self.dimension)
        return np.asarray(vector / np.linalg.norm(vector), np.float32)

    def detect(self, image: Pixels) -> list[Face]:
        return [] if image.shape[0] < 100 else super().detect(image)


def write_people(folder: Path, *brightnesses: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for number, brightness in enumerate(brightnesses):
        photo = a_photo()
        photo[:8, :8] = brightness
        paths.append(folder / f"{number:03}.jpg")
        paths[-1].write_bytes(jpeg(photo))
    return paths


class Bench:
    """What an import works with, on a scripted model."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(processing, "FaceAttributesModel", lambda _: ScriptedAttributes())
        self.folder = folder
        self.settings = Settings(data_dir=folder, duplicate_threshold=0.99, verify_threshold=0.99)
        self.engine: Engine = ByBrightness()
        self.store = a_store(folder)
        self.report = folder / "report.csv"

    def run(self, photos: list[Photo], stop_after: int | None = None) -> dict[str, ReportLine]:
        gallery = Gallery(self.store, self.engine.name, self.engine.dimension)
        with Report(self.report) as report:
            todo = photos_to_do(photos, report, self.store, self.settings)
            importer = Importer(self.store, self.engine, gallery, self.settings, report, None)
            for number, made in enumerate(process_photos(todo, self.engine, self.settings)):
                if number == stop_after:
                    return report.lines
                importer.take(made)
            importer.finish()
            return report.lines

    def enrolled(self) -> int:
        return sum(1 for _ in self.store.embeddings(0))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_everybody_is_enrolled_once_and_every_photo_has_its_line(bench: Bench, tmp_path: Path) -> None:
    paths = write_people(tmp_path / "photos", 0, 64, 128, 64)
    (tmp_path / "photos" / "none.png").write_bytes(b"no picture")
    cv2.imwrite(str(tmp_path / "photos" / "small.jpg"), np.full((64, 64, 3), 200, np.uint8))
    lines = bench.run(find_photos(tmp_path / "photos"))
    codes = {Path(path).name: line.code for path, line in lines.items()}
    assert codes == {
        "000.jpg": "enrolled", "001.jpg": "enrolled", "002.jpg": "enrolled", "003.jpg": "duplicate_face",
        "none.png": "unsupported_format", "small.jpg": "no_face",
    }  # fmt: skip
    assert str(paths[1]) in lines[str(paths[3])].message
    assert bench.enrolled() == 3


def test_an_import_that_is_repeated_does_nothing_again(bench: Bench, tmp_path: Path) -> None:
    write_people(tmp_path / "photos", 0, 64, 128)
    photos = find_photos(tmp_path / "photos")
    first = dict(bench.run(photos))
    assert bench.run(photos) == first
    assert bench.enrolled() == 3


def test_a_photo_that_was_enrolled_and_not_reported_is_known_for_what_it_is(bench: Bench, tmp_path: Path) -> None:
    write_people(tmp_path / "photos", 0, 64, 128)
    photos = find_photos(tmp_path / "photos")
    before = dict(bench.run(photos))
    bench.report.unlink()
    assert bench.run(photos) == before
    assert bench.enrolled() == 3


def test_a_line_that_was_cut_off_is_written_anew(bench: Bench, tmp_path: Path) -> None:
    write_people(tmp_path / "photos", 0, 64)
    photos = find_photos(tmp_path / "photos")
    before = dict(bench.run(photos))
    bench.report.write_bytes(bench.report.read_bytes()[:-10])
    assert bench.run(photos) == before
    assert bench.report.read_text().count("\n") == 3


@pytest.mark.parametrize("text", ["my,own,table\n", "path,sha256,code,user_id,message\na.jpg,enrolled\n"])
def test_another_file_is_never_taken_for_a_report(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.csv").write_text(text)
    with pytest.raises(ValueError, match="no report"):
        Report(tmp_path / "report.csv")


def test_a_photo_that_was_refused_is_tried_again_when_another_lies_under_its_name(bench: Bench, tmp_path: Path) -> None:
    (path,) = write_people(tmp_path / "photos", 64)
    good = path.read_bytes()
    path.write_bytes(b"no picture")
    assert bench.run([Photo(path, None)])[str(path)].code == "unsupported_format"
    bench.run([Photo(path, None)])
    path.write_bytes(good)
    assert bench.run([Photo(path, None)])[str(path)].code == "enrolled"
    assert bench.report.read_text().count("\n") == 3


def test_a_report_of_another_store_is_refused_instead_of_enrolling_nobody(bench: Bench, tmp_path: Path) -> None:
    write_people(tmp_path / "photos", 0, 64)
    photos = find_photos(tmp_path / "photos")
    bench.run(photos)
    bench.store = a_store(tmp_path / "other")
    with pytest.raises(ValueError, match="another store"):
        bench.run(photos)


def test_every_name_that_a_file_can_have_is_found_again_in_the_report(bench: Bench, tmp_path: Path) -> None:
    paths = write_people(tmp_path / "photos", 0, 64, 128)
    for path, name in zip(paths, (b"a\nb.jpg", b"\xff.jpg", 'q"ü\u2028,.HEIC'.encode()), strict=True):
        path.rename(path.parent / os.fsdecode(name))
    photos = find_photos(tmp_path / "photos")
    assert len(photos) == 3
    before = dict(bench.run(photos))
    written = bench.report.read_bytes()
    assert bench.run(photos) == before
    assert bench.report.read_bytes() == written


def test_a_csv_names_photos_beside_it(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,user_id\na.jpg,1\nsub/b.jpg,\n\n")
    assert find_photos(tmp_path / "list.csv") == [
        Photo(tmp_path / "a.jpg", "1"),
        Photo(tmp_path / "sub/b.jpg", None),
    ]
    (tmp_path / "list.csv").write_text("path\na.jpg\na.jpg\n")
    with pytest.raises(ValueError, match="twice"):
        find_photos(tmp_path / "list.csv")


# The tiny pack's faces are white squares: no check may mind.
ANY_FACE = {
    **dict.fromkeys(("MIN_SHARPNESS", "MIN_LUMINANCE", "MIN_DYNAMIC_RANGE", "MIN_UNIFORMITY", "MIN_INTER_EYE_PX"), "0"),
    **dict.fromkeys(("MAX_UNDER_EXPOSURE", "MAX_OVER_EXPOSURE", "MAX_LUMINANCE", "MAX_HIDDEN", "MAX_MASK"), "1"),
    **dict.fromkeys(("MAX_SUNGLASSES", "MAX_COVERED"), "1"),
    **dict.fromkeys(("MAX_ROLL_DEG", "MAX_YAW_DEG", "MAX_PITCH_DEG", "MAX_COLOUR_DISTANCE"), "90"),
    **{"MIN_FACE_IN_FRAME": "0", "MAX_HEAD_SIZE": "10"},
}


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_import_interrupted_twice_ends_like_one_that_was_not(tmp_path: Path, how: signal.Signals) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(60):
        photo = np.zeros((640, 640, 3), np.uint8)
        photo[320:352, 320:352] = 255
        photo[290 + number : 293 + number, 250:420] = (40 + 3 * number, 90, 220 - 3 * number)
        (folder / f"{number:02}.jpg").write_bytes(jpeg(photo))
    write_tiny_pack(tmp_path / "pack")
    data, report = tmp_path / "data", tmp_path / "report.csv"
    environment = {
        **os.environ, **ANY_FACE, "FACE_MODEL": str(tmp_path / "pack"), "DATA_DIR": str(data), "MONGO_URI": "",
        "DUPLICATE_THRESHOLD": "0.998",
    }  # fmt: skip
    command = [sys.executable, "app.py", "import", str(folder), "--report", str(report)]

    def lines() -> int:
        return report.read_text().count("\n") if report.exists() else 0

    for at_least in (1, 2):
        process = subprocess.Popen(command, cwd=PROJECT, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and lines() < at_least:
            time.sleep(0.01)
        process.send_signal(how)
        process.wait(60)
    assert subprocess.run(command, check=False, cwd=PROJECT, env=environment).returncode == 0
    rows = list(csv.DictReader(report.open()))
    assert sorted(row["path"] for row in rows) == sorted(str(path) for path in folder.iterdir())
    enrolled = [row["user_id"] for row in rows if row["code"] == "enrolled"]
    store = SqliteStore(data / "faces.sqlite3")
    store.prepare()
    assert 2 <= len(enrolled) < 60
    assert sorted(enrolled) == sorted(stored.user_id for stored in store.embeddings(0))


# --- duplicates ---


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


# --- export, erase, stats ---


def test_an_export_names_everybody_and_no_template_unless_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_store(tmp_path, 1, 2).erase(3, "person-2")
    rows = list(csv.DictReader(io.StringIO(commanded(tmp_path, capsys, "export"))))
    assert rows == [{"user_id": "person-1", "enrolled_at": "1970-01-01T00:16:41Z", "model": "m"}]
    out = tmp_path / "people.jsonl"
    commanded(tmp_path, capsys, "export", "--embeddings", "--format", "jsonl", "--out", str(out))
    person = json.loads(out.read_text())
    assert np.allclose(person["embedding"], a_template(1), atol=1e-6)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


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
    assert (ended.stdout, ended.stderr) == ("user_id,enrolled_at,model\n", "")


def test_what_is_no_command_is_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["imprt"]) == 2
    assert "no command 'imprt'" in capsys.readouterr().err


def test_a_command_that_fails_says_which_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["import", str(tmp_path), "--data-dir", str(tmp_path)]) == 1
    assert "import ends: there is no photo in" in capsys.readouterr().err


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


def test_the_counts_are_those_of_the_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = a_store(tmp_path, 1, 2, 3)
    store.append(4, [Enrolment("other", a_template(9), "another model", 5000.0)])
    store.erase(5, "person-3")
    out = commanded(tmp_path, capsys, "stats")
    for line in ("enrolled: 3", "with m: 2", "with another model: 1", "erased: 1", "log: 5", "1970-01-01T01:23:20Z"):
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


# --- a change of model ---


class OtherModel(ByBrightness):
    name = "scripted-v2"


def test_everybody_keeps_their_user_id_under_a_new_model_and_the_erased_are_erased(
    bench: Bench, tmp_path: Path
) -> None:
    paths = write_people(tmp_path / "photos", 0, 64, 128, 200)
    lines = bench.run(find_photos(tmp_path / "photos"))
    people = [lines[str(path)].user_id for path in paths]
    photos = [Photo(path, user_id) for path, user_id in zip(paths, people, strict=True)]
    new, report = a_store(tmp_path / "new"), tmp_path / "reembed.csv"

    def update(some: list[Photo]) -> list[str]:
        with Report(report) as lines:
            return bring_up_to_date(bench.store, new, some, OtherModel(), bench.settings, lines)

    assert update(photos[:2]) == sorted(people[2:])
    bench.store.erase(bench.store.last_place() + 1, people[0])
    assert update(photos) == []
    assert update(photos) == []
    assert [stored.user_id for stored in new.embeddings(0)] == people[1:]
    assert {stored.model for stored in new.embeddings(0)} == {"scripted-v2"}
    assert Gallery(new, "scripted-v2", bench.engine.dimension).compare(
        people[2], ByBrightness().embed(cv2_read(paths[2]), ByBrightness().faces[0])
    ) == pytest.approx(1, abs=1e-3)


def cv2_read(path: Path) -> Pixels:
    return np.asarray(cv2.imread(str(path)), np.uint8)


def test_a_change_of_model_needs_a_store_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_people(tmp_path / "photos", 0)
    for words in ([], ["--into-folder", str(tmp_path)]):
        commanded(tmp_path, capsys, "reembed", str(tmp_path / "photos"), *words, status=1)
