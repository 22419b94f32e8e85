"""Tells which file of an InsightFace pack does what, and loads them, reading each as seldom as possible."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from onnx.external_data_helper import uses_external_data

from engines import model_files
from engines.model_files import HashedFile, ModelUnavailable
from engines.onnx_files import ORT_ERRORS, outline, session_options, session_without_prelu

TASKS = ("detection", "recognition")
# InsightFace asserts what it expects of a model.
_NO_SUCH_MODEL: tuple[type[Exception], ...] = (*ORT_ERRORS, RuntimeError, AssertionError)


@dataclass(frozen=True)
class Pack:
    """A loaded pack.

    Attributes:
        recogniser: InsightFace's own object.
        recogniser_file, digest: what it was loaded from, and that file's SHA-256 in hexadecimal.
        detector_file: what the detector was loaded from.
        files: all whose digests are known.
    """

    recogniser: Any
    recogniser_file: Path
    digest: str
    detector_file: Path
    files: tuple[HashedFile, ...]

    def require_unchanged(self) -> None:
        """Raise ModelUnavailable if a file was written to or replaced since it was digested."""
        for file in self.files:
            file.require_unchanged()


def load_pack(
    folder: Path,
    files: Mapping[str, HashedFile] | None,
    *,
    threads: int,
    providers: list[str],
    meanwhile: Callable[[Any], None],
    without_prelu: bool = False,
) -> Pack:
    """Load a pack's detector and recogniser.

    Args:
        folder: holds a manifest.json (version 2) or just the weights.
        files: by task, where they are known and verified already; the others are found in the folder.
        threads: of one model run; 0 takes all cores.
        providers: onnxruntime's, in their order.
        meanwhile: is given the detector while the recogniser is still being loaded.
        without_prelu: the recogniser is known to compute the same without PRelu, and is loaded so at once.

    Raises:
        ModelUnavailable: the folder is no pack, or a file of it is damaged.
    """
    options = session_options(threads)
    onnxruntime.set_default_logger_severity(3)
    parts = {task: _Part(task, file.path, known=file) for task, file in (files or {}).items()}
    missing = [task for task in TASKS if task not in parts]
    if missing:
        parts = _parts_of(folder, missing) | parts
    recogniser = parts["recognition"]
    if providers[0] == "CUDAExecutionProvider":
        from insightface.model_zoo import preload_cuda_libraries  # noqa: PLC0415 - see `_loaded`

        preload_cuda_libraries(providers)  # before there is any session
    # The recogniser is nearly all of a pack. onnxruntime and hashlib let go of the interpreter, which imports
    # InsightFace and warms the detector meanwhile.
    with ThreadPoolExecutor(2) as beside:
        hashing = beside.submit(_hashed, recogniser, model_files.state(recogniser.path))
        recogniser_options = session_options(threads, keep_memory=False)
        # The aligner's own library warns of the aligner's way of calling it, on every start.
        warnings.filterwarnings("ignore", category=FutureWarning, module="insightface")
        detecting = beside.submit(_detecting, parts["detection"], providers, options, meanwhile)
        # In this thread, whose heap gives back what a session leaves that another one takes the place of: a worker's
        # heap kept 36 MiB of SFace.
        with refusing(recogniser.path, recogniser.task):
            session = session_without_prelu(recogniser.path, threads) if without_prelu else None
        session = session or _session(recogniser, providers, recogniser_options)
        detecting.result()
        loaded = _loaded(recogniser, session, providers, recogniser_options)
        known = hashing.result()
    detector = parts["detection"].known
    digested = (known,) if detector is None else (known, detector)
    return Pack(loaded, recogniser.path, known.sha256, parts["detection"].path, digested)


def providers_for(wanted: str, available: Sequence[str], precision: str) -> list[str]:
    """Which of onnxruntime's providers are to run the models, in their order.

    Args:
        wanted: `cpu`, `cuda`, or `auto`.
        available: what onnxruntime has.
        precision: the recogniser's.

    Raises:
        ModelUnavailable: CUDA is demanded and cannot be.
    """
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    if wanted == "cuda" and precision != "fp32":
        raise ModelUnavailable(f"EMBEDDING_PRECISION={precision} is for CPUs: take fp32 with ORT_PROVIDERS=cuda.")
    if wanted == "cuda" and cuda not in available:
        raise ModelUnavailable(
            "ORT_PROVIDERS=cuda, but the onnxruntime that is installed has no CUDA: install onnxruntime-gpu in its "
            "place, or take ORT_PROVIDERS=cpu."
        )
    if wanted == "cuda" or (wanted == "auto" and cuda in available and precision == "fp32"):
        return [cuda, cpu]
    return [cpu]


@dataclass(frozen=True)
class _Part:
    """One model of a pack: its task and file, its digest where that is known already, what a manifest says of it."""

    task: str
    path: Path
    known: HashedFile | None = None
    descriptor: Any = None


def _parts_of(folder: Path, needed: Sequence[str]) -> dict[str, _Part]:
    """Which file of a pack does which of the needed tasks.

    Without a manifest the file's own inputs and outputs tell, by the rule of InsightFace's router, so that no
    session is built for a model that is not needed.
    """
    if not folder.is_dir():
        raise ModelUnavailable(
            f"FACE_MODEL names {folder}, which is no folder: give the folder of an InsightFace pack, "
            "or one of auto, auraface, compact"
        )
    parts = _declared_parts(folder) if (folder / "manifest.json").is_file() else None
    if parts is None:
        parts = {}
        for path in sorted(folder.glob("*.onnx")):
            task = _task_of(path)
            parts.setdefault(task, _Part(task, path))
    for task in needed:
        if task not in parts:
            raise ModelUnavailable(f"{folder} holds no {task} model; an InsightFace pack has one for each of {TASKS}")
    return {task: parts[task] for task in needed}


def _declared_parts(folder: Path) -> dict[str, _Part] | None:
    """What a manifest declares; None where it is of no version that says which file does what."""
    from insightface.model_zoo import has_model_package_manifest, load_model_package  # noqa: PLC0415 - see `_loaded`

    try:
        json.loads((folder / "manifest.json").read_bytes())
    except ValueError as error:  # it would count as none, and what it says of the files' digests as unsaid
        raise ModelUnavailable(f"the manifest of {folder} is no JSON: {error}") from error
    if not has_model_package_manifest(folder):
        return None
    try:
        package = load_model_package(folder)
    except (ValueError, TypeError, OSError) as error:
        raise ModelUnavailable(f"the manifest of {folder} cannot be used: {error}") from error
    parts = {task: _Part(task, one.path, descriptor=one) for task, one in package.tasks.items() if task in TASKS}
    for part in parts.values():
        if not part.path.is_file():
            raise ModelUnavailable(f"the manifest of {folder} names {part.path.name}, which is not there")
        _graph_of(part.path)
    return parts


def _graph_of(path: Path) -> onnx.GraphProto:
    """A file's graph without its weights, which must lie in that very file; ModelUnavailable if they do not."""
    try:
        graph = onnx.load_model_from_string(outline(path)).graph
    except (DecodeError, ValueError) as error:
        raise ModelUnavailable(
            f"{path} is damaged or no ONNX model: replace it or take it out of the folder"
        ) from error
    if any(uses_external_data(tensor) for tensor in _tensors(graph)):
        # Its digest is to tell one recogniser from another.
        raise ModelUnavailable(f"{path} keeps its weights in another file: save it as one file (onnx.save_model does)")
    return graph


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All tensors that a graph is made of."""
    yield from graph.initializer
    for attribute in (one for node in graph.node for one in node.attribute):
        yield from (*attribute.tensors, attribute.t)
        for inner in (*attribute.graphs, attribute.g):
            yield from _tensors(inner)


def _task_of(path: Path) -> str:
    graph = _graph_of(path)
    if len(graph.output) >= 5:
        return "detection"
    initialisers = {one.name for one in graph.initializer}  # older exporters list the weights among the inputs
    inputs = [one for one in graph.input if one.name not in initialisers]
    sides = [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim][2:4] if len(inputs) == 1 else []
    square = len(sides) == 2 and sides[0] == sides[1]
    # 192 is the landmark models' input; a second input is the face swapper's.
    if len(graph.output) == 1 and square and sides[0] >= 112 and sides[0] % 16 == 0 and sides[0] != 192:
        return "recognition"
    return ""


@contextmanager
def refusing(path: Path, task: str) -> Iterator[None]:
    """Tell the operator of a file that is no model for this task: it cannot be loaded or cannot be run."""
    try:
        yield
    except _NO_SUCH_MODEL as error:
        raise ModelUnavailable(f"{path} cannot be used as a {task} model: {error}") from error


def _session(part: _Part, providers: list[str], options: Any) -> Any:
    """onnxruntime's session of a file; None where InsightFace makes it, after what the manifest demands."""
    if part.descriptor is not None:
        return None
    with refusing(part.path, part.task):
        return onnxruntime.InferenceSession(str(part.path), options, providers=providers)


def _detecting(part: _Part, providers: list[str], options: Any, meanwhile: Callable[[Any], None]) -> None:
    """Load the detector and give it to who runs it first."""
    detector = _loaded(part, None, providers, options)
    with refusing(part.path, part.task):
        meanwhile(detector)


def _hashed(part: _Part, before: tuple[int, ...]) -> HashedFile:
    """A part's digest, for which its file is read only if nobody has; `before` is its state before anything was."""
    if part.known is not None:
        return part.known
    # InsightFace loads no file of another digest than a manifest declares.
    declared = part.descriptor.sha256 if part.descriptor is not None else None
    return HashedFile(part.path, declared or model_files.sha256_of(part.path), before)


def _loaded(part: _Part, session: Any, providers: list[str], options: Any) -> Any:
    """InsightFace's own class for a part; of a session, where there is one already."""
    # Slow to import, hence not before a recogniser is being loaded: a third of a second, much of it for what is not
    # used here, but the package imports it.
    from insightface.model_zoo import ArcFaceONNX, get_model  # noqa: PLC0415

    with refusing(part.path, part.task):
        if session is not None:
            # It reads names of nodes, for which it would parse all of the file once more.
            return ArcFaceONNX(model_file=io.BytesIO(outline(part.path)), session=session)
        named = {"name": str(part.path)}
        if part.descriptor is not None:
            named = {"name": str(part.path.parent), "model_task": part.task, "model_descriptor": part.descriptor}
        return get_model(
            providers=providers,
            sess_options=options,
            static_shape_sessions=False,  # one session for pictures of every shape, not one for each
            **named,
        )
