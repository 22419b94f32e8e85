"""Reads ONNX files without their weights, makes onnxruntime's sessions of them, and rewrites what it runs slowly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data
from onnxruntime.capi import onnxruntime_pybind11_state

# onnxruntime's own errors, which share no base of their own: of a file that is no model, or of one that cannot run.
ORT_ERRORS: tuple[type[Exception], ...] = tuple(
    one for one in vars(onnxruntime_pybind11_state).values() if isinstance(one, type) and issubclass(one, Exception)
)

# Fields of onnx.proto, from the whole file inwards: ModelProto.graph, GraphProto.initializer, and of TensorProto the
# name and data_location, which tells whether the numbers lie in another file.
_GRAPH, _INITIALISER, _NAME, _DATA_LOCATION = 7, 5, 8, 14
# Further fields of TensorProto: dims, data_type, raw_data, external_data.
_DIMS, _DATA_TYPE, _RAW_DATA, _EXTERNAL_DATA = 1, 2, 9, 13
# Protocol Buffers' wire types; the others, of groups, are not in any ONNX file.
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5

# Shorter weights stay in the outline: shapes and the like, which are needed to understand a graph.
_SHORT_BYTES = 256


def session_options(threads: int, *, keep_memory: bool = True) -> onnxruntime.SessionOptions:
    """Options for a session whose runs take `threads` threads each; 0 takes all cores.

    Args:
        threads: of one run.
        keep_memory: whether the session keeps memory from run to run. A detector is quicker with it, by a third: its
            pictures are large. A recogniser is not, and holds 10 MiB less without; nor is the face attributes network.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = keep_memory
    # Spinning threads of one caller take the cores from the next: a quarter of the throughput with two callers.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def outline(path: Path, *, refer: bool = False) -> bytes:
    """Return a model as a serialised ModelProto whose initialisers have kept their names and whereabouts alone.

    The weights are skipped, not read: of a ResNet-100's 261 MB 0.2 are looked at, where `onnx.load` takes as long as
    onnxruntime does for a session.

    Args:
        path: the ONNX file.
        refer: whether initialisers keep their shapes, too, and refer to the file for their numbers, as ONNX's external
            data: then a session can be made of the outline.

    Raises:
        ValueError: the file is no ONNX model, or is cut short. What is wrong within its parts shows when the
            outline is parsed, or the file loaded.
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        end = os.fstat(stream.fileno()).st_size
        return _outlined(stream, end, (_GRAPH, _INITIALISER), path.name if refer else "")


def _outlined(stream: BinaryIO, end: int, within: tuple[int, ...], referred: str) -> bytes:
    """Copy the message up to `end`: of the last of that path of messages the fields to be kept, of the others all."""
    kept = bytearray()
    kept_fields = (_NAME, _DATA_LOCATION, _DIMS, _DATA_TYPE) if referred else (_NAME, _DATA_LOCATION)
    while (start := stream.tell()) < end:
        key = _varint(stream)
        field, wire = key >> 3, key & 7
        if wire == _VARINT:
            _varint(stream)
            length = 0  # of the field after the number
        elif wire == _LENGTH:
            length = _varint(stream)
        elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
            length = 8 if wire == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"no Protocol Buffers at byte {start}")
        body = stream.tell()
        if body + length > end:
            raise ValueError(f"what begins at byte {start} goes on past its end")
        if wire == _LENGTH and within and field == within[0]:
            part = _outlined(stream, body + length, within[1:], referred)
            kept += _as_varint(key) + _as_varint(len(part)) + part
        elif within or field in kept_fields or (referred and field == _RAW_DATA and length < _SHORT_BYTES):
            stream.seek(start)
            kept += stream.read(body + length - start)
        else:
            stream.seek(body + length)
            if referred and field == _RAW_DATA:
                kept += _reference(referred, body, length)
    return bytes(kept)


def _reference(name: str, offset: int, length: int) -> bytes:
    """The fields of a TensorProto whose numbers are `length` bytes at `offset` of the file of this name."""
    tensor = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", name), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return bytes(tensor.SerializeToString())


def _varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            break
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("a number that does not end")


def _as_varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def session_without_prelu(path: Path, threads: int) -> onnxruntime.InferenceSession | None:
    """Make a session that computes each PRelu as `a x + (1 - a) relu(x)`; None if the model has none.

    onnxruntime's own PRelu is slow and leaves the blocked layout that its convolutions compute in. The scalings are
    depthwise convolutions here, which stay in it. The weights are read from the file itself: only the graph differs.

    Args:
        path: a verified ONNX file.
        threads: of one run; 0 takes all cores.

    Raises:
        ValueError, OSError, onnxruntime's errors: the file cannot be read so.
    """
    model = onnx.load_model_from_string(outline(path, refer=True))
    graph = model.graph
    tensors = {one.name: one for one in graph.initializer}
    slopes = {node.output[0]: _slopes(node, tensors, path.parent) for node in graph.node if node.op_type == "PRelu"}
    if not slopes or any(values is None for values in slopes.values()):
        return None
    nodes = []
    for node in graph.node:
        values = slopes.get(node.output[0])
        if values is None:
            nodes.append(node)
            continue
        x, y = node.input[0], node.output[0]
        nodes.append(helper.make_node("Relu", [x], [f"{y}/relu"]))
        for part, source, scale in (("all", x, values), ("positive", f"{y}/relu", 1 - values)):
            weight = f"{y}/{part}_scale"
            graph.initializer.append(numpy_helper.from_array(scale.reshape(-1, 1, 1, 1), weight))
            nodes.append(
                helper.make_node("Conv", [source, weight], [f"{y}/{part}"], group=scale.size, kernel_shape=[1, 1])
            )
        nodes.append(helper.make_node("Add", [f"{y}/all", f"{y}/positive"], [y]))
    del graph.node[:]
    graph.node.extend(nodes)
    options = session_options(threads, keep_memory=False)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _slopes(node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto], folder: Path) -> npt.NDArray[Any] | None:
    """A PRelu's slope for each channel, float32[c]; None if it has others than one constant a channel."""
    tensor = tensors.get(node.input[1])
    if tensor is None or list(tensor.dims[1:]) != [1, 1] or tensor.data_type != onnx.TensorProto.FLOAT:
        return None
    if tensor.dims[0] == 1:  # one for all, as PyTorch's nn.PReLU() has by default: of how many it does not say
        return None
    if uses_external_data(tensor):
        read = onnx.TensorProto()
        read.CopyFrom(tensor)
        load_external_data_for_tensor(read, str(folder))
        tensor = read
    return np.asarray(numpy_helper.to_array(tensor), np.float32).ravel()
