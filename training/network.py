"""The network, its loss, its training and its export."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from eye_network import SHUT, EyeNet
from labels import INPUT, LEFT, OUTPUTS, PROBABILITIES, ROLL, STRETCH, TOP, UNITS, YAW
from numpy.typing import NDArray
from onnx import numpy_helper
from overlays import Image
from torch import nn

log = logging.getLogger(__name__)


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


HIDDEN = 192


class Net(nn.Module):
    """float [n, 3, 128, 128] BGR 0..255 → float [n, 15], named by OUTPUTS: logits, then quantities in UNITS."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 96, 192)) -> None:
        super().__init__()
        a, b, c, d, e = widths
        self.fine = nn.Sequential(_conv(3, a, 2), _conv(a, b, 2), Residual(b))
        self.middle = nn.Sequential(_conv(b, c, 2), Residual(c))
        self.coarse = nn.Sequential(_conv(c, d, 2), Residual(d))
        self.coarsest = nn.Sequential(_conv(d, e, 2), Residual(e))
        self.eyes = nn.Sequential(nn.Conv2d(c, 24, 1), nn.ReLU(inplace=True))
        self.parts = nn.Sequential(nn.Conv2d(d, 24, 1), nn.ReLU(inplace=True))
        features = 24 * 48 + 24 * 64 + e * 4 + 2 * b
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(features, len(OUTPUTS)))
        # Learned last, on what the rest has become; adds to the head above, at first nothing.
        self.second = nn.Sequential(
            nn.BatchNorm1d(features),
            nn.Dropout(0.3),
            nn.Linear(features, HIDDEN),
            nn.ReLU(inplace=True),
            nn.Dropout(0.3),
        )
        self.second_head = nn.Linear(HIDDEN, len(OUTPUTS))
        nn.init.zeros_(self.second_head.weight)
        nn.init.zeros_(self.second_head.bias)

    def finest(self, x: torch.Tensor) -> torch.Tensor:
        """float [n, 32, 32, 32]: edges and textures."""
        return self.fine((x - 127.5) / 64.0)  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.features(self.finest(x))
        return self.head(features) + self.second_head(self.second(features))  # type: ignore[no-any-return]

    def features(self, fine: torch.Tensor) -> torch.Tensor:
        """float [n, 3520]: what the heads read, from the finest maps."""
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        # Where in the face something lies stays known; the eyes' own rows are read at twice the detail; noise and
        # compression show in the mean and the spread of the finest map.
        mean = fine.mean((2, 3))
        spread = (((fine - mean[:, :, None, None]) ** 2).mean((2, 3)) + 1e-5).sqrt()
        whole = nn.functional.avg_pool2d(self.coarsest(coarse), 2)
        maps = (self.eyes(middle[:, :, 4:7]), self.parts(coarse), whole)
        return torch.cat([*(each.flatten(1) for each in maps), mean, spread], 1)

    def start_from(self, path: Path, images: torch.Tensor) -> None:
        """Take the first nine convolutions from an earlier network (`covering.onnx`), as long as they have its shapes.

        Its batch norms are part of its weights: they are taken apart again so that on `images` (float [n, 3, 128,
        128]) each gives what it gave.
        """
        tensors = {one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}
        convolutions = [node for node in onnx.load(path).graph.node if node.op_type == "Conv"]
        layers = [
            layer
            for part in (self.fine, self.middle, self.coarse)
            for layer in part.modules()
            if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d))
        ]
        with torch.no_grad():
            for node, conv, norm in zip(convolutions, layers[::2], layers[1::2], strict=True):
                conv.weight.copy_(torch.from_numpy(tensors[node.input[1]].copy()))
                bias = torch.from_numpy(tensors[node.input[2]].copy())

                def set_norm(
                    _: nn.Module, inputs: tuple[torch.Tensor, ...], norm: Any = norm, bias: torch.Tensor = bias
                ) -> None:
                    mean, var = inputs[0].mean((0, 2, 3)), inputs[0].var((0, 2, 3)) + 1e-3
                    norm.running_mean.copy_(mean)
                    norm.running_var.copy_(var)
                    norm.weight.copy_((var + norm.eps).sqrt())
                    norm.bias.copy_(bias + mean)

                hook = norm.register_forward_pre_hook(set_norm)
                self.eval()(images)
                hook.remove()


EYES_SHARE = 0.7


class Exported(nn.Module):
    """uint8 [n, 160, 160, 3] BGR, as `aligned_face` cuts it → ten probabilities and five quantities.

    Each is the mean of what the crop and its mirror image tell: the pose is then the same for both.
    """

    def __init__(self, net: Net, eyes: EyeNet) -> None:
        super().__init__()
        self.net, self.eyes = net, eyes
        self.register_buffer("units", torch.from_numpy(UNITS))
        # Yaw and roll of a mirror image have the other sign.
        self.register_buffer("mirrored", torch.tensor([-1.0 if name in ("yaw", "roll") else 1.0 for name in OUTPUTS]))

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        part = crops[:, TOP : TOP + INPUT, LEFT : LEFT + INPUT].permute(0, 3, 1, 2).float()
        return (self.told(part) + self.told(part.flip(3)) * self.mirrored) / 2

    def told(self, part: torch.Tensor) -> torch.Tensor:
        found = self.net(part)
        ten = len(PROBABILITIES)
        # Both networks were taught whether the eyes are shut: the mean of their logits counts.
        shut = EYES_SHARE * self.eyes(part)[:, None] + (1 - EYES_SHARE) * found[:, SHUT : SHUT + 1]
        found = torch.cat([found[:, :SHUT], shut, found[:, SHUT + 1 :]], 1)
        return torch.cat([torch.sigmoid(found[:, :ten]), found[:, ten:] * self.units], 1)


# Regions and hints count half; each quantity counts as a probability does.
WEIGHTS = (1.5, 1.5, 1.5, 0.5, 0.5, 0.5, 1.5, 0.5, 0.5, 0.7, 1, 1, 1, 1.5, 1)


# How much more the positives of rare outputs count in the end.
RARE = {"shut": 5.0, "blend": 4.0, "other": 1.5, "sunglasses": 1.5}


def loss_of(found: torch.Tensor, labels: torch.Tensor, rare: Mapping[str, float] | None = None) -> torch.Tensor:
    """Cross-entropy over the known labels, softened a little against wrong ones, and smooth L1 of the quantities."""
    ten = len(PROBABILITIES)
    weights = torch.tensor(WEIGHTS)
    positive = torch.tensor([(rare or {}).get(name, 1.0) for name in PROBABILITIES])
    known = (labels[:, :ten] >= 0).float() * weights[:ten]
    soft = labels[:, :ten].clamp(min=0) * 0.96 + 0.02
    each = nn.functional.binary_cross_entropy_with_logits(found[:, :ten], soft, reduction="none", pos_weight=positive)
    measured = labels[:, ten:].isfinite().float() * weights[ten:]
    if rare:  # most faces are not stretched: else the answer is drawn towards that
        measured[:, STRETCH - ten] *= torch.where(labels[:, STRETCH] == 0, 0.1, 2.0)
    target = torch.nan_to_num(labels[:, ten:]) / torch.from_numpy(UNITS)
    off = nn.functional.smooth_l1_loss(found[:, ten:], target, reduction="none", beta=0.15)
    return (each * known).sum() / known.sum() + (off * measured).sum() / measured.sum()


# What the first training leaves as it is.
LATER = ("fine.", "second")
# The finest maps are kept in bytes: eighths from 0 to 31.9, which 99.9 % of them do not reach.
STEPS_OF_MAP = 8.0


def finest_maps(net: Net, images: Image) -> torch.Tensor:
    """uint8 [2, n, 32, 32, 32] in eighths: of every image, lit a little differently, and of its mirror image.

    The layers up to there stay as an earlier network has them: to train them as well costs twice the time.
    """
    count = len(images)
    maps = torch.empty(2, count, 32, 32, 32, dtype=torch.uint8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for first in range(0, count, 250):
            x = torch.from_numpy(images[first : first + 250]).float().permute(0, 3, 1, 2)
            for flip in (0, 1):
                lit = x * (1 + 0.1 * torch.randn(len(x), 3, 1, 1)) + 6 * torch.randn(len(x), 1, 1, 1)
                lit = (lit.flip(3) if flip else lit).clamp(0, 255)
                found = net.finest(lit).float() * STEPS_OF_MAP
                maps[flip, first : first + 250] = found.round().clamp(0, 255).byte().permute(0, 2, 3, 1)
            if first % 5000 == 0:
                log.info("finest maps of %d", first)
    return maps


def _train(rank: int, net: Net, maps: torch.Tensor, labels: torch.Tensor, shared: Shared) -> None:
    """One of several workers: every so many steps all take the mean of their weights."""
    torch.set_num_threads(1)
    torch.manual_seed(shared.seed * 100 + rank)
    batch, peak, apart = 64, 1.5e-3, 24
    parameters = [*(p for name, p in net.named_parameters() if not name.startswith(LATER))]
    buffers = [b for name, b in net.named_buffers() if not name.startswith(LATER) and b.dtype == torch.float32]
    optimiser = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.03)
    weights = [*parameters, *buffers]
    average = [w.detach().clone() for w in weights]
    net.train()
    net.fine.eval()
    step, running, done = 0, 0.0, 0.0
    while done < 1:
        done = (time.monotonic() - shared.began) / shared.seconds
        rate = peak * min(1.0, step / 150) * 0.5 * (1 + np.cos(np.pi * min(1.0, done)))
        for group in optimiser.param_groups:
            group["lr"] = max(float(rate), 1e-6)
        rows, flip = torch.randint(maps.shape[1], (batch,)), int(torch.randint(2, ()))
        x, y = maps[flip, rows].float().permute(0, 3, 1, 2) / STEPS_OF_MAP, labels[rows].clone()
        if flip:
            y[:, [YAW, ROLL]] *= -1
        if torch.rand(()) < 0.4:
            x = torch.roll(x, tuple(torch.randint(-1, 2, (2,)).tolist()), (2, 3))
        with torch.autocast("cpu", torch.bfloat16):
            found = net.head(net.features(x))
        loss = loss_of(found.float(), y)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        step += 1
        running += (0.02 if step > 1 else 1) * (loss.item() - running)
        if step % apart == 0:
            with torch.no_grad():
                flat = torch.cat([w.reshape(-1) for w in weights])
                shared.weights[rank] = flat
                # A worker that is late is not waited for: its latest weights count.
                for w, mean in zip(weights, _cut(shared.weights.mean(0), weights), strict=True):
                    w.copy_(mean)
                for w, kept in zip(weights, average, strict=True):
                    kept.lerp_(w, 1 - 0.96 if step > 20 * apart else 0.3)
            if rank == 0 and step % (8 * apart) == 0:
                log.info("step %d loss %.4f, %.0f %%", step, running, 100 * done)
            if rank == 0 and step % (20 * apart) == 0:
                shared.result.copy_(torch.cat([w.reshape(-1) for w in average]))
                torch.save(shared.result, "checkpoint.pt")
    shared.steps[rank] = step
    if rank == 0:
        shared.result.copy_(torch.cat([w.reshape(-1) for w in average]))


def _cut(flat: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    parts = flat.split([one.numel() for one in like])
    return [part.reshape(one.shape) for part, one in zip(parts, like, strict=True)]


@dataclass
class Shared:
    """What the workers of a training share."""

    seed: int
    began: float
    seconds: float
    weights: torch.Tensor
    result: torch.Tensor
    steps: torch.Tensor


def fit(images: Image, labels: NDArray[np.float32], *, minutes: float, seed: int, start: Path, workers: int) -> Net:
    """Train for so many minutes; a moving average of the weights is what counts."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    net = Net()
    net.start_from(start, torch.from_numpy(images[:256]).permute(0, 3, 1, 2).float())
    net = net.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload] # a layout, unknown to the stubs
    maps = finest_maps(net, images)
    weights = [p for name, p in net.named_parameters() if not name.startswith(LATER)]
    weights += [b for name, b in net.named_buffers() if not name.startswith(LATER) and b.dtype == torch.float32]
    flat = torch.cat([w.detach().reshape(-1) for w in weights])
    shared = Shared(
        seed,
        time.monotonic(),
        60 * minutes,
        flat.repeat(workers, 1).share_memory_(),
        flat.clone().share_memory_(),
        torch.zeros(workers).share_memory_(),
    )
    log.info("%d weights to learn", len(flat))
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_train, args=(rank, net, maps, torch.from_numpy(labels), shared))
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    log.info("steps of the workers %s", shared.steps.tolist())
    with torch.no_grad():
        for w, value in zip(weights, _cut(shared.result, weights), strict=True):
            w.copy_(value)
    return net.eval()


def _keep_features(net: Net, images: Image, features: torch.Tensor, chunks: list[int]) -> None:
    torch.set_num_threads(1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for chunk in chunks:
            rows = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            x = torch.from_numpy(np.array(images[rows])).float().permute(0, 3, 1, 2)
            features[rows] = net.features(net.finest(x.flip(3) if chunk % 2 else x)).bfloat16()


# Of every second so many images the mirror image is used.
CHUNK = 250


def refine(net: Net, images: Image, labels: NDArray[np.float32], *, epochs: int, seed: int, workers: int) -> Net:
    """Train the second head on the features of all images, or of their mirror images; the features stay as they are.

    Shut eyes, blends and stretched faces are rare among the samples: they count more here.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    count, width = len(images), net.second[0].num_features
    features = torch.empty(count, width, dtype=torch.bfloat16).share_memory_()
    labels = labels.copy()
    for first in range(CHUNK, count, 2 * CHUNK):
        labels[first : first + CHUNK, [YAW, ROLL]] *= -1
    chunks = list(range(-(-count // CHUNK)))
    context = multiprocessing.get_context("fork")
    net.eval()
    processes = [
        context.Process(target=_keep_features, args=(net, images, features, chunks[rank::workers]))
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    log.info("features of %d", count)
    known = torch.from_numpy(labels)
    parameters = [*net.second.parameters(), *net.second_head.parameters(), *net.head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    batch = 256
    steps = epochs * (count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps, pct_start=0.15)
    for part in (net.second, net.second_head, net.head):
        part.train()
    for step in range(steps):
        rows = torch.randint(count, (batch,))
        x = features[rows].float()
        loss = loss_of(net.head(x) + net.second_head(net.second(x)), known[rows], RARE)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            log.info("second head: step %d of %d, loss %.4f", step, steps, loss.item())
    return net.eval()


def export(net: Net, eyes: EyeNet, path: Path) -> None:
    """Write one ONNX file with any number of faces at once."""
    torch.onnx.export(
        Exported(net, eyes).eval(),
        (torch.zeros(2, 160, 160, 3, dtype=torch.uint8),),
        str(path),
        input_names=["crops"],
        output_names=["attributes"],
        dynamic_axes={"crops": {0: "n"}, "attributes": {0: "n"}},
        opset_version=17,
        dynamo=False,
    )
