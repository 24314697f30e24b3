"""Fused versions of a frozen backbone's small operations: few passes over memory, and little kept for backward.

Between two matrix products a decoder layer normalises, rotates and gates. Written as in a textbook, each of these is
five to ten operations. Each operation reads its tensors from memory, writes them back and keeps some: on a CPU that
costs as much time as the products, and most of the memory of training. Here each is one function with a hand-written
derivative; weights are frozen, so only inputs have one. The products themselves use oneDNN where torch would use MKL:
on AMD's cores these are a tenth to a third faster at the sizes here, forward and backward.

A module is replaced only if the replacement gives the same on random numbers. Any other module stays as it is, which
costs nothing but speed and memory. Nothing is replaced where no gain was measured (`model.fused`).
"""

import types
from collections.abc import Callable, Iterator
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

_LOGITS_AT_ONCE = 2**22
"""Number of logits computed at a time when only log-probabilities are wanted: 16 MiB in float32."""
_HAS_ONE_DNN = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _Product(torch.autograd.Function):
    """x W' + b by oneDNN, for a frozen W in float32 on the CPU. Keeps only W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _one_dnn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _one_dnn(grad, weight.t(), None), None, None


def _one_dnn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W' + b for x [..., d] and a frozen W [n, d], b [n] or None: [..., n], differentiable in x."""
    plain = weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.requires_grad
    if plain or not _HAS_ONE_DNN or not x.numel():
        return functional.linear(x, weight, bias)
    return _differentiable_product(x, weight, bias)


class _Norm(torch.autograd.Function):
    """RMSNorm, y = w x / rms(x). Keeps x, which the residual stream keeps anyway, and one number per position."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        kind = torch.promote_types(x.dtype, torch.float32)
        lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=kind)
        inverse = lengths.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        out: Tensor = (x * inverse).to(x.dtype).mul_(weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        # dx = inverse * (w g) - x * inverse^3 / d * <w g, x>
        scaled = (grad * weight).to(inverse.dtype)
        along = torch.linalg.vecdot(scaled, x.to(inverse.dtype))[..., None]
        along.mul_(inverse.pow(3)).div_(-x.shape[-1])
        return scaled.mul_(inverse).addcmul_(x, along).to(x.dtype), None, None


class _Gate(torch.autograd.Function):
    """silu(gate) * up. Keeps both inputs and nothing else."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out: Tensor = functional.silu(gate).mul_(up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), functional.silu(gate).mul_(grad)


class _Rotation(torch.autograd.Function):
    """Rotary positions: halves (a, b) of each head become (a cos - b sin, b cos + a sin). Keeps the angles only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None  # an orthogonal map: its transpose rotates the other way


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned


class _Forgetful:
    """A stand-in for the autograd context where nothing will be differentiated."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


def _callable(function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """Return the function as a callable that skips `apply` without gradients.

    A decoding step makes 360 such calls, and `apply` doubles the time of each.
    """

    def call(*args: object) -> Tensor:
        out: Tensor = function.apply(*args) if torch.is_grad_enabled() else function.forward(_Forgetful(), *args)  # type: ignore[no-untyped-call]
        return out

    return call


_differentiable_product = _callable(_Product)
normed: Callable[[Tensor, Tensor, float], Tensor] = _callable(_Norm)
gated: Callable[[Tensor, Tensor], Tensor] = _callable(_Gate)
rotated: Callable[[Tensor, Tensor, Tensor], Tensor] = _callable(_Rotation)


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    return normed(hidden_states, self.weight, self.variance_epsilon)


def _linear(self: Any, input: Tensor) -> Tensor:
    return product(input, self.weight, self.bias)


def _mlp(self: Any, x: Tensor) -> Tensor:
    out: Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
    return out


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _rotated_in_part(q, cos, sin), _rotated_in_part(k, cos, sin)


def _rotated_in_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate as much of each head as there are angles for; some models leave the rest of a head without position."""
    width = cos.shape[-1]
    if width == x.shape[-1]:
        return rotated(x, cos, sin)
    return torch.cat([rotated(x[..., :width], cos, sin), x[..., width:]], dim=-1)


def pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether replacing was measured to be faster: on a CPU in float32. On a GPU nothing was measured.

    It is done in float64 too, for exactness: transformers computes norms in float32 whatever the model's dtype.
    """
    return device.type == "cpu" and dtype in (torch.float32, torch.float64)


def fuse(model: PreTrainedModel) -> int:
    """Replace what can be replaced in a causal LM with frozen weights, and return the number of modules replaced.

    A module is chosen by its attributes and by what it computes on random numbers, not by its name: Llama, Mistral,
    Qwen2 and Qwen3 are covered. The random numbers come from a separate generator.
    """
    num_fused = 0
    random = torch.Generator().manual_seed(0)

    def sample(*shape: int, like: Tensor) -> Tensor:
        return torch.randn(*shape, generator=random).to(like)

    for module in model.modules():
        if hasattr(module, "variance_epsilon") and hasattr(module, "weight"):
            num_fused += _replace(module, _norm, sample(3, module.weight.shape[0], like=module.weight))
        elif {"gate_proj", "up_proj", "down_proj", "act_fn"} <= dict(module.named_children()).keys():
            weight = module.gate_proj.weight
            num_fused += _replace(module, _mlp, sample(3, weight.shape[1], like=weight))
        elif hasattr(module, "q_proj") and hasattr(module, "k_proj"):
            num_fused += _replace_rotary(module, sample)
        elif type(module) is nn.Linear:
            num_fused += _replace(module, _linear, sample(3, module.in_features, like=module.weight))
    return num_fused


def unfuse(model: PreTrainedModel) -> None:
    """Undo `fuse`."""
    for module in model.modules():
        vars(module).pop("forward", None)


def _replace(module: nn.Module, forward: Callable[..., Tensor], sample: Tensor) -> bool:
    with torch.no_grad():
        same = _close(forward(module, sample), module(sample))
    if same:
        module.forward = types.MethodType(forward, module)
    return same


def _replace_rotary(attention: Any, sample: Callable[..., Tensor]) -> bool:
    """Make this attention's `forward` call our rotation in place of transformers' own.

    `forward` looks the function up in its module; replacing it there would change it for the whole process. So we give
    this attention a copy of `forward` that looks it up elsewhere.
    """
    forward = type(attention).forward
    theirs = getattr(forward, "__globals__", {}).get("apply_rotary_pos_emb")
    if theirs is None or "apply_rotary_pos_emb" not in forward.__code__.co_names:
        return False
    where = attention.q_proj.weight
    width = attention.head_dim
    q, k = sample(2, 3, 5, width, like=where), sample(2, 1, 5, width, like=where)
    for turned in (width, width // 2):  # angles for the whole head, and for a part of it
        angles = sample(2, 5, turned // 2, like=where).repeat(1, 1, 2)
        try:
            wanted = theirs(q, k, angles.cos(), angles.sin())
        except Exception:  # it takes none for a part of a head, or is a function of another kind
            if turned == width:
                return False
            continue
        found = _rotary(q, k, angles.cos(), angles.sin())
        if not all(_close(ours, other) for ours, other in zip(found, wanted, strict=True)):
            return False
    names = {**forward.__globals__, "apply_rotary_pos_emb": _rotary}
    copy = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    attention.forward = types.MethodType(copy, attention)
    return True


def _close(found: Tensor, wanted: Tensor) -> bool:
    tolerance = 1e-5 if found.dtype in (torch.float32, torch.float64) else 2e-2
    # Relative to the largest entry: a small entry that sums large terms is off by the rounding of those.
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


def _blocks(num_rows: int, num_tokens: int) -> Iterator[slice]:
    """Yield slices of rows whose logits are computed together, of even size: a small one costs nearly as much."""
    num_blocks = ceil(num_rows * num_tokens / _LOGITS_AT_ONCE)
    size = max(1, ceil(num_rows / max(1, num_blocks)))
    for start in range(0, num_rows, size):
        yield slice(start, start + size)


def _kind(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


class _TokenLogps(torch.autograd.Function):
    """Log-probabilities of given tokens, and their derivative in the same pass over the vocabulary.

    d log p(y) / d h = (W_y - sum over v of p_v W_v) / temperature does not depend on later operations. So it is
    computed while a block's probabilities are at hand, and the backward pass only scales it. [N, V] never exists.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float
    ) -> Tensor:
        logps = torch.empty(len(hidden), dtype=_kind(hidden), device=hidden.device)
        derivative = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in _blocks(len(hidden), len(weight)):
            logits = product(hidden[rows], weight, bias).to(logps.dtype).div_(temperature)
            logits = logits.log_softmax(1)
            logps[rows] = logits.gather(1, ids[rows, None])[:, 0]
            if derivative is not None:
                mean = product(logits.exp_().to(weight.dtype), weight.t())
                derivative[rows] = (weight[ids[rows]] - mean).div_(temperature)
        if derivative is not None:
            ctx.save_for_backward(derivative)
        return logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (derivative,) = ctx.saved_tensors
        return derivative * grad[:, None].to(derivative.dtype), None, None, None, None


def token_logps(weight: Tensor, bias: Tensor | None, hidden: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Return log_softmax((hidden @ weight' + bias) / temperature) at the given tokens, differentiable in `hidden`.

    Args:
        weight: [V, d], the output layer's, frozen.
        bias: [V], the output layer's, or None.
        hidden: [N, d], after the final norm.
        ids: [N] long.
        temperature: above 0.

    Returns:
        [N] float32 (float64 for a model of float64).
    """
    logps: Tensor = _TokenLogps.apply(hidden, weight, bias, ids, temperature)  # type: ignore[no-untyped-call]
    return logps


@torch.no_grad()
def judge_tokens(weight: Tensor, bias: Tensor | None, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each given token, and whether greedy decoding picks it; one pass over the logits.

    Args:
        weight: [V, d], the output layer's.
        bias: [V], the output layer's, or None.
        hidden: [N, d], after the final norm.
        ids: [N] long.

    Returns:
        Log-probabilities [N] at temperature 1, as `token_logps` gives them, and [N] bool.
    """
    logps = torch.empty(len(hidden), dtype=_kind(hidden), device=hidden.device)
    picked = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    for rows in _blocks(len(hidden), len(weight)):
        all_logps = product(hidden[rows], weight, bias).to(logps.dtype).log_softmax(1)
        logps[rows] = all_logps.gather(1, ids[rows, None])[:, 0]
        picked[rows] = all_logps.argmax(1) == ids[rows]
    return logps, picked
