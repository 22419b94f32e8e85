"""The network of the eyes alone: shut or open, from each eye at full detail, both by the same weights."""

from __future__ import annotations

import logging
import time

import numpy as np
import torch
from labels import LEFT, PROBABILITIES, TOP
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


class EyeNet(nn.Module):
    """float [n, 3, 128, 128] BGR 0..255 → the logit [n] that both eyes are shut: the mean of both eyes' own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _conv(3, 16, 2), _conv(16, 32, 2), _conv(32, 32), _conv(32, 64, 2), _conv(64, 64), nn.Flatten(),
            nn.Dropout(0.3), nn.Linear(64 * 35, 1),
        )  # fmt: skip

    def forward(self, view: torch.Tensor) -> torch.Tensor:
        rows = view[:, :, FIRST_ROW : FIRST_ROW + ROWS]
        first, second = (rows[:, :, :, x : x + COLUMNS] for x in FIRST_COLUMNS)
        eyes = (torch.cat([first, second.flip(3)]) - 127.5) / 64.0
        return self.layers(eyes).view(2, -1).mean(0)  # type: ignore[no-any-return]


def fit_eyes(images: Image, labels: NDArray[np.float32], *, minutes: float, seed: int) -> EyeNet:
    """Train on the samples whose eyes are known: a third of each batch shut or half shut, the rest those that fail."""
    torch.manual_seed(seed)
    known = np.flatnonzero(labels[:, SHUT] >= 0)
    margin = 6
    top = FIRST_ROW - margin
    strips = np.ascontiguousarray(images[known][:, top : top + ROWS + 2 * margin])
    truth = torch.from_numpy(labels[known, SHUT].copy())
    shut = np.flatnonzero(truth.numpy() > 0)
    difficulty = np.where(truth.numpy() > 0, 0.0, 0.3)
    rng = np.random.default_rng(seed)
    net = EyeNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload] # a layout, unknown to the stubs
    average = torch.optim.swa_utils.AveragedModel(
        net,
        multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99),  # type: ignore[no-untyped-call]
        use_buffers=True,
    )
    peak, batch = 2e-3, 96
    optimiser = torch.optim.AdamW(net.parameters(), lr=peak, weight_decay=0.05)
    began, step, running, done = time.monotonic(), 0, 0.7, 0.0
    net.train()
    while done < 1:
        done = (time.monotonic() - began) / (60 * minutes)
        for group in optimiser.param_groups:
            group["lr"] = max(1e-6, peak * min(1.0, step / 100) * 0.5 * (1 + np.cos(np.pi * min(1.0, done))))
        rows = np.concatenate(
            [
                rng.choice(shut, batch // 3),
                rng.choice(len(truth), batch - batch // 3, p=difficulty / difficulty.sum()),
            ]
        )
        y = truth[torch.from_numpy(rows)]
        x = torch.from_numpy(strips[rows]).float().permute(0, 3, 1, 2)
        if rng.random() < 0.5:
            x = x.flip(3)
        dy, dx = rng.integers(0, 2 * margin + 1), rng.integers(-margin, margin + 1)
        x = torch.roll(x[:, :, dy : dy + ROWS], int(dx), 3)
        x = x * (1 + 0.2 * torch.randn(batch, 1, 1, 1)) + 12 * torch.randn(batch, 1, 1, 1)
        if rng.random() < 0.3:  # a small face
            small = nn.functional.interpolate(x, scale_factor=float(rng.uniform(0.4, 0.9)), mode="bilinear")
            x = nn.functional.interpolate(small, size=x.shape[2:], mode="bilinear")
        view = torch.zeros(batch, 3, 128, 128)
        view[:, :, FIRST_ROW : FIRST_ROW + ROWS] = x.clamp(0, 255)
        with torch.autocast("cpu", torch.bfloat16):
            found = net(view)
        each = nn.functional.binary_cross_entropy_with_logits(found.float(), y * 0.96 + 0.02, reduction="none")
        optimiser.zero_grad()
        each.mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        step += 1
        if step % 2 == 0:
            average.update_parameters(net)
        open_rows = rows[batch // 3 :]
        difficulty[open_rows] = np.maximum(
            0.02, 0.5 * difficulty[open_rows] + 0.5 * each.detach().numpy()[batch // 3 :]
        )
        difficulty[shut] = 0
        running += 0.02 * (each.mean().item() - running)
        if step % 200 == 0:
            log.info("eyes: step %d loss %.4f, %.0f %%", step, running, 100 * done)
    final = average.module.eval()
    assert isinstance(final, EyeNet)
    return final
