"""Times what `python app.py duplicates` does with random templates, and counts the planted pairs that it misses.

    python benchmarks/duplicates.py [--people 1000000] [--share 1]

The time for all comes from a random share of the blocks; nothing can be said to be missed of less than all.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from commands.duplicates import blocks_of, pairs_above
from engines.base import Template

DIMENSION, LEAST, PLANTED = 512, 0.5, 1000


def templates(people: int, generator: np.random.Generator) -> tuple[Template, set[tuple[int, int]]]:
    """Random templates, and the pairs among them whose cosine was made `LEAST` or more."""
    rows = np.empty((people, DIMENSION), np.float32)
    for start in range(0, people, 50_000):
        some = generator.standard_normal((min(50_000, people - start), DIMENSION), dtype=np.float32)
        rows[start : start + len(some)] = some / np.linalg.norm(some, axis=1, keepdims=True)
    planted = set()
    for i, j in np.sort(generator.permutation(people)[: 2 * PLANTED].reshape(-1, 2)):
        cosine = generator.uniform(LEAST - 0.05, 1)
        apart = rows[j] - (rows[j] @ rows[i]) * rows[i]
        rows[j] = cosine * rows[i] + np.sqrt(1 - cosine**2) * apart / np.linalg.norm(apart)
        if rows[i] @ rows[j] >= LEAST:
            planted.add((int(i), int(j)))
    return rows, planted


def main(people: int, share: float) -> None:
    generator = np.random.default_rng(1)
    rows, planted = templates(people, generator)
    blocks = blocks_of(people)
    few = [blocks[at] for at in generator.permutation(len(blocks))[: max(1, round(share * len(blocks)))]]
    found, seconds, used = timed(rows, few)
    whole, whole_used = (one * len(blocks) / len(few) for one in (seconds, used))
    missed = planted - found if len(few) == len(blocks) else set()
    print(
        f"{people:,} people, {len(few)} of {len(blocks)} blocks: all take {whole / 60:.1f} minutes "
        f"({whole_used / 60:.1f} of CPU); {len(found)} pairs, {len(found - planted)} wrong, "
        f"{len(missed)} missed; {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB at most"
    )


def timed(rows: Template, blocks: list[tuple[int, int]]) -> tuple[set[tuple[int, int]], float, float]:
    """The pairs in some blocks, and how long that took: seconds, and seconds of CPU."""
    begun, used = time.perf_counter(), time.process_time()
    found = {(i, j) for i, j, _ in pairs_above(rows, LEAST, iter(blocks))}
    return found, time.perf_counter() - begun, time.process_time() - used


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=1_000_000)
    parser.add_argument("--share", type=float, default=1.0)
    given = parser.parse_args()
    main(given.people, given.share)
