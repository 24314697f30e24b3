"""The processes that were launched together: they share work, gather results and sum gradients.

All their communication passes through one exchange, which every process reaches, even one that has no task or example.
A process that meets a user's mistake goes there too, so that the others end with it instead of waiting for it.
`torchrun --nproc_per_node=N` or `accelerate launch` starts them; without it there is one.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed import DistError

from latentmem.errors import ConfigError, LatentMemError, RunError
from latentmem.models.sharding import PATIENCE, end_passes
from latentmem.pulse import GONE, watch_others

T = TypeVar("T")
R = TypeVar("R")

Sharding = Literal["none", "fsdp"]
_HONOURED = {
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""Variables through which accelerate's launcher passes FSDP settings, each with the only value supported here."""

_SILENT_SECONDS = 3.0
"""How long the other processes wait before they exit after a mistake. A launcher kills all processes once the first
one ends, and the one with the error message should end first."""


@dataclass(frozen=True)
class _Mistake:
    """What a process brings to an exchange when it cannot go on."""


def sharding_asked() -> Sharding:
    """Return what `accelerate launch` was told to spread over the processes.

    Raises:
        ConfigError: DeepSpeed was asked for, or FSDP settings that would have no effect here.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise ConfigError(
            "accelerate was launched with DeepSpeed, which is not used here: what is trained is small; launch with "
            "--multi_gpu, or with the packaged configs/accelerate/fsdp.yaml for a model that does not fit one GPU "
            "(docs/training.md, FSDP)"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return "none"
    for key, honoured in _HONOURED.items():
        if (found := os.environ.get(key, honoured)).lower() != honoured.lower():
            raise ConfigError(
                f"accelerate was launched with FSDP and {key}={found}; here it works with {honoured} only: take the "
                "packaged configs/accelerate/fsdp.yaml (docs/training.md, FSDP)"
            )
    return "fsdp"


_watch_once = cache(watch_others)


def _is_lost(error: Exception) -> bool:
    """Return whether an error says that another process no longer answers."""
    return isinstance(error, DistError) or "gloo/transport" in str(error)


class Processes:
    """One process among its peers."""

    def __init__(self) -> None:
        # Unless told so, accelerate treats several processes on a machine without a GPU as independent ones.
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        self.rank: int = state.process_index
        self.size: int = state.num_processes
        if self.size > 1:
            _watch_once(self.rank, self.size)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """Return this process's share of items that all processes hold."""
        return list(items[self.rank :: self.size])

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Apply `work` to each item, each in one process; return all results to all processes, in the items' order."""
        shares = self._exchange([work(item) for item in self.shard(items)])
        return [shares[i % self.size][i // self.size] for i in range(len(items))]

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` in the first process only, and return its result in all processes."""
        made: T = self._exchange(make() if self.is_first else None)[0]
        return made

    def gather(self, items: list[T]) -> list[T]:
        """Return the items of all processes, process by process."""
        return [item for part in self._exchange(items) for item in part]

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Sum each value over the processes."""
        everyone = self._exchange(values)
        return {key: sum(part[key] for part in everyone) for key in values}

    def wait(self) -> None:
        """Wait until all processes have come here."""
        self._exchange(None)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its sum over the processes, in a single message."""
        if self.size == 1:
            return
        end_passes()
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

    @contextmanager
    def one_fate(self) -> Iterator[None]:
        """End all processes when one of them meets a user's mistake in this block, and report the mistake once.

        The process that met it raises it; if several did, the first of them. The others exit with status 2 at their
        next exchange, at the latest at the end of the block, where all processes meet. These blocks must not be nested.

        Raises:
            RunError: another process was killed, or its host is gone.
        """
        try:
            try:
                yield
                self.wait()
            except LatentMemError:
                self._exchange(_Mistake())
                raise
        except RuntimeError as error:
            if not _is_lost(error):
                raise
            time.sleep(_SILENT_SECONDS)  # a launcher on the same machine tells more: which one died, and of what
            raise RunError(
                f"another process of this command has died; its own output may say why. Then {GONE}"
            ) from None

    def _exchange(self, part: Any) -> list[Any]:
        """Return what each process brought, by rank."""
        if self.size == 1:
            return [part]
        end_passes()
        parts: list[Any] = self._gather(part)
        mistaken = [rank for rank, part in enumerate(parts) if isinstance(part, _Mistake)]
        if mistaken and mistaken[0] != self.rank:
            time.sleep(_SILENT_SECONDS)
            raise SystemExit(2)
        return parts

    def _gather(self, part: Any) -> list[Any]:
        parts: list[Any] = gather_object([part])
        return parts
