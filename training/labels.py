"""Names what the network tells of a face, in the order of its outputs."""

from __future__ import annotations

import numpy as np

PROBABILITIES = ("mask", "sunglasses", "other", "eyes", "nose", "mouth", "shut", "hand", "spectacles")
# yaw, pitch, roll: degrees; stretch: log2 of width over height, against an undistorted photo; likeness: the cosine of a
# recogniser's embeddings before and after a distortion.
QUANTITIES = ("yaw", "pitch", "roll", "stretch", "likeness")
# The probability that compression, noise or a filter has damaged the photo; it has a round of its own.
OUTPUTS = (*PROBABILITIES, *QUANTITIES, "damaged")
# The network's own units, in which each quantity is of the order of one.
UNITS = np.array([30, 30, 30, 0.5, 0.5], np.float32)
YAW, PITCH, ROLL, STRETCH, LIKENESS, DAMAGED = range(len(PROBABILITIES), len(OUTPUTS))
# The part of the 160-pixel crop that the network sees, pixel by pixel: from the hairline to the chin, ear to ear.
LEFT, TOP, INPUT = 16, 20, 128
