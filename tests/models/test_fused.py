"""Each operation against the module it replaces, by loops and finite differences; only what is equal is replaced."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from latentmem.models import fused
from latentmem.models.assets import quiet_loading
from latentmem.models.fused import fuse, token_logps
from latentmem.models.language_model import LanguageModel

B, T, D, V = 2, 5, 8, 192


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval().requires_grad_(False)


def angles(rows: int) -> Tensor:
    """[rows, D]; both halves of a head turn by the same angles."""
    return randn(rows, D // 2, seed=3).repeat(1, 2)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: fused.normed(x, randn(D, seed=1), 1e-3),
        lambda x: fused.gated(x, randn(B, T, D, seed=2)),
        lambda x: fused.gated(randn(B, T, D, seed=2), x),
        lambda x: fused.rotated(x, angles(T).cos(), angles(T).sin()),
        lambda x: token_logps(randn(V, D), randn(V, seed=6), x.reshape(-1, D), torch.arange(B * T) * 7, 0.7),
    ],
    ids=["norm", "gate", "up", "rotation", "logps"],
)
def test_derivatives_are_those_of_finite_differences(function: Callable[[Tensor], Tensor]) -> None:
    assert torch.autograd.gradcheck(function, randn(B, T, D).requires_grad_())


def test_norm_gate_and_rotation_by_loops() -> None:
    x, y, weight = randn(3, 4), randn(3, 4, seed=1), randn(4, seed=2)
    normed, gated = fused.normed(x, weight, 0.1), fused.gated(x, y)
    turns = randn(3, 2, seed=3)
    turned = fused.rotated(x, turns.cos().repeat(1, 2), turns.sin().repeat(1, 2))
    for t in range(3):
        rms = (sum(float(v) ** 2 for v in x[t]) / 4 + 0.1) ** 0.5
        for i in range(4):
            a = float(x[t, i])
            assert normed[t, i].item() == pytest.approx(a / rms * float(weight[i]))
            assert gated[t, i].item() == pytest.approx(a / (1 + float((-x[t, i]).exp())) * float(y[t, i]))
        for i in range(2):
            pair = torch.complex(x[t, i], x[t, i + 2]) * torch.polar(torch.tensor(1.0).double(), turns[t, i])
            assert [turned[t, i].item(), turned[t, i + 2].item()] == pytest.approx([pair.real.item(), pair.imag.item()])


@pytest.mark.parametrize("folder", ["tiny_model_dir", "other_model_dir"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_model_computes_what_it_did(folder: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(folder)
    model, plain = load(path, dtype), load(path, dtype)
    layers = model.config.num_hidden_layers
    norms_in_attention = 2 if folder == "other_model_dir" else 0  # Qwen3 normalises queries and keys
    wanted = layers * (4 + 7 + norms_in_attention) + 2
    assert fuse(model) == wanted, "two norms, MLP, rotation and seven products a layer, a last norm and a last product"
    embeddings = randn(B, T, model.config.hidden_size, dtype=dtype) * 0.2
    results = []
    for each in (model, plain):
        x = embeddings.clone().requires_grad_()
        logits = each(inputs_embeds=x).logits.float()
        (gradient,) = torch.autograd.grad((logits * randn(*logits.shape, seed=1, dtype=torch.float32)).sum(), x)
        results.append((logits.detach(), gradient))
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for found, wanted in zip(*results, strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < tolerance


def test_a_double_model_is_double_throughout(tiny_model_dir: Path) -> None:
    """transformers computes norms in float32 there, which would show as 1e-7."""
    model = load(tiny_model_dir, torch.float64)
    fuse(model)
    x = randn(1, 3, 32)
    norm = model.base_model.norm
    wanted = x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight
    assert_close(norm(x), wanted, atol=1e-14, rtol=1e-14)


def test_modules_that_compute_something_else_stay_as_they_are() -> None:
    class PlusOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.randn(4)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return (1 + self.weight) * x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    class Gelu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
            self.act_fn = nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    model = nn.Sequential(PlusOne(), Gelu()).requires_grad_(False).double()
    x = randn(3, 4)
    before = model(x)
    assert fuse(model) == 3, "the three products, which in float64 are the same to the last bit"
    assert torch.equal(model(x), before)


def test_other_models_of_the_process_keep_their_own_functions(tiny_model_dir: Path) -> None:
    from transformers.models.llama import modeling_llama

    theirs = modeling_llama.apply_rotary_pos_emb
    fuse(load(tiny_model_dir))
    assert modeling_llama.apply_rotary_pos_emb is theirs
    assert "forward" not in vars(load(tiny_model_dir).base_model.norm)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 2, 7), (0, 7)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_and_their_gradients_by_loops(shape: tuple[int, ...], with_bias: bool, dtype: torch.dtype) -> None:
    weight, bias = randn(5, 7, dtype=dtype), randn(5, seed=2, dtype=dtype) if with_bias else None
    x = randn(*shape, seed=1, dtype=dtype).requires_grad_()
    found = fused.product(x, weight, bias)
    upstream = randn(*shape[:-1], 5, seed=3, dtype=dtype)
    (gradient,) = torch.autograd.grad((found * upstream).sum(), x)
    assert found.shape == upstream.shape
    rows = zip(
        x.detach().reshape(-1, 7), found.reshape(-1, 5), gradient.reshape(-1, 7), upstream.reshape(-1, 5), strict=True
    )
    for row, out, back, up in rows:
        for i in range(5):
            wanted = sum(float(row[j]) * float(weight[i, j]) for j in range(7)) + (float(bias[i]) if with_bias else 0)
            assert out[i].item() == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        for j in range(7):
            wanted = sum(float(up[i]) * float(weight[i, j]) for i in range(5))
            assert back[j].item() == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    with torch.no_grad():
        assert torch.equal(fused.product(x, weight, bias), found)


def test_a_product_with_a_weight_that_is_trained_has_its_gradient_too() -> None:
    weight, x = randn(5, 7, dtype=torch.float32).requires_grad_(), randn(3, 7, seed=1, dtype=torch.float32)
    (gradient,) = torch.autograd.grad(fused.product(x, weight).sum(), weight)
    assert_close(gradient, x.sum(0).expand(5, 7))


@pytest.mark.parametrize("at_once", [1, 3 * V, 2**22])
@pytest.mark.parametrize("with_bias", [False, True])
def test_token_logps_and_their_gradient_by_loops(
    at_once: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_LOGITS_AT_ONCE", at_once)
    weight, ids = randn(V, D), torch.tensor([0, V - 1, 17, 17, 3, 100, 42])
    bias = randn(V, seed=2) if with_bias else None
    hidden, upstream = randn(7, D, seed=1).requires_grad_(), randn(7, seed=3)
    found = token_logps(weight, bias, hidden, ids, temperature=0.7)
    (gradient,) = torch.autograd.grad((found * upstream).sum(), hidden)
    for i in range(7):
        scores = [
            (float(w @ hidden[i].detach()) + (float(bias[v]) if with_bias else 0)) / 0.7 for v, w in enumerate(weight)
        ]
        total = sum(torch.tensor(scores, dtype=torch.float64).exp()).item()
        assert found[i].item() == pytest.approx(scores[ids[i]] - torch.tensor(total).log().item(), rel=1e-6)
        mean = sum(torch.tensor(s, dtype=torch.float64).exp() / total * w for s, w in zip(scores, weight, strict=True))
        assert_close(gradient[i], (weight[ids[i]] - mean) / 0.7 * upstream[i])


def test_token_logps_are_float32_for_a_model_of_bfloat16() -> None:
    weight, hidden = randn(V, D, dtype=torch.bfloat16), randn(3, D, dtype=torch.bfloat16).requires_grad_()
    found = token_logps(weight, None, hidden, torch.arange(3), 1.0)
    assert found.dtype == torch.float32
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    assert gradient.dtype == torch.bfloat16


def test_without_gradients_nothing_is_kept() -> None:
    hidden = randn(3, D)
    assert token_logps(randn(V, D), None, hidden, torch.arange(3), 1.0).grad_fn is None


def replaced(model: LanguageModel) -> int:
    return sum("forward" in vars(module) for module in model.model.modules())


def test_modules_are_replaced_where_that_was_measured_to_pay_and_nowhere_else(tiny_model_dir: Path) -> None:
    load = LanguageModel.from_pretrained
    assert replaced(load(str(tiny_model_dir), "cpu", "float32")) > 10
    assert replaced(load(str(tiny_model_dir), "cpu", "float32", fused="never")) == 0
    assert replaced(load(str(tiny_model_dir), "cpu", "bfloat16")) == 0
    assert [fused.pays(torch.device(kind), torch.float32) for kind in ("cpu", "cuda", "mps")] == [True, False, False]


def test_loading_a_model_draws_no_number_that_others_would_draw(tiny_model_dir: Path) -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    LanguageModel.from_pretrained(str(tiny_model_dir), "cpu", "float32")
    assert torch.equal(torch.randn(3), expected)
