"""Makes `models/face_attributes.onnx`: composes the samples, trains the network and exports it.

    python training/train_face_attributes.py --data DIR --pack models/compact [--sources free|no-nc|all] [--out FILE]

DIR holds `covering/`, `covering_more/` and `eyes/` (crops), `occluders/` (cut-outs) and `teachers/` (networks that
label). Which crops are used, and as what, is `data.csv` beside this file. The pack is the compact model's: its detector
finds distorted faces, its recogniser says what is left of them. Everything random comes from `--seed`.
"""

from __future__ import annotations

import argparse
import copy
import logging
from pathlib import Path

import distillation
import network
import numpy as np
import samples
import torch
from labels import OUTPUTS
from numpy.typing import NDArray
from overlays import Image

log = logging.getLogger(__name__)

SOFTENED_PEAK, BRANCHES_PEAK = 1e-3, 3e-3


def main() -> None:
    """Train in rounds, each on samples of its own, which begin with the weights of the one before.

    The last of these rounds begins with the mean of all before. The mean of both begins the rounds on softened labels,
    of which each begins with the mean of that and of those before. The mean of the softened rounds is the network. At
    last it learns from distorted samples what to add to its likeness, and what damage is; nothing else of it changes.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("models/face_attributes.onnx"))
    parser.add_argument("--sources", choices=samples.SOURCES, default="no-nc")
    parser.add_argument("--samples", type=int, default=40_000, help="of each round")
    parser.add_argument("--epochs", type=float, nargs="+", default=[12.0, 8.0, 8.0, 8.0], help="of each round")
    parser.add_argument("--peaks", type=float, nargs="+", default=[2e-3, 1e-3, 1e-3, 8e-4], help="learning rates")
    parser.add_argument("--softened-epochs", type=float, nargs="+", default=[8.0, 8.0], help="of each softened round")
    parser.add_argument("--distorted", type=int, default=40_000, help="samples of the round on distorted faces")
    parser.add_argument("--distorted-epochs", type=float, default=8.0, help="of that round")
    parser.add_argument("--start", type=Path, help="weights (.pt) to begin with; they are not in the mean")
    parser.add_argument("--seed", type=int, default=3, help="of the first round; later rounds add to it")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    pictures = samples.load(args.data, "train", args.sources)
    log.info("crops %s", {key: len(faces) for key, faces in pictures.crops.items()})
    samples.ask_teachers(pictures, args.data / "teachers", args.workers)
    torch.manual_seed(args.seed)
    net = network.Net()
    if args.start:
        net.load_state_dict(torch.load(args.start))
    states: list[dict[str, torch.Tensor]] = []
    for number, (epochs, peak) in enumerate(zip(args.epochs, args.peaks, strict=True)):
        seed = args.seed + number
        images, labels = samples.bank(pictures, args.pack, args.samples, seed, args.workers)
        positives = dict(zip(OUTPUTS, (labels > 0.5).sum(0).tolist(), strict=True))
        log.info("%d samples, known positives %s", len(images), positives)
        if states and number == len(args.epochs) - 1:
            states = [network.mean_of(states)]
            net.load_state_dict(states[0])
        net = network.fit(net, images, labels, epochs=epochs, peak=peak, seed=seed, threads=args.workers)
        states.append(copy.deepcopy(net.state_dict()))
        torch.save(states[-1], args.out.with_name(f"{args.out.stem}-{number + 1}.pt"))
    first = network.mean_of(states)
    states = []
    for number, epochs in enumerate(args.softened_epochs):
        seed = args.seed + 100 + 10 * number
        images, labels = softened_samples(pictures, args, seed)
        net.load_state_dict(network.mean_of([first, *states]))
        net = network.fit(net, images, labels, epochs=epochs, peak=SOFTENED_PEAK, seed=seed, threads=args.workers)
        states.append(copy.deepcopy(net.state_dict()))
        torch.save(states[-1], args.out.with_name(f"{args.out.stem}-softened-{number + 1}.pt"))
    net.load_state_dict(network.mean_of(states))
    seed = args.seed + 200
    images, labels = samples.bank(pictures, args.pack, args.distorted, seed, args.workers, samples.RECIPE_OF_DISTORTED)
    net = network.fit_branches(net, images, labels, epochs=args.distorted_epochs, peak=BRANCHES_PEAK, seed=seed)
    network.export(net, args.out)


def softened_samples(
    pictures: samples.Pictures, args: argparse.Namespace, seed: int
) -> tuple[Image, NDArray[np.float32]]:
    """Samples of three thirds of the crops; what judges the labels of one third learned from the two others."""
    banks = [
        samples.bank(pictures.part(third, 3), args.pack, args.samples // 3, seed + third, args.workers)
        for third in range(3)
    ]
    axes = distillation.axes_of(banks[0][0][:1500], args.data, args.pack, args.workers)
    seen = [distillation.describe(images, args.data, args.pack, axes, args.workers) for images, _ in banks]
    labels = distillation.soften(seen, [labels for _, labels in banks], seed)
    return np.concatenate([images for images, _ in banks]), np.concatenate(labels)


if __name__ == "__main__":
    main()
