"""The dtypes that ringsim computes with, by name; NumPy's own plus bfloat16 from ml_dtypes."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from .errors import WorkloadError

ITEMSIZE: Final = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
ALIASES: Final = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
ATTENTION: Final = ("float64", "float32", "float16", "bfloat16")


def canonical(name: str) -> str:
    """The dtype's full name (``bf16`` -> ``bfloat16``). Raises WorkloadError for one that attention is not defined for."""
    full = ALIASES.get(name, name)
    if full not in ATTENTION:
        raise WorkloadError(f"unknown dtype {name!r}; allowed: {', '.join(ATTENTION)} (or {', '.join(ALIASES)})")
    return full


def accumulator(name: str) -> str:
    """The dtype of partial results: float64 for float64 inputs, else float32."""
    return "float64" if name == "float64" else "float32"


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype called `name`."""
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)
