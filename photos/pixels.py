"""The one type of a decoded picture."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# uint8[height, width, 3], the channels blue, green, red.
Pixels = npt.NDArray[np.uint8]
