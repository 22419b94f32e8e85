"""Compares a pack's recogniser in bf16 and int8 with onnxruntime's fp32: time, similarity, what becomes of matches.

    python benchmarks/precision.py PACK [DIR [PHOTO ...]]

DIR holds a sub-folder of photos per person; each PHOTO shows a stranger to them, for impostor pairs alone. Times are
medians of single embeddings in turn: CPU, which is nearly the same on a busy machine, and wall clock. Each person's
photos count seven more times: landmarks shifted, lighter and darker, mirrored, saved again as JPEG. FNMR's moves are
paired, with 95 % intervals over people drawn again; "mixed" enrols in fp32 and verifies in the other.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engines import reduced_precision
from engines.base import Face
from engines.insightface_engine import InsightFaceEngine
from engines.model_files import ModelUnavailable
from photos import decode
from photos.pixels import Pixels

ROUNDS, COPIES, FMR = 15, 8, 1e-4
Templates = npt.NDArray[np.float32]


def engines(pack: Path, threads: int) -> dict[str, InsightFaceEngine]:
    """The pack in each precision that can be had here."""
    found = {"fp32": InsightFaceEngine(pack, threads=threads)}
    for precision in reduced_precision.INSTRUCTIONS:
        try:
            found[precision] = InsightFaceEngine(pack, threads=threads, precision=precision)
        except ModelUnavailable as error:
            print(error)
    return found


def times(of: dict[str, InsightFaceEngine], crops: list[Pixels]) -> None:
    """Print the time of an embedding: CPU and wall clock, and their ratios to fp32's."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in of}
    for _ in range(ROUNDS):
        for crop in crops:
            for name, engine in of.items():
                begun = time.process_time(), time.perf_counter()
                engine._embedded(None, [crop])
                taken[name].append((time.process_time() - begun[0], time.perf_counter() - begun[1]))
    medians = {name: 1000 * np.median(one, axis=0) for name, one in taken.items()}
    for name, (cpu, wall) in medians.items():
        of_cpu, of_wall = medians[name] / medians["fp32"]
        print(f"  {name}: CPU {cpu:.1f} ms ({of_cpu:.2f}), wall {wall:.1f} ms ({of_wall:.2f})")


def faces_in(engine: InsightFaceEngine, paths: Iterable[Path]) -> Iterator[tuple[Path, Pixels, Face]]:
    for path in sorted(paths):
        photo = decode.decode(path.read_bytes(), max_bytes=2**26, max_pixels=10**8).pixels
        for face in engine.detect(photo)[:1]:
            yield path, photo, face


def varied(engine: InsightFaceEngine, photo: Pixels, face: Face, rng: np.random.Generator) -> Iterator[Pixels]:
    """The aligned face, and as other photos of the moment might have given it."""
    yield engine._aligned(photo, face)
    for number in range(1, COPIES):
        shift = rng.normal(0, 0.02 * face.inter_eye, face.landmarks.shape).astype(np.float32)
        crop = np.asarray(engine._aligned(photo, replace(face, landmarks=face.landmarks + shift)), np.float32)
        lit = np.clip(crop * rng.uniform(0.75, 1.25) + rng.uniform(-15, 15), 0, 255).astype(np.uint8)
        lit = np.ascontiguousarray(lit[:, ::-1]) if number % 2 else lit
        jpeg = cv2.imencode(".jpg", lit, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(60, 95))])[1]
        yield np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), np.uint8)


def normalised(raw: Templates) -> Templates:
    return np.asarray(raw / np.linalg.norm(raw, axis=1, keepdims=True), np.float32)


def missed(
    enrolled: Templates, probes: Templates, photos: npt.NDArray[np.int64], owners: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Each person's genuine pairs below the threshold of the wanted FMR, and all; strangers are those past `owners`."""
    n = len(owners)
    cosines = probes[:n] @ enrolled[:n].T
    same = owners[:, None] == owners[None, :]
    genuine = same & (photos[:, None] != photos[None, :])
    impostors = [cosines[~same], (probes[:n] @ enrolled[n:].T).ravel(), (enrolled[:n] @ probes[n:].T).ravel()]
    below = cosines < np.quantile(np.concatenate(impostors), 1 - FMR)
    counted = [np.bincount(owners, one.sum(axis=1)).astype(np.float64) for one in (genuine & below, genuine)]
    return counted[0], counted[1]


def matches(of: dict[str, InsightFaceEngine], people: Path, strangers: list[Path]) -> None:
    """Print what becomes of FNMR at the wanted FMR."""
    rng = np.random.default_rng(0)
    whole, crops, photos, names = of["fp32"], [], [], []
    for number, (path, photo, face) in enumerate(faces_in(whole, people.glob("*/*.jpg"))):
        crops += list(varied(whole, photo, face, rng))
        photos += [number] * COPIES
        names += [path.parent.name] * COPIES
    crops += [whole._aligned(photo, face) for _, photo, face in faces_in(whole, strangers)]
    owners = np.unique(names, return_inverse=True)[1]
    templates = {name: normalised(engine._embedded(None, crops)) for name, engine in of.items()}
    base, pairs = missed(templates["fp32"], templates["fp32"], np.array(photos), owners)
    print(
        f"FNMR at FMR {FMR:g} in fp32: {100 * base.sum() / pairs.sum():.2f} %, {pairs.sum():.0f} ordered genuine pairs"
    )
    drawn = rng.multinomial(len(pairs), [1 / len(pairs)] * len(pairs), 2000)
    for name in list(of)[1:]:
        cosines = np.vecdot(templates[name], templates["fp32"])
        print(f"  {name}: cosine to fp32 {cosines.mean():.4f}, at worst {cosines.min():.4f}, {len(cosines)} faces")
        for enrolled, how in ((name, "alone"), ("fp32", "mixed")):
            more = missed(templates[enrolled], templates[name], np.array(photos), owners)[0] - base
            low, high = np.percentile(100 * (drawn @ more) / (drawn @ pairs), [2.5, 97.5])
            print(f"    {how}: FNMR moves by {100 * more.sum() / pairs.sum():+.2f} points ({low:+.2f} to {high:+.2f})")


def main(pack: str, people: str | None = None, *strangers: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(pack, f"{scratch}/pack")
        for threads in (1, 2):
            of = engines(Path(scratch, "pack"), threads)
            print(f"{threads} threads")
            times(of, of["fp32"]._some_crops(reduced_precision.photos()))
        if people is not None:
            matches(of, Path(people), [Path(one) for one in strangers])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
