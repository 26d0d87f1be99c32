"""Float64 all the way: transformers rounds norms, positions and eager softmax to float32, whatever the weights are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor


@contextmanager
def real_float64() -> Iterator[None]:
    """Let a float64 tensor stay one when a model asks for float32 to be exact.

    Where two layouts sum the same gradients in another order, such a rounding in between costs all digits but seven.
    """
    to, to_float, softmax = Tensor.to, Tensor.float, torch.nn.functional.softmax

    def stays(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asks = torch.float32 in args or kwargs.get("dtype") == torch.float32
        return tensor if asks and tensor.dtype == torch.float64 else to(tensor, *args, **kwargs)

    def stays_float(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        narrow = tensor.is_floating_point() and tensor.dtype != torch.float64
        return to_float(tensor, *args, **kwargs) if narrow else tensor.double()

    def exact_softmax(tensor: Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        return softmax(tensor, *args, dtype=None if tensor.dtype == torch.float64 else dtype, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "to", stays)
        patch.setattr(Tensor, "float", stays_float)
        patch.setattr(torch.nn.functional, "softmax", exact_softmax)
        yield
