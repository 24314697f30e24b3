"""The processes that train together: data-parallel over tasks, gradients summed.

The loss is divided by counts over all processes, so the sum of their gradients is that of one process on the whole
batch, however unevenly the tasks fall. Every process reaches every collective, also one without any task or example.
`torchrun --nproc_per_node=N` or `accelerate launch` starts them; without it there is one.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

T = TypeVar("T")


class Processes:
    """One process among its peers."""

    def __init__(self) -> None:
        # Without being told so, accelerate takes several processes on a machine without a GPU for single ones.
        state = PartialState(cpu=not torch.cuda.is_available())
        self.rank: int = state.process_index
        self.size: int = state.num_processes
        self.wait = state.wait_for_everyone

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """The share of this process in items that all processes hold."""
        return list(items[self.rank :: self.size])

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, process by process."""
        if self.size == 1:
            return items
        gathered: list[T] = gather_object(items)
        return gathered

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Each value summed over the processes."""
        everyone: list[Any] = self.gather([values])
        return {key: sum(part[key] for part in everyone) for key in values}

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its sum over the processes; one message for all of them."""
        if self.size == 1:
            return
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        torch.distributed.all_reduce(flat)
        start = 0
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.copy_(flat[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()
