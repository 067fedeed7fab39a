"""CUDA graphs for a function that is called with the same shapes over and over.

A small span at batch 1 is bound by the launches of its kernels; a graph launches them all at once.
The first call with some shapes runs as it is, the second is recorded, and from then on replayed.
What the function reads beside its inputs (weights, the cache) must stay where it is. Off CUDA, and
while something counts operations, which a replay would hide, calls pass through.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ["Graphs"]


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor


@dataclass
class Graphs:
    """Recordings of one function, one for each combination of shapes.

    An output is the recording's own memory, valid until the next call.
    """

    recordings: dict[tuple[torch.Size, ...], _Recording | None] = field(default_factory=dict)

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if not inputs[0].is_cuda or _get_current_dispatch_mode() is not None:
            return function(*inputs)
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self.recordings:
            self.recordings[shapes] = None
            return function(*inputs)
        recording = self.recordings[shapes]
        if recording is None:
            kept = [tensor.clone() for tensor in inputs]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = function(*kept)
            recording = self.recordings[shapes] = _Recording(graph, kept, output)
        for kept_input, tensor in zip(recording.inputs, inputs, strict=True):
            kept_input.copy_(tensor)
        recording.graph.replay()
        return recording.output
