"""EMBEDDING_PRECISION and ORT_PROVIDERS: compared with the original, and no silent falling back."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import bootstrap
from bootstrap import load_engine
from engines import insightface_pack, model_files, reduced_precision
from engines.insightface_engine import InsightFaceEngine
from engines.model_files import ModelUnavailable
from photos.pixels import Pixels
from tests.support.fakes import write_tiny_pack

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def unavailable(precision: str) -> str:
    """Why a precision cannot be had on this machine; empty where it can."""
    try:
        reduced_precision.demand(precision)
    except ModelUnavailable as error:
        return str(error)
    return ""


def needs(precision: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(bool(unavailable(precision)), reason=unavailable(precision))


def small_recogniser(seed: int) -> onnx.ModelProto:
    """Five convolutions with random weights; the last brings 7 x 7 pixels down to a vector."""
    rng = np.random.default_rng(seed)
    nodes, kernels, last = [], [], "data"
    layers = [(3, 16, 3, 4), (16, 16, 3, 2), (16, 32, 3, 2), (32, 32, 3, 1), (32, 64, 7, 7)]
    for number, (wide, channels, side, stride) in enumerate(layers):
        kernel = rng.normal(0, np.sqrt(2 / wide) / side, (channels, wide, side, side)).astype(np.float32)
        kernels.append(numpy_helper.from_array(kernel, f"kernel{number}"))
        form: Any = {"strides": [stride, stride], "pads": [side // 2 if side == 3 else 0] * 4}
        nodes.append(helper.make_node("Conv", [last, f"kernel{number}"], [f"sum{number}"], **form))
        nodes.append(helper.make_node("Relu", [f"sum{number}"], [last := f"layer{number}"]))
    nodes[-1] = helper.make_node("Flatten", ["sum4"], ["embedding"])
    crop = helper.make_tensor_value_info("data", TensorProto.FLOAT, ["n", 3, 112, 112])
    out = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 64])
    graph = helper.make_graph(nodes, "small", [crop], [out], initializer=kernels)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


class Recogniser:
    """A small recogniser's file, and what an engine does with it."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.source = folder / "rec.onnx"
        onnx.save(small_recogniser(seed), str(self.source))
        self.digest = model_files.sha256_of(self.source)
        self.folder = folder / "int8"
        self.original = onnxruntime.InferenceSession(str(self.source), providers=["CPUExecutionProvider"])
        self.conversions = 0

    def embed(self, session: Any, crops: Sequence[Pixels]) -> npt.NDArray[np.float32]:
        self.conversions += isinstance(session, reduced_precision._Feeds)
        blobs = [(np.asarray(crop, np.float32).transpose(2, 0, 1)[None] - 127.5) / 127.5 for crop in crops]
        return np.concatenate([(session or self.original).run(None, {"data": blob})[0] for blob in blobs])

    def crops(self) -> list[Pixels]:
        rng = np.random.default_rng(1)
        return [np.kron(rng.integers(0, 256, (7, 7, 3), np.uint8), np.ones((16, 16, 1), np.uint8)) for _ in range(4)]

    def session(self, precision: str, threads: int = 1) -> reduced_precision.OpenVinoSession:
        return reduced_precision.session(
            precision,
            self.source,
            self.digest,
            self.folder,
            threads=threads,
            crops=self.crops,
            embed=self.embed,
        )

    def copy(self) -> Path:
        (copy,) = self.folder.glob("*.onnx")
        return copy


@pytest.mark.parametrize("precision", [pytest.param(one, marks=needs(one)) for one in ("bf16", "int8")])
@pytest.mark.parametrize("threads", [0, 1, 64])
def test_the_embeddings_are_nearly_the_originals_and_really_of_another_precision(
    tmp_path: Path, precision: str, threads: int
) -> None:
    recogniser = Recogniser(tmp_path)
    session = recogniser.session(precision, threads)
    ours, theirs = recogniser.embed(session, recogniser.crops()), recogniser.embed(None, recogniser.crops())
    cosines = np.vecdot(ours, theirs) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert reduced_precision.LEAST[precision][0] < cosines.mean() < 1 - 1e-6


@needs("bf16")
def test_threads_that_embed_at_once_get_what_is_theirs(tmp_path: Path) -> None:
    recogniser = Recogniser(tmp_path)
    session, crops = recogniser.session("bf16"), recogniser.crops()
    alone = recogniser.embed(session, crops)
    wrong: list[int] = []

    def check(number: int) -> None:
        for _ in range(50):
            if not np.array_equal(recogniser.embed(session, crops[number : number + 1])[0], alone[number]):
                wrong.append(number)

    threads = [threading.Thread(target=check, args=(number % len(crops),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@needs("int8")
def test_the_8_bit_copy_is_made_once_and_nothing_else_is_left_behind(tmp_path: Path) -> None:
    recogniser = Recogniser(tmp_path)
    recogniser.session("int8")
    copy = recogniser.copy()
    recogniser.session("int8")
    assert recogniser.conversions == 1
    assert [path.name for path in sorted(recogniser.folder.iterdir())] == [copy.with_suffix(".json").name, copy.name]


@needs("int8")
def test_the_first_and_last_layers_of_an_8_bit_copy_stay_whole(tmp_path: Path) -> None:
    recogniser = Recogniser(tmp_path)
    recogniser.session("int8")
    stored = onnx.load(str(recogniser.copy())).graph.initializer
    whole = {one.name for one in stored if one.data_type == TensorProto.FLOAT and len(one.dims) == 4}
    assert whole == {"kernel0", "kernel1", "kernel4"}


@needs("int8")
@pytest.mark.parametrize("harm", ["another bit", "cut off", "no description", "a description of another", "nonsense"])
def test_a_copy_that_is_not_as_it_was_made_is_made_again(tmp_path: Path, harm: str) -> None:
    recogniser = Recogniser(tmp_path)
    recogniser.session("int8")
    copy = recogniser.copy()
    whole, about = copy.read_bytes(), copy.with_suffix(".json")
    if harm == "another bit":
        copy.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif harm == "cut off":
        copy.write_bytes(whole[:100])
    elif harm == "no description":
        about.unlink()
    elif harm == "a description of another":
        about.write_text(json.dumps({**json.loads(about.read_text()), "source_sha256": "0" * 64}))
    else:
        about.write_text("[1]")
    recogniser.session("int8")
    assert recogniser.conversions == 2
    assert json.loads(about.read_text())["sha256"] == model_files.sha256_of(copy)


@needs("int8")
def test_another_recogniser_gets_a_copy_of_its_own(tmp_path: Path) -> None:
    one, other = Recogniser(tmp_path / "one"), Recogniser(tmp_path / "other", seed=1)
    other.folder = one.folder
    one.session("int8")
    other.session("int8")
    assert len(list(one.folder.glob("*.onnx"))) == 2


@needs("int8")
def test_a_copy_that_differs_too_much_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reduced_precision.LEAST, "int8", (0.99, 1.1))
    recogniser = Recogniser(tmp_path)
    with pytest.raises(ModelUnavailable, match=r"differ too much .* EMBEDDING_PRECISION=fp32"):
        recogniser.session("int8")
    assert list(recogniser.folder.iterdir()) == []


@pytest.mark.parametrize("precision", [pytest.param(one, marks=needs(one)) for one in ("bf16", "int8")])
def test_every_start_compares_with_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    recogniser = Recogniser(tmp_path)
    recogniser.session(precision)
    monkeypatch.setitem(reduced_precision.LEAST, precision, (1.1, 0))
    with pytest.raises(ModelUnavailable, match="differ too much"):
        recogniser.session(precision)


@needs("int8")
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    recogniser = Recogniser(tmp_path)
    recogniser.folder.write_text("in the way")
    with pytest.raises(ModelUnavailable, match=r"cannot be kept in .*int8"):
        recogniser.session("int8")


@needs("int8")
def test_a_recogniser_without_convolutions_is_not_passed_off_as_one_in_8_bits(tmp_path: Path) -> None:
    recogniser = Recogniser(tmp_path)
    write_tiny_pack(tmp_path / "pack")
    recogniser.source = tmp_path / "pack" / "rec.onnx"
    with pytest.raises(ModelUnavailable, match="no convolutions"):
        recogniser.session("int8")


@needs("bf16")
def test_a_detector_that_finds_no_face_to_check_with_is_told_so(tmp_path: Path) -> None:
    write_tiny_pack(tmp_path / "pack")
    with pytest.raises(ModelUnavailable, match="finds no faces in the photos"):
        InsightFaceEngine(tmp_path / "pack", threads=1, precision="bf16")


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("lists", ["flags : fpu avx2 avx512f", None])
def test_a_cpu_without_the_instructions_is_refused_and_not_helped_out_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, lists: str | None
) -> None:
    monkeypatch.setattr(reduced_precision, "CPU_INFO", tmp_path / "cpuinfo")
    if lists is not None:
        (tmp_path / "cpuinfo").write_text(lists)
    with pytest.raises(ModelUnavailable, match=r"needs Linux on a CPU with one of .*EMBEDDING_PRECISION=fp32"):
        Recogniser(tmp_path).session(precision)


def test_where_openvino_is_missing_the_start_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    write_tiny_pack(tmp_path / "pack")
    with pytest.raises(ModelUnavailable, match=r"-m pip install .* requirements-openvino\.lock"):
        InsightFaceEngine(tmp_path / "pack", threads=1, precision="bf16")


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared pack is not beside this clone")
@pytest.mark.parametrize(
    ("precision", "suffix", "least"),
    [pytest.param("bf16", "", 0.998, marks=needs("bf16")), pytest.param("int8", "-int8", 0.99, marks=needs("int8"))],
)
def test_a_real_recogniser_has_a_name_of_its_own_where_its_templates_are_not_the_originals(
    tmp_path: Path, precision: str, suffix: str, least: float
) -> None:
    pack = tmp_path / "pack"
    pack.mkdir()
    for file in (SHARED / "pack").iterdir():
        (pack / file.name).symlink_to(file)
    whole, small = (InsightFaceEngine(pack, threads=1, precision=one) for one in ("fp32", precision))
    assert small.name == whole.name + suffix
    (photo, *_) = reduced_precision.photos()
    (face,) = whole.detect(photo)
    ours, theirs = small.embed(photo, face), whole.embed(photo, face)
    assert float(np.linalg.norm(ours)) == pytest.approx(1)
    assert least < float(np.vecdot(ours, theirs)) < 1


def test_cuda_is_taken_where_it_is_and_demanded_only_where_asked_for() -> None:
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    assert insightface_pack.providers_for("auto", [cpu], "fp32") == [cpu]
    assert insightface_pack.providers_for("auto", [cuda, cpu], "fp32") == [cuda, cpu]
    assert insightface_pack.providers_for("auto", [cuda, cpu], "int8") == [cpu]
    assert insightface_pack.providers_for("cpu", [cuda, cpu], "fp32") == [cpu]
    assert insightface_pack.providers_for("cuda", [cuda, cpu], "fp32") == [cuda, cpu]
    with pytest.raises(ModelUnavailable, match="install onnxruntime-gpu"):
        insightface_pack.providers_for("cuda", [cpu], "fp32")
    with pytest.raises(ModelUnavailable, match="bf16 is for CPUs"):
        insightface_pack.providers_for("cuda", [cuda, cpu], "bf16")


def test_a_gpu_that_is_demanded_and_absent_stops_the_start(tmp_path: Path) -> None:
    write_tiny_pack(tmp_path / "pack")
    with pytest.raises(ModelUnavailable, match="ORT_PROVIDERS=cuda"):
        InsightFaceEngine(tmp_path / "pack", threads=1, providers="cuda")


@pytest.mark.parametrize("precision", [pytest.param(one, marks=needs(one)) for one in ("bf16", "int8")])
def test_the_compact_model_runs_in_fewer_bits_as_packs_do(tmp_path: Path, precision: str) -> None:
    model = load_engine(
        "compact", models_dir=tmp_path, hub_timeout_s=0, threads=1, may_fall_back=False, precision=precision
    )
    assert model.name == {"bf16": "sface-2021dec", "int8": "sface-2021dec-int8"}[precision]
    assert bootstrap.cosine_at_half_of(model.name) == model.cosine_at_half == 0.47
