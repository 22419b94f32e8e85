"""ONNX files: the outline is what the library reads, but for the weights; without PRelu a model computes the same."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from engines.onnx_files import outline, session_without_prelu
from tests.support.fakes import write_tiny_pack


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    write_tiny_pack(tmp_path)
    return tmp_path


def emptied(model: onnx.ModelProto) -> onnx.ModelProto:
    for one in model.graph.initializer:
        one.CopyFrom(TensorProto(name=one.name if one.HasField("name") else None))
    return model


@pytest.mark.parametrize("name", ["det.onnx", "rec.onnx"])
def test_an_outline_is_the_model_with_its_weights_emptied(pack: Path, name: str) -> None:
    whole = onnx.load(str(pack / name))
    assert onnx.load_model_from_string(outline(pack / name)) == emptied(whole)


def test_weights_are_skipped_wherever_their_numbers_stand_and_however_they_are_written(tmp_path: Path) -> None:
    model = onnx.ModelProto(ir_version=8, graph=onnx.GraphProto(name="g"))
    model.graph.initializer.add(name="floats", dims=[2], data_type=1, float_data=[1.5, 2.5])
    model.graph.initializer.add(name="raw", dims=[300], data_type=2, raw_data=bytes(300))
    model.graph.initializer.add(dims=[1], data_type=7, int64_data=[-1])
    # A second piece of the graph, which readers join to the first: a tensor's name after its numbers (4: a float
    # unpacked, 9: bytes), and numbers of fixed widths in fields that nobody knows.
    tensor = b"\x25\x00\x00\x80\x3f" + b"\x4a\x02\x00\x00" + b"\x42\x04last"
    piece = b"\x2a" + bytes([len(tensor)]) + tensor + b"\xf9\x07" + bytes(8) + b"\xfd\x07" + bytes(4)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString() + b"\x3a" + bytes([len(piece)]) + piece)
    whole = onnx.load(str(tmp_path / "m.onnx"))
    found = onnx.load_model_from_string(outline(tmp_path / "m.onnx"))
    assert [one.name for one in found.graph.initializer] == ["floats", "raw", "", "last"]
    assert found == emptied(whole)


@pytest.mark.parametrize("name", ["det.onnx", "rec.onnx"])
def test_a_file_that_is_cut_short_is_refused_wherever_the_library_refuses_it(pack: Path, name: str) -> None:
    data, cut = (pack / name).read_bytes(), pack / "cut.onnx"
    step = max(1, len(data) // 500)
    for length in [*range(0, len(data), step), *range(len(data) - 200, len(data))]:
        cut.write_bytes(data[:length])
        try:
            onnx.load(str(cut))
        except DecodeError:
            with pytest.raises((ValueError, DecodeError)):
                onnx.load_model_from_string(outline(cut))
        else:
            onnx.load_model_from_string(outline(cut))


@pytest.mark.parametrize(
    "damage",
    [
        b"\x3b\x3c",
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x3a\x05\x2a\x09",
        b"\xff",
        b"\x00damaged",
    ],
    ids=["a group", "a length without end", "a part longer than the whole", "half a number", "anything"],
)
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "damaged.onnx").write_bytes(damage)
    with pytest.raises((ValueError, DecodeError)):
        onnx.load_model_from_string(outline(tmp_path / "damaged.onnx"))


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A model that ends with 2 GB of weights: a hole, which takes no disk."""
    size = 2**31 - 100
    tensor = b"\x42\x01w\x4a" + varint(size)
    graph = b"\x2a" + varint(len(tensor) + size) + tensor
    with (tmp_path / "large.onnx").open("wb") as stream:
        stream.write(b"\x08\x08\x3a" + varint(len(graph) + size) + graph)
        stream.truncate(stream.tell() + size)
    return tmp_path / "large.onnx"


def test_weights_of_any_size_are_not_read(large: Path) -> None:
    tracemalloc.start()
    try:
        found = onnx.load_model_from_string(outline(large))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [one.name for one in found.graph.initializer] == ["w"]
    assert most < 2**20


def test_a_file_that_lacks_the_end_of_its_last_weights_is_refused_without_reading_them(large: Path) -> None:
    with large.open("rb+") as stream:
        stream.truncate(large.stat().st_size - 1)
    with pytest.raises(ValueError, match="goes on past its end"):
        outline(large)


def varint(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value >= 0x80 else bytes([value])


def write_prelu_model(path: Path, slopes: npt.NDArray[np.float32]) -> None:
    """A convolution and a PRelu of `slopes`, with random weights."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(16, 3, 3, 3)).astype(np.float32),
        "b": rng.normal(size=16).astype(np.float32),
        "slopes": slopes,
    }
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c"]), helper.make_node("PRelu", ["c", "slopes"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "prelu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16, 10, 10])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))


def test_without_prelu_a_model_computes_the_same_for_slopes_of_every_kind(tmp_path: Path) -> None:
    slopes = np.array([-0.5, 0.0, 0.25, 1.0, 1.7, 0.1, -1.2, 3.0] * 2, np.float32).reshape(16, 1, 1)
    write_prelu_model(tmp_path / "m.onnx", slopes)
    image = np.random.default_rng(1).normal(size=(2, 3, 12, 12)).astype(np.float32)
    whole = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    quicker = session_without_prelu(tmp_path / "m.onnx", threads=1)
    assert quicker is not None
    np.testing.assert_allclose(
        quicker.run(None, {"x": image})[0], whole.run(None, {"x": image})[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "shape", [(1,), (1, 1, 1), (16, 10, 1)], ids=["one for all", "PyTorch's one for all", "one for each row"]
)
def test_a_prelu_whose_slopes_are_not_one_for_each_channel_is_left_as_it_is(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    write_prelu_model(tmp_path / "m.onnx", np.full(shape, 0.2, np.float32))
    assert session_without_prelu(tmp_path / "m.onnx", threads=1) is None


def test_a_model_that_has_no_prelu_is_left_as_it_is(pack: Path) -> None:
    assert session_without_prelu(pack / "rec.onnx", threads=1) is None
