"""Makes `models/face_attributes.onnx`: samples, network, training, export and validation figures.

    python training/train_face_attributes.py --data DIR --recogniser FILE [--sources free|no-nc|all] [--out FILE]

DIR holds `covering/`, `covering_more/` and `eyes/` (crops), `occluders/` (cut-outs) and `teachers/` (networks that
label). Which crops are used, and as what, is `data.csv` beside this file. FILE is the recogniser of the compact
model's pack (`models/compact/rec.onnx`). Everything random comes from `--seed`.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import eye_network
import network
import numpy as np
import samples
from labels import OUTPUTS

log = logging.getLogger(__name__)


def main() -> None:
    """Compose the samples, train and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recogniser", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("models/face_attributes.onnx"))
    parser.add_argument("--sources", choices=samples.SOURCES, default="no-nc")
    parser.add_argument("--samples", type=int, default=24_000)
    parser.add_argument("--bank", type=Path, help="an .npz file that keeps the composed samples")
    parser.add_argument("--start", type=Path, required=True, help="an earlier covering.onnx: its layers begin this one")
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--eye-minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.bank and args.bank.is_file():
        kept = np.load(args.bank)
        images, labels = kept["images"], kept["labels"]
    else:
        pictures = samples.load(args.data, "train", args.sources)
        log.info("crops %s", {key: len(faces) for key, faces in pictures.crops.items()})
        samples.ask_teachers(pictures, args.data / "teachers", args.workers)
        images, labels = samples.bank(pictures, args.recogniser, args.samples, args.seed, args.workers)
        if args.bank:
            np.savez(args.bank, images=images, labels=labels)
    positives = dict(zip(OUTPUTS, (labels > 0.5).sum(0).tolist(), strict=True))
    log.info("%d samples, known positives %s", len(images), positives)
    net = network.fit(images, labels, minutes=args.minutes, seed=args.seed, start=args.start, workers=args.workers)
    network.refine(net, images, labels, epochs=12, seed=args.seed, workers=args.workers)
    eyes = eye_network.fit_eyes(images, labels, minutes=args.eye_minutes, seed=args.seed)
    network.export(net, eyes, args.out)


if __name__ == "__main__":
    main()
