"""Softens labels: heads on two pretrained networks judge samples of faces that they did not learn from.

A label says that something lies over the mouth. It does not say how plainly, and two in a hundred labels are wrong.
Networks that have seen far more faces than we have tell hidden from free, and shut from open, by features of their own.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import teachers
import torch
from labels import LEFT, PROBABILITIES, TOP
from network import cross_entropy
from numpy.typing import NDArray
from overlays import Image
from torch import nn

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]

# The recogniser's maps (SFace) after two of its blocks, and how many principal components of their channels are kept:
# these hold 0.90 and 0.87 of the variance.
MAPS = {"conv_9_conv2d": 96, "conv_13_conv2d": 160}
CELLS = 49
# What its PRelu does to these maps, nearly.
SLOPE = 0.1
# The iris network's last maps of an eye: 4x4 and 2x2 cells of 128 channels.
EYE_MAPS = ("t260", "t317")
EYE_FEATURES = 128 * (16 + 4)
# Half the side of an eye's square, and its centre, in pixels of a view: 1.15 eye widths, as `teachers.EyeState` has it.
EYE_HALF = 26.0
EYE_CENTRES = ((57.5 - LEFT, 63.5 - TOP), (101.5 - LEFT, 63.5 - TOP))

# How much of a label comes from the heads; less of an eye's that was labelled by itself, on enlarged pictures.
SHARE, EYE_SHARE = 0.6, 0.3
EPOCHS, BATCH, PEAK = 5, 128, 1e-3


@dataclass
class Described:
    """What both networks see in n views: float16 [n, 49, components] a map, and [n, 2, 2560] of the eyes."""

    maps: list[Halves]
    eyes: Halves

    def __len__(self) -> int:
        return len(self.eyes)


@dataclass
class Axes:
    """The mean [channels] and the principal components [channels, components] of each map's channels."""

    means: list[Floats]
    components: list[Floats]


def _cut(model: Path, outputs: Sequence[str]) -> onnxruntime.InferenceSession:
    """A network's first layers, down to `outputs`."""
    whole = onnx.shape_inference.infer_shapes(onnx.load(model))
    part = onnx.utils.Extractor(whole).extract_model([whole.graph.input[0].name], list(outputs))
    return teachers.session(part.SerializeToString())


_recogniser: onnxruntime.InferenceSession
_iris: onnxruntime.InferenceSession
_axes: Axes | None


def _load(data: Path, pack: Path, axes: Axes | None) -> None:
    global _recogniser, _iris, _axes  # noqa: PLW0603 - each worker's own
    cv2.setNumThreads(1)
    _recogniser = _cut(pack / "rec.onnx", list(MAPS))
    _iris = _cut(data / "teachers" / "mediapipe_iris_landmark.onnx", EYE_MAPS)
    _axes = axes


def _maps(view: Image) -> list[Floats]:
    """The recogniser's maps, float32 [49, channels] each, of uint8 BGR [128, 128, 3]."""
    matrix = teachers.similarity(teachers.CROP_POINTS - (LEFT, TOP), teachers.RECOGNISER_POINTS)
    image = teachers.recogniser_input(view, matrix)
    found = []
    for seen in _recogniser.run(list(MAPS), {_recogniser.get_inputs()[0].name: image}):
        bent = np.maximum(seen[0], SLOPE * seen[0])
        side = bent.shape[1] // 7
        cells = bent.reshape(len(bent), 7, side, 7, side).mean((2, 4))
        found.append(np.asarray(cells.reshape(len(bent), CELLS).T, np.float32))
    return found


def _eyes(view: Image) -> Floats:
    """What the iris network sees in both eyes, float32 [2, 2560]."""
    found = []
    for mirrored, centre in zip((True, False), EYE_CENTRES, strict=True):
        eye = teachers.square(view, centre, EYE_HALF, teachers.IRIS_INPUT)
        seen = _iris.run(list(EYE_MAPS), {"image": teachers.iris_input(eye, mirrored=mirrored)})
        found.append(np.concatenate([one.reshape(-1) for one in seen]))
    return np.asarray(found, np.float32)


def _describe(view: Image) -> tuple[list[Halves], Halves]:
    maps = _maps(view)
    if _axes is not None:
        maps = [(m - mean) @ parts for m, mean, parts in zip(maps, _axes.means, _axes.components, strict=True)]
    return [m.astype(np.float16) for m in maps], _eyes(view).astype(np.float16)


def axes_of(views: Image, data: Path, pack: Path, workers: int) -> Axes:
    """The principal components of the maps' channels over uint8 `views` [n, 128, 128, 3]."""
    with multiprocessing.get_context("fork").Pool(workers, _load, (data, pack, None)) as pool:
        found = [maps for maps, _ in pool.imap(_describe, views, 16)]
    means, components = [], []
    for number, kept in enumerate(MAPS.values()):
        cells = np.concatenate([maps[number] for maps in found]).astype(np.float32)
        means.append(cells.mean(0))
        components.append(np.linalg.eigh(np.cov((cells - means[-1])[::3].T))[1][:, -kept:].astype(np.float32))
    return Axes(means, components)


def describe(views: Image, data: Path, pack: Path, axes: Axes, workers: int) -> Described:
    """Show uint8 `views` [n, 128, 128, 3] to both networks: `pack`'s recogniser, and the iris network in `data`."""
    found = Described(
        [np.empty((len(views), CELLS, kept), np.float16) for kept in MAPS.values()],
        np.empty((len(views), 2, EYE_FEATURES), np.float16),
    )
    with multiprocessing.get_context("fork").Pool(workers, _load, (data, pack, axes)) as pool:
        for number, (maps, eyes) in enumerate(pool.imap(_describe, views, 32)):
            found.eyes[number] = eyes
            for whole, one in zip(found.maps, maps, strict=True):
                whole[number] = one
    return found


class Head(nn.Module):
    """What both networks see → the logits of PROBABILITIES."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.ModuleList([nn.BatchNorm1d(kept) for kept in MAPS.values()])
        self.parts = nn.ModuleList(
            [nn.Linear(CELLS * kept, width) for kept, width in zip(MAPS.values(), (128, 192), strict=True)]
        )
        self.eye_scale, self.eye = nn.BatchNorm1d(EYE_FEATURES), nn.Linear(EYE_FEATURES, 64)
        self.eye_shut = nn.Linear(64, 1)
        self.found = nn.Linear(128 + 192 + 2 * 64, len(PROBABILITIES))
        self.some, self.many = nn.Dropout(0.3), nn.Dropout(0.4)

    def forward(self, maps: list[torch.Tensor], eyes: torch.Tensor) -> torch.Tensor:
        seen = [
            part(self.many(scale(one.transpose(1, 2)).flatten(1)))
            for one, scale, part in zip(maps, self.scale, self.parts, strict=True)
        ]
        both = torch.relu(self.eye(self.many(self.eye_scale(eyes.flatten(0, 1))))).unflatten(0, (-1, 2))
        found = self.found(self.some(torch.relu(torch.cat([*seen, both.flatten(1)], 1))))
        shut = torch.zeros_like(found)
        shut[:, PROBABILITIES.index("shut")] = self.eye_shut(both).sum((1, 2))
        return found + shut


def _inputs(seen: Described, rows: slice | NDArray[np.int64]) -> tuple[list[torch.Tensor], torch.Tensor]:
    return [torch.from_numpy(one[rows]).float() for one in seen.maps], torch.from_numpy(seen.eyes[rows]).float()


def fit_head(seen: Sequence[Described], labels: Sequence[Floats], seed: int) -> Head:
    """Train a head on several banks of samples."""
    torch.manual_seed(seed)
    head = Head()
    optimiser = torch.optim.AdamW(head.parameters(), lr=PEAK, weight_decay=0.05)
    batches = [(bank, first) for bank, one in enumerate(seen) for first in range(0, len(one) - BATCH + 1, BATCH)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK, total_steps=EPOCHS * len(batches), pct_start=0.1)
    rng = np.random.default_rng(seed)
    for _ in range(EPOCHS):
        orders = [rng.permutation(len(one)) for one in seen]
        for number in rng.permutation(len(batches)):
            bank, first = batches[number]
            rows = orders[bank][first : first + BATCH]
            truth = torch.from_numpy(labels[bank][rows, : len(PROBABILITIES)])
            # What is rare weighs more here and in the network: the limits are chosen on what comes out.
            each = cross_entropy(head(*_inputs(seen[bank], rows)), truth)
            optimiser.zero_grad()
            each.sum(1).mean().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    return head.eval()


def soften(seen: Sequence[Described], labels: Sequence[Floats], seed: int) -> list[Floats]:
    """The labels of several banks of samples, each judged by a head that learned from the other banks.

    A known probability moves by SHARE towards the head's, by EYE_SHARE where only the eyes were labelled. Of eyes that
    nobody labelled, and that no lens hides, the head's word is the label. Every other unknown stays unknown: no head
    learned it.
    """
    shut, sunglasses, count = PROBABILITIES.index("shut"), PROBABILITIES.index("sunglasses"), len(PROBABILITIES)
    softened = []
    for bank, known in enumerate(labels):
        others = [number for number in range(len(labels)) if number != bank]
        head = fit_head([seen[number] for number in others], [labels[number] for number in others], seed + bank)
        with torch.inference_mode():
            judged = torch.cat(
                [head(*_inputs(seen[bank], slice(first, first + 1024))) for first in range(0, len(known), 1024)]
            )
        probable = torch.sigmoid(judged).numpy()
        soft = known.copy()
        share = np.full((len(known), count), SHARE, np.float32)
        share[known[:, sunglasses] < 0, shut] = EYE_SHARE
        moved = (1 - share) * known[:, :count] + share * probable
        soft[:, :count] = np.where(known[:, :count] >= 0, moved, known[:, :count])
        unseen = (known[:, shut] < 0) & (known[:, sunglasses] >= 0) & (known[:, sunglasses] < 0.5)
        soft[unseen, shut] = probable[unseen, shut]
        softened.append(soft)
        log.info("softened %d of %d banks", bank + 1, len(labels))
    return softened
