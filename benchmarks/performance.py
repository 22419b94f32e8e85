"""Writes docs/performance.md: what each stage of a request costs, against the older flow and a bare model loop.

    python benchmarks/performance.py MODEL [MODEL ...] --photos PHOTO [PHOTO ...]

MODEL is what FACE_MODEL takes. Everything is measured in one run, in turns, photo by photo, in CPU seconds of this
process with one thread a model run, so that neither the machine's other load nor the number of its cores decides.

The older flow runs every model of the pack on every face before any check, and for a sign-up twice: once for the
checks, once for the embedding. The bare loop is the model runs of the very request, recorded once and replayed.
"""

from __future__ import annotations

import argparse
import io
import logging
import math
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from api.access import Access
from api.readiness import Readiness
from api.service_parts import Parts
from app import create_app
from benchmarks.load import Service as Process
from benchmarks.load import exchange, model_runs, request
from bootstrap import load_engine
from engines.base import Engine
from engines.face_attributes import FaceAttributesModel
from engines.model_slots import ModelSlots
from gallery.decisions import Gallery
from photos.decode import decode
from pipeline import Pipeline, Trace
from settings import Settings
from store.sqlite import SqliteStore

STAGES = ("read", "decode", "detect", "decode_larger", "check", "embed", "search", "enrol")
ROUNDS = 3


def folder_of(model: str) -> Path:
    """Where the pack lies that FACE_MODEL names."""
    return PROJECT / "models" / model if model in ("compact", "auraface") else Path(model).resolve()


def older_flow(model: str) -> Callable[[bytes], object]:
    """One analysis of a photo as the older flow made it: all models of the pack on all faces."""
    import cv2
    import numpy as np
    from insightface.app import FaceAnalysis
    from onnxruntime import SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = 1
    older = FaceAnalysis(name=str(folder_of(model)), providers=["CPUExecutionProvider"], sess_options=options)
    older.prepare(0)
    return lambda data: older.get(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))


class Service:
    """The application in this process, its stages clocked in CPU seconds."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        store = SqliteStore(folder / "faces.sqlite3")
        store.prepare()
        gallery = Gallery(store, engine.name, engine.dimension)
        reader = FaceAttributesModel(PROJECT / "models")
        settings = Settings()
        pipeline = Pipeline(settings, engine, reader, ModelSlots(settings.model_slots, math.inf), decode)
        self._client = create_app(
            settings, Parts(engine, store, gallery, pipeline, Access(settings), Readiness(gallery.refresh))
        ).test_client()
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begun = time.process_time()
        try:
            yield
        finally:
            self.seconds[name] += time.process_time() - begun

    def post(self, data: bytes, route: str) -> int:
        """Send one photo; the whole request counts as `request`."""
        with patch.object(Trace, "stage", lambda _, name: self.stage(name)), self.stage("request"):
            return self._client.post(route, data={"file": (io.BytesIO(data), "p.jpg")}).status_code


def clocked(work: Callable[..., object], *arguments: object) -> float:
    begun = time.process_time()
    work(*arguments)
    return time.process_time() - begun


def twice(older: Callable[[bytes], object], photo: bytes) -> None:
    older(photo)
    older(photo)


LOADING = """
import sys, time, warnings
warnings.simplefilter("ignore")
import onnxruntime
from pathlib import Path
begun = time.perf_counter()
for path in Path(sys.argv[1]).glob("*.onnx"):
    onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
print(time.perf_counter() - begun)
"""


def first_answer(model: str, photo: bytes) -> tuple[float, float]:
    """Seconds from the start of the service's process to its first answered sign-up, and those that models take."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        service = Process(model, Path(folder))
        with socket.create_connection(("127.0.0.1", service.port), 60) as connection:
            status = exchange(connection, request("/signUp", photo))
        taken = time.perf_counter() - begun
        service.stop()
    if status != 200:
        raise SystemExit(f"the first sign-up answered {status}")
    alone = [sys.executable, "-c", LOADING, str(folder_of(model))]
    return taken, float(subprocess.run(alone, cwd=PROJECT, capture_output=True, check=True).stdout)  # noqa: S603 - ours


def measured(model: str, photos: list[bytes]) -> list[str]:
    """The lines of one model."""
    engine = load_engine(model, models_dir=PROJECT / "models", hub_timeout_s=1, threads=1, may_fall_back=False)
    older = older_flow(model)
    with tempfile.TemporaryDirectory() as folder:
        service = Service(engine, Path(folder))
        accepted = [photo for photo in photos if service.post(photo, "/signUp") in (200, 409)]
        refused = [photo for photo in photos if photo not in accepted]
        ratios: dict[str, list[float]] = defaultdict(list)
        bare = dict(zip(accepted, model_runs(engine, accepted, Settings()), strict=True))
        service.seconds.clear()
        for _ in range(ROUNDS):
            for photo in accepted:
                ratios["bare"].append(clocked(bare[photo]) / clocked(service.post, photo, "/verify"))
                ratios["sign_up"].append(clocked(service.post, photo, "/signUp") / clocked(twice, older, photo))
            for photo in refused:
                ratios["refused"].append(clocked(service.post, photo, "/signUp") / clocked(twice, older, photo))
        count = ROUNDS * (2 * len(accepted) + len(refused))
    total = service.seconds.pop("request")
    starts = [first_answer(model, accepted[0]) for _ in range(ROUNDS)]
    whole, models = (statistics.median(one) for one in zip(*starts, strict=True))
    milliseconds = {stage: 1000 * service.seconds.get(stage, 0.0) / count for stage in STAGES}
    rest = 1000 * total / count - sum(milliseconds.values())
    row = " | ".join(f"{milliseconds[stage]:.1f}" for stage in STAGES if stage != "decode_larger")
    again = milliseconds["decode_larger"]
    lines = [
        f"### {engine.name}",
        "",
        f"{len(accepted)} photos pass (each is signed up and verified), and {len(refused)} are refused.",
        "",
        "| read | decode | detect | check | embed | search | store | HTTP and the rest | all |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| {row} | {rest:.1f} | {1000 * total / count:.1f} |",
        "",
        f"Mean CPU milliseconds a request (`HTTP and the rest` includes {again:.1f} for decoding again, larger)."
        if again >= 0.05
        else "Mean CPU milliseconds a request.",
        "",
    ]
    rows = {
        "a sign-up, against the older flow": "sign_up",
        "a refused photo, against the older flow": "refused",
        "the bare loop of a verification's model runs, against the verification": "bare",
    }
    lines += ["| ratio of CPU seconds | median | 10 % ... 90 % of photos |", "|---|---|---|"]
    for title, name in rows.items():
        if len(ratios[name]) > 1:
            cuts = statistics.quantiles(ratios[name], n=10)
            lines.append(f"| {title} | {statistics.median(ratios[name]):.2f} | {cuts[0]:.2f} ... {cuts[-1]:.2f} |")
    beyond = statistics.median(taken - loading for taken, loading in starts)
    lines += [
        "",
        f"The first sign-up is answered {whole:.1f} s after the start of the process. Loading the models alone takes",
        f"{models:.1f} s, and the difference is {beyond:.1f} s. (Each figure is the median of {ROUNDS} starts.)",
    ]
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--photos", nargs="+", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=PROJECT / "docs" / "performance.md")
    parsed = parser.parse_args()
    logging.disable()
    photos = [path.read_bytes() for path in parsed.photos]
    text = [
        "# Performance",
        "",
        "What each stage of a request costs, and how much of it is the models' own work. This page is written by",
        "`make benchmark DATA=...`.",
        "",
        "Each request is compared with two things, photo by photo in one run:",
        "",
        "- The *older flow* runs every model of the pack on every face, and does so twice for a sign-up.",
        "- The *bare loop* is the request's own model runs and nothing else.",
        "",
        f"Times are CPU time with one thread a model run (Python {platform.python_version()}, {platform.machine()}).",
        "`python benchmarks/load.py MODEL PHOTO ...` measures the service under load, in overload and over a soak.",
        "",
    ]
    for model in parsed.models:
        text += measured(model, photos)
    parsed.out.write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    main()
