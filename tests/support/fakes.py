"""Scripted stand-ins for the models, and small real packs that tests make themselves."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.base import MEAN_FACE, Face, Template
from engines.face_attributes import FaceAttributes
from photos.pixels import Pixels

DIMENSION = 8


def a_face(
    inter_eye_distance: float = 60.0,
    centre: tuple[float, float] = (160.0, 140.0),
    roll_deg: float = 0.0,
) -> Face:
    """A frontal face whose eyes' midpoint lies at `centre`."""
    turn = np.deg2rad(roll_deg)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = (MEAN_FACE[:, :2] * inter_eye_distance) @ rotation.T + centre
    width = 2.0 * inter_eye_distance
    box = np.array([centre[0] - width / 2, centre[1] - width / 2, centre[0] + width / 2, centre[1] + width])
    return Face(box.astype(np.float32), 0.9, points.astype(np.float32))


def a_photo(skin_bgr: tuple[int, int, int] = (130, 160, 200), size: tuple[int, int] = (360, 320)) -> Pixels:
    """A skin-coloured photo with plenty of fine detail, sharp and well lit: every check but detection passes."""
    grain = np.random.default_rng(7).normal(0, 24, (*size, 1))
    return np.clip(np.array(skin_bgr) + grain, 0, 255).astype(np.uint8)


def jpeg(image: Pixels) -> bytes:
    return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1])


def a_template(seed: int) -> Template:
    vector = np.random.default_rng(seed).normal(size=DIMENSION).astype(np.float32)
    return np.asarray(vector / np.linalg.norm(vector), np.float32)


def packaged(package: str, *parts: str) -> bytes:
    """A file that an installed package carries."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.joinpath(*parts).read_bytes()


def packaged_photo(package: str, *parts: str) -> Pixels:
    """A photo that an installed package carries, as uint8[h, w, 3] BGR."""
    data = np.frombuffer(packaged(package, *parts), np.uint8)
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


def a_portrait() -> Pixels:
    """A real photo of one person that passes every check; its face is `PORTRAIT_FACE`."""
    return packaged_photo("skimage", "data", "astronaut.png")


PORTRAIT_FACE = a_face(42.5, (225.0, 101.0), -4.0)


class ScriptedEngine:
    """Finds the faces and gives the template that a test sets; `hold` keeps detection busy until it is released."""

    name = "scripted-v1"
    dimension = DIMENSION
    cosine_at_half = 0.5

    def __init__(self) -> None:
        self.faces: list[Face] = [a_face()]
        self.template: Template = a_template(1)
        self.templates: list[Template] = []
        self.detections = 0
        self.frames = 0
        self.frame_faces: list[list[Face]] = []
        self.embeddings = 0
        self.released = threading.Event()
        self.released.set()

    def describe(self) -> str:
        return "a scripted model"

    def detect(self, image: Pixels) -> list[Face]:
        self.detections += 1
        assert self.released.wait(20)
        return self.faces

    def detect_in_frame(self, image: Pixels) -> list[Face]:
        self.frames += 1
        return self.frame_faces.pop(0) if self.frame_faces else self.faces

    def embed(self, image: Pixels, face: Face) -> Template:
        self.embeddings += 1
        return self.templates.pop(0) if self.templates else self.template


class ScriptedAttributes:
    """Sees whatever attributes a test sets."""

    def __init__(self) -> None:
        self.seen = FaceAttributes(mask=0.0, sunglasses=0.0, other=0.0, hidden=0.0)

    def read(self, aligned: Pixels) -> FaceAttributes:
        return self.seen

    def glance(self, crops: Sequence[Pixels]) -> list[FaceAttributes]:
        return [self.seen] * len(crops)


# The tiny pack's "faces" are white squares, which no gate for photographs would pass.
NO_GATES = {
    "MIN_INTER_EYE_PX": "0",
    "MAX_HEAD_SIZE": "10",
    "MIN_FACE_IN_FRAME": "0",
    "MIN_SHARPNESS": "0",
    "MIN_LUMINANCE": "0",
    "MAX_UNDER_EXPOSURE": "1",
    "MAX_LUMINANCE": "1",
    "MAX_OVER_EXPOSURE": "1",
    "MIN_DYNAMIC_RANGE": "0",
    "MIN_UNIFORMITY": "0",
    "MAX_ROLL_DEG": "180",
    "MAX_YAW_DEG": "90",
    "MAX_PITCH_DEG": "90",
    "MAX_COLOUR_DISTANCE": "150",
    "MAX_HIDDEN": "1",
    "MAX_MASK": "1",
    "MAX_SUNGLASSES": "1",
    "MAX_COVERED": "1",
    "MAX_EYES_SHUT": "1",
    "MAX_STRETCH": "10",
    "MIN_LIKENESS": "-1",
    "MAX_DAMAGE": "1",
}


def write_tiny_pack(folder: Path, *, seed: int = 0) -> None:
    """Write a detector and a recogniser in the form of an InsightFace pack, a few kilobytes each.

    The detector (nine outputs, as SCRFD's) finds a face wherever a 32-pixel cell is white, with the landmarks of an
    upright face; the recogniser projects the averaged crop on fixed random directions. They are real models for a
    real loader, not recognisers of anything.
    """
    folder.mkdir(parents=True, exist_ok=True)
    detector = _tiny_detector()
    detector.doc_string = str(seed)
    onnx.save(detector, str(folder / "det.onnx"))
    onnx.save(_tiny_recogniser(seed), str(folder / "rec.onnx"))


def _tiny_detector() -> onnx.ModelProto:
    nodes: list[Any] = []
    weights: list[Any] = []
    outputs: dict[str, list[Any]] = {"score": [], "bbox": [], "kps": []}

    def constant(name: str, values: npt.NDArray[Any]) -> str:
        weights.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    for stride in (8, 16, 32):
        # A stride-32 cell whose mean is nearly white scores; the finer strides never do.
        slope, offset = (30.0, -25.0) if stride == 32 else (0.0, -20.0)
        kps = MEAN_FACE[:, :2].ravel()
        for kind, width, bias in (
            ("score", 1, [offset, -20.0]),
            ("bbox", 4, [1.0, 1.0, 1.0, 2.0] * 2),
            ("kps", 10, [*kps, *kps]),
        ):
            kernel = np.zeros((len(bias), 3, stride, stride), np.float32)
            if kind == "score":
                kernel[0] = slope / (3 * stride * stride)
            name = f"{kind}_{stride}"
            nodes.append(
                helper.make_node(
                    "Conv",
                    ["input", constant(f"{name}_w", kernel), constant(f"{name}_b", np.array(bias, np.float32))],
                    [f"{name}_conv"],
                    kernel_shape=[stride, stride],
                    strides=[stride, stride],
                )
            )
            last = f"{name}_conv"
            if kind == "score":
                nodes.append(helper.make_node("Sigmoid", [last], [f"{name}_sigmoid"]))
                last = f"{name}_sigmoid"
            nodes.append(helper.make_node("Transpose", [last], [f"{name}_nhwc"], perm=[0, 2, 3, 1]))
            shape = constant(f"{name}_shape", np.array([-1, width], np.int64))
            nodes.append(helper.make_node("Reshape", [f"{name}_nhwc", shape], [name]))
            outputs[kind].append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width]))
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, "height", "width"])
    return _model(nodes, [image], [*outputs["score"], *outputs["bbox"], *outputs["kps"]], weights)


def _tiny_recogniser(seed: int) -> onnx.ModelProto:
    directions = np.random.default_rng(seed).normal(size=(147, 512)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["data"], ["pooled"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "directions"], ["embedding"]),
    ]
    crop = helper.make_tensor_value_info("data", TensorProto.FLOAT, ["n", 3, 112, 112])
    out = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 512])
    return _model(nodes, [crop], [out], [numpy_helper.from_array(directions, "directions")])


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any]) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializer=weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return model
