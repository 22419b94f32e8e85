"""The command evaluate: what it reads, what it keeps, what it counts, and what its report may and may not say."""

from __future__ import annotations

import argparse
import base64
import html.parser
import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

import app
from commands.evaluate import cache as evaluation_cache
from commands.evaluate.biometrics import LEAST_ERRORS, fmr_for_fpir
from commands.evaluate.cache import Cache, Outcome, cache_key, embed_all, files_behind_a_template, library_versions
from commands.evaluate.command import add_arguments
from commands.evaluate.data import read_folder, read_pairs, read_subgroups
from commands.evaluate.evaluation import evaluation
from commands.evaluate.report_page import page as report_page
from commands.evaluate.report_text import power_of_ten, rate_text, summary
from engines.base import Template
from engines.model_slots import ModelSlots
from errors import FaceError
from photos.decode import decode
from photos.pixels import Pixels
from pipeline import Pipeline
from settings import PROJECT, Settings
from store.encryption import Keyring
from tests.support.fakes import (
    DIMENSION,
    ScriptedAttributes,
    ScriptedEngine,
    a_face,
    a_photo,
    a_template,
    jpeg,
    write_tiny_pack,
)
from tests.support.heic import heic_of_many

PLAIN = Keyring()


def write(root: Path, **people: int) -> Path:
    """A folder in LFW's layout, whose files hold their own names for pictures."""
    for name, count in people.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(1, count + 1):
            (root / name / f"{name}_{number:04d}.jpg").write_text(f"{name} {number}")
    return root


def arguments(folder: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(folder), *more])


def evaluated(
    folder: Path, embed: Callable[[bytes], Template], *more: str, pairs: Path | None = None, groups: Path | None = None
) -> dict[str, Any]:
    """The whole evaluation but for the models: `embed` makes the templates."""
    people, ignored = read_folder(folder)
    folds = read_pairs(pairs, people) if pairs else []
    outcomes = embed_all(
        [one for photos in people.values() for one in photos], embed, Cache(None, "", DIMENSION, PLAIN), at_once=2
    )
    result = evaluation(
        people,
        outcomes,
        ScriptedEngine(),
        Settings(),
        arguments(folder, *more),
        folds=folds,
        groups=read_subgroups(groups, people) if groups else {},
    )
    result["photos"]["ignored_files"] = ignored
    return result


def by_person(data: bytes) -> Template:
    """Everybody's photos are alike, and nobody's like another's."""
    name, number = data.decode().split()
    vector = np.zeros(DIMENSION, np.float32)
    vector[sum(name.encode()) % DIMENSION] = 1
    vector[0] += 0.01 * int(number)
    return np.asarray(vector / np.linalg.norm(vector), np.float32)


def rate(found: dict[str, Any]) -> tuple[int, int]:
    return found["errors"], found["trials"]


# --- Reading ---------------------------------------------------------------------------------------------------------


def test_people_are_folders_and_other_files_are_passed_over_and_counted(tmp_path: Path) -> None:
    write(tmp_path, b=1, a=2)
    (tmp_path / "a" / "Thumbs.db").write_text("")
    (tmp_path / "list.csv").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a" / "holiday").mkdir()
    for stray in (tmp_path / "stray.jpg", tmp_path / "a" / "holiday" / "a_0003.jpg"):
        stray.write_bytes(b"a 3")
    people, ignored = read_folder(tmp_path)
    assert {name: [one.name for one in photos] for name, photos in people.items()} == {
        "a": ["a_0001.jpg", "a_0002.jpg"],
        "b": ["b_0001.jpg"],
    }
    assert ignored == 3


def test_a_folder_of_less_than_two_people_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two or more people"):
        read_folder(write(tmp_path, a=5))


def test_pairs_are_read_in_lfws_own_format(tmp_path: Path) -> None:
    people, _ = read_folder(write(tmp_path, Ann_Li=3, Bo=2))
    file = tmp_path / "pairs.txt"
    file.write_text("2\t1\nAnn_Li\t1\t3\nAnn_Li\t2\tBo\t1\nBo\t1\t2\nBo\t2\tAnn_Li\t1\n")
    folds = read_pairs(file, people)
    assert [[(*(one.stem for one in pair.photos), pair.same) for pair in fold] for fold in folds] == [
        [("Ann_Li_0001", "Ann_Li_0003", True), ("Ann_Li_0002", "Bo_0001", False)],
        [("Bo_0001", "Bo_0002", True), ("Bo_0002", "Ann_Li_0001", False)],
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nothing"),
        ("1 1\nA 1 2\nA 1 B 1\n", "2 or more"),
        ("2 1\nA 1 2\nA 1 B 1\n", "2 lines follow"),
        ("two 1\nA 1 2\nA 1 B 1\n", "first line"),
        ("2 1\nA 1 2\nA 1 B 1\nA 1 9\nA 2 B 1\n", "not there: A 1 9"),
        ("2 1\nA 1 2\nA 1 B 1\nA\nA 2 B 1\n", "not there: A"),
    ],
)
def test_pairs_that_cannot_be_taken_at_their_word_are_refused(tmp_path: Path, text: str, said: str) -> None:
    people, _ = read_folder(write(tmp_path, A=2, B=1))
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_pairs(tmp_path / "pairs.txt", people)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("identity,colour\na,x\n", "columns identity and group"),
        ("identity,group\na,\n", "columns"),
        ("identity,group\na,x\na,y\n", "two groups"),
        ("identity,group\nz,x\n", "nobody"),
    ],
)
def test_subgroups_that_cannot_be_taken_at_their_word_are_refused(tmp_path: Path, text: str, said: str) -> None:
    people, _ = read_folder(write(tmp_path, a=1, b=1))
    (tmp_path / "groups.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_subgroups(tmp_path / "groups.csv", people)


@pytest.mark.parametrize("flag", [("--wanted-fmr", "0"), ("--wanted-fpir", "1"), ("--gallery-size", "0")])
def test_a_wish_that_no_threshold_can_grant_is_refused(tmp_path: Path, flag: tuple[str, str]) -> None:
    with pytest.raises(SystemExit):
        arguments(tmp_path, *flag)


# --- Keeping templates -----------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    people, _ = read_folder(write(tmp_path / "photos", a=3, b=3))
    paths = [one for photos in people.values() for one in photos]
    embedded: list[str] = []

    def embed(data: bytes) -> Template:
        if len(embedded) == 4:
            raise KeyboardInterrupt
        embedded.append(data.decode())
        return by_person(data)

    cache = Cache(tmp_path / "cache", "k", DIMENSION, PLAIN)
    with pytest.raises(KeyboardInterrupt):
        embed_all(paths, embed, cache, at_once=1)
    again: list[str] = []

    def embed_the_rest(data: bytes) -> Template:
        again.append(data.decode())
        return by_person(data)

    outcomes = embed_all(paths, embed_the_rest, cache, at_once=1)
    assert embedded + again == [one.read_text() for one in paths]
    for path in paths:
        assert np.array_equal(outcomes[path].template, by_person(path.read_bytes()))  # type: ignore[arg-type]


def test_a_file_that_was_cut_off_costs_that_photo_alone(tmp_path: Path) -> None:
    cache = Cache(tmp_path, "k", DIMENSION, PLAIN)
    for seed, name in enumerate("abc"):
        cache.add(Outcome(name, a_template(seed), None))
    file = tmp_path / "k" / "b"
    file.write_bytes(file.read_bytes()[:-20])
    assert [cache.get(one) is not None for one in "abcd"] == [True, False, True, False]


def test_a_machine_that_can_decode_nothing_ends_the_run_and_refuses_no_photo_for_good(tmp_path: Path) -> None:
    write(tmp_path, ann=1, bob=1)
    people, _ = read_folder(tmp_path)
    paths = [one for photos in people.values() for one in photos]

    def nothing(_: bytes) -> Template:
        raise FaceError("overloaded")

    with pytest.raises(FaceError, match="overloaded"):
        embed_all(paths, nothing, Cache(tmp_path / "cache", "key", DIMENSION, PLAIN), at_once=1)
    outcomes = embed_all(paths, by_person, Cache(tmp_path / "cache", "key", DIMENSION, PLAIN), at_once=1)
    assert all(one.template is not None for one in outcomes.values())


def test_kept_templates_can_be_read_by_their_owner_alone(tmp_path: Path) -> None:
    Cache(tmp_path / "cache", "k", DIMENSION, PLAIN).add(Outcome("a", a_template(1), None))
    (file,) = (tmp_path / "cache" / "k").iterdir()
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_kept_templates_are_sealed_where_there_are_keys(tmp_path: Path) -> None:
    template, keyring = a_template(1), Keyring((bytes(32),))
    Cache(tmp_path, "k", DIMENSION, keyring).add(Outcome("a", template, None))
    assert template.tobytes()[:20] not in (tmp_path / "k" / "a").read_bytes()
    for keys, known in ((keyring, True), (Keyring((bytes([1] * 32),)), False), (PLAIN, False)):
        assert (Cache(tmp_path, "k", DIMENSION, keys).get("a") is not None) is known


@pytest.mark.parametrize("keyring", [PLAIN, Keyring((bytes(32),))])
def test_a_refusal_is_kept_too(tmp_path: Path, keyring: Keyring) -> None:
    Cache(tmp_path, "k", DIMENSION, keyring).add(Outcome("a", None, "blurred"))
    assert Cache(tmp_path, "k", DIMENSION, keyring).get("a") == Outcome("a", None, "blurred")


def test_templates_of_other_limits_or_another_model_or_unchecked_are_not_taken() -> None:
    other = ScriptedEngine()
    other.name = "another"
    keys = {
        cache_key(ScriptedEngine(), Settings(), False),
        cache_key(ScriptedEngine(), Settings(), True),
        cache_key(ScriptedEngine(), Settings(max_yaw_deg=20.0), False),
        cache_key(other, Settings(), False),
    }
    assert len(keys) == 4
    assert cache_key(ScriptedEngine(), Settings(verify_threshold=0.6), False) in keys


def test_a_change_of_any_file_behind_a_template_makes_kept_templates_outdated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key() -> str:
        return cache_key(ScriptedEngine(), Settings(), False)

    monkeypatch.setattr(evaluation_cache, "library_versions", lambda _: [])  # slow, and has a test of its own
    before = key()
    for path in files_behind_a_template(PROJECT):
        copy = tmp_path / path.relative_to(PROJECT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(evaluation_cache, "PROJECT", tmp_path)
    unchanged = key()
    assert unchanged == before
    for path in files_behind_a_template(tmp_path):
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        assert key() != unchanged, path
        path.write_bytes(content)
    assert key() == unchanged


def test_every_module_that_the_pipeline_imports_is_behind_a_template() -> None:
    # What the settings import is left out: the limits are in the key themselves.
    code = (
        "import sys, settings; before = set(sys.modules); import pipeline;"
        "print(*(getattr(sys.modules[name], '__file__', '') for name in set(sys.modules) - before))"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT, capture_output=True, text=True)
    imported = {Path(name) for name in ended.stdout.split()}
    own = {path for path in imported if path.is_relative_to(PROJECT) and ".venv" not in path.parts}
    # The limits are in the key themselves. Messages and log lines change no template.
    without_effect = {PROJECT / name for name in ("settings.py", "env_file.py", "errors.py", "logs.py")}
    without_effect |= {path for path in own if path.parent in (PROJECT / "store", PROJECT / "challenge")}
    assert own - without_effect <= set(files_behind_a_template(PROJECT))


def test_another_version_of_a_library_makes_kept_templates_outdated(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {text.partition(" ")[0] for text in library_versions(files_behind_a_template(PROJECT))}
    assert {"numpy", "onnxruntime", "insightface", "pillow"} <= named
    before = cache_key(ScriptedEngine(), Settings(), False)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "another")
    assert cache_key(ScriptedEngine(), Settings(), False) != before


# --- Counting --------------------------------------------------------------------------------------------------------


def test_refused_photos_are_counted_by_reason_and_by_attempt(tmp_path: Path) -> None:
    def embed(data: bytes) -> Template:
        if data in (b"a 1", b"b 2"):
            raise FaceError("blurred")
        if data.startswith(b"c"):
            raise FaceError("mask")
        return by_person(data)

    result = evaluated(write(tmp_path, a=4, b=4, c=2), embed)
    found = result["failures"]
    assert rate(found["fta"]) == (4, 10)
    assert rate(found["fte"]) == (2, 3)  # the first photos of a and c
    assert (found["people_without_template"], found["by_code"]) == (1, {"blurred": 2, "mask": 2})
    assert (result["comparisons"]["genuine_pairs"], result["comparisons"]["impostor_pairs"]) == (6, 9)
    present = result["at_verify_threshold"]
    assert (rate(present["fmr"]), rate(present["fnmr"])) == ((0, 9), (0, 6))
    assert present["frr"] == pytest.approx(0.4)  # FTA + FNMR (1 - FTA)
    assert present["gfrr"] == pytest.approx(2 / 3 + 1 / 3 * 0.4)


def test_the_same_file_twice_is_no_genuine_pair_and_in_two_folders_a_fault_to_mend(tmp_path: Path) -> None:
    write(tmp_path, a=2, b=2)
    (tmp_path / "a" / "copy.jpg").write_text("a 1")
    (tmp_path / "b" / "stray.jpg").write_text("a 2")
    result = evaluated(tmp_path, by_person)
    assert (result["photos"]["repeated_files"], result["photos"]["files_of_two_people"]) == (1, 1)
    assert result["photos"]["templates"] == 5
    assert "1 files lie in the folders of two people" in summary(result)


def test_lfws_protocol_decides_each_fold_by_the_others_and_takes_refused_photos_for_strangers(tmp_path: Path) -> None:
    write(tmp_path / "photos", A=3, B=3)
    file = tmp_path / "pairs.txt"
    file.write_text("2 2\nA 1 2\nA 1 3\nA 1 B 1\nA 2 B 2\nB 1 2\nB 2 3\nB 1 A 1\nB 2 A 3\n")

    def embed(data: bytes) -> Template:
        if data == b"A 3":
            raise FaceError("mask")
        return by_person(data)

    found = evaluated(tmp_path / "photos", embed, pairs=file)["protocol"]
    assert (found["folds"], found["pairs"], found["pairs_refused"]) == (2, 8, 2)
    assert found["all"]["accuracies"] == [0.75, 1.0]  # A 1 3 counts as two people, which B 2 A 3 is
    assert found["all"]["standard_error"] == pytest.approx(0.125)
    assert found["compared"]["accuracies"] == [1.0, 1.0]


def test_groups_are_compared_within_themselves(tmp_path: Path) -> None:
    write(tmp_path / "photos", a=2, b=2, c=2, d=2, e=1)
    (tmp_path / "groups.csv").write_text("identity,group\na,x\nb,x\nc,y\nd,y\nz,y\n")

    def embed(data: bytes) -> Template:
        return by_person(b"a" + data[1:]) if data[:1] in b"ab" else by_person(data)

    found = evaluated(tmp_path / "photos", embed, groups=tmp_path / "groups.csv")["subgroups"]
    assert found["unnamed_people"] == 1
    x, y = (found["groups"][name]["rows"][0] for name in "xy")
    assert (rate(x["fmr"]), rate(y["fmr"])) == ((4, 4), (0, 4))
    assert (rate(x["fnmr"]), rate(y["fnmr"])) == ((0, 2), (0, 2))


def noise(data: bytes) -> Template:
    return a_template(int.from_bytes(data, "big") % 2**32)


def test_a_recommended_threshold_keeps_what_was_wanted_and_is_a_line_for_env(tmp_path: Path) -> None:
    folder = write(tmp_path, **{f"p{one}": 2 for one in range(60)})
    result = evaluated(folder, noise, "--wanted-fmr", "0.01", "--wanted-fpir", "0.1")
    for_fmr, for_fpir = result["recommended"]
    assert for_fmr["line"] == f"VERIFY_THRESHOLD={for_fmr['threshold']:g}"
    assert 0.005 < for_fmr["fmr"]["share"] <= 0.01
    assert (for_fpir["gallery_size"], for_fpir["extrapolated"]) == (59, False)
    assert 0.08 < for_fpir["fpir"]["share"] <= 0.1
    assert for_fmr["line"] in report_page(result)


def test_a_threshold_for_another_gallery_size_is_extrapolated_and_says_so(tmp_path: Path) -> None:
    folder = write(tmp_path, **{f"p{one}": 2 for one in range(60)})
    result = evaluated(folder, noise, "--wanted-fpir", "0.5", "--gallery-size", "600")
    one = result["recommended"][1]
    assert one["extrapolated"]
    assert one["fmr"]["share"] <= one["fmr_needed"] == pytest.approx(1 - 0.5 ** (1 / 600))
    assert "FPIR 50.0 % with 600 enrolled (extrapolated:" in summary(result)


def test_what_so_few_pairs_cannot_measure_gets_no_threshold_and_no_rate(tmp_path: Path) -> None:
    result = evaluated(write(tmp_path, a=4, b=4, c=4), by_person, "--wanted-fmr", "1e-4")
    assert result["recommended"][0]["threshold"] is None
    told = summary(result)
    assert "FMR 10⁻⁴: not measurable with 48 impostor pairs; it needs 30,000, such as one photo each of 246" in told
    rows = {row["wanted_fmr"]: row for row in result["comparisons"]["rows"]}
    assert (rows[1e-1]["support"], rows[1e-2]["support"]) == ("uncertain", "not measurable")
    assert rows[1e-6]["threshold"] is None
    assert "VERIFY_THRESHOLD" not in told


# --- Telling ---------------------------------------------------------------------------------------------------------


def a_rate(errors: int, trials: int, low: float, high: float) -> dict[str, Any]:
    share = errors / trials if trials else None
    return {"errors": errors, "trials": trials, "share": share, "low": low, "high": high}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (a_rate(0, 400, 0.0, 0.0095), "none of 400 (at most 0.95 %)"),
        (a_rate(400, 400, 0.9903, 1.0), "all of 400 (at least 99.0 %)"),
        (a_rate(0, 0, 0.0, 1.0), "not measurable: nothing to count"),
        (a_rate(1, 30_000, 0.000006, 0.00019), "0.0033 % (0.0006 to 0.019 %)"),
        (a_rate(29_999, 30_000, 0.9998, 0.999999), "> 99.9 % (> 99.9 to > 99.9 %)"),
        (a_rate(12, 100, 0.07, 0.198), "12.0 % (7.00 to 19.8 %)"),
    ],
)
def test_nothing_seen_is_not_called_none_and_less_than_all_is_not_called_all(found: dict[str, Any], said: str) -> None:
    assert rate_text(found) == said


def test_small_shares_are_told_in_powers_of_ten() -> None:
    assert [power_of_ten(one) for one in (0.00012, 0.05, 0.25)] == ["1.2·10⁻⁴", "5.0·10⁻²", "25.0 %"]


class Elements(html.parser.HTMLParser):
    """Every element's name and attributes, and whether they are closed in their order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_loads_nothing_names_nobody_and_is_well_formed(tmp_path: Path) -> None:
    people = {f"Person<{one}>": 3 for one in range(8)}
    write(tmp_path / "photos", **people)
    (tmp_path / "groups.csv").write_text("identity,group\n" + "".join(f"{one},<b>&\n" for one in people))
    page = report_page(evaluated(tmp_path / "photos", noise, groups=tmp_path / "groups.csv"))
    elements = Elements(page)
    assert elements.open == []
    drawn = {tag for tag, _ in elements.seen}
    assert {"img", "table"} <= drawn
    assert not drawn & {"script", "link", "svg", "image", "iframe", "object", "b"}
    sources = [str(given["src"]) for _, given in elements.seen if "src" in given]
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not any(name in ("href", "xlink:href") for _, given in elements.seen for name in given)
    assert not any(one in page for one in ("http:", "https:", "url(", "@import"))
    assert "Person" not in page
    assert len(sources) == 4
    for source in sources:
        figure = base64.b64decode(source.partition(",")[2])
        assert ElementTree.fromstring(figure).tag == "{http://www.w3.org/2000/svg}svg"
        assert b"Person" not in figure


def test_people_with_one_photo_each_leave_misses_unknown(tmp_path: Path) -> None:
    result = evaluated(write(tmp_path, **{f"p{one}": 1 for one in range(20)}), noise)
    told = summary(result)
    assert "nothing is known about misses" in told
    assert result["comparisons"]["equal_error_rate"] is None
    assert report_page(result).count("<img") == 2


def test_the_table_of_gallery_sizes_in_the_concepts_is_what_the_command_would_ask_for() -> None:
    page = (PROJECT / "docs" / "concepts.md").read_text(encoding="utf-8")
    rows = [
        row.strip("| ").split(" | ") for row in page.splitlines() if row.startswith("|") and row.endswith("people |")
    ]
    assert len(rows) == 4
    for size, fmr, trials, people in rows:
        needed = fmr_for_fpir(0.01, int(size.replace(",", "")))
        assert fmr == f"{needed:.1e}"
        assert trials == f"{LEAST_ERRORS / needed:,.0f}"
        number = int(people.split()[0].replace(",", ""))
        assert number * (number - 1) / 2 >= LEAST_ERRORS / needed > (number - 1) * (number - 2) / 2


# --- The whole command, on real (tiny) models ------------------------------------------------------------------------


def a_face_of(person: int, photo: int) -> Pixels:
    """What the tiny pack's detector takes for a face, in the middle of colours that its recogniser tells apart."""
    colours = np.random.default_rng(person).integers(0, 200, (40, 40, 3), dtype=np.uint8)
    image = np.asarray(cv2.resize(colours, (640, 640), interpolation=cv2.INTER_NEAREST), np.int16)
    image += np.random.default_rng(1000 * person + photo).integers(0, 40, image.shape, dtype=np.int16)
    image[320:352, 320:352] = 255
    return image.astype(np.uint8)


def test_the_command_writes_its_report_and_keeps_templates_only_where_it_was_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_pack(tmp_path / "pack")
    for person in range(4):
        for photo in range(3):
            path = tmp_path / "photos" / f"p{person}" / f"p{person}_{photo:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(cv2.imencode(".png", a_face_of(person, photo))[1]))
    (tmp_path / "photos" / "p0" / "broken.jpg").write_bytes(b"no photo")
    # It would end the process that decodes it.
    (tmp_path / "photos" / "p0" / "deadly.heic").write_bytes(heic_of_many(photos=100, metadata=7_000_000, pieces=30))
    command = ["evaluate", str(tmp_path / "photos"), "--face-model", str(tmp_path / "pack"), "--without-checks"]
    command += ["--data-dir", str(tmp_path / "data"), "--wanted-fmr", "0.1"]
    out = tmp_path / "data" / "evaluation"
    assert app.main(command) == 0
    assert sorted(one.name for one in out.iterdir()) == ["report.html", "report.json"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["data", "pack", "photos"]
    assert list(out.parent.iterdir()) == [out]
    result = json.loads((out / "report.json").read_text())
    assert (result["photos"]["templates"], result["failures"]["by_code"]) == (
        12,
        {"unsupported_format": 1, "unreadable_image": 1},
    )
    assert rate(result["recommended"][0]["fnmr"]) == (0, 12)
    assert result["recommended"][0]["line"] in capsys.readouterr().out
    (tmp_path / "photos" / "p0" / "deadly.heic").unlink()  # it takes seconds, and was seen above
    assert app.main([*command, "--cache", str(tmp_path / "cache")]) == 0
    assert len(list((tmp_path / "cache").iterdir())) == 1
    # Without the flag the checks decide, and refuse such pictures.
    command.remove("--without-checks")
    assert app.main(command) == 1


def test_the_widest_face_is_taken_only_where_the_checks_are_left_out(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    engine.faces = [a_face(), a_face(30)]
    pipeline = Pipeline(Settings(), engine, ScriptedAttributes(), ModelSlots(1, 0.0), decode)
    photo = jpeg(a_photo())
    with pytest.raises(FaceError, match="multiple_faces"):
        pipeline.template(photo)
    assert np.array_equal(pipeline.unchecked_template(photo), engine.template)
    engine.faces = []
    with pytest.raises(FaceError, match="no_face"):
        pipeline.unchecked_template(photo)
