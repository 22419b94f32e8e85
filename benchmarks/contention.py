"""Enrols different people as fast as possible, from one process and from four on the same store, in turn.

    python benchmarks/contention.py [--mongo-uri URI] [--seconds 5]

SQLite by default. Prints enrolments a second, the four processes' sum as a ratio to the single process's rate, how many
places a process was beaten to for each that it took, and the rate of a batch enrolment.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bootstrap import make_store
from gallery.decisions import Gallery, NewFace
from store.records import Enrolment, EnrolmentLog

D = 512


class Counting:
    """A store that counts the places asked for and got."""

    def __init__(self, store: EnrolmentLog) -> None:
        self._store = store
        self.asked = self.got = 0

    def append(self, seq: int, enrolments: Sequence[Enrolment]) -> int:
        got = self._store.append(seq, enrolments)
        self.asked += 1
        self.got += got > 0
        return got

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def people(seed: int, n: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    vectors = np.random.default_rng(seed).standard_normal((n, D), np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def enrol(where: dict[str, Any], seed: int, plan: tuple[float, int], barrier: Any, results: Any) -> None:
    seconds, batch = plan
    store = Counting(make_store(**where))
    store.prepare()
    gallery = Gallery(store, "m", D)
    gallery.refresh()
    everybody = people(seed, 200_000 if batch > 1 else 20_000)
    barrier.wait()
    begun, enrolled = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds and enrolled + batch <= len(everybody):
        if batch == 1:
            gallery.enrol(everybody[enrolled], duplicate_cosine=0.5)
        else:
            gallery.enrol_many([NewFace(one) for one in everybody[enrolled : enrolled + batch]], duplicate_cosine=0.5)
        enrolled += batch
    results.put((enrolled / (time.perf_counter() - begun), store.asked, store.got))


def measure(mongo_uri: str | None, processes: int, seconds: float, batch: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        where = {
            "mongo_uri": mongo_uri,
            "mongo_db": "contention",
            "mongo_collection": f"contention_{uuid.uuid4().hex}",
            "data_dir": Path(folder),
        }
        context = multiprocessing.get_context("spawn")
        barrier, results = context.Barrier(processes), context.Queue()
        running = [
            context.Process(target=enrol, args=(where, seed, (seconds, batch), barrier, results))
            for seed in range(processes)
        ]
        for one in running:
            one.start()
        answers = [results.get() for _ in running]
        for one in running:
            one.join()
    asked, got = sum(answer[1] for answer in answers), sum(answer[2] for answer in answers)
    return sum(answer[0] for answer in answers), (asked - got) / max(got, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mongo-uri")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parsed = parser.parse_args()
    for _ in range(parsed.rounds):
        single, _ = measure(parsed.mongo_uri, 1, parsed.seconds, 1)
        four, lost = measure(parsed.mongo_uri, 4, parsed.seconds, 1)
        batch, _ = measure(parsed.mongo_uri, 1, parsed.seconds, 200)
        print(
            f"one process {single:6.0f}/s   four {four:6.0f}/s, ratio {four / single:.2f}, "
            f"{lost:.2f} places lost for each taken   batches of 200: {batch:6.0f}/s, ratio {batch / single:.1f}"
        )


if __name__ == "__main__":
    main()
