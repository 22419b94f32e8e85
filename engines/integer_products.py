"""Multiplies matrices of 8-bit integers, for comparisons of everybody with everybody; runs on onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

# x86 processors without VNNI add two products in 16 bits and cut what is too much: 2 * (128 + 79) * 79 fits.
LARGEST_CODE = 79

Codes = npt.NDArray[np.int8]


def product_of_codes(dimension: int) -> Callable[[Codes, Codes], npt.NDArray[np.int32]]:
    """Return the exact product of int8[n, d] and int8[m, d] as int32[n, m], on every core.

    Two and a half times as fast as the product in float32 (benchmarks/duplicates.py).

    Args:
        dimension: d. Every code must lie within +-LARGEST_CODE.
    """
    import onnxruntime  # noqa: PLC0415 - slow to import, and for one command alone
    from onnx import TensorProto, helper  # noqa: PLC0415

    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b", "zero"], ["products"])],
        "products",
        [
            helper.make_tensor_value_info("a", TensorProto.UINT8, [None, dimension]),
            helper.make_tensor_value_info("b", TensorProto.INT8, [dimension, None]),
        ],
        [helper.make_tensor_value_info("products", TensorProto.INT32, [None, None])],
        [helper.make_tensor("zero", TensorProto.UINT8, [], [128])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def product(rows: Codes, columns: Codes) -> Any:
        unsigned = (rows.astype(np.int16) + 128).astype(np.uint8)  # onnxruntime is fastest with one unsigned factor
        return session.run(None, {"a": unsigned, "b": np.ascontiguousarray(columns.T)})[0]

    return product
