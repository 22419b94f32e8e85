"""Owns dlib's two networks as onnxruntime sessions: the face descriptor, and the CNN detector behind its pyramid."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from engines.model_files import ModelFile, ModelUnavailable
from engines.onnx_sessions import session_options
from photos.pixels import Pixels

Floats = npt.NDArray[np.float32]
Tile = tuple[int, int, int, int]  # left, top, width, height

DESCRIPTOR = ModelFile(
    name="dlib_face_recognition_resnet_model_v1.dat",
    size=22466066,
    sha256="55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
    task="recognition",
)
DETECTOR = ModelFile(
    name="mmod_human_face_detector.dat",
    size=729940,
    sha256="4cb19393e2fbaf2b1609a9319ad5386618c886a6234ec1b971f3e87c85d87fe6",
    task="detection",
)
MEAN = np.array([122.782, 117.001, 104.298], np.float32)  # of red, green and blue, in both files


class _Graph:
    """A network under construction, which takes its weights from dlib's file in the file's own order."""

    def __init__(self, file: ModelFile, folder: Path) -> None:
        path = folder / file.name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ModelUnavailable(
                f"{path} of the package face-recognition-models cannot be read: {error.strerror}"
            ) from error
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise ModelUnavailable(
                f"{path} is not the file of face-recognition-models 0.3: "
                "pip install --force-reinstall face-recognition-models==0.3.0"
            )
        self._weights = _weights(data)
        self._model = onnx.ModelProto(ir_version=8, opset_import=[helper.make_opsetid("", 17)])
        self._graph = self._model.graph
        self._graph.name = file.name

    def node(self, kind: str, *inputs: str | npt.NDArray[Any], **attributes: Any) -> str:
        """Add a node; arrays among the inputs become constants. Returns the name of its output."""
        names = [one if isinstance(one, str) else self._constant(one) for one in inputs]
        output = f"n{len(self._graph.node)}"
        self._graph.node.append(helper.make_node(kind, names, [output], **attributes))
        return output

    def _constant(self, value: npt.NDArray[Any]) -> str:
        name = f"c{len(self._graph.initializer)}"
        self._graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def convolution(self, x: str, filters: int, side: int, *, stride: int = 1, affine: bool = True) -> str:
        """dlib's `con`, with the `affine` behind it folded in: padded by half the filter's side, but for a stride."""
        values = next(self._weights)
        kernel, bias = values[:-filters].reshape(filters, -1, side, side), values[-filters:]
        if affine:
            gamma, beta = np.split(next(self._weights), 2)
            kernel, bias = kernel * gamma[:, None, None, None], bias * gamma + beta
        pad = side // 2 if stride == 1 else 0
        return self.node("Conv", x, kernel, bias, strides=[stride] * 2, pads=[pad] * 4)

    def matrix(self, x: str, rows: int) -> str:
        """dlib's `fc_no_bias` of `rows` inputs."""
        return self.node("MatMul", x, next(self._weights).reshape(rows, -1))

    def session(self, output: str, shape: list[str | int], threads: int) -> onnxruntime.InferenceSession:
        """Make a session of the network from `image`, float32 of this shape, to `output`."""
        self._graph.input.append(helper.make_tensor_value_info("image", TensorProto.FLOAT, shape))
        self._graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
        return onnxruntime.InferenceSession(
            self._model.SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"]
        )


class _Reader:
    """A place in a file of dlib's."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at

    def integers(self, count: int) -> list[int]:
        """Non-negative ones: a byte that counts an integer's bytes, then those, the lowest first."""
        read = []
        for _ in range(count):
            begin, self._at = self._at + 1, self._at + 1 + self._data[self._at]
            read.append(int.from_bytes(self._data[begin : self._at], "little"))
        return read

    def tensor(self) -> Floats:
        _version, *sizes = self.integers(5)
        begin, self._at = self._at, self._at + 4 * math.prod(sizes)
        return np.frombuffer(self._data[begin : self._at], "<f4")


def _weights(data: bytes) -> Iterator[Floats]:
    """The weights of each layer that has any, in the order in which a picture meets them.

    Layers are found by their names: which bytes these are, the digest has told. Of a convolution they are its filters
    and then their biases, of what scales channels the factors and then the sums, of the last layer a matrix.
    """
    for name in re.finditer(rb"\x01[\x04-\x07](?:con_4|affine_|bn_con2|fc_2)", data):
        reader = _Reader(data, name.end())
        if name[0].endswith(b"fc_2"):
            reader.integers(2)
        values = reader.tensor()
        if name[0].endswith(b"bn_con2"):
            # As it was trained, not yet made an `affine`, which dlib does on loading.
            reader.integers(2 * 5)
            _, _, means, variances = (reader.tensor() for _ in range(4))
            gamma, beta = np.split(values, 2)
            gamma = gamma / np.sqrt(variances + np.float32(1e-4))
            values = np.concatenate([gamma, beta - gamma * means])
        yield values


def _levelled(pixels: Pixels) -> Floats:
    """Red, green and blue as both networks take them."""
    return (pixels.astype(np.float32) - MEAN) / np.float32(256)


class Descriptor:
    """The 128-d face descriptor, a ResNet of 29 layers (dlib's dnn_face_recognition_ex.cpp)."""

    # Filters, how many residual blocks, and whether the first of them halves the picture.
    LEVELS = ((32, 3, False), (64, 4, True), (128, 3, True), (256, 3, True), (256, 1, True))

    def __init__(self, folder: Path, threads: int) -> None:
        """Load it from its file in `folder`; `threads` of one run, 0 takes all cores. Raises ModelUnavailable."""
        graph = _Graph(DESCRIPTOR, folder)
        x = graph.node("Relu", graph.convolution("image", 32, 7, stride=2))
        x = graph.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2])
        side, depth = 35, 32
        for filters, blocks, halves in self.LEVELS:
            for block in range(blocks):
                stride = 2 if halves and block == 0 else 1
                y = graph.node("Relu", graph.convolution(x, filters, 3, stride=stride))
                y = graph.convolution(y, filters, 3)
                if stride == 2:
                    # What is smaller or has fewer channels is filled up with zeros, as dlib's `add_prev` does.
                    x = graph.node("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
                    short = side // 2 - (side - 1) // 2
                    x = graph.node("Pad", x, np.array([0, 0, 0, 0, 0, filters - depth, 0, 0]))
                    y = graph.node("Pad", y, np.array([0, 0, 0, 0, 0, 0, short, short]))
                    side, depth = side // 2, filters
                x = graph.node("Relu", graph.node("Add", x, y))
        x = graph.node("Flatten", graph.node("GlobalAveragePool", x))
        x = graph.matrix(x, filters)
        self._session = graph.session(x, ["n", 3, 150, 150], threads)

    def of(self, chips: Pixels) -> Floats:
        """Describe aligned faces, uint8[n, 150, 150, 3] RGB, as float32[n, 128]. Thread-safe."""
        planes = _levelled(chips).transpose(0, 3, 1, 2)
        return np.asarray(self._session.run(None, {"image": np.ascontiguousarray(planes)})[0])


class Detector:
    """The detector of faces by a fully convolutional network (dlib's dnn_mmod_face_detection_ex.cpp)."""

    # The file's options: what scores above zero is a face of this side in its level of the pyramid, unless its box
    # and a surer one's share more than this of the box around both.
    SIDE, OVERLAP = 80, 0.3382761
    # Where the network's first answer stands in the mosaic, and how far apart they are: three filters of 5 at stride 2.
    FIRST, STEP = 14, 8

    def __init__(self, folder: Path, threads: int) -> None:
        """Load it from its file in `folder`; `threads` of one run, 0 takes all cores. Raises ModelUnavailable."""
        graph = _Graph(DETECTOR, folder)
        x = "image"
        for filters, stride in ((16, 2), (32, 2), (32, 2), (45, 1), (45, 1), (45, 1)):
            x = graph.node("Relu", graph.convolution(x, filters, 5, stride=stride))
        x = graph.convolution(x, 1, 9, affine=False)
        self._session = graph.session(x, [1, 3, "height", "width"], threads)

    def faces(self, image: Pixels) -> list[tuple[npt.NDArray[np.int64], float]]:
        """Find faces of 80 pixels and more. Thread-safe.

        Args:
            image: uint8[h, w, 3] RGB, no side shorter than 10.

        Returns:
            int64[4] (left, top, right, bottom, all inside the box) and score of each, the surest first.
        """
        tiles, height, width = _layout(*image.shape[:2])
        mosaic = np.zeros((height, width, 3), np.float32)
        level = _levelled(image)
        for left, top, across, down in tiles:
            level = _resized(level, down, across)
            mosaic[top : top + down, left : left + across] = level
        planes = np.ascontiguousarray(mosaic.transpose(2, 0, 1)[None])
        scores = np.asarray(self._session.run(None, {"image": planes})[0])[0, 0]
        found: list[tuple[npt.NDArray[np.int64], float]] = []
        for at in np.argsort(-scores, axis=None)[: np.count_nonzero(scores > 0)]:
            row, column = np.unravel_index(at, scores.shape)
            box = self._box(tiles, self.STEP * int(column) + self.FIRST, self.STEP * int(row) + self.FIRST)
            if not found or bool((_overlaps(box, np.stack([other for other, _ in found])) <= self.OVERLAP).all()):
                found.append((box, float(scores[row, column])))
        return found

    def _box(self, tiles: list[Tile], x: int, y: int) -> npt.NDArray[np.int64]:
        """The face whose centre lies at x, y of the mosaic, in the picture."""
        left_top, sizes = np.hsplit(np.array(tiles), 2)
        away = np.array([x, y]) - np.clip([x, y], left_top, left_top + sizes - 1)
        nearest = int(np.argmin(np.hypot(away[:, 0], away[:, 1])))
        left, top = left_top[nearest]
        half = (self.SIDE - 1) / 2
        edges = np.array([x - left - half, y - top - half, x - left + half, y - top + half])
        for _ in range(nearest):
            edges = edges * 1.2 + 0.3
        rounded = np.trunc(edges + np.copysign(0.5, edges))  # a half goes away from zero
        return np.asarray(rounded, np.int64)


def _layout(height: int, width: int) -> tuple[list[Tile], int, int]:
    """Where dlib's tiled pyramid has its levels, each 5/6 of the one before, and its own height and width."""
    sizes: list[tuple[int, int]] = []
    rows, columns = height, width
    while not sizes or (columns > 0 and rows >= 5):
        sizes.append((columns, rows))
        rows, columns = int(5 / 6 * rows), int(5 / 6 * columns)
    between, around = 10, 11
    total = sum(rows + between for _, rows in sizes) - 2 * between
    tiles: list[Tile] = []
    top = around
    for columns, rows in sizes:
        # Down the left side, until one fits beside the last, and half of what follows the first is placed.
        fits = bool(tiles) and columns <= width - tiles[-1][2] - between
        if fits and 2 * (top - around - height) >= total - height:
            break
        tiles.append((around, top, columns, rows))
        top += rows + between
    end = bottom = top - between
    for columns, rows in sizes[len(tiles) :]:
        # Up the right side, as far as the first.
        if bottom - rows < around + height:
            break
        tiles.append((around + width - columns, bottom - rows, columns, rows))
        bottom -= rows + between
    return tiles, end + around, width + 2 * around


def _resized(image: Floats, height: int, width: int) -> Floats:
    """Resize by linear interpolation with the corners' pixels on the corners' pixels, as dlib does."""
    (upper, lower, down), (left, right, across) = (
        _between(old, new) for old, new in zip(image.shape[:2], (height, width), strict=True)
    )
    rows = image[upper] + (image[lower] - image[upper]) * down[:, None, None]
    return rows[:, left] + (rows[:, right] - rows[:, left]) * across[:, None]


def _between(old: int, new: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Floats]:
    """For each of `new` pixels the two of `old` that it lies between, and how near it is to the second."""
    at = np.arange(new) * ((old - 1) / max(new - 1, 1))
    first = np.minimum(at.astype(np.int64), old - 1)
    return first, np.minimum(first + 1, old - 1), (at - first).astype(np.float32)


def _overlaps(one: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The share that the common part of a box and each of int64[n, 4] has of the box around both, edges included."""
    common = np.clip(np.minimum(one[2:], others[:, 2:]) - np.maximum(one[:2], others[:, :2]) + 1, 0, None)
    around = np.maximum(one[2:], others[:, 2:]) - np.minimum(one[:2], others[:, :2]) + 1
    return np.asarray(common.prod(axis=1) / around.prod(axis=1), np.float64)
