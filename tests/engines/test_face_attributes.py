"""The face attributes network as it ships: what it must see on a real face, and what it must not mind."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.face_attributes import FaceAttributes, FaceAttributesModel
from engines.model_files import ModelUnavailable
from face_checks import FRAME_EYE_CENTRE_PX, aligned_face
from photos.pixels import Pixels
from settings import PROJECT, Settings
from tests.support.fakes import PORTRAIT_FACE, a_portrait

LIMITS = Settings()
EYE, MOUTH = 22.0, 44.0  # pixels from the point between the eyes, across and down


@pytest.fixture(scope="module")
def model() -> FaceAttributesModel:
    return FaceAttributesModel(PROJECT / "models")


@pytest.fixture(scope="module")
def face() -> Pixels:
    """A clean face, cut out as the service cuts it."""
    return aligned_face(a_portrait(), PORTRAIT_FACE)


def painted(
    face: Pixels, outline: list[tuple[float, float]], colour: tuple[int, int, int], opacity: float = 1
) -> Pixels:
    """The face with a polygon over it; its corners in pixels from the point between the eyes."""
    over = face.copy()
    cv2.fillPoly(over, [np.round(np.array(outline) + FRAME_EYE_CENTRE_PX).astype(np.int32)], colour, cv2.LINE_AA)
    return np.asarray(cv2.addWeighted(over, opacity, face, 1 - opacity, 0), np.uint8)


def mask_from(top: float) -> list[tuple[float, float]]:
    return [(-40, top), (0, top - 6), (40, top), (36, 62), (0, 80), (-36, 62)]


def lenses(face: Pixels, opacity: float) -> Pixels:
    for side in (-1, 1):
        outline = [(side * EYE + 17 * np.cos(t), 2 + 13 * np.sin(t)) for t in np.linspace(0, 2 * np.pi, 24)]
        face = painted(face, outline, (18, 14, 14), opacity)
    return painted(face, [(-6, -2), (6, -2), (6, 2), (-6, 2)], (18, 14, 14))


def verdict(seen: FaceAttributes) -> set[str]:
    found = {"mask": seen.mask > LIMITS.max_mask, "sunglasses": seen.sunglasses > LIMITS.max_sunglasses}
    return {name for name, is_there in {**found, "other": seen.other > LIMITS.max_covered}.items() if is_there}


def test_a_free_face_is_not_covered(model: FaceAttributesModel, face: Pixels) -> None:
    assert verdict(model.read(face)) == set()


@pytest.mark.parametrize("colour", [(230, 190, 120), (245, 245, 245), (25, 25, 25), (60, 60, 170)])
def test_a_mask_of_any_colour_is_seen(model: FaceAttributesModel, face: Pixels, colour: tuple[int, int, int]) -> None:
    assert "mask" in verdict(model.read(painted(face, mask_from(22), colour)))


def test_a_mask_under_the_chin_leaves_the_face_free(model: FaceAttributesModel, face: Pixels) -> None:
    assert verdict(model.read(painted(face, mask_from(74), (230, 190, 120)))) == set()


def test_dark_lenses_are_seen_and_clear_ones_are_not_minded(model: FaceAttributesModel, face: Pixels) -> None:
    assert "sunglasses" in verdict(model.read(lenses(face, 0.97)))
    assert verdict(model.read(lenses(face, 0.1))) == set()


@pytest.mark.parametrize(
    "outline",
    [[(-14, 10), (30, 6), (34, 90), (-10, 94)], [(-60, 32), (60, 32), (60, 58), (-60, 58)]],
    ids=["a phone upright", "a bar over the mouth"],
)
def test_something_over_the_lower_face_is_seen(
    model: FaceAttributesModel, face: Pixels, outline: list[tuple[float, float]]
) -> None:
    assert verdict(model.read(painted(face, outline, (40, 40, 44))))


def stretched(width: float) -> Pixels:
    """The face of a photo that somebody made so many times as wide."""
    photo = a_portrait()
    landmarks = (PORTRAIT_FACE.landmarks * (width, 1)).astype(np.float32)
    size = (round(photo.shape[1] * width), photo.shape[0])
    return aligned_face(np.asarray(cv2.resize(photo, size), np.uint8), replace(PORTRAIT_FACE, landmarks=landmarks))


def test_a_wider_and_a_higher_photo_are_stretched_and_the_photo_itself_is_not(model: FaceAttributesModel) -> None:
    high, itself, wide = (model.read(stretched(width)).stretch for width in (1 / 1.9, 1.0, 1.9))
    assert high < 1 / LIMITS.max_stretch < itself < LIMITS.max_stretch < wide


def test_compression_and_noise_cost_likeness(model: FaceAttributesModel, face: Pixels) -> None:
    file = cv2.imencode(".jpg", face, [cv2.IMWRITE_JPEG_QUALITY, 3])[1]
    compressed = np.asarray(cv2.imdecode(file, cv2.IMREAD_COLOR), np.uint8)
    noise = np.random.default_rng(5).normal(0, 60, face.shape)
    noisy = np.clip(face + noise, 0, 255).astype(np.uint8)
    assert model.read(face).likeness > LIMITS.min_likeness
    assert max(model.read(compressed).likeness, model.read(noisy).likeness) < LIMITS.min_likeness


@pytest.mark.parametrize(("quality", "noise"), [(6, 0), (95, 30)], ids=["compressed", "noisy"])
def test_compression_and_noise_are_damage_where_they_leave_much_likeness(
    model: FaceAttributesModel, face: Pixels, quality: int, noise: float
) -> None:
    noisy = np.clip(face + np.random.default_rng(5).normal(0, noise, face.shape), 0, 255).astype(np.uint8)
    file = cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    damaged = np.asarray(cv2.imdecode(file, cv2.IMREAD_COLOR), np.uint8)
    assert model.read(face).damaged < 0.5 * LIMITS.max_damage
    assert model.read(damaged).damaged > LIMITS.max_damage
    assert model.read(damaged).likeness > LIMITS.min_likeness


def test_open_eyes_are_open_and_lids_drawn_over_them_shut_them(model: FaceAttributesModel, face: Pixels) -> None:
    lids = face.copy()
    rows = np.arange(160, dtype=np.float32)
    for centre in (57.5, 101.5):  # the skin between brow and lid, stretched over the eye
        columns = np.arange(round(centre) - 11, round(centre) + 12, dtype=np.float32)
        source = np.interp(rows, [0, 50, 68, 70, 159], [0, 50, 59, 70, 159]).astype(np.float32)
        grid = np.meshgrid(columns, source)
        lids[:, columns.astype(int)] = cv2.remap(face, grid[0].astype(np.float32), grid[1], cv2.INTER_LINEAR)
    assert model.read(face).eyes_shut < LIMITS.max_eyes_shut
    assert model.read(lids).eyes_shut > model.read(face).eyes_shut


def test_the_pose_of_a_mirror_image_is_mirrored(model: FaceAttributesModel, face: Pixels) -> None:
    seen, mirrored = model.read(face), model.read(np.ascontiguousarray(face[:, ::-1]))
    assert (mirrored.yaw, mirrored.pitch, mirrored.roll) == pytest.approx((-seen.yaw, seen.pitch, -seen.roll), abs=0.01)


def test_a_glance_sees_about_what_a_reading_sees(model: FaceAttributesModel, face: Pixels) -> None:
    (glance,), seen = model.glance([face]), model.read(face)
    assert (glance.yaw, glance.pitch, glance.roll) == pytest.approx((seen.yaw, seen.pitch, seen.roll), abs=6)
    assert glance.likeness == pytest.approx(seen.likeness, abs=0.1)


def test_a_glance_leaves_the_mirror_image_out(model: FaceAttributesModel, face: Pixels) -> None:
    mirrored = np.ascontiguousarray(face[:, ::-1])
    assert model.read(face).pitch == pytest.approx(model.read(mirrored).pitch, abs=0.01)
    one, other = model.glance([face, mirrored])
    assert one.pitch != pytest.approx(other.pitch, abs=0.01)


def test_faces_that_are_glanced_at_together_are_read_as_each_alone(model: FaceAttributesModel, face: Pixels) -> None:
    several = [face, np.ascontiguousarray(face[:, ::-1]), np.full_like(face, 127)]
    for together, alone in zip(model.glance(several), [model.glance([one])[0] for one in several], strict=True):
        assert astuple(together) == pytest.approx(astuple(alone), abs=1e-3)
    assert model.glance([]) == []


def test_probabilities_are_probabilities(model: FaceAttributesModel) -> None:
    for value in (0, 127, 255):
        seen = model.read(np.full((160, 160, 3), value, np.uint8))
        assert all(0 <= one <= 1 for one in (seen.mask, seen.sunglasses, seen.other, seen.hidden, seen.eyes_shut))


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_without_its_file_the_service_does_not_start(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "face_attributes.onnx").write_bytes(content)
    with pytest.raises(ModelUnavailable, match=r"face_attributes\.onnx"):
        FaceAttributesModel(tmp_path)


OUTPUTS = [
    "mask", "sunglasses", "other", "eyes", "nose", "mouth", "shut", "hand", "spectacles", "yaw", "pitch", "roll",
    "stretch", "likeness", "damaged",
]  # fmt: skip


def write_model(folder: Path, outputs: list[str] | None, values: list[float]) -> None:
    """A network that tells the same of every face, and perhaps what its outputs are called."""
    nodes = [
        helper.make_node("Cast", ["crops"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["means"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Mul", ["means", "nothing"], ["zeros"]),
        helper.make_node("Reshape", ["zeros", "column"], ["one_each"]),
        helper.make_node("Add", ["one_each", "values"], ["attributes"]),
    ]
    crops = helper.make_tensor_value_info("crops", TensorProto.UINT8, ["n", 160, 160, 3])
    attributes = helper.make_tensor_value_info("attributes", TensorProto.FLOAT, ["n", len(values)])
    weights = [
        numpy_helper.from_array(np.array([values], np.float32), "values"),
        numpy_helper.from_array(np.array(0, np.float32), "nothing"),
        numpy_helper.from_array(np.array([-1, 1], np.int64), "column"),
    ]
    graph = helper.make_graph(nodes, "constant", [crops], [attributes], initializer=weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    if outputs is not None:
        helper.set_model_props(model, {"outputs": ",".join(outputs)})
    onnx.save(model, str(folder / "face_attributes.onnx"))


def test_an_output_is_found_by_its_name_and_one_that_nothing_reads_is_no_mistake(tmp_path: Path) -> None:
    names = [*reversed(OUTPUTS), "blend"]
    write_model(tmp_path, names, [float(place) for place in range(len(names))])
    seen = FaceAttributesModel(tmp_path).read(np.zeros((160, 160, 3), np.uint8))
    assert (seen.mask, seen.likeness, seen.pitch) == tuple(map(names.index, ("mask", "likeness", "pitch")))
    assert seen.hidden == seen.eyes_hidden == names.index("eyes")
    assert seen.stretch == 2.0 ** names.index("stretch")


@pytest.mark.parametrize("missing", OUTPUTS)
def test_a_network_without_an_output_that_is_read_is_refused(tmp_path: Path, missing: str) -> None:
    others = [name for name in OUTPUTS if name != missing]
    write_model(tmp_path, others, [0.5] * len(others))
    with pytest.raises(ModelUnavailable, match="lacks an output"):
        FaceAttributesModel(tmp_path)


@pytest.mark.parametrize("outputs", [None, [], OUTPUTS[:-1], [*OUTPUTS, "blend"]])
def test_a_network_whose_outputs_have_no_names_or_others_than_it_has_is_refused(
    tmp_path: Path, outputs: list[str] | None
) -> None:
    write_model(tmp_path, outputs, [0.5] * len(OUTPUTS))
    with pytest.raises(ModelUnavailable, match="lacks an output"):
        FaceAttributesModel(tmp_path)


def test_the_models_runtime_reports_to_nobody(tmp_path: Path) -> None:
    # With an environment of its own: in continuous integration onnxruntime keeps quiet by itself.
    load = (
        "from bootstrap import prepare_libraries; prepare_libraries();"
        "from engines.face_attributes import FaceAttributesModel; from settings import PROJECT;"
        "FaceAttributesModel(PROJECT / 'models')"
    )
    subprocess.run([sys.executable, "-c", load], cwd=PROJECT, env={"HOME": str(tmp_path)}, check=True, timeout=60)
    assert list(tmp_path.rglob("*")) == []  # otherwise: .cache/Microsoft/DeveloperTools/.onnxruntime/deviceid
