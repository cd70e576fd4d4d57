"""Moving tensors to the device that computes, without the host waiting for them to arrive."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["to_device"]


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor there. To a GPU it goes through pinned memory, and the host does not wait."""
    if torch.device(device).type != "cuda" or tensor.is_cuda or tensor.requires_grad:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
