"""A frozen backbone spread over processes that were launched together: each keeps a part of every decoder layer.

torch's `fully_shard` gathers a layer while it is at work and drops it again. So each pass through the model needs all
processes, although they have different amounts of work. Hence they agree on every pass. Each process asks for its next
pass by a number, or says by the highest number that it waits for an exchange. The lowest number wins: the processes
that asked for it make their pass; the others only send their parts of the layers, in the same order, and ask again.
Trained weights, the embeddings and the final norm are whole in each process.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from latentmem.errors import ModelError

PATIENCE = timedelta(days=7)
"""How long a process waits for another. The launcher notices a dead process; a slow one, on long tasks, is no error."""
_NONE = 2**31


class _Meeting:
    """The exchange of numbers by which processes agree on the next pass."""

    def __init__(self) -> None:
        # The numbers stay on the CPU, even where the layers are gathered on GPUs.
        self.group = distributed.new_group(backend="gloo", timeout=PATIENCE)
        self.passes: list[list[Any]] = []
        """The layers of each kind of pass in order: forward and backward of the first model, then of the next."""
        self.seen: set[int] = set()
        """Kinds of pass that this process has made since the last exchange."""

    def add(self, model: PreTrainedModel, layers: Sequence[Any]) -> None:
        """Make the model agree with the other processes before each of its passes. No graph may hold two passes."""
        forward, backward = len(self.passes), len(self.passes) + 1
        self.passes += [list(layers), list(layers)[::-1]]

        def announce_backward(module: Any, args: Any, output: Any) -> None:
            if output.last_hidden_state.requires_grad:
                output.last_hidden_state.register_hook(lambda gradient: self.agree(backward))

        model.base_model.register_forward_pre_hook(lambda module, args: self.agree(forward))
        model.base_model.register_forward_hook(announce_backward)

    def agree(self, wish: int) -> None:
        """Return when the wished pass is next; until then, help the other processes with theirs."""
        while True:
            chosen = torch.tensor(wish)
            distributed.all_reduce(chosen, distributed.ReduceOp.MIN, self.group)
            if int(chosen) == wish:
                break
            for layer in self.passes[int(chosen)]:
                layer.unshard()
                layer.reshard()
        self.seen.add(wish)

    def end(self) -> None:
        """Return when no process asks for another pass."""
        self.agree(_NONE)
        for kind in self.seen - {_NONE}:
            for layer in self.passes[kind]:
                layer.reset_iter_state()  # else torch records every pass until a backward pass, which may be far off
        self.seen.clear()


_meeting: _Meeting | None = None


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """Move a frozen model to a device; of each decoder layer, move only the part of this process.

    All processes call this alike. From then on, they call `end_passes` before anything else that they do together.
    Layers come to the device one by one, so it never holds the whole model.

    Raises:
        ModelError: the model has no list of decoder layers named `layers`, as Llama, Mistral and Qwen have.
    """
    global _meeting
    layers = getattr(model.base_model, "layers", None)
    if layers is None:
        raise ModelError(
            f"{type(model).__name__} cannot be spread over processes by FSDP: it has no list of decoder layers named "
            "`layers`, as Llama, Mistral and Qwen have; launch with --multi_gpu instead"
        )
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        _meeting = _meeting or _Meeting()
        _meeting.add(model, layers)
    model.to(device)


def end_passes() -> None:
    """Return when no process asks for a pass through a sharded model; call it before other common work."""
    if _meeting is not None:
        _meeting.end()
