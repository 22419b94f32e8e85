"""Owns `python app.py duplicates`: every pair of enrolled people who look alike, exactly, at the pace of 8-bit codes.

As in templates.py a pair's cosine is at most s·t·⟨c, b⟩ plus what rounding to the codes left over. The integers ⟨c, b⟩
of many pairs at once are one matrix product; where they reach what the threshold asks for, float32 decides.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

import bootstrap
from commands.progress import watched
from engines.base import Template, cosine_of, similarity_of
from gallery.templates import coded
from settings import Settings, SettingsError
from store.records import RecordStore

logger = logging.getLogger("face_api")

ROWS, COLUMNS = 2048, 16_384
MAX_NORM = 1.01
# x86 without VNNI adds two products in 16 bits and cuts what is too much: 2 (128 + 79) 79 is the most that fits.
LARGEST_CODE = 79


def pairs_above(rows: Template, least: float, tiles: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int, float]]:
    """Yield (i, j, cosine) with i < j of every pair whose cosine is at least `least`.

    Args:
        rows: float32[n, d], L2-normalised.
        least: the lowest cosine that counts.
        tiles: where the blocks of ROWS by COLUMNS pairs begin, as `tiles_of` lists them.
    """
    parts = (coded(rows[start : start + ROWS], LARGEST_CODE) for start in range(0, len(rows), ROWS))
    codes, scales, residuals = (np.concatenate(one) for one in zip(*parts, strict=True))
    product = _integer_product(rows.shape[1])
    for top, left in tiles:
        down, across = slice(top, top + ROWS), slice(left, left + COLUMNS)
        unsigned = (codes[down].astype(np.int16) + 128).astype(np.uint8)
        dots = product(unsigned, np.ascontiguousarray(codes[across].T))
        worst = residuals[across].max()
        bar = least - (MAX_NORM * (residuals[down] + worst) + residuals[down] * worst + 1e-5)
        # The scale that makes the least of the integers enough: the largest for a positive bar, else the smallest.
        scale = np.where(bar > 0, scales[across].max(), scales[across].min())
        enough = np.floor(bar / (scales[down] * scale)).astype(np.int64)
        for i in np.flatnonzero(dots.max(axis=1) >= enough):
            others = left + np.flatnonzero(dots[i] >= enough[i])
            others = others[others > top + i]
            cosines = rows[others] @ rows[top + i]
            for j, cosine in zip(others[cosines >= least], cosines[cosines >= least], strict=True):
                yield top + int(i), int(j), float(cosine)


def tiles_of(count: int) -> list[tuple[int, int]]:
    """Where the blocks begin that hold every pair i < j of `count` rows."""
    return [
        (top, left) for top in range(0, count, ROWS) for left in range(0, count, COLUMNS) if left + COLUMNS > top + 1
    ]


def _integer_product(dimension: int) -> Callable[[Any, Any], Any]:
    """onnxruntime's product of uint8[n, d] (128 too high) and int8[d, m] in int32, on every core."""
    import onnxruntime  # noqa: PLC0415 - for this command alone
    from onnx import TensorProto, helper  # noqa: PLC0415

    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b", "zero"], ["dots"])],
        "products",
        [
            helper.make_tensor_value_info("a", TensorProto.UINT8, [None, dimension]),
            helper.make_tensor_value_info("b", TensorProto.INT8, [dimension, None]),
        ],
        [helper.make_tensor_value_info("dots", TensorProto.INT32, [None, None])],
        [helper.make_tensor("zero", TensorProto.UINT8, [], [128])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda a, b: session.run(None, {"a": a, "b": b})[0]


def templates_of(store: RecordStore, model: str | None) -> tuple[list[str], Template, str]:
    """Read everybody of one model (by default the one with most people): user_ids, float32[n, d], and the model.

    Raises:
        ValueError: nobody is enrolled with it.
    """
    last = store.last_place()
    erased = set(store.erasures(last))
    by_model: dict[tuple[str, int], tuple[list[str], bytearray]] = {}  # a bytearray grows where it lies
    for entry in watched(store.entries(0), last, "records"):
        if entry.template is not None and entry.user_id is not None and entry.user_id not in erased:
            user_ids, rows = by_model.setdefault((entry.model or "", len(entry.template)), ([], bytearray()))
            user_ids.append(entry.user_id)
            rows += np.ascontiguousarray(entry.template, np.float32).tobytes()
    found = [(len(one[0]), key) for key, one in by_model.items() if model in (None, key[0])]
    if not found:
        raise ValueError("nobody is enrolled" + (f" with the model {model}" if model else ""))
    key = max(found)[1]
    user_ids, rows = by_model[key]
    return user_ids, np.frombuffer(rows, np.float32).reshape(-1, key[1]), key[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python app.py duplicates`."""
    parser.add_argument("--least", type=float, help="similarity from which a pair is listed; default: the threshold")
    parser.add_argument("--model", help="the model's name in the records; default: the one with most people")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """List the pairs as CSV on the standard output, while services run.

    Raises:
        SettingsError: a similarity that is none.
        ValueError: nobody is enrolled.
        FaceError: `database_unavailable`.
    """
    least = settings.duplicate_threshold if arguments.least is None else arguments.least
    if not (math.isfinite(least) and -1 <= least <= 1):
        raise SettingsError("--least must lie between -1 and 1")
    store = bootstrap.connected_store(settings)
    try:
        user_ids, rows, model = templates_of(store, arguments.model)
    finally:
        store.close()
    half = bootstrap.cosine_at_half_of(model)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["user_id", "other_user_id", "similarity"])
    tiles = tiles_of(len(rows))
    found = 0
    for i, j, cosine in pairs_above(rows, cosine_of(least, half), watched(tiles, len(tiles), "blocks")):
        found += 1
        with tqdm.external_write_mode(sys.stdout):
            writer.writerow([user_ids[i], user_ids[j], f"{similarity_of(cosine, half):.4f}"])
            sys.stdout.flush()
    logger.info("%d pairs among %d people", found, len(user_ids))
    return 0
