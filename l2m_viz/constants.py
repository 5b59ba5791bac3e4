"""Small constants on a device.

Each copy of a few numbers from the host has it wait until a GPU has done all that it was given before: a network that
makes five such copies a step leaves the GPU idle five times. So they are made once for each device.
"""

from functools import lru_cache

import torch
from torch import Tensor

from l2m_viz.parallel import is_traced


def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers as a tensor (n,), which nobody may change.

    >>> constant((0.5, 2.0), torch.device("cpu"))
    tensor([0.5000, 2.0000])
    """
    if device.type == "cpu" or is_traced():  # no wait, and export wants to see numbers as numbers
        return torch.tensor(values, dtype=dtype)
    return _on_device(values, device, dtype)


@lru_cache(maxsize=512)
def _on_device(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # a user's inference mode must not reach those who need gradients later
        return torch.tensor(values, device=device, dtype=dtype)
