"""Owns the face model: finding faces and embedding them; the only importer of `insightface` and `dlib`."""

from __future__ import annotations

import importlib.util
import logging
import math
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

import quantised
import weights
from weights import ModelUnavailable

AURAFACE_NAME = "auraface-v1"
AURAFACE_RECOGNISER = next(file.sha256 for file in weights.AURAFACE if file.task == "recognition")
TASKS = ("detection", "recognition")

# In a copy of this longest side detection finds what it finds in a larger photo. The detectors look at 960 and 640
# pixels; the rest keeps the landmarks where they were: of 148 faces in 12-megapixel photos 7 % come out less similar
# than 0.995 when halved to 2000 pixels and 16 % when quartered to 1000 (saving the photo at JPEG quality 80 instead
# of 90 does it to 16 % as well).
ENOUGH_SIDE = 1600

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]
Vector = npt.NDArray[np.float32]
Affine = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LandmarkLayout:
    """Which five points a model's landmarks are, as a mean frontal face in inter-eye distances.

    Attributes:
        points: float[5, 3], x right, y down, z away from the camera; the origin lies between the eyes' centres.
            x and y are the medians of 165 near-frontal photos of 30 people; z follows from anthropometry (the
            nose's tip stands about half an inter-eye distance in front of the eyes, the mouth a tenth).
        left_eye, right_eye: the rows whose mean is the centre of the eye at the left / right of the picture.
    """

    points: npt.NDArray[np.float64]
    left_eye: tuple[int, ...]
    right_eye: tuple[int, ...]


INSIGHTFACE_LAYOUT = LandmarkLayout(
    points=np.array([[-0.5, 0, 0], [0.5, 0, 0], [0, 0.6, -0.5], [-0.45, 1.01, -0.1], [0.45, 1.01, -0.1]]),
    left_eye=(0,),
    right_eye=(1,),
)
DLIB_LAYOUT = LandmarkLayout(
    points=np.array([[0.7, 0, 0.1], [0.3, 0, 0], [-0.7, 0, 0.1], [-0.3, 0, 0], [0, 0.77, -0.35]]),
    left_eye=(2, 3),
    right_eye=(0, 1),
)


@dataclass(frozen=True)
class Face:
    """One detected face.

    Attributes:
        box: float32[4], left, top, right, bottom in pixels; may reach outside the photo.
        score: the detector's confidence; comparable within one engine only.
        landmarks: float32[5, 2], x and y in pixels, in the order of `layout`.
        layout: which points they are.
    """

    box: npt.NDArray[np.float32]
    score: float
    landmarks: npt.NDArray[np.float32]
    layout: LandmarkLayout

    @property
    def eyes(self) -> npt.NDArray[np.float64]:
        """float64[2, 2]: the centres of the eyes at the left and the right of the picture, in pixels."""
        points = self.landmarks.astype(np.float64)
        return np.stack([points[list(rows)].mean(axis=0) for rows in (self.layout.left_eye, self.layout.right_eye)])

    @property
    def inter_eye(self) -> float:
        """The inter-eye distance in pixels of the picture that the face was found in."""
        left, right = self.eyes
        return float(np.hypot(*(right - left)))

    def enlarged(self, times: float) -> Face:
        """The same face in a copy of the picture that is `times` as large."""
        # Pixels have their coordinates at their centres.
        box, landmarks = ((np.asarray(one) + 0.5) * times - 0.5 for one in (self.box, self.landmarks))
        return replace(self, box=box.astype(np.float32), landmarks=landmarks.astype(np.float32))


class Engine(Protocol):
    """A face model.

    Attributes:
        name: what records of its templates carry; templates of different names are never compared.
        dimension: components of a template.
        cosine_at_half: the cosine that reads as similarity 0.5.
    """

    name: str
    dimension: int
    cosine_at_half: float

    def describe(self) -> str:
        """Plain words for the operator: which model, from where."""

    def detect(self, image: Pixels) -> list[Face]:
        """Find every face in uint8[h, w, 3] BGR, the widest first. Thread-safe."""

    def embed(self, image: Pixels, face: Face) -> Vector:
        """Embed one detected face as float32[dimension] of norm 1. Thread-safe.

        Raises:
            ValueError: the landmarks are degenerate, so that there is nothing to embed.
        """


def similarity_of(cosine: float, cosine_at_half: float) -> float:
    """Translate a cosine into the API's similarity: 1 - (1 - cosine) / (2 (1 - cosine_at_half)), at most 1."""
    return min(1.0, 1.0 - (1.0 - cosine) / (2.0 * (1.0 - cosine_at_half)))


def cosine_of(similarity: float, cosine_at_half: float) -> float:
    """Translate a similarity back into the cosine that reads as it."""
    return 1.0 - (1.0 - similarity) * 2.0 * (1.0 - cosine_at_half)


def cosine_at_half_of(model: str) -> float:
    """The `cosine_at_half` of a model by its name in the records; of a model that is none of these, the packs'."""
    return CompactEngine.cosine_at_half if model == CompactEngine.name else 0.5


def _normalised(raw: npt.NDArray[Any]) -> Vector:
    vector = np.asarray(raw, dtype=np.float32).ravel()
    norm = float(np.linalg.norm(vector))
    if not np.isfinite(norm) or norm < 1e-6:
        raise ValueError("the model returned no usable embedding")
    return vector / np.float32(norm)


class InsightFaceEngine:
    """A detector and a recogniser of an InsightFace pack, called part by part; nothing else of it is loaded."""

    # Both sides are needed: SCRFD misses faces that fill more than about 40 % of the frame at 640 alone.
    SMALL_SIDE, FULL_SIDE = 128, 640
    FACE = 0.5
    # A selfie needs no full search: where a quick look (0.41 of its cost) sees one face that is sure and 30 % of the
    # picture wide, and no trace of another, it ends. Of 596 shared photos 462 end so, and no face is missed; all
    # together cost 0.64. A second face pasted beside such a one, which the full search finds, is lost in 0 of 420
    # photos when it is 15 % of the picture wide, 1 % at 10 %, 4 % at 6 %, 11 % at 5 %, 24 % at 4 %
    # (benchmarks/detection.py; an input of 320 loses twice as many, at 0.5 of the cost).
    LARGE_FACE_SIDE, LARGE, SURE_ENOUGH, TRACE = 384, 0.3, 0.7, 0.02
    # One face seen at both sides gives two boxes, which the detector's own suppression merges from an overlap of
    # 0.4; what lies mostly inside a surer face is the same face too (a face within a face is no second person).
    MOSTLY_INSIDE = 0.7

    # A head tilted by more is looked at again in an upright crop of this side.
    UPRIGHT_WITHIN_DEG = 6.0
    UPRIGHT_SIDE = 256
    # A face that the detector is less sure of is looked at turned to either side as well.
    SURE = 0.8
    TRIED_DEG = 35.0

    def __init__(
        self,
        folder: Path,
        *,
        threads: int,
        files: Mapping[str, Path] | None = None,
        precision: str = "fp32",
        providers: str = "cpu",
    ) -> None:
        """Load and warm the pack in `folder`.

        Args:
            folder: holds a manifest.json (version 2) or just the weights.
            threads: threads of one model run; 0 takes all cores.
            files: task -> file, where they are known (and verified) already; found in the folder otherwise.
            precision: of the recogniser, `fp32` or `int8`, for which a copy is made in the folder's `int8/` once.
            providers: `cpu`, `cuda`, or `auto`: CUDA where onnxruntime has it.

        Raises:
            ModelUnavailable: the folder is no such pack, a file of it is damaged, the copy is not good enough, or
                there is no CUDA where it was demanded.
        """
        import onnxruntime  # noqa: PLC0415 - a run on the other engine does not pay for it
        from insightface.model_zoo import get_model  # noqa: PLC0415
        from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # noqa: PLC0415

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Spinning threads of one caller take the cores from the next: a quarter of the throughput with two callers.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        onnxruntime.set_default_logger_severity(3)
        chosen = _providers(providers, onnxruntime.get_available_providers(), precision)
        files, arguments = (files, {}) if files else _pack_files(folder)
        # The aligner's own library warns of the aligner's way of calling it, on every start.
        warnings.filterwarnings("ignore", category=FutureWarning, module="insightface")
        parts = {}
        for task, path in files.items():
            try:
                parts[task] = get_model(
                    providers=chosen,
                    sess_options=options,
                    static_shape_sessions=False,  # one session for pictures of every shape, not one for each
                    **arguments.get(task, {"name": str(path)}),
                )
            except (ort_errors.Fail, ort_errors.InvalidProtobuf, ort_errors.InvalidGraph, RuntimeError) as error:
                raise ModelUnavailable(f"{path} cannot be loaded as a {task} model: {error}") from error
        self._detector, self._recogniser = parts["detection"], parts["recognition"]
        if not self._detector.use_kps:
            raise ModelUnavailable(f"the detector in {folder} gives no landmarks: a variant with key points is needed")
        self._detector.prepare(0, det_thresh=self.FACE)
        self._folder = folder
        digest = weights.digest(files["recognition"])
        # The recogniser's own bytes decide what compares with what, wherever the pack lies and whatever it is called.
        self.name = AURAFACE_NAME if digest == AURAFACE_RECOGNISER else f"insightface-{digest[:12]}"
        self.cosine_at_half = 0.5
        self._provider = str(self._recogniser.session.get_providers()[0])
        if self._provider != chosen[0]:
            # onnxruntime only warns of that, and goes on with the next.
            if providers == "cuda":
                raise ModelUnavailable("ORT_PROVIDERS=cuda, but onnxruntime could not use the GPU: see its warnings.")
            logger.warning("onnxruntime has CUDA and could not use it: the models run on the CPU")
        warm = np.full((64, 64, 3), 127, np.uint8)
        for side in (self.SMALL_SIDE, self.UPRIGHT_SIDE, self.LARGE_FACE_SIDE, self.FULL_SIDE):
            self._detector.detect(warm, input_size=(side, side))
        if precision == "int8":
            copy = quantised.int8_copy(files["recognition"], digest, folder / "int8", self._some_crops, self._embedded)
            self._recogniser.session = onnxruntime.InferenceSession(str(copy), options, providers=chosen)
            # Close to the original's embeddings, but not the same: a gallery must not mix the two.
            self.name += "-int8"
        self.dimension = int(self._recogniser.get_feat([np.full((112, 112, 3), 127, np.uint8)]).size)

    def describe(self) -> str:
        return (
            f"{self.name}, an InsightFace pack in {self._folder}, on {self._provider.removesuffix('ExecutionProvider')}"
        )

    def _some_crops(self) -> list[Pixels]:
        """Aligned faces to calibrate an 8-bit copy with."""
        return [self._aligned(photo, face) for photo in quantised.photos() for face in self.detect(photo)]

    def _embedded(self, session: Any, crops: Sequence[Pixels]) -> npt.NDArray[np.float32]:
        """What a session (None: the original's) makes of aligned faces, as float32[n, d]."""
        original = self._recogniser.session
        self._recogniser.session = session or original
        try:
            return np.concatenate([self._recogniser.get_feat([crop]) for crop in crops])
        finally:
            self._recogniser.session = original

    def detect(self, image: Pixels) -> list[Face]:
        if _holds_no_face(image):
            return []
        scale, small = _to_side(image, self.FULL_SIDE, enlarging=1.0)
        traces = self._found(small, self.LARGE_FACE_SIDE, self.TRACE)
        found = traces if self._is_all(traces, small) else self._found(small, self.FULL_SIDE, self.FACE)
        faces = _widest_first([face.enlarged(1 / scale) for face in _without_nested(found, self.MOSTLY_INSIDE)])
        return [self._looked_at_upright(image, face) for face in faces[:1]] + faces[1:]

    def _found(self, image: Pixels, side: int, least: float) -> list[Face]:
        """The detector's boxes of a score of at least `least`, with an input of this longest side and a small one."""
        sizes = [(self.SMALL_SIDE, self.SMALL_SIDE), _input_size(image, side)]
        boxes, landmarks = self._detector.detect(image, input_size=sizes, det_thresh=least)
        return [
            Face(box[:4], float(box[4]), points, INSIGHTFACE_LAYOUT)
            for box, points in zip(boxes, landmarks, strict=True)
            if np.isfinite(box).all() and np.isfinite(points).all() and (box[2:4] - box[:2]).min() >= 1
        ]

    def _is_all(self, traces: list[Face], image: Pixels) -> bool:
        """Whether a quick look has seen enough: one sure and large face, and no trace of another."""
        apart = _without_nested(traces, self.MOSTLY_INSIDE)
        return (
            len(apart) == 1
            and apart[0].score >= self.SURE_ENOUGH
            and float(apart[0].box[2] - apart[0].box[0]) >= self.LARGE * max(image.shape[:2])
        )

    def _looked_at_upright(self, image: Pixels, face: Face) -> Face:
        """Find the landmarks of a tilted head again in an upright crop.

        Detectors that learned upright heads place the landmarks of a tilted one half-way to upright, or as if it were
        upright and then less surely; either spoils the measured roll and the embedding.
        """
        turn = 0.0
        if face.score < self.SURE:
            for tried in (-self.TRIED_DEG, self.TRIED_DEG):
                seen = self._seen_turned(image, face, tried)
                if seen is not None and seen.score > face.score:
                    face, turn = seen, tried
        for _ in range(2):
            roll = _roll_deg(face)
            if abs(roll - turn) < self.UPRIGHT_WITHIN_DEG:
                break
            seen = self._seen_turned(image, face, roll)
            if seen is None:
                break
            face, turn = seen, roll
        return face

    def _seen_turned(self, image: Pixels, face: Face, turn_deg: float) -> Face | None:
        """Detect in a crop around the face's box, turned back by `turn_deg`; None where nothing is found."""
        side = (self.UPRIGHT_SIDE, self.UPRIGHT_SIDE)
        centre = (face.box[:2] + face.box[2:]) / 2
        scale = 0.5 * self.UPRIGHT_SIDE / float((face.box[2:] - face.box[:2]).max())
        matrix = np.asarray(cv2.getRotationMatrix2D((float(centre[0]), float(centre[1])), turn_deg, scale), np.float64)
        matrix[:, 2] += self.UPRIGHT_SIDE / 2 - centre
        crop = cut_out(image, matrix, self.UPRIGHT_SIDE)
        boxes, landmarks = self._detector.detect(crop, input_size=side)
        if len(boxes) == 0:
            return None
        surest = int(np.argmax(boxes[:, 4]))
        points = cv2.transform(landmarks[surest][None].astype(np.float64), cv2.invertAffineTransform(matrix))[0]
        return Face(face.box, float(boxes[surest, 4]), points.astype(np.float32), face.layout)

    def embed(self, image: Pixels, face: Face) -> Vector:
        crop = self._aligned(image, face)
        if not crop.any():
            raise ValueError("degenerate landmarks: the aligned crop is empty")
        return _normalised(self._recogniser.get_feat([crop]))

    def _aligned(self, image: Pixels, face: Face) -> Pixels:
        from insightface.utils.face_align import estimate_norm  # noqa: PLC0415 - loaded with the engine

        side = self._recogniser.input_size[0]
        return cut_out(image, estimate_norm(face.landmarks, side), side, border=cv2.BORDER_CONSTANT)


def _providers(wanted: str, available: Sequence[str], precision: str) -> list[str]:
    """Return onnxruntime's providers in their order; ModelUnavailable where CUDA is demanded and cannot be."""
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    if wanted == "cuda" and precision == "int8":
        raise ModelUnavailable("EMBEDDING_PRECISION=int8 is for CPUs: take fp32 with ORT_PROVIDERS=cuda.")
    if wanted == "cuda" and cuda not in available:
        raise ModelUnavailable(
            "ORT_PROVIDERS=cuda, but the onnxruntime that is installed has no CUDA: install onnxruntime-gpu in its "
            "place, or take ORT_PROVIDERS=cpu."
        )
    if wanted == "cuda" or (wanted == "auto" and cuda in available and precision != "int8"):
        return [cuda, cpu]
    return [cpu]


def _pack_files(folder: Path) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """Which file of a pack does which task, and the loader's arguments where a manifest declares them.

    Without a manifest the file's own inputs and outputs tell, by the rule of InsightFace's router, so that no
    session is built for a model that is not needed.
    """
    from insightface.model_zoo import has_model_package_manifest, load_model_package  # noqa: PLC0415

    if not folder.is_dir():
        raise ModelUnavailable(
            f"FACE_MODEL names {folder}, which is no folder: give the folder of an InsightFace pack, "
            "or one of auto, auraface, compact"
        )
    files: dict[str, Path] = {}
    arguments: dict[str, dict[str, Any]] = {}
    if has_model_package_manifest(folder):
        try:
            package = load_model_package(folder)
        except (ValueError, TypeError, OSError) as error:
            raise ModelUnavailable(f"the manifest of {folder} cannot be used: {error}") from error
        for task, descriptor in package.tasks.items():
            if task in TASKS:
                files[task] = descriptor.path
                arguments[task] = {"name": str(folder), "model_task": task, "model_descriptor": descriptor}
    else:
        for path in sorted(folder.glob("*.onnx")):
            files.setdefault(_task_of(path), path)
        files.pop("", None)
    for task in TASKS:
        if task not in files:
            raise ModelUnavailable(f"{folder} holds no {task} model; an InsightFace pack has one for each of {TASKS}")
    return files, arguments


def _task_of(path: Path) -> str:
    import onnx  # noqa: PLC0415 - comes with insightface, loaded with it
    from google.protobuf.message import DecodeError  # noqa: PLC0415

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except (DecodeError, ValueError) as error:
        raise ModelUnavailable(
            f"{path} is damaged or no ONNX model: replace it or take it out of the folder"
        ) from error
    if len(graph.output) >= 5:
        return "detection"
    initialisers = {one.name for one in graph.initializer}  # older exporters list the weights among the inputs
    inputs = [one for one in graph.input if one.name not in initialisers]
    sides = [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim][2:4] if len(inputs) == 1 else []
    square = len(sides) == 2 and sides[0] == sides[1]
    # 192 is the landmark models' input; a second input is the face swapper's.
    if square and sides[0] >= 112 and sides[0] % 16 == 0 and sides[0] != 192:
        return "recognition"
    return ""


class CompactEngine:
    """dlib's detectors, 5-point landmarks and 128-d descriptor, all from wheels: to start with, not to go live with.

    The template is the mean of the descriptors of the aligned face and of its mirror image: on the 165 photos of
    30 people it misses no more at cosine 0.935 than the plain descriptor at 0.926, with a third of its false matches.
    """

    name = "compact-dlib-mirrored"
    dimension = 128
    # Measured on 165 photos of 30 people, 136 probes against a gallery of 30, 20 orders: at 0.926 (where the plain
    # descriptor has an FMR of 1e-3 on LFW) 9.5 probes took somebody else's name and 2.2 people could not enrol;
    # at 0.94, 2.1 and 0.5, for 15 % of misses. A gate that lets nobody in as somebody else is worth the misses.
    cosine_at_half = 0.94
    # The HOG detector looks for faces of 80 pixels and more: a twelfth of this longest side.
    HOG_SIDE = 960
    # Patterns on clothes and flowers score up to 0.3; a face that scores less is found by the second look.
    HOG_SCORE = 0.35
    # The second look costs 70 times the first per pixel, and needs faces of about 40 pixels.
    CNN_SIDE = 320

    def __init__(self) -> None:
        import dlib  # noqa: PLC0415 - a run on the other engine does not pay for it

        # The package's own __init__ needs pkg_resources, which new setuptools lack: only its folder is used.
        spec = importlib.util.find_spec("face_recognition_models")
        if spec is None or not spec.submodule_search_locations:
            raise ModelUnavailable(
                "the package face-recognition-models is not installed: pip install -r requirements.txt"
            )
        folder = Path(next(iter(spec.submodule_search_locations))) / "models"
        self._dlib = dlib
        self._hog = dlib.get_frontal_face_detector()
        self._cnn = dlib.cnn_face_detection_model_v1(str(folder / "mmod_human_face_detector.dat"))
        self._predictor = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
        self._recogniser = dlib.face_recognition_model_v1(str(folder / "dlib_face_recognition_resnet_model_v1.dat"))
        # dlib's detectors and networks keep scratch state: one caller at a time.
        self._lock = threading.Lock()
        blank = np.full((150, 150, 3), 127, np.uint8)
        self.detect(blank)
        self._recogniser.compute_face_descriptor(blank)

    def describe(self) -> str:
        return f"{self.name}, dlib's small model (to start with, not to go live with)"

    def detect(self, image: Pixels) -> list[Face]:
        if _holds_no_face(image):
            return []
        shrunk, small = _to_side(image, self.HOG_SIDE, enlarging=1.0)
        rgb = np.asarray(cv2.cvtColor(small, cv2.COLOR_BGR2RGB), np.uint8)
        with self._lock:
            scale, searched = _to_side(rgb, self.HOG_SIDE, enlarging=4.0)
            boxes, scores, _ = self._hog.run(searched, 0, self.HOG_SCORE)
            if not boxes:
                scale, searched = _to_side(rgb, self.CNN_SIDE, enlarging=4.0)
                seen = self._cnn(searched, 0)
                boxes, scores = [one.rect for one in seen], [one.confidence for one in seen]
            found = []
            for box, score in zip(boxes, scores, strict=True):
                edges = np.array([box.left(), box.top(), box.right(), box.bottom()]) / scale
                shape = self._predictor(rgb, self._dlib.rectangle(*(round(edge) for edge in edges)))
                points = np.array([(part.x, part.y) for part in shape.parts()], np.float32)
                face = Face(edges.astype(np.float32), float(score), points, DLIB_LAYOUT)
                found.append(face.enlarged(1 / shrunk))
        return _widest_first(found)

    def embed(self, image: Pixels, face: Face) -> Vector:
        if np.ptp(face.landmarks, axis=0).max() < 1:
            raise ValueError("degenerate landmarks: all in one place")
        rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        left, top, right, bottom = (round(float(edge)) for edge in face.box)
        parts = [self._dlib.point(int(x), int(y)) for x, y in face.landmarks]
        shape = self._dlib.full_object_detection(self._dlib.rectangle(left, top, right, bottom), parts)
        chip = self._dlib.get_face_chip(rgb, shape, 150, 0.25)
        with self._lock:
            pair = self._recogniser.compute_face_descriptor([chip, np.ascontiguousarray(chip[:, ::-1])])
        return _normalised(np.sum([np.array(one) for one in pair], axis=0))


def _holds_no_face(image: Pixels) -> bool:
    """Whether the picture is a speck or a strip, on which the detectors' resizing fails; no face fits either."""
    short, long = sorted(image.shape[:2])
    return bool(short < 16 or short * 32 < long)


def _to_side(image: Pixels, side: int, *, enlarging: float) -> tuple[float, Pixels]:
    """Scale so that the longest side is `side`, `enlarging` times at most; returns the scale and the picture."""
    scale = min(enlarging, side / max(image.shape[:2]))
    if scale == 1:
        return scale, image
    height, width = (max(1, round(scale * one)) for one in image.shape[:2])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    _, near = _halved(image, scale)
    return scale, np.asarray(cv2.resize(near, (width, height), interpolation=how), np.uint8)


def _halved(image: Pixels, scale: float) -> tuple[int, Pixels]:
    """Halve the picture while it stays larger than at `scale`; returns how many times smaller it is, and the picture.

    Halving is many times as fast as other shrinking, and leads from a photo and from its reduced copy to the same.
    """
    by = 1
    while by * scale <= 0.5 and min(image.shape[:2]) > 1:
        height, width = (one // 2 for one in image.shape[:2])
        whole = image[: 2 * height, : 2 * width]
        image = np.asarray(cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
        by *= 2
    return by, image


def _input_size(image: Pixels, side: int) -> tuple[int, int]:
    """Width and height of the detector's input, the longest `side`: multiples of 32, and no wider than the picture."""
    height, width = (32 * math.ceil(side * one / max(image.shape[:2]) / 32) for one in image.shape[:2])
    return width, height


def cut_out(image: Pixels, matrix: Affine, side: int, *, border: int = cv2.BORDER_REPLICATE) -> Pixels:
    """Cut uint8[side, side, 3] out of the picture by `matrix`, float64[2, 3], from the picture's pixels to its own."""
    scale = math.hypot(matrix[0, 0], matrix[1, 0])
    if scale < 0.5:  # the warp alone would skip pixels: noise would pass for detail
        corners = np.array([[[0.0, 0.0], [side, 0.0], [0.0, side], [side, side]]])
        seen = cv2.transform(corners, cv2.invertAffineTransform(matrix))[0]
        x0, y0 = np.clip(np.floor(seen.min(axis=0)), 0, image.shape[1::-1]).astype(int)
        x1, y1 = np.clip(np.ceil(seen.max(axis=0)), 0, image.shape[1::-1]).astype(int)
        part = image[y0:y1, x0:x1]
        if part.size:
            by, near = _halved(part, 2 * scale)
            height, width = (max(1, round(2 * scale * by * one)) for one in near.shape[:2])
            image = np.asarray(cv2.resize(near, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
            across, down = by * near.shape[1] / width, by * near.shape[0] / height
            # Pixels have their coordinates at their centres.
            back = np.array([[across, 0, x0 + across / 2 - 0.5], [0, down, y0 + down / 2 - 0.5], [0, 0, 1]])
            matrix = matrix @ back
    return np.asarray(cv2.warpAffine(image, matrix, (side, side), borderMode=border), np.uint8)


def _roll_deg(face: Face) -> float:
    """The slope of the line through the eyes, degrees."""
    left, right = face.eyes
    return float(np.degrees(np.arctan2(right[1] - left[1], right[0] - left[0])))


def _widest_first(faces: list[Face]) -> list[Face]:
    return sorted(faces, key=lambda face: float(face.box[0] - face.box[2]))


def _without_nested(faces: list[Face], mostly: float) -> list[Face]:
    """Drop each face most of whose box lies inside the box of a surer one."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda one: -one.score):
        if all(_share_inside(face.box, other.box) < mostly for other in kept):
            kept.append(face)
    return kept


def _share_inside(box: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    size = np.clip(box[2:] - box[:2], 1e-6, None)
    common = np.clip(np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2]), 0, None)
    return float(np.prod(common) / np.prod(size))


def load_engine(
    face_model: str,
    *,
    models_dir: Path,
    hub_timeout_s: float,
    threads: int,
    may_fall_back: bool,
    precision: str = "fp32",
    providers: str = "cpu",
) -> Engine:
    """Load the model that `FACE_MODEL` names, warmed and ready.

    Args:
        face_model: `auto`, `auraface`, `compact`, or the folder of an InsightFace pack.
        models_dir: AuraFace's files lie in its `auraface/`, and are fetched there.
        hub_timeout_s: after this long without an answer the hub counts as unreachable.
        threads: threads of one model run; 0 takes all cores.
        may_fall_back: whether `auto` may take the compact model where AuraFace cannot be had.
        precision: of the recogniser; the compact model has only one.
        providers: what onnxruntime runs the models on; the compact model runs on the CPU.

    Raises:
        ModelUnavailable: with a message for the operator that says what to do.
    """
    if face_model == "compact":
        if precision != "fp32" or providers == "cuda":
            raise ModelUnavailable(
                "The compact model has neither 8 bits nor CUDA: EMBEDDING_PRECISION and ORT_PROVIDERS "
                "are for InsightFace's packs."
            )
        return CompactEngine()
    if face_model not in ("auto", "auraface"):
        return InsightFaceEngine(
            Path(face_model).expanduser().resolve(), threads=threads, precision=precision, providers=providers
        )
    folder = models_dir / "auraface"
    try:
        weights.ensure(folder, hub_timeout_s=hub_timeout_s)
    except ModelUnavailable as error:
        if face_model == "auraface":
            raise
        if not may_fall_back:
            raise ModelUnavailable(
                f"{error}\nWith MONGO_URI set there is no falling back to a smaller model: a gallery must not mix "
                "models. Make the files available as above, or choose one yourself with FACE_MODEL=compact or "
                "FACE_MODEL=/folder/of/an/InsightFace/pack."
            ) from error
        logger.warning(
            "AuraFace is not available, so the service runs on the COMPACT model (dlib): good to start with, not to "
            "go live with. What was missing: %s",
            error,
        )
        return CompactEngine()
    files = {one.task: folder / one.name for one in weights.AURAFACE}
    return InsightFaceEngine(folder, threads=threads, files=files, precision=precision, providers=providers)
