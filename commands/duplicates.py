"""The command duplicates: lists every pair of enrolled people who look alike.

It compares 8-bit codes first, as the search does (docs/decisions/0002): a pair's cosine is at most s * t * (c . b) plus
what rounding to the codes left over. The integers c . b of many pairs at once are one matrix product. Where they reach
what the threshold asks for, float32 decides.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import sys
from collections.abc import Iterable, Iterator

import numpy as np

import bootstrap
from commands.command import Command
from commands.progress import with_progress
from engines.base import Template, cosine_of, similarity_of
from engines.integer_products import LARGEST_CODE, product_of_codes
from gallery.templates import coded
from settings import Settings, SettingsError
from store.records import RecordStore

logger = logging.getLogger(__name__)

# The pairs of one block: a product of 2,048 by 16,384 integers is 128 MiB.
BLOCK_ROWS, BLOCK_COLUMNS = 2048, 16_384
# Templates are normalised in float32, so their norms are 1 to within much less than this.
MAX_NORM = 1.01


def pairs_above(
    templates: Template, min_cosine: float, blocks: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, int, float]]:
    """Yield (i, j, cosine) with i < j of every pair in the blocks whose cosine is at least `min_cosine`.

    Args:
        templates: float32[n, d], L2-normalised.
        min_cosine: -1...1.
        blocks: where the blocks of BLOCK_ROWS by BLOCK_COLUMNS pairs begin, as `blocks_of` lists them.
    """
    starts = range(0, len(templates), BLOCK_ROWS)
    parts = (coded(templates[start : start + BLOCK_ROWS], LARGEST_CODE) for start in starts)
    codes, scales, residuals = (np.concatenate(part) for part in zip(*parts, strict=True))
    product = product_of_codes(templates.shape[1])
    for top, left in blocks:
        rows, columns = slice(top, top + BLOCK_ROWS), slice(left, left + BLOCK_COLUMNS)
        products = product(codes[rows], codes[columns])
        worst = residuals[columns].max()
        needed = min_cosine - (MAX_NORM * (residuals[rows] + worst) + residuals[rows] * worst + 1e-5)
        # The scale with which the smallest product is enough: the largest for a positive bound, else the smallest.
        scale = np.where(needed > 0, scales[columns].max(), scales[columns].min())
        enough = np.floor(needed / (scales[rows] * scale)).astype(np.int64)
        for row in np.flatnonzero(products.max(axis=1) >= enough):
            others = left + np.flatnonzero(products[row] >= enough[row])
            others = others[others > top + row]
            cosines = templates[others] @ templates[top + row]
            similar = cosines >= min_cosine
            for other, cosine in zip(others[similar].tolist(), cosines[similar].tolist(), strict=True):
                yield top + int(row), other, cosine


def blocks_of(count: int) -> list[tuple[int, int]]:
    """Where the blocks begin that hold every pair i < j of `count` templates."""
    return [
        (top, left)
        for top in range(0, count, BLOCK_ROWS)
        for left in range(0, count, BLOCK_COLUMNS)
        if left + BLOCK_COLUMNS > top + 1
    ]


def templates_of(store: RecordStore, model: str | None) -> tuple[list[str], Template, str]:
    """Read every photo of one model; None takes the model with most photos.

    Returns:
        The photos' user_ids, float32[n, d], and the model.

    Raises:
        ValueError: nobody is enrolled with it.
    """
    last = store.last_place()
    erased, removed = set(store.erasures(last)), set(store.removals(last))
    by_model: dict[tuple[str, int], tuple[list[str], bytearray]] = {}  # a bytearray grows without a copy
    for entry in with_progress(store.entries(0), last, "records"):
        is_gone = entry.user_id in erased or entry.seq in removed
        if entry.template is not None and entry.user_id is not None and not is_gone:
            user_ids, rows = by_model.setdefault((entry.model or "", len(entry.template)), ([], bytearray()))
            user_ids.append(entry.user_id)
            rows += np.ascontiguousarray(entry.template, np.float32).tobytes()
    sizes = [(len(user_ids), key) for key, (user_ids, _) in by_model.items() if model in (None, key[0])]
    if not sizes:
        raise ValueError("nobody is enrolled" + (f" with the model {model}" if model else ""))
    name, dimension = max(sizes)[1]
    user_ids, rows = by_model[name, dimension]
    return user_ids, np.frombuffer(rows, np.float32).reshape(-1, dimension), name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser this command's arguments."""
    parser.add_argument("--least", type=float, help="lowest similarity to list (default: DUPLICATE_THRESHOLD)")
    parser.add_argument("--model", help="the model's name in the records (default: the model with most people)")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Write the pairs to standard output as CSV, the most similar first, while services run.

    An interrupted run writes the pairs that it found until then.

    Raises:
        SettingsError: `--least` is no similarity.
        ValueError: nobody is enrolled.
        FaceError: `database_unavailable`.
    """
    least = settings.duplicate_threshold if arguments.least is None else arguments.least
    if not (math.isfinite(least) and -1 <= least <= 1):
        raise SettingsError("--least must lie between -1 and 1")
    store = bootstrap.connect_store(settings)
    try:
        user_ids, templates, model = templates_of(store, arguments.model)
    finally:
        store.close()
    cosine_at_half = bootstrap.cosine_at_half_of(model)
    blocks = blocks_of(len(templates))
    # The two user_ids -> the highest cosine of any two of their photos.
    found: dict[tuple[str, str], float] = {}
    try:
        for i, j, cosine in pairs_above(
            templates, cosine_of(least, cosine_at_half), with_progress(blocks, len(blocks), "blocks")
        ):
            one, other = user_ids[i], user_ids[j]
            if one != other:
                pair = (other, one) if (other, one) in found else (one, other)
                found[pair] = max(cosine, found.get(pair, cosine))
    finally:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["user_id", "other_user_id", "similarity"])
        writer.writerows(
            (*pair, f"{similarity_of(cosine, cosine_at_half):.4f}")
            for pair, cosine in sorted(found.items(), key=lambda one: -one[1])
        )
    logger.info("%d pairs among %d people", len(found), len(set(user_ids)))
    return 0


DUPLICATES = Command("duplicates", "list the pairs of enrolled people who look alike", run, add_arguments)
