"""Times the start of a gallery: from the snapshot, beside reading every document of the store.

    python benchmarks/start.py --people 1000000 [--sealed] [--keep DIR [--model NAME]]

Both starts are processes of their own on one SQLite store, in turn. The store is filled with random templates: 4 KiB of
disk a person, and 2.6 for the snapshot. DIR keeps both; with NAME the running model's (`GET /health` names it), and
DATA_DIR=DIR, the service serves them. With --sealed both are encrypted, as with TEMPLATE_KEYS.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gallery.decisions import Gallery
from gallery.snapshot import SnapshotFolder
from store.encryption import NO_KEYS, Keyring
from store.records import Enrolment
from store.sqlite import SqliteStore

D = 512
KEYRING = Keyring((bytes(range(32)),))


def fill(folder: Path, n: int, model: str, keyring: Keyring) -> None:
    store = SqliteStore(folder / "faces.sqlite3", keyring)
    store.prepare()
    rng = np.random.default_rng(0)
    for start in range(store.last_place(), n, 5000):
        vectors = rng.standard_normal((min(5000, n - start), D), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        store.append(start + 1, [Enrolment(str(uuid.uuid4()), one, model, time.time()) for one in vectors])
    store.close()


def start(folder: Path, model: str, snapshot: bool, keyring: Keyring) -> dict[str, float]:
    """Load a gallery in this process, and say how long it took and how much memory it takes."""
    begun = time.perf_counter()
    store = SqliteStore(folder / "faces.sqlite3", keyring)
    store.prepare()
    identity = f"{store.describe()} {model} {D} None"
    kept = SnapshotFolder(folder / "gallery", identity, D, keyring) if snapshot else None
    gallery = Gallery(store, model, D, snapshot=kept)
    gallery.load()
    seconds = time.perf_counter() - begun
    gallery.close()
    lines = Path("/proc/self/status").read_text().splitlines()
    own = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return {"seconds": seconds, "people": gallery.status()["enrolled"], "own_mib": own / 1024}


def in_a_process(folder: Path, model: str, snapshot: bool, sealed: bool) -> dict[str, float]:
    what = "snapshot" if snapshot else "store"
    command = [sys.executable, __file__, "--keep", str(folder), "--model", model, "--start", what]
    command += ["--sealed"] * sealed
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))  # noqa: S603


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--people", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--model", default="benchmark")
    parser.add_argument("--sealed", action="store_true")
    parser.add_argument("--start", choices=("snapshot", "store"), help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    keyring = KEYRING if parsed.sealed else NO_KEYS
    if parsed.start:
        print(json.dumps(start(parsed.keep, parsed.model, parsed.start == "snapshot", keyring)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = parsed.keep or Path(temporary)
        fill(folder, parsed.people, parsed.model, keyring)
        first = in_a_process(folder, parsed.model, snapshot=True, sealed=parsed.sealed)
        print(f"{first['people']:,} people; first start, which writes the snapshot: {first['seconds']:.1f} s")
        for _ in range(parsed.rounds):
            whole = in_a_process(folder, parsed.model, snapshot=False, sealed=parsed.sealed)
            quick = in_a_process(folder, parsed.model, snapshot=True, sealed=parsed.sealed)
            ratio = quick["seconds"] / whole["seconds"]
            print(
                f"every document: {whole['seconds']:6.2f} s, {whole['own_mib']:5.0f} MiB of its own   "
                f"snapshot: {quick['seconds']:6.2f} s, {quick['own_mib']:5.0f} MiB   ratio {ratio:.3f}"
            )


if __name__ == "__main__":
    main()
