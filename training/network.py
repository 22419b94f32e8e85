"""The network, its loss, its training and its export."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from labels import DAMAGED, INPUT, LEFT, LIKENESS, OUTPUTS, PROBABILITIES, ROLL, STRETCH, TOP, UNITS, YAW
from numpy.typing import NDArray
from overlays import Image
from torch import nn

log = logging.getLogger(__name__)

SHUT = PROBABILITIES.index("shut")
# Each eye in the network's 128-pixel view: 40 rows about the line of the eyes, 56 columns about its centre.
ROWS, COLUMNS = 40, 56
FIRST_ROW = 63 - TOP - ROWS // 2
FIRST_COLUMNS = (57 - LEFT - COLUMNS // 2, 101 - LEFT - COLUMNS // 2)


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


def _branch(features: int, width: int) -> nn.Sequential:
    """Adds one number to what the rest of the network finds: nothing, before it has learned."""
    layers = nn.Sequential(nn.Dropout(0.2), nn.Linear(features, width), nn.ReLU(inplace=True), nn.Linear(width, 1))
    nn.init.zeros_(layers[-1].weight)
    nn.init.zeros_(layers[-1].bias)
    return layers


class Net(nn.Module):
    """float [n, 3, 128, 128] BGR 0..255 → float [n, 15], named by OUTPUTS: logits, quantities in UNITS, a logit.

    It sees the whole face in five steps down to 4x4, and each eye by itself in three: whether an eye is shut is a
    matter of two or three pixels. Both eyes share their weights; one of them is mirrored.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(_conv(3, 16, 2), _conv(16, 32, 2), Residual(32))
        self.middle = nn.Sequential(_conv(32, 64, 2), Residual(64))
        self.coarse = nn.Sequential(_conv(64, 96, 2), Residual(96), Residual(96))
        self.coarsest = nn.Sequential(_conv(96, 192, 2), Residual(192))
        self.parts = nn.Sequential(nn.Conv2d(96, 24, 1), nn.ReLU(inplace=True))
        self.eye = nn.Sequential(_conv(3, 16, 2), _conv(16, 32, 2), Residual(32), _conv(32, 64, 2), nn.Flatten())
        self.eye_features = nn.Sequential(nn.Dropout(0.2), nn.Linear(64 * 35, 48), nn.ReLU(inplace=True))
        self.eye_shut = nn.Linear(48, 1)
        features = 24 * 64 + 192 * 4 + 2 * 32 + 2 * 48
        self.hidden = nn.Sequential(nn.Dropout(0.2), nn.Linear(features, 160), nn.ReLU(inplace=True), nn.Dropout(0.2))
        self.head = nn.Linear(160, len(OUTPUTS) - 1)
        # They learn by themselves, last: see `fit_branches`.
        self.likeness, self.damaged = _branch(features, 96), _branch(features, 192)

    def forward(self, view: torch.Tensor) -> torch.Tensor:
        x = (view - 127.5) / 64.0
        fine = self.fine(x)
        coarse = self.coarse(self.middle(fine))
        # Noise and compression show in the mean and the spread of the finest map, wherever they lie.
        mean = fine.mean((2, 3))
        spread = (((fine - mean[:, :, None, None]) ** 2).mean((2, 3)) + 1e-5).sqrt()
        whole = nn.functional.avg_pool2d(self.coarsest(coarse), 2)
        rows = x[:, :, FIRST_ROW : FIRST_ROW + ROWS]
        left, right = (rows[:, :, :, first : first + COLUMNS] for first in FIRST_COLUMNS)
        eyes = self.eye_features(self.eye(torch.cat([left, right.flip(3)])))
        left, right = eyes.chunk(2)
        seen = torch.cat([self.parts(coarse).flatten(1), whole.flatten(1), mean, spread, left, right], 1)
        found = self.head(self.hidden(seen))
        shut = self.eye_shut(left) + self.eye_shut(right)
        likeness = found[:, LIKENESS:] + self.likeness(seen)
        return torch.cat(
            [
                found[:, :SHUT],
                found[:, SHUT : SHUT + 1] + shut,
                found[:, SHUT + 1 : LIKENESS],
                likeness,
                self.damaged(seen),
            ],
            1,
        )


class Exported(nn.Module):
    """uint8 [n, 160, 160, 3] BGR, as `aligned_face` cuts it → nine probabilities, five quantities, a probability."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("units", torch.from_numpy(UNITS))

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        view = crops[:, TOP : TOP + INPUT, LEFT : LEFT + INPUT].permute(0, 3, 1, 2).float()
        found = self.net(view)
        count = len(PROBABILITIES)
        quantities = found[:, count:DAMAGED] * self.units
        return torch.cat([torch.sigmoid(found[:, :count]), quantities, torch.sigmoid(found[:, DAMAGED:])], 1)


# Regions and hints count half, and likeness twice, since few samples have it. Sunglasses, other coverings and shut eyes
# are rarer among the samples than they matter.
WEIGHTS = {
    "eyes": 0.5,
    "nose": 0.5,
    "mouth": 0.5,
    "hand": 0.4,
    "spectacles": 0.4,
    "yaw": 0.7,
    "pitch": 0.7,
    "roll": 0.7,
    "likeness": 2.0,
}
POSITIVES = {"sunglasses": 1.5, "other": 1.5, "shut": 3.0}


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each of PROBABILITIES [n, 9], softened a little against wrong labels; 0 of unknown ones."""
    positive = torch.tensor([POSITIVES.get(name, 1.0) for name in PROBABILITIES])
    soft = labels.clamp(min=0) * 0.97 + 0.015
    each = nn.functional.binary_cross_entropy_with_logits(logits, soft, reduction="none", pos_weight=positive)
    return each * (labels >= 0)


def loss_of(found: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One loss a sample [n]: cross-entropy over the known labels, and smooth L1 of the known quantities."""
    count = len(PROBABILITIES)
    weights = torch.tensor([WEIGHTS.get(name, 1.0) for name in OUTPUTS[:DAMAGED]])
    each = cross_entropy(found[:, :count], labels[:, :count]) * weights[:count]
    measured = labels[:, count:DAMAGED].isfinite().float() * weights[count:]
    # Most faces are not stretched: without this the answer is drawn towards that.
    measured[:, STRETCH - count] *= torch.where(labels[:, STRETCH].abs() < 0.02, 0.3, 2.0)
    target = torch.nan_to_num(labels[:, count:DAMAGED]) / torch.from_numpy(UNITS)
    off = nn.functional.smooth_l1_loss(found[:, count:DAMAGED], target, reduction="none", beta=0.15)
    return each.sum(1) + (off * measured).sum(1)


BATCH = 64


def _varied(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch mirrored, moved, and lit a little differently each time."""
    flipped = torch.rand(len(x)) < 0.5
    x = torch.where(flipped[:, None, None, None], x.flip(3), x)
    y = y.clone()
    y[flipped[:, None] & torch.isin(torch.arange(len(OUTPUTS)), torch.tensor([YAW, ROLL]))[None]] *= -1
    down, right = torch.randint(-3, 4, (2,)).tolist()
    x = nn.functional.pad(x, (3, 3, 3, 3), mode="replicate")[:, :, 3 + down :, 3 + right :][:, :, :INPUT, :INPUT]
    gain = 1 + 0.12 * torch.randn(len(x), 1, 1, 1) + 0.04 * torch.randn(len(x), 3, 1, 1)
    return (x * gain + 8 * torch.randn(len(x), 1, 1, 1)).clamp(0, 255), y


def fit(
    net: Net, images: Image, labels: NDArray[np.float32], *, epochs: float, peak: float, seed: int, threads: int
) -> Net:
    """Train with a learning rate that rises to `peak` and falls along a cosine; what fails is seen more often.

    Returns:
        The moving average of the weights.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    net = net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload] # a layout, unknown to the stubs
    average = torch.optim.swa_utils.AveragedModel(
        net,
        multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998),  # type: ignore[no-untyped-call]
        use_buffers=True,
    )
    optimiser = torch.optim.AdamW(net.parameters(), lr=peak, weight_decay=0.03)
    steps = int(epochs * len(images) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, total_steps=steps, pct_start=0.08)
    pixels, truth = torch.from_numpy(images), torch.from_numpy(labels)
    losses = torch.full((len(images),), 3.0)
    running = 0.0
    for step in range(steps):
        # Capped: among what fails most are the wrong labels.
        rows = torch.multinomial(0.4 + (losses / losses.mean()).clamp(max=2.5), BATCH)
        x, y = _varied(pixels[rows].permute(0, 3, 1, 2).float(), truth[rows])
        with torch.autocast("cpu", torch.bfloat16):
            found = net(x.contiguous(memory_format=torch.channels_last))
        each = loss_of(found.float(), y)
        optimiser.zero_grad()
        each.mean().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        average.update_parameters(net)
        losses[rows] = each.detach()
        running += 0.01 * (each.mean().item() - running)
        if step % 500 == 499:
            log.info("step %d of %d, loss %.4f", step + 1, steps, running / (1 - 0.99 ** (step + 1)))
    final = average.module.eval()
    assert isinstance(final, Net)
    return final


def fit_branches(net: Net, images: Image, labels: NDArray[np.float32], *, epochs: float, peak: float, seed: int) -> Net:
    """Train the branches of likeness and damage on distorted samples; every other output stays as it is."""
    torch.manual_seed(seed)
    branches = nn.ModuleList([net.likeness, net.damaged])
    net = net.eval().requires_grad_(requires_grad=False)
    branches.requires_grad_(requires_grad=True).train()
    optimiser = torch.optim.AdamW(branches.parameters(), lr=peak, weight_decay=0.03)
    steps = int(epochs * len(images) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, total_steps=steps, pct_start=0.08)
    pixels, truth = torch.from_numpy(images), torch.from_numpy(labels)
    running = 0.0
    for step in range(steps):
        rows = torch.randint(len(images), (BATCH,))
        x, y = _varied(pixels[rows].permute(0, 3, 1, 2).float(), truth[rows])
        loss = _loss_of_branches(net(x.contiguous(memory_format=torch.channels_last)), y)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        running += 0.01 * (loss.item() - running)
        if step % 500 == 499:
            log.info("step %d of %d, loss of the branches %.4f", step + 1, steps, running / (1 - 0.99 ** (step + 1)))
    return net.eval()


def _loss_of_branches(found: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    unit = float(UNITS[LIKENESS - len(PROBABILITIES)])
    measured, known = labels[:, LIKENESS].isfinite(), labels[:, DAMAGED] >= 0
    likeness = nn.functional.smooth_l1_loss(found[measured, LIKENESS], labels[measured, LIKENESS] / unit, beta=0.15)
    soft = labels[known, DAMAGED] * 0.97 + 0.015
    return likeness + nn.functional.binary_cross_entropy_with_logits(found[known, DAMAGED], soft)


def mean_of(states: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of several rounds' weights, which errs less than each of them."""
    return {
        name: torch.stack([state[name].float() for state in states]).mean(0).to(first.dtype)
        for name, first in states[0].items()
    }


def export(net: Net, path: Path) -> None:
    """Write one ONNX file for any number of faces at once, which names its own outputs."""
    torch.onnx.export(
        Exported(net.float()).eval(),
        (torch.zeros(2, 160, 160, 3, dtype=torch.uint8),),
        str(path),
        input_names=["crops"],
        output_names=["attributes"],
        dynamic_axes={"crops": {0: "n"}, "attributes": {0: "n"}},
        opset_version=17,
        dynamo=False,
    )
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"outputs": ",".join(OUTPUTS)})
    onnx.save(model, path)
