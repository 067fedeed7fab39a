"""Fully sharded training: every process holds a part of the weights, their average and the moments.

The blocks of a network and then the whole are sharded by torch's `fully_shard` (FSDP2; Zhao et al.
2023). The weights of a block are gathered for the time that it computes. Checkpoints are whole and
the same as without sharding, so that a training goes on with any number of processes.
"""

import copy
from typing import Any, TypeVar

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

__all__ = ["FullySharded", "is_sharded", "load_whole_state", "shard", "whole", "whole_state"]

M = TypeVar("M", bound=nn.Module)


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with all processes sharing the weights."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a module in place: each member of its lists, such as the blocks, and then the rest."""
    for part in [m for m in module.modules() if isinstance(m, nn.ModuleList)]:
        for block in part:
            fully_shard(block, mesh=mesh)
    # By default the whole keeps its gathered weights until the backward pass, which a validation
    # does not have; the average could not be exchanged with them then.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def is_sharded(module: nn.Module) -> bool:
    """Whether a module is sharded as a whole."""
    return isinstance(module, FSDPModule)


def whole_state(module: nn.Module) -> dict[str, Any]:
    """The state of a sharded module on the CPU, in the main process; all must ask for it."""
    return get_model_state_dict(
        module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def load_whole_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Load a whole state, which all processes have, into a sharded module."""
    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True))


def whole(module: M, plain: M) -> M | None:
    """A copy of `plain` with the weights of a sharded module, in the main process."""
    state = whole_state(module)
    if not state:
        return None
    copied = copy.deepcopy(plain)
    copied.load_state_dict(state)
    device = next(module.parameters()).device
    return copied.to(device)
