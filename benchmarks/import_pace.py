"""Compares `python app.py import`'s pace with a bare loop of the same model runs, in turns, in one run.

    python benchmarks/import_pace.py MODEL PHOTO [PHOTO ...]

Both have as many threads as there are cores, one thread a model run. The ratio of CPU seconds does not depend on the
machine's other load; that of the rates does.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import warnings
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from benchmarks.load import bare_loop, model_runs, usable
from bootstrap import load_engine
from commands.bulk.photo_list import Photo
from commands.bulk.processing import one_thread_per_photo, process_photos
from settings import Settings

ROUNDS = 3


def main(model: str, paths: list[str]) -> None:
    settings = one_thread_per_photo(Settings())
    engine = load_engine(model, models_dir=PROJECT / "models", hub_timeout_s=1, threads=1, may_fall_back=False)
    good = set(usable(engine, [Path(path).read_bytes() for path in paths], settings))
    photos = [Photo(Path(path), None) for path in paths if Path(path).read_bytes() in good]
    runs = model_runs(engine, [photo.path.read_bytes() for photo in photos], settings)
    rates, cpu = [], []
    for _ in range(ROUNDS):
        begun, used = time.perf_counter(), time.process_time()
        made = [one for one in process_photos(photos, engine, settings) if one.template is not None]
        seconds, used = (time.perf_counter() - begun) / len(made), (time.process_time() - used) / len(made)
        bare_rate, bare_cpu = bare_loop(runs, os.cpu_count() or 1, seconds * len(made))
        rates.append(1 / seconds / bare_rate)
        cpu.append(bare_cpu / used)
    print(
        f"{engine.name}, {len(photos)} photos: {statistics.median(rates):.2f} of the bare loop's rate, "
        f"by CPU seconds {statistics.median(cpu):.2f}"
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2:])
