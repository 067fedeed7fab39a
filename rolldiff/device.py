"""Devices, number types and compilation, by the names that configurations use."""

import torch
from torch import nn

from rolldiff.errors import FLOATS, UsageError, shown

__all__ = ["compile_in_place", "named_device", "named_dtype"]


def named_device(name: str | None) -> torch.device:
    """A device by its name; None selects a GPU if one is available.

    Raises:
        UsageError: if torch does not know the name, or there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name if isinstance(name, str) else "")
        if device.type != "meta":
            torch.empty(0, device=device)
            return device
    except Exception as error:  # backends that are not there raise whatever they like
        raise UsageError(
            "device must be a device of torch that is available here, such as cpu, got "
            f"{shown(name)}"
        ) from error
    raise UsageError(f"device must be a device that holds numbers, such as cpu, got {shown(name)}")


def named_dtype(name: str | None) -> torch.dtype | None:
    """The type that the network computes in, by its name in torch; None leaves the choice.

    Raises:
        UsageError: if torch has no such floating-point type.
    """
    if name is None:
        return None
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if dtype not in FLOATS:
        raise UsageError(f"dtype must be float32, bfloat16 or float16, got {shown(name)}")
    return dtype


def compile_in_place(model: nn.Module) -> None:
    """Compile a model, with room for all the shapes that a command meets.

    Blocks share their compiled versions: with and without gradients, with a cache, and for several
    spans. Above torch's limit of 8 versions, blocks would silently run uncompiled.
    """
    torch._dynamo.config.recompile_limit = 64
    model.compile()
