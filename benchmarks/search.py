"""Searches galleries of growing size, beside a matrix product, a plain read of the matrix, and the older way.

    python benchmarks/search.py --people 100000 1000000 --probes 10000

All methods answer the same probes in turn, one query at a time; figures are medians, as ratios to NumPy's `M @ q`
(BLAS held to one thread). Probes are another photo of somebody enrolled (a third), strangers (a third), and near-ties:
points half-way between two who are enrolled (a third). Afterwards 8 threads search while 200 people a second enrol, and
every decision is compared with float32 brute force over the rows that the search could see. The older way (every
document fetched from the store and unpickled for one request) is measured at up to 20,000 people.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import pickle
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engines.base import Template
from gallery.in_memory import InMemoryCopy, InMemoryView, ModelFilter
from gallery.snapshot import SnapshotFolder
from gallery.templates import BLOCK_ROWS
from store.records import Enrolment, Entry
from store.sqlite import SqliteStore

D = 512
DUPLICATE = 0.5
OLDER_AT_MOST = 20_000


def unit(vectors: npt.NDArray[np.float32]) -> Template:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32)


def user_id(row: int) -> str:
    return str(uuid.UUID(int=(row + 1) * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128))


class Log:
    """A store that is a matrix: place i holds row i - 1. Only what a copy reads."""

    def __init__(self, matrix: Template, count: int) -> None:
        self.matrix, self.count = matrix, count

    def entries(self, after: int) -> Iterator[Entry]:
        for row in range(after, self.count):
            yield Entry(row + 1, user_id(row), self.matrix[row], "m")

    def last_place(self) -> int:
        return self.count

    def checkpoint(self, seq: int) -> str:
        return str(seq)

    def erasures(self, until: int) -> list[str]:
        return []


def make_people(n: int, rng: np.random.Generator) -> Template:
    matrix = np.empty((n, D), np.float32)
    for start in range(0, n, 10_000):
        matrix[start : start + 10_000] = unit(rng.standard_normal((min(10_000, n - start), D), np.float32))
    return matrix


def make_probe(matrix: Template, count: int, kind: int, rng: np.random.Generator) -> Template:
    noise = rng.standard_normal(D, np.float32)
    if kind == 0:
        return unit(matrix[rng.integers(count)] + np.float32(rng.uniform(0.02, 0.08)) * noise)
    if kind == 1:
        return unit(noise)
    one, other = matrix[rng.integers(count, size=2)]
    return unit(one + other + np.float32(1e-4) * noise)


def resident() -> dict[str, int]:
    """Bytes of this process that are in memory: its own, and those of mapped files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: 1024 * int(status[key].split()[0]) for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))}


def decided(view: InMemoryView, probe: Template) -> tuple[str | None, float]:
    best = view.search(probe)
    return (best[0].user_id, best[0].cosine) if best else (None, -1.0)


def brute_force(matrix: Template, count: int, probe: Template) -> tuple[str | None, float]:
    best_row, best = -1, -np.inf
    for start in range(0, count, BLOCK_ROWS):
        cosines = np.vecdot(matrix[start : min(start + BLOCK_ROWS, count)], probe)
        row = int(np.argmax(cosines))
        if cosines[row] > best:
            best_row, best = start + row, float(cosines[row])
    return user_id(best_row), min(1.0, best)


def timed(call: Callable[..., object], *given: object) -> float:
    begun = time.perf_counter()
    call(*given)
    return time.perf_counter() - begun


def older_way(matrix: Template, count: int, folder: Path) -> Callable[[Template], object]:
    """Every document fetched and unpickled for one request."""
    store = SqliteStore(folder / "older.sqlite3")
    store.prepare()
    for start in range(0, count, 2000):
        rows = range(start, min(start + 2000, count))
        store.append(start + 1, [Enrolment(user_id(row), matrix[row], "m", 0.0) for row in rows])

    def search(probe: Template) -> object:
        best: tuple[float, str] | None = None
        for record in store._query("SELECT user_id, embedding FROM faces"):
            cosine = float(np.dot(pickle.loads(record["embedding"]), probe))
            best = max(best, (cosine, record["user_id"])) if best else (cosine, record["user_id"])
        return best

    return search


def measure(n: int, probes: int, checked: int, folder: Path) -> None:
    rng = np.random.default_rng(n)
    spare = 5000
    log = Log(make_people(n + spare, rng), n)
    before = resident()
    copy = InMemoryCopy(log, ModelFilter("m", D, None), SnapshotFolder(folder / str(n), "benchmark", D))  # type: ignore[arg-type]
    loading = timed(copy.load)
    copy.close()
    after = resident()
    view = copy.caught_up()
    matrix = log.matrix[:n]
    methods: dict[str, Callable[[Template], object]] = {
        "M @ q": lambda probe: matrix @ probe,
        "plain read": lambda _: [matrix[at : at + BLOCK_ROWS].view(np.uint64).sum() for at in range(0, n, BLOCK_ROWS)],
        "np.vecdot": lambda probe: np.vecdot(matrix, probe),
        "this": lambda probe: decided(view, probe),
    }
    if n <= OLDER_AT_MOST:
        methods["older way"] = older_way(log.matrix, n, folder)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(probes):
        probe = make_probe(matrix, n, number % 3, rng)
        for name, method in methods.items():
            seconds[name].append(timed(method, probe))
    medians = {name: statistics.median(all_) for name, all_ in seconds.items()}
    print(f"\n{n:,} people (loaded in {loading:.1f} s from a log in memory, snapshot written)")
    for name, median in medians.items():
        of_read = median / medians["plain read"]
        print(
            f"  {name:12} {1000 * median:9.2f} ms   {median / medians['M @ q']:7.3f} of M @ q {of_read:9.3f} of a read"
        )
    for name, bytes_ in after.items():
        print(f"  resident, {name:6} {(bytes_ - before[name]) / n:7.0f} bytes a person")
    wrong = sum(
        decided(view, probe) != brute_force(matrix, n, probe)
        for probe in (make_probe(matrix, n, number % 3, rng) for number in range(checked))
    )
    print(f"  differing decisions: {wrong} of {checked:,}")
    crowd(copy, log, rng, max(checked // 20, 100))


def crowd(copy: InMemoryCopy, log: Log, rng: np.random.Generator, checked: int) -> None:
    """8 threads of queries while 200 people a second are enrolled."""
    over = threading.Event()
    answers: list[tuple[int, Template, tuple[str | None, float]]] = []
    taken: list[float] = []

    def query(seed: int) -> None:
        mine = np.random.default_rng(seed)
        while not over.is_set():
            probe = make_probe(log.matrix, log.count, int(mine.integers(3)), mine)
            begun = time.perf_counter()
            view = copy.caught_up()
            found = decided(view, probe)
            taken.append(time.perf_counter() - begun)
            answers.append((view.templates.count, probe, found))

    threads = [threading.Thread(target=query, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    begun, enrolled = time.monotonic(), 0
    while enrolled < 4000:
        due = min(4000, int(200 * (time.monotonic() - begun)))
        log.count += due - enrolled
        enrolled = due
        time.sleep(0.005)
    over.set()
    for thread in threads:
        thread.join()
    rate = len(answers) / (time.monotonic() - begun)
    some = rng.choice(len(answers), min(checked, len(answers)), replace=False)
    wrong = sum(answers[at][2] != brute_force(log.matrix, answers[at][0], answers[at][1]) for at in some)
    print(
        f"  8 threads while 200 a second enrol: {rate:.0f} searches a second, "
        f"median {1000 * statistics.median(taken):.0f} ms, slowest {1000 * max(taken):.0f} ms, "
        f"differing decisions: {wrong} of {len(some)} looked at"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--people", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--probes", type=int, default=31, help="timed probes")
    parser.add_argument("--checked", type=int, default=2000, help="probes compared with brute force")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for n in parsed.people:
            measure(n, parsed.probes, parsed.checked, Path(folder))


if __name__ == "__main__":
    main()
