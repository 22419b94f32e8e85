"""Runs a recogniser in less than 32 bits in OpenVINO, makes its 8-bit copy, and compares both with the original.

bf16 runs the verified file itself, its numbers rounded to 16 bits; what it embeds compares with what the original
does. int8 runs a copy that is made of it once: convolutions in 8 bits, one scale a channel, all between in 32. What the
copy needs to know of activations it learns from faces in photos that installed packages carry, so that nothing is
fetched and no outside file is trusted; the caller has verified `source`.

Against onnxruntime in fp32 (benchmarks/precision.py):

            CPU of a ResNet-100   of a MobileFaceNet   its cosines, at worst   FNMR at FMR 1e-4, in points
    bf16    0.46                  0.66                 0.9996, 0.998           +0.03 (-0.04 to +0.11)
    int8    0.31                  0.53                 0.9984, 0.991           -0.02 (-0.12 to +0.06)
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from engines import model_files
from engines.model_files import ModelUnavailable
from photos.pixels import Pixels

log = logging.getLogger(__name__)

Embed = Callable[[Any, Sequence[Pixels]], npt.NDArray[np.float32]]

# Whichever of these a CPU has. Without them OpenVINO computes bf16 four times as slowly, by way of fp32, and says that
# it computes in bf16; and sums of 8-bit products overflow.
INSTRUCTIONS = {"bf16": {"avx512_bf16", "amx_bf16"}, "int8": {"avx512_vnni", "avx_vnni", "amx_int8"}}
CPU_INFO = Path("/proc/cpuinfo")
# Cosines to the original's embeddings that held-out faces of the packages' photos must reach, on average and at worst.
# They reach 0.9991 and 0.9986 in bf16, 0.9975 and 0.993 in int8, with a MobileFaceNet; an error in the conversion, or a
# recogniser that does not bear so few bits, falls far below.
LEAST = {"bf16": (0.998, 0.995), "int8": (0.99, 0.97)}

# package -> a photo in it: one face, and six.
_PHOTOS = (("skimage", "data/astronaut.png"), ("insightface", "data/images/t1.jpg"))
VARIATIONS = 12


def photos() -> list[Pixels]:
    """Return the photos of faces that installed packages carry, uint8[h, w, 3] BGR."""
    found = []
    for package, path in _PHOTOS:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None and (Path(spec.origin).parent / path).is_file():
            data = np.frombuffer((Path(spec.origin).parent / path).read_bytes(), np.uint8)
            found.append(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8))
    return found


class OpenVinoSession:
    """A recogniser in OpenVINO, run as onnxruntime's sessions are. Thread-safe."""

    def __init__(self, model: Path, *, bf16: bool, threads: int) -> None:
        """Load a model; `threads` of one run, 0 for all cores. Raises ModelUnavailable."""
        import openvino  # noqa: PLC0415 - only installed where it is wanted

        cores = len(os.sched_getaffinity(0))
        each = min(threads or cores, cores)
        at_once = cores // each
        core = openvino.Core()
        try:
            read = core.read_model(model)
            # One face at a time: a tenth quicker than any number of them.
            read.reshape([1, *(side.get_length() for side in read.input(0).partial_shape[1:])])
            self._model = core.compile_model(
                read,
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
                    "NUM_STREAMS": at_once,
                    "INFERENCE_NUM_THREADS": at_once * each,
                    "ENABLE_CPU_PINNING": False,  # the cores are the detector's too
                },
            )
        except RuntimeError as error:
            raise ModelUnavailable(f"OpenVINO cannot run {model}: {error}") from error
        self._of_thread = threading.local()

    def run(self, _names: object, feeds: dict[str, Any]) -> list[npt.NDArray[np.float32]]:
        """Embed float32[1, 3, side, side] as float32[1, d]."""
        if not hasattr(self._of_thread, "request"):
            self._of_thread.request = self._model.create_infer_request()
        (blob,) = feeds.values()
        return [np.asarray(self._of_thread.request.infer([blob])[0])]


def session(
    precision: str,
    source: Path,
    digest: str,
    folder: Path,
    *,
    threads: int,
    crops: Callable[[], list[Pixels]],
    embed: Embed,
) -> OpenVinoSession:
    """Return a recogniser in `bf16` or `int8`, once its embeddings of held-out faces were compared with the original's.

    Args:
        precision: a key of `INSTRUCTIONS`.
        source: the recogniser's verified file.
        digest: its SHA-256.
        folder: where 8-bit copies are kept.
        threads: threads of one run; 0 takes all cores.
        crops: gives aligned faces, uint8[side, side, 3] BGR, to calibrate and to check with.
        embed: runs a session on crops: float32[n, d]; None as the session means the original.

    Raises:
        ModelUnavailable: OpenVINO is not there, the CPU cannot do it, an 8-bit copy cannot be made or kept, or the
            embeddings differ too much from the original's.
    """
    demand(precision)
    faces = crops()
    if len(faces) < 2:
        raise ModelUnavailable(
            "The detector finds no faces in the photos that installed packages carry to check the recogniser with: "
            "run with EMBEDDING_PRECISION=fp32."
        )
    # Every other face calibrates, the others check. The check is made at every start: an 8-bit copy may have been made
    # on another CPU.
    calibrating, held_out = faces[::2], faces[1::2]
    if precision == "int8":
        source = _int8_copy(
            source, digest, folder, calibrating=calibrating, held_out=held_out, threads=threads, embed=embed
        )
    opened = OpenVinoSession(source, bf16=precision == "bf16", threads=threads)
    _check(precision, opened, held_out, embed)
    return opened


def demand(precision: str) -> None:
    """Raise ModelUnavailable, saying what to do, where a precision cannot be had here."""
    if importlib.util.find_spec("openvino") is None:
        raise ModelUnavailable(
            f"EMBEDDING_PRECISION={precision} needs OpenVINO: {sys.executable} -m pip install --no-deps -r "
            "requirements-openvino.lock, or run with EMBEDDING_PRECISION=fp32."
        )
    try:
        words = set(CPU_INFO.read_text().split())
    except OSError:  # not Linux
        words = set()
    if not INSTRUCTIONS[precision] & words:
        raise ModelUnavailable(
            f"EMBEDDING_PRECISION={precision} needs Linux on a CPU with one of "
            f"{', '.join(sorted(INSTRUCTIONS[precision]))}, which {CPU_INFO} does not list: run with "
            "EMBEDDING_PRECISION=fp32."
        )


def _check(precision: str, opened: OpenVinoSession, faces: list[Pixels], embed: Embed) -> None:
    ours, theirs = (np.asarray(embed(one, faces), np.float64) for one in (opened, None))
    cosines = np.vecdot(ours, theirs) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    mean, worst = float(cosines.mean()), float(cosines.min())
    log.info(
        "Embeddings of %d held-out faces in %s and fp32: cosine %.4f, at worst %.4f", len(faces), precision, mean, worst
    )
    if not (mean >= LEAST[precision][0] and worst >= LEAST[precision][1]):
        raise ModelUnavailable(
            f"In {precision} the recogniser's embeddings differ too much from its own in fp32 (cosines {mean:.4f} on "
            f"average and {worst:.4f} at worst, where {LEAST[precision][0]} and {LEAST[precision][1]} are needed): run "
            "with EMBEDDING_PRECISION=fp32."
        )


def _int8_copy(
    source: Path,
    digest: str,
    folder: Path,
    *,
    calibrating: list[Pixels],
    held_out: list[Pixels],
    threads: int,
    embed: Embed,
) -> Path:
    """Return the 8-bit copy of a recogniser, made unless `folder` holds it as it was made."""
    import onnxruntime  # noqa: PLC0415 - slow to import

    copy = folder / f"{digest[:12]}-onnxruntime-{onnxruntime.__version__}.int8.onnx"
    about = copy.with_suffix(".json")
    try:
        if _is_as_made(copy, about, digest):
            return copy
        folder.mkdir(parents=True, exist_ok=True)
        log.info("Making the 8-bit copy of %s; this is done once and takes minutes", source.name)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "int8.onnx"
            _convert(source, made, _varied(calibrating), embed)
            _check("int8", OpenVinoSession(made, bf16=False, threads=threads), _varied(held_out), embed)
            facts = {"source_sha256": digest, "sha256": model_files.sha256_of(made)}
            (Path(scratch) / "about.json").write_text(json.dumps(facts))
            # The description first: a copy without its own is made again.
            (Path(scratch) / "about.json").replace(about)
            made.replace(copy)
    except OSError as error:
        raise ModelUnavailable(
            f"The 8-bit copy of {source.name} cannot be kept in {folder} ({error.strerror}): make that folder "
            "writable, or run with EMBEDDING_PRECISION=fp32."
        ) from error
    return copy


def _is_as_made(copy: Path, about: Path, digest: str) -> bool:
    if not (copy.is_file() and about.is_file()):
        return False
    try:
        facts = json.loads(about.read_text())
        sound = bool(facts["source_sha256"] == digest and facts["sha256"] == model_files.sha256_of(copy))
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        log.warning("The 8-bit copy %s is damaged: it is made again", copy.name)
    return sound


def _convert(source: Path, made: Path, faces: list[Pixels], embed: Embed) -> None:
    """Write the copy, calibrated on faces."""
    import onnx  # noqa: PLC0415 - only where a copy is made
    from onnxruntime.quantization import (  # noqa: PLC0415
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415

    fed: list[dict[str, Any]] = []
    embed(_Feeds(fed), faces)

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime carries no types
        def __init__(self) -> None:
            self._feeds = iter(fed)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    prepared = made.with_name("prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    model = onnx.load(str(prepared))
    graph = model.graph
    for number, node in enumerate(graph.node):
        node.name = str(number)  # some exporters leave names out
    sides = {one.name: [side.dim_value for side in one.type.tensor_type.shape.dim[2:]] for one in graph.value_info}
    layers = [node for node in graph.node if node.op_type == "Conv"]
    # The first layers, and those that turn the picture into a vector, cost little time and spoil most: four fifths of
    # the cosine that a MobileFaceNet loses, measured layer by layer. Results stay in 32 bits until they are added to
    # the part that skipped a layer: 8 bits cost another 0.003 there.
    quantised = [node.name for node in layers[2:] if sides.get(node.output[0]) != [1, 1]]
    if not quantised:
        raise ModelUnavailable(
            f"{source.name} has no convolutions to put into 8 bits: run with EMBEDDING_PRECISION=fp32."
        )
    quantize_static(
        model,
        str(made),
        Reader(),
        quant_format=QuantFormat.QDQ,
        nodes_to_quantize=quantised,
        per_channel=True,
        # Unsigned activations with signed weights are what CPUs have instructions for.
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"OpTypesToExcludeOutputQuantization": ["Conv"]},
    )


class _Feeds:
    """Stands in for a session, and keeps what it would be run on."""

    def __init__(self, fed: list[dict[str, Any]]) -> None:
        self._fed = fed

    def run(self, _names: object, feeds: dict[str, Any]) -> list[npt.NDArray[np.float32]]:
        self._fed.append(feeds)
        return [np.zeros((len(next(iter(feeds.values()))), 1), np.float32)]


def _varied(faces: list[Pixels]) -> list[Pixels]:
    return [variation for face in faces for variation in _variations(face)]


def _variations(face: Pixels) -> Iterator[Pixels]:
    """Yield copies of a face as other photos might show it: mirrored, shifted, lighter and darker, blurred."""
    rng = np.random.default_rng(0)
    side = face.shape[0]
    for number in range(VARIATIONS):
        varied = np.asarray(np.ascontiguousarray(face[:, ::-1] if number % 2 else face), np.float32)
        turn = cv2.getRotationMatrix2D((side / 2, side / 2), rng.uniform(-8, 8), rng.uniform(0.92, 1.1))
        turn[:, 2] += rng.uniform(-0.03, 0.03, 2) * side
        varied = np.asarray(cv2.warpAffine(varied, turn, (side, side), borderMode=cv2.BORDER_REPLICATE), np.float32)
        if number % 4 == 3:
            varied = np.asarray(cv2.GaussianBlur(varied, (0, 0), 1.0), np.float32)
        yield np.clip(varied * rng.uniform(0.6, 1.4) + rng.uniform(-30, 30), 0, 255).astype(np.uint8)
