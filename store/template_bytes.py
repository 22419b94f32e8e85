"""Turns a template into stored bytes and back: pickled, sealed where there are keys, read without running code."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.base import Template
from store.encryption import Keyring, is_sealed

MAX_EMBEDDING_BYTES = 64 * 1024
NORM_TOLERANCE = 1e-3


def encode(template: Template, user_id: str, model: str | None, keyring: Keyring) -> bytes:
    """Return what is stored of float32[d]: a pickle, sealed to its person and model where there are keys."""
    # Every supported Python reads protocol 4, and most write it by default.
    pickled = pickle.dumps(np.ascontiguousarray(template, np.float32), protocol=4)
    return keyring.seal(pickled, _place(user_id, model)) if keyring else pickled


def decode(blob: object, user_id: object, model: object, keyring: Keyring) -> Template:
    """Read what `encode`, or an older service, has stored.

    Args:
        blob: bytes of `pickle.dumps(array)`, protocols 2-5, written by NumPy 1 or 2; float32 or float64;
            shape (d,) or (1, d); sealed or plain.
        user_id: the record's user_id.
        model: the record's model.
        keyring: opens sealed templates.

    Raises:
        MissingKeyError: the template is sealed with a key that is not here.
        ValueError: `blob` is anything else, was moved from another record, is plain though the keyring refuses that,
            or is not finite and of norm 1.
    """
    if not isinstance(blob, bytes) or len(blob) > MAX_EMBEDDING_BYTES:
        raise ValueError("its embedding is absent, no binary, or too large")
    if is_sealed(blob):
        blob = keyring.open(blob, _place(user_id, model))
    elif not keyring.plain_too:
        raise ValueError("it is not encrypted, and PLAIN_TEMPLATES=refuse is set")
    return _loads(blob)


def reseal(blob: bytes, user_id: str, model: str | None, keyring: Keyring) -> bytes | None:
    """Return the same template sealed with the keyring's first key; None if it is already. Raises as `decode` does."""
    if keyring.is_current(blob):
        return None
    return encode(decode(blob, user_id, model, keyring), user_id, model, keyring)


def _place(user_id: object, model: object) -> str:
    return json.dumps(["template", str(user_id), None if model is None else str(model)])


def _loads(blob: bytes) -> Template:
    try:
        vector = _TemplateUnpickler(blob).vector()
    except Exception as error:  # hostile bytes may raise anything; all of it means unreadable
        raise ValueError(f"its embedding cannot be read ({type(error).__name__})") from error
    with np.errstate(over="ignore"):  # an infinite norm is refused below
        norm = float(np.linalg.norm(vector))
    if not abs(norm - 1) <= NORM_TOLERANCE:
        raise ValueError(f"its embedding has the norm {norm}")
    template: Template = (vector / norm).astype(np.float32)
    return template


class _PickledDtype:
    """What a pickle says about a dtype, as plain data that NumPy never sees."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code
        self.order = ""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _PickledArray:
    """What a pickle says about an array, as plain data; stands in for `numpy.ndarray` and its `_reconstruct`."""

    def __init__(self, *_: object) -> None:
        self.shape: object = None
        self.dtype: object = None
        self.data: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, self.shape, self.dtype, _fortran_order, self.data = state


class _PickledBuffer(_PickledArray):
    """Stands in for NumPy's `_frombuffer`, which pickles of protocol 5 call."""

    def __init__(self, data: object, dtype: object, shape: object, *_: object) -> None:
        super().__init__()
        self.data, self.dtype, self.shape = data, dtype, shape


class _PickledBytes:
    """Stands in for `_codecs.encode`, which pickles of protocol 2 call to make bytes."""

    def __new__(cls, text: str, encoding: str) -> Any:
        if encoding != "latin1":
            raise ValueError("another encoding than latin1")
        return text.encode("latin1")


_GLOBALS: Mapping[tuple[str, str], type] = {
    ("numpy", "dtype"): _PickledDtype,
    ("numpy", "ndarray"): _PickledArray,
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy.core.numeric", "_frombuffer"): _PickledBuffer,
    ("numpy._core.numeric", "_frombuffer"): _PickledBuffer,
    ("_codecs", "encode"): _PickledBytes,
}
# fmt: off
_OPCODES = frozenset({
    "PROTO", "FRAME", "STOP", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "MEMOIZE", "BINPUT", "BINGET",
    "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2",
    "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BYTEARRAY8",
})
# fmt: on


class _TemplateUnpickler(pickle.Unpickler):
    """Admits only the names and opcodes that an array's pickle needs, and loads stand-ins that run nothing."""

    def __init__(self, blob: bytes) -> None:
        # Before anything is loaded: other opcodes could make the loader allocate or hash without limit.
        if any(opcode.name not in _OPCODES for opcode, _, _ in pickletools.genops(blob)):
            raise pickle.UnpicklingError("an opcode that no array needs")
        super().__init__(io.BytesIO(blob))

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError("a name that no array needs")
        return _GLOBALS[module, name]

    def vector(self) -> npt.NDArray[np.float64]:
        """Return float64[d]; raises any exception when the pickle is not one vector of float32 or float64."""
        array = self.load()
        if not isinstance(array, _PickledArray) or not isinstance(array.dtype, _PickledDtype):
            raise pickle.UnpicklingError("not an array")
        if array.dtype.code not in ("f4", "f8") or array.dtype.order not in ("<", ">"):
            raise pickle.UnpicklingError("neither float32 nor float64")
        values = np.frombuffer(array.data, np.dtype(array.dtype.order + array.dtype.code))
        if array.shape not in ((values.size,), (1, values.size)):
            raise pickle.UnpicklingError("not a vector")
        return values.astype(np.float64)
