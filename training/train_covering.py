"""Makes `models/covering.onnx`: samples, network, training, thresholds, export and figures.

    python training/train_covering.py --data DIR [--sources free|no-nc|all] [--out models/covering.onnx]

DIR holds `covering/` (crops) and `occluders/` (cut-outs); which crops are used, and as what, is `data.csv` beside
this file. Everything random comes from `--seed`.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import multiprocessing
import time
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import overlays
import torch
from numpy.typing import NDArray
from overlays import Image
from torch import nn

Rng = np.random.Generator

OUTPUTS = ("mask", "sunglasses", "other", "eyes", "nose", "mouth")
INPUT = 96
# The part of the 160-pixel crop that the network sees: from the hairline to the chin, from ear to ear.
LEFT, TOP, PART = 16, 20, 128
# free: MIT and Apache-2.0 alone; no-nc: also those that state no terms; all: also those for non-commercial research.
SOURCES = {
    "free": ("chandrikadeb7",),
    "no-nc": ("chandrikadeb7", "aghamohammadi94", "prajnasb", "shreyas0906"),
    "all": ("chandrikadeb7", "aghamohammadi94", "prajnasb", "shreyas0906", "utk", "celeba"),
}
FREE_CUTOUTS = ("hand",)
UNKNOWN = -1.0

log = logging.getLogger("train_covering")


@dataclass
class Pictures:
    """The crops of one split by label, and the cut-outs by kind that may be pasted onto them."""

    crops: dict[str, list[Image]] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)
    cutouts: dict[str, list[Image]] = field(default_factory=dict)


def _read(path: Path, flag: int = cv2.IMREAD_COLOR) -> Image:
    picture = cv2.imread(str(path), flag)
    if picture is None:
        raise FileNotFoundError(path)
    return picture


def load(data: Path, use: str, sources: str) -> Pictures:
    """Read one split of the `sources` named in SOURCES. A fifth of the cut-outs serves validation alone."""
    pictures = Pictures()
    with (Path(__file__).parent / "data.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["use"] != use or row["source"].removesuffix("+overlay") not in SOURCES[sources]:
                continue
            key = row["label"] + ("+overlay" if row["source"].endswith("+overlay") else "")
            pictures.crops.setdefault(key, []).append(_read(data / "covering" / row["file"]))
            name = "+".join([row["source"].removesuffix("+overlay"), *filter(None, row["attributes"].split(";"))])
            pictures.sources.setdefault(key, []).append(name)
    with (data / "occluders" / "occluders.csv").open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            kind = row["kind"].split(":")[0]
            if (number % 5 == 0) != (use == "val") or (sources == "free" and kind not in FREE_CUTOUTS):
                continue
            # Furniture, cars and the like teach nothing about faces, but are opaque things of odd outline.
            pictures.cutouts.setdefault(kind, []).append(_read(data / "occluders" / row["file"], cv2.IMREAD_UNCHANGED))
    return pictures


def _labels(**known: float) -> NDArray[np.float32]:
    return np.array([known.get(name, 0.0) for name in OUTPUTS], np.float32)


def _of_alpha(alpha: overlays.Alpha) -> NDArray[np.float32]:
    """The labels of something nameless over the face: hidden from a third on (the mouth: a fifth), free below about a
    fifteenth, unknown between."""
    eyes, nose, mouth, inner = overlays.hidden(alpha)

    def grade(share: float, low: float, high: float) -> float:
        return 1.0 if share >= high else 0.0 if share <= low else UNKNOWN

    regions = [grade(eyes, 0.08, 0.35), grade(nose, 0.08, 0.3), grade(mouth, 0.05, 0.2)]
    other = max(*regions, grade(inner, 0.08, 0.25))
    if other == 0.0 and (UNKNOWN in regions or inner > 0.08):
        other = UNKNOWN
    return np.array([0, 0, other, *regions], np.float32)


def _choose(rng: Rng, images: list[Image]) -> Image:
    return images[int(rng.integers(len(images)))]


def _place(rng: Rng, covering: bool) -> tuple[float, float]:
    """Where a hand or thing is held: at an eye, the nose or the mouth, or else beside the face."""
    if covering:
        spot = [*overlays.EYES, overlays.NOSE, overlays.MOUTH, overlays.MOUTH, (80, 124)][int(rng.integers(6))]
        return spot[0] + rng.normal(0, 14), spot[1] + rng.normal(0, 14)
    angle = rng.uniform(0, 2 * np.pi)
    return 80 + rng.uniform(70, 95) * np.cos(angle), 92 + rng.uniform(70, 95) * np.sin(angle)


def _nameless(
    face: Image, rng: Rng, pictures: Pictures, donor: Image, covering: bool
) -> tuple[Image, NDArray[np.float32]]:
    """A hand, scarf or thing over the face (`covering`) or beside it; tried anew until the labels say so."""
    image, labels = face, _labels()
    for _ in range(8):
        spot, kind = _place(rng, covering), rng.random()
        if kind < 0.55:
            image, alpha = overlays.hand(face, rng, _choose(rng, pictures.cutouts["hand"]), spot)
            if rng.random() < 0.12:
                image, second = overlays.hand(image, rng, _choose(rng, pictures.cutouts["hand"]), _place(rng, covering))
                alpha = np.maximum(alpha, second)
        elif kind < 0.65:
            top = rng.uniform(74, 106) if covering else rng.uniform(134, 150)
            image, alpha = overlays.scarf(face, rng, donor, top)
        elif kind < 0.8 and "scarf" in pictures.cutouts:
            piece = _choose(rng, pictures.cutouts["scarf" if rng.random() < 0.5 else "object"])
            image, alpha = overlays.cutout(
                face, rng, piece, centre=spot, length=rng.uniform(60, 150), angle=rng.uniform(-180, 180)
            )
        else:
            image, alpha = overlays.held_object(face, rng, donor, spot)
        labels = _of_alpha(alpha)
        if labels[2] == float(covering):
            return image, labels
    return image, labels


def _glasses(face: Image, rng: Rng, pictures: Pictures, donor: Image, dark: bool) -> tuple[Image, NDArray[np.float32]]:
    """Spectacles or sunglasses, drawn or pasted."""
    kind = "sunglasses" if dark else "eyeglasses"
    if kind in pictures.cutouts and rng.random() < 0.5:
        # The lens's own opacity is unknown for see-through cut-outs; over the pupils it must be dense to be a covering.
        image, alpha = overlays.cutout(
            face,
            rng,
            _choose(rng, pictures.cutouts[kind]),
            centre=(80 + rng.normal(0, 2), 67 + rng.normal(0, 3)),
            length=rng.uniform(92, 122),
            angle=rng.normal(0, 3),
        )
        if dark:
            eyes = min(float(alpha[area].mean()) for area in overlays.EYE_AREAS)
            return image, _labels(sunglasses=1, eyes=1) if eyes > 0.7 else _labels(sunglasses=UNKNOWN, eyes=UNKNOWN)
        return image, _labels()
    opacity = rng.uniform(0.7, 1.0) if dark else rng.choice([0.0, 0.0, rng.uniform(0.05, 0.27)])
    return overlays.spectacles(face, rng, float(opacity), donor)[0], _labels(sunglasses=float(dark), eyes=float(dark))


def _clean_variant(face: Image, rng: Rng, pictures: Pictures, donor: Image) -> tuple[Image, NDArray[np.float32]]:
    """Something worn or held that is no covering."""
    kind = rng.random()
    if kind < 0.26:
        return _glasses(face, rng, pictures, donor, dark=False)
    if kind < 0.36:
        return overlays.mask(face, rng, donor, "chin")[0], _labels()
    if kind < 0.6:
        return _nameless(face, rng, pictures, donor, covering=False)
    if kind < 0.7:
        return overlays.headwear(face, rng, donor), _labels()
    if kind < 0.97:
        paint = (overlays.beard, overlays.beard, overlays.strands, overlays.visor, overlays.watermark)[
            int(rng.integers(5))
        ]
        return paint(face, rng), _labels()
    return overlays.cannula(face, rng), _labels()


RECIPE = {
    "clean": 0.24, "clean variant": 0.24, "none+overlay": 0.03, "mask": 0.1, "mask+overlay": 0.01, "drawn mask": 0.1,
    "sunglasses": 0.05, "sunglasses+overlay": 0.01, "drawn sunglasses": 0.09, "other+overlay": 0.02, "other": 0.002,
    "nameless": 0.23, "mask and sunglasses": 0.01,
}  # fmt: skip
KNOWN = {
    "none": _labels(),
    "mask": _labels(mask=1, nose=1, mouth=1, other=UNKNOWN, eyes=UNKNOWN, sunglasses=0),
    "sunglasses": _labels(sunglasses=1, eyes=1, mask=0),
    "other": _labels(other=1, eyes=UNKNOWN, nose=UNKNOWN, mouth=UNKNOWN),
}


def compose(  # noqa: PLR0911 - one return for each kind of the recipe
    rng: Rng, pictures: Pictures, kind: str
) -> tuple[Image, NDArray[np.float32]]:
    """One 160-pixel picture of the recipe's `kind` and its labels."""
    crops = pictures.crops
    if kind in ("mask", "sunglasses", "other", "none+overlay", "mask+overlay", "sunglasses+overlay", "other+overlay"):
        return _choose(rng, crops[kind]), KNOWN[kind.removesuffix("+overlay")]
    face, donor = _choose(rng, crops["none"]), _choose(rng, crops[str(rng.choice(["none", "mask"]))])
    if kind == "clean":
        return face, _labels()
    dress = rng.random()
    if dress < 0.12 and kind != "clean variant":
        face = overlays.headwear(face, rng, _choose(rng, crops["none"]))
    elif dress < 0.24:
        face = (overlays.beard, overlays.strands)[int(rng.integers(2))](face, rng)
    if kind == "clean variant":
        return _clean_variant(face, rng, pictures, donor)
    if kind == "drawn mask":
        if rng.random() < 0.2:
            face = _glasses(face, rng, pictures, donor, dark=False)[0]
        under = rng.random() < 0.25
        image = overlays.mask(face, rng, donor, "nose" if under else "full")[0]
        return image, _labels(mask=1, mouth=1, nose=0 if under else 1, other=UNKNOWN)
    if kind == "drawn sunglasses":
        return _glasses(face, rng, pictures, donor, dark=True)
    if kind == "mask and sunglasses":
        image, labels = _glasses(_choose(rng, crops["mask"]), rng, pictures, donor, dark=True)
        return image, np.maximum(labels, KNOWN["mask"])
    if rng.random() < 0.15:
        face = _glasses(face, rng, pictures, donor, dark=False)[0]
    return _nameless(face, rng, pictures, donor, covering=True)


def view(rng: Rng, picture: Image, jitter: float = 1.0) -> Image:
    """The network's 96-pixel view of a 160-pixel crop, as other detectors and cameras might have given it."""
    if rng.random() < 0.12 * jitter:  # a photo that ends close to the face
        left, right, top, bottom = (rng.uniform(0, 45, 4) * (rng.random(4) < 0.4)).astype(int)
        picture = cv2.copyMakeBorder(
            picture[top : 160 - bottom, left : 160 - right], top, bottom, left, right, cv2.BORDER_REPLICATE
        )
    scale = INPUT / PART * float(np.exp(np.clip(rng.normal(0, 0.075), -0.2, 0.2) * jitter))
    matrix = cv2.getRotationMatrix2D((80, 88), float(rng.normal(0, 6)) * jitter, scale)
    centre = (np.array([80 - LEFT, 88 - TOP]) * INPUT / PART) + rng.normal(0, (2.4, 3.0)) * jitter
    matrix = matrix + np.array([[0, 0, centre[0] - 80], [0, 0, centre[1] - 88]])
    if rng.random() < 0.5 * (jitter > 0):
        matrix = matrix @ np.array([[-1, 0, 160], [0, 1, 0], [0, 0, 1.0]])
    border = cv2.BORDER_REPLICATE if rng.random() < 0.85 or jitter == 0 else cv2.BORDER_CONSTANT
    seen = cv2.warpAffine(picture, matrix, (INPUT, INPUT), flags=cv2.INTER_LINEAR, borderMode=border)
    return overlays.look(seen, rng, INPUT) if jitter > 0 else seen


_shared: Pictures


def _bank_part(task: tuple[int, int, int]) -> tuple[Image, NDArray[np.float32]]:
    seed, first, count = task
    cv2.setNumThreads(1)
    have = {k: v for k, v in RECIPE.items() if not (k.removesuffix("+overlay") in KNOWN and k not in _shared.crops)}
    shares = np.array(list(have.values()))
    images, labels = np.empty((count, INPUT, INPUT, 3), np.uint8), np.empty((count, len(OUTPUTS)), np.float32)
    for i in range(count):
        rng = np.random.default_rng([seed, first + i])
        picture, labels[i] = compose(rng, _shared, str(rng.choice(list(have), p=shares / shares.sum())))
        images[i] = view(rng, picture)
    return images, labels


def bank(pictures: Pictures, count: int, seed: int, workers: int) -> tuple[Image, NDArray[np.float32]]:
    """`count` composed samples: uint8 [count, 96, 96, 3] BGR and float32 [count, 6] labels (-1: unknown)."""
    global _shared  # noqa: PLW0603 - forked workers read the pictures without copying them
    _shared = pictures
    step = 500
    tasks = [(seed, first, min(step, count - first)) for first in range(0, count, step)]
    images, labels = np.empty((count, INPUT, INPUT, 3), np.uint8), np.empty((count, len(OUTPUTS)), np.float32)
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for (_, first, n), (x, y) in zip(tasks, pool.imap(_bank_part, tasks), strict=True):
            images[first : first + n], labels[first : first + n] = x, y
    return images, labels


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _conv(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(self.first(x)))


class Net(nn.Module):
    """float [n, 3, 96, 96] BGR 0..255 → six logits, named by OUTPUTS."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 96)) -> None:
        super().__init__()
        a, b, c, d = widths
        self.features = nn.Sequential(
            _conv(3, a, 2), _conv(a, b, 2), Residual(b), _conv(b, c, 2), Residual(c), _conv(c, d, 2), Residual(d)
        )
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(d * 9, len(OUTPUTS)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.features((x - 127.5) / 64.0)
        # Thirds of the face stay apart: eyes, nose and mouth have their own rows.
        return self.head(torch.nn.functional.avg_pool2d(maps, 2).flatten(1))  # type: ignore[no-any-return]


class Exported(nn.Module):
    """uint8 [n, 160, 160, 3] BGR, as `aligned_face` cuts it → six probabilities."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        part = crops[:, TOP : TOP + PART, LEFT : LEFT + PART].permute(0, 3, 1, 2).float()
        small = torch.nn.functional.interpolate(part, size=(INPUT, INPUT), mode="bilinear", align_corners=False)
        return torch.sigmoid(self.net(small))


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy over the known labels, softened a little against wrong ones; regions count half."""
    known = (labels >= 0).float() * torch.tensor([1, 1, 1, 0.5, 0.5, 0.5])
    soft = labels.clamp(min=0) * 0.96 + 0.02
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, soft, reduction="none")
    return (each * known).sum() / known.sum()


def fit(images: Image, labels: NDArray[np.float32], epochs: int, seed: int) -> Net:
    """Train on the bank with AdamW, one cosine cycle and an average of the weights."""
    torch.manual_seed(seed)
    net = Net().to(memory_format=torch.channels_last)  # type: ignore[call-overload] # a layout, unknown to the stubs
    moving = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)  # type: ignore[no-untyped-call]
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=moving, use_buffers=True)
    x_all, y_all = torch.from_numpy(images), torch.from_numpy(labels)
    batch = 128
    steps = epochs * (len(images) // batch)
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps, pct_start=0.1)
    for epoch in range(epochs):
        net.train()
        began, total = time.monotonic(), 0.0
        order = torch.randperm(len(images))
        for first in range(0, len(images) - batch + 1, batch):
            rows = order[first : first + batch]
            x = x_all[rows].permute(0, 3, 1, 2).float()
            # Cheap changes on top of the bank's own, so that no sample comes twice alike.
            if torch.rand(()) < 0.5:
                x = x.flip(3)
            x = x * (1 + 0.12 * torch.randn(batch, 3, 1, 1)) + 8 * torch.randn(batch, 1, 1, 1)
            x = torch.roll(x, tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3))
            x = x.clamp(0, 255).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(x)
            loss = loss_of(logits.float(), y_all[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            average.update_parameters(net)
            total += loss.item() * batch
        log.info("epoch %d loss %.4f %.0f s", epoch, total / len(images), time.monotonic() - began)
    final = average.module.eval()
    assert isinstance(final, Net)
    return final


def export(net: Net, path: Path) -> None:
    """Write one ONNX file with any number of faces at once."""
    torch.onnx.export(
        Exported(net).eval(),
        (torch.zeros(2, 160, 160, 3, dtype=torch.uint8),),
        str(path),
        input_names=["crops"],
        output_names=["probabilities"],
        dynamic_axes={"crops": {0: "n"}, "probabilities": {0: "n"}},
        opset_version=17,
        dynamo=False,
    )


def predict(path: Path, crops: list[Image]) -> NDArray[np.float32]:
    """float32 [n, 6]: the file's own answers, as the service will get them."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    parts = [session.run(None, {"crops": np.stack(crops[i : i + 64])})[0] for i in range(0, len(crops), 64)]
    return np.concatenate(parts).astype(np.float32)


def validation(data: Path, seed: int) -> tuple[list[Image], NDArray[np.float32], list[str]]:
    """The val crops as they are and with coverings composed from the cut-outs kept back: crops, labels, groups."""
    pictures = load(data, "val", "all")
    crops: list[Image] = []
    labels: list[NDArray[np.float32]] = []
    groups: list[str] = []
    for key, images in pictures.crops.items():
        crops += images
        labels += [KNOWN[key.removesuffix("+overlay")]] * len(images)
        groups += [f"{key} {source}" for source in pictures.sources[key]]
    for kind in ("clean variant", "drawn mask", "drawn sunglasses", "nameless"):
        for i in range(400):
            picture, label = compose(np.random.default_rng([seed, 7, i]), pictures, kind)
            crops.append(picture)
            labels.append(label)
            groups.append(f"composed {kind}")
    return crops, np.stack(labels), groups


def thresholds(found: NDArray[np.float32], labels: NDArray[np.float32], groups: list[str]) -> dict[str, float]:
    """Per output the lowest threshold that refuses at most 0.25 % (other: 0.5 %) of the real clean val crops."""
    clean = np.array([group.startswith("none ") for group in groups]) & (labels.max(1) == 0)
    chosen = {}
    for column, name in enumerate(OUTPUTS):
        allowed = 0.005 if name == "other" else 0.0025
        chosen[name] = round(float(np.clip(np.quantile(found[clean, column], 1 - allowed), 0.2, 0.95)), 3)
    return chosen


def figures(found: NDArray[np.float32], groups: list[str], limit: dict[str, float]) -> dict[str, dict[str, float]]:
    """Per group: how many crops, and the share refused in all and for each reason."""
    over = found[:, :3] > np.array([limit[name] for name in OUTPUTS[:3]])
    table = {}
    for group in sorted(set(groups)):
        rows = over[[g == group for g in groups]]
        shares = {name: round(float(rows[:, i].mean()), 4) for i, name in enumerate(OUTPUTS[:3])}
        table[group] = {"n": len(rows), "refused": round(float(rows.any(1).mean()), 4), **shares}
    return table


def main() -> None:
    """Train, choose thresholds, export, and write the figures beside the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("models/covering.onnx"))
    parser.add_argument("--sources", choices=tuple(SOURCES), default="no-nc")
    parser.add_argument("--samples", type=int, default=72_000)
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.workers)
    images, labels = bank(load(args.data, "train", args.sources), args.samples, args.seed, args.workers)
    log.info(
        "%d samples, known positives %s", len(images), dict(zip(OUTPUTS, (labels > 0).sum(0).tolist(), strict=True))
    )
    net = fit(images, labels, args.epochs, args.seed)
    export(net, args.out)
    crops, known, groups = validation(args.data, args.seed)
    found = predict(args.out, crops)
    limit = thresholds(found, known, groups)
    report = {"sources": args.sources, "seed": args.seed, "thresholds": limit, "groups": figures(found, groups, limit)}
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    log.info("%s", json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
