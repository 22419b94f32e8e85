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

import network
import samples
import torch
from labels import OUTPUTS

log = logging.getLogger(__name__)


def main() -> None:
    """Train in rounds, each on samples of its own, which begin with the weights of the one before.

    The last round begins with the mean of all rounds before; the mean of both is the network.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("models/face_attributes.onnx"))
    parser.add_argument("--sources", choices=samples.SOURCES, default="no-nc")
    parser.add_argument("--samples", type=int, default=40_000, help="of each round")
    parser.add_argument("--epochs", type=float, nargs="+", default=[12.0, 8.0, 8.0, 8.0], help="of each round")
    parser.add_argument("--peaks", type=float, nargs="+", default=[2e-3, 1e-3, 1e-3, 8e-4], help="learning rates")
    parser.add_argument("--start", type=Path, help="weights (.pt) to begin with; they are not in the mean")
    parser.add_argument("--seed", type=int, default=3, help="of the first round; each later one adds 1")
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
    net.load_state_dict(network.mean_of(states))
    network.export(net, args.out)


if __name__ == "__main__":
    main()
