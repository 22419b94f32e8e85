"""The commands on many photos: import and reembed, their lists of photos and their reports."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

import app
import bootstrap
from commands.bulk import processing
from commands.bulk.import_photos import Importer, photos_to_do
from commands.bulk.photo_list import Photo, find_photos
from commands.bulk.processing import ProcessedPhoto, process_photos
from commands.bulk.reembed import bring_up_to_date
from commands.bulk.report import Report, ReportLine
from engines.base import Engine, Face, Template
from gallery.decisions import Gallery
from photos.decoder_pool import Decoders
from photos.pixels import Pixels
from settings import PROJECT, Settings
from store.audit_log import lines_of
from store.records import Enrolment
from store.sqlite import SqliteStore
from tests.support.fakes import (
    NO_GATES,
    ScriptedAttributes,
    ScriptedEngine,
    a_photo,
    a_template,
    jpeg,
    write_tiny_pack,
)
from tests.support.stores import a_store, commanded

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
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, brightness in enumerate(brightnesses):
        photo = a_photo()
        photo[:8, :8] = brightness
        paths.append(folder / f"{number:03}.jpg")
        paths[-1].write_bytes(jpeg(photo))
    return paths


class KeptOpen:
    """Decoders that the next import uses as well."""

    def __init__(self, decoders: Decoders) -> None:
        self.decode, self.require_working = decoders.decode, decoders.require_working

    def close(self) -> None:
        pass


class Bench:
    """What an import works with, on a scripted model."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, decoders: Decoders) -> None:
        monkeypatch.setattr(processing, "Decoders", lambda *_: KeptOpen(decoders))
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
            importer.know_people(photos)
            for number, made in enumerate(process_photos(todo, self.engine, self.settings)):
                if number == stop_after:
                    return report.lines
                importer.take(made)
            importer.finish()
            return report.lines

    def enrolled(self) -> int:
        return sum(1 for _ in self.store.embeddings(0))


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    """The decoders of all imports here: starting them takes longer than an import."""
    with closing(Decoders(2, 40_000_000)) as started:
        yield started


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoders: Decoders) -> Bench:
    return Bench(tmp_path, monkeypatch, decoders)


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


def test_a_stretched_copy_is_a_duplicate_and_its_line_names_the_photo_that_it_copies(
    bench: Bench, tmp_path: Path
) -> None:
    first, copied, stretched = (Photo(tmp_path / name, None) for name in ("first.jpg", "copied.jpg", "stretched.jpg"))
    gallery = Gallery(bench.store, bench.engine.name, bench.engine.dimension)
    with Report(bench.report) as report:
        importer = Importer(bench.store, bench.engine, gallery, bench.settings, report, None)
        for number, photo in enumerate((first, copied)):
            importer.take(ProcessedPhoto(photo, str(number), a_template(number), None))
        importer.take(ProcessedPhoto(stretched, "2", a_template(2), None, restored=[a_template(1)]))
        importer.finish()
        lines = report.lines
    assert [line.code for line in lines.values()] == ["enrolled", "enrolled", "duplicate_face"]
    assert str(copied.path) in lines[str(stretched.path)].message


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


def test_a_folder_is_searched_for_photos_and_neither_for_hidden_files_nor_for_a_systems_own(tmp_path: Path) -> None:
    for name in (
        "a.JPG", "b.jfif", "c.jpe", "sub/d.heic",
        "._a.JPG", ".hidden/e.jpg", "@eaDir/a.JPG", "sub/@eaDir/d.jpg", "__MACOSX/a.jpg", "#recycle/a.jpg", "notes.txt",
    ):  # fmt: skip
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"")
    found = [photo.path.relative_to(tmp_path / "photos").as_posix() for photo in find_photos(tmp_path / "photos")]
    assert found == ["a.JPG", "b.jfif", "c.jpe", "sub/d.heic"]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("list.txt", b"path\na.jpg\n", "neither a folder nor a .csv"),
        ("list.csv", b"a.jpg\nb.jpg\n", "names its columns: path"),
        ("list.csv", b"Dear all,\nplease find enclosed\n", "names its columns: path"),
        ("list.csv", b"path,user_id\na.jpg,1\nb.jpg\n", "line 3"),
        ("list.csv", b"path,user_id\n,1\n", "line 2"),
        ("list.csv", b"path\n\xff\xfe.jpg\n", "UTF-8"),
        ("list.csv", b'path\n"a.jpg\n', "no"),
        ("list.csv", b"path\n", "no photo"),
        ("list.csv", b"", "names its columns: path"),
    ],
)
def test_a_list_is_a_csv_that_names_its_columns(tmp_path: Path, name: str, text: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=told):
        find_photos(tmp_path / name)


def test_a_csvs_columns_may_stand_in_any_order_beside_others(tmp_path: Path) -> None:
    (tmp_path / "list.CSV").write_text("\ufeffname,User_ID,File\nAnn,1,a.jpg\n", encoding="utf-8")
    assert find_photos(tmp_path / "list.CSV") == [Photo(tmp_path / "a.jpg", "1")]


def test_a_csv_names_photos_beside_it(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,user_id\na.jpg,1\nsub/b.jpg,\n\n")
    assert find_photos(tmp_path / "list.csv") == [
        Photo(tmp_path / "a.jpg", "1"),
        Photo(tmp_path / "sub/b.jpg", None),
    ]
    (tmp_path / "list.csv").write_text("path\na.jpg\na.jpg\n")
    with pytest.raises(ValueError, match="twice"):
        find_photos(tmp_path / "list.csv")


# --- the whole command, on a scripted model ---


@pytest.fixture
def scripted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """`app.main` runs on the bench's store and model."""
    monkeypatch.setattr(bootstrap, "engine_of", lambda _: bench.engine)
    return bench


def imported(bench: Bench, *words: str) -> int:
    limits = [
        "--verify-threshold",
        "0.99",
        "--duplicate-threshold",
        "0.99",
        "--threshold-floor",
        "0.4",
        "--model-threads",
        "1",
    ]
    return app.main(["import", *words, "--data-dir", str(bench.folder), *limits])


def test_an_import_says_where_its_report_is_and_tells_its_own_run_from_earlier_ones(
    scripted: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_people(tmp_path / "photos", 0, 64)
    assert imported(scripted, str(tmp_path / "photos")) == 0
    assert capsys.readouterr().out == f"This run:\n       2 enrolled\nReport: {tmp_path / 'import-report.csv'}\n"
    (tmp_path / "photos" / "none.png").write_bytes(b"no picture")
    assert imported(scripted, str(tmp_path / "photos")) == 0
    assert capsys.readouterr().out.splitlines() == [
        "This run:", "       1 unsupported_format",
        "Earlier runs, not done again:", "       2 enrolled",
        f"Report: {tmp_path / 'import-report.csv'}",
    ]  # fmt: skip


def test_every_enrolment_of_an_import_is_in_the_audit_log_once(scripted: Bench, tmp_path: Path) -> None:
    write_people(tmp_path / "photos", 0, 64, 64)
    for _ in range(2):
        imported(scripted, str(tmp_path / "photos"))
    lines = [line for _, line in lines_of(tmp_path / "audit")]
    assert [(line["event"], line["code"], line["key"]) for line in lines] == [("enrol", "ok", "(import)")] * 2
    assert {line["user_id"] for line in lines} == {stored.user_id for stored in scripted.store.embeddings(0)}


def test_an_import_of_which_every_photo_failed_fails_whenever_it_is_run(scripted: Bench, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "none.png").write_bytes(b"no picture")
    assert imported(scripted, str(tmp_path / "photos")) == 1
    assert imported(scripted, str(tmp_path / "photos")) == 1
    write_people(tmp_path / "photos", 0)
    assert imported(scripted, str(tmp_path / "photos")) == 0
    # Everybody of these photos is enrolled already.
    assert imported(scripted, str(tmp_path / "photos"), "--report", str(tmp_path / "another.csv")) == 0


class InterruptedAtTheThird(ByBrightness):
    """A model at whose third photo somebody presses Ctrl-C."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def embed(self, image: Pixels, face: Face) -> Template:
        with self.lock:
            self.embeddings += 1
            if self.embeddings == 3:
                os.kill(os.getpid(), signal.SIGINT)
        return super().embed(image, face)


def test_an_interrupted_import_loses_no_photo_that_was_finished(
    scripted: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.engine = InterruptedAtTheThird()
    paths = write_people(tmp_path / "photos", *range(0, 256, 16), *range(0, 256, 16))
    assert imported(scripted, str(tmp_path / "photos")) == 130
    finished = sum(map(int, re.findall(r"^ +(\d+) ", capsys.readouterr().out, re.MULTILINE)))
    # Photos that nobody had begun were left; those that were finished are counted, reported and enrolled.
    assert 3 <= scripted.engine.embeddings == finished < len(paths)
    assert scripted.enrolled() >= 3
    before = scripted.engine.embeddings
    assert imported(scripted, str(tmp_path / "photos")) == 0
    assert scripted.engine.embeddings == len(paths)
    assert before < len(paths)
    assert scripted.enrolled() == 16


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
        **os.environ, **NO_GATES, "FACE_MODEL": str(tmp_path / "pack"), "DATA_DIR": str(data), "MONGO_URI": "",
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


# --- several photos of a person ---


def write_person(folder: Path, **photos: int) -> None:
    """Write photos of these brightnesses by their names; equal ones show the same face."""
    for name, brightness in photos.items():
        (path,) = write_people(folder / "made", brightness)
        path.rename(folder / f"{name}.jpg")
        (folder / "made").rmdir()


def codes_of(lines: dict[str, ReportLine], folder: Path) -> dict[str, str]:
    return {Path(path).relative_to(folder).as_posix(): line.code for path, line in lines.items()}


def test_of_a_folder_a_person_the_first_photo_that_passes_enrols_and_the_others_are_added(
    bench: Bench, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    write_person(folder / "ann", b=0, c=0, d=128)
    (folder / "ann" / "a.jpg").write_bytes(b"no picture")
    write_person(folder / "ben", a=64)
    write_person(folder / "cleo", a=0, b=200)
    photos = find_photos(folder, person_folders=None)
    assert {photo.person for photo in photos} == {"ann", "ben", "cleo"}
    lines = bench.run(photos)
    assert codes_of(lines, folder) == {
        "ann/a.jpg": "unsupported_format", "ann/b.jpg": "enrolled", "ann/c.jpg": "photo_added", "ann/d.jpg": "no_match",
        "ben/a.jpg": "enrolled", "cleo/a.jpg": "duplicate_face", "cleo/b.jpg": "enrolled",
    }  # fmt: skip
    ann = bench.store.find_person(lines[str(folder / "ann/b.jpg")].user_id)
    assert ann is not None
    assert len(ann.photos) == 2
    assert all(photo.quality is not None for photo in ann.photos)
    # A further photo joins at the next run, and nothing is done again.
    write_person(folder / "ben", b=64)
    again = bench.run(find_photos(folder, person_folders=None))
    assert again[str(folder / "ben/b.jpg")].code == "photo_added"
    assert again[str(folder / "ben/b.jpg")].user_id == lines[str(folder / "ben/a.jpg")].user_id
    assert bench.enrolled() == 5


def test_nobody_gets_more_photos_by_an_import_than_they_may_have(bench: Bench, tmp_path: Path) -> None:
    bench.settings = replace(bench.settings, max_photos=2)
    write_person(tmp_path / "photos" / "ann", a=0, b=0, c=0)
    lines = bench.run(find_photos(tmp_path / "photos", person_folders=True))
    assert list(codes_of(lines, tmp_path / "photos").values()) == ["enrolled", "photo_added", "not_needed"]
    assert [stored.seq for stored in bench.store.embeddings(0)] == [1, 2]


def test_a_folder_says_by_its_form_whether_it_holds_a_folder_a_person(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def people(**options: bool | None) -> list[str | None]:
        return [photo.person for photo in find_photos(tmp_path, **options)]

    write_person(tmp_path / "ann", a=0)
    write_person(tmp_path / "ben", a=64)
    assert people(person_folders=None) == [None, None]  # one photo each: each enrols anyway
    write_person(tmp_path / "ben", b=64)
    assert people(person_folders=None) == ["ann", "ben", "ben"]
    assert people() == people(person_folders=False) == [None] * 3
    write_person(tmp_path, loose=128)
    with caplog.at_level("INFO"):
        assert people(person_folders=None) == [None] * 4
    assert "3 of 4 photos lie in 2 sub-folders, 1 lie elsewhere" in caplog.text
    assert people(person_folders=True) == ["ann", "ben", "ben", None]


def test_a_csv_may_say_which_photos_show_the_same_person(bench: Bench, tmp_path: Path) -> None:
    write_person(tmp_path, a=0, b=64, c=0)
    (tmp_path / "list.csv").write_text("person,file\nann,a.jpg\nben,b.jpg\nann,c.jpg\n", "utf-8")
    lines = bench.run(find_photos(tmp_path / "list.csv"))
    assert codes_of(lines, tmp_path) == {"a.jpg": "enrolled", "b.jpg": "enrolled", "c.jpg": "photo_added"}


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


def test_a_person_gets_as_many_photos_under_a_new_model_as_they_had(bench: Bench, tmp_path: Path) -> None:
    paths = write_people(tmp_path / "photos", 0, 64, 128)
    user_id = bench.run([Photo(paths[0], None)])[str(paths[0])].user_id
    (stored,) = bench.store.embeddings(0)
    template = np.eye(1, bench.engine.dimension, dtype=np.float32)[0]
    bench.store.append(2, [Enrolment(user_id, template, stored.model or "", 5.0, photo_id="a")])
    new, report = a_store(tmp_path / "new"), tmp_path / "reembed.csv"

    def update(some: list[Photo]) -> list[str]:
        with Report(report) as lines:
            return bring_up_to_date(bench.store, new, some, OtherModel(), bench.settings, lines)

    photos = [Photo(path, user_id) for path in paths]
    assert update(photos[:1]) == []
    assert update(photos[:1]) == []
    assert len(list(new.embeddings(0))) == 1
    assert update(photos) == []
    person = new.find_person(user_id)
    assert person is not None
    assert [photo.timestamp for photo in person.photos][1:] == [5.0]


def cv2_read(path: Path) -> Pixels:
    return np.asarray(cv2.imread(str(path)), np.uint8)


def test_a_change_of_model_needs_a_store_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_people(tmp_path / "photos", 0)
    for words in ([], ["--into-folder", str(tmp_path)]):
        commanded(tmp_path, capsys, "reembed", str(tmp_path / "photos"), *words, status=1)


def reembedded(bench: Bench, folder: Path, into: Path, *words: str) -> int:
    return app.main(["reembed", str(folder), "--into-folder", str(into), "--data-dir", str(bench.folder), *words])


def enrolled_photos(bench: Bench, tmp_path: Path) -> Path:
    """A folder of photos that are named by the user_ids of two people."""
    for path in write_people(tmp_path / "photos", 0, 64):
        user_id = bench.run([Photo(path, None)])[str(path)].user_id
        path.rename(path.parent / f"{user_id}.jpg")
    return tmp_path / "photos"


def test_reembed_refuses_the_model_that_everybody_has_already(
    scripted: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = enrolled_photos(scripted, tmp_path)
    assert reembedded(scripted, photos, tmp_path / "new") == 1
    assert "everybody is enrolled with scripted-v1 already" in capsys.readouterr().err


def test_reembed_says_which_model_is_which_and_when_to_switch_over(
    scripted: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = enrolled_photos(scripted, tmp_path)
    scripted.engine = OtherModel()
    assert reembedded(scripted, photos, tmp_path / "new") == 0
    shown = capsys.readouterr()
    assert "The served store holds 2 people with scripted-v1. The new templates are made with scripted-v2" in shown.err
    assert "2 people are in the new store with scripted-v2, 0 are not there yet." in shown.out
    assert f"FACE_MODEL=auto and DATA_DIR={tmp_path / 'new'}" in shown.out
    assert (tmp_path / "reembed-report.csv").is_file()


def test_reembed_names_every_setting_that_the_new_templates_were_made_with(
    scripted: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = enrolled_photos(scripted, tmp_path)
    scripted.engine = OtherModel()
    reembedded(scripted, photos, tmp_path / "new", "--face-detector", "yunet", "--embedding-precision", "int8")
    assert "FACE_MODEL=auto, FACE_DETECTOR=yunet, EMBEDDING_PRECISION=int8 and DATA_DIR" in capsys.readouterr().out


def test_reembed_never_says_to_switch_over_to_a_store_of_nobody(
    scripted: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = enrolled_photos(scripted, tmp_path)
    for path in photos.iterdir():
        path.write_bytes(b"no picture")
    scripted.engine = OtherModel()
    assert reembedded(scripted, photos, tmp_path / "new") == 1
    shown = capsys.readouterr().out
    assert "Do not switch over" in shown
    assert "To switch over" not in shown


def test_reembed_refuses_a_store_of_a_third_model_and_a_store_of_nobody(
    scripted: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = enrolled_photos(scripted, tmp_path)
    a_store(tmp_path / "third", 1)
    scripted.engine = OtherModel()
    assert reembedded(scripted, photos, tmp_path / "third") == 1
    assert "people of another model (m)" in capsys.readouterr().err
    scripted.folder = tmp_path / "empty"
    assert reembedded(scripted, photos, tmp_path / "new") == 1
    assert "nobody is enrolled" in capsys.readouterr().err
