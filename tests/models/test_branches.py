"""Messages that share a beginning, in one row, against each message alone in full under transformers' own attention."""

import random
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from latentmem.models.adapters import Adapter
from latentmem.models.assets import quiet_loading
from latentmem.models.branches import Branched, grow_rows
from latentmem.models.language_model import LanguageModel

LARGE = 10**6
GROUP = [([1, 2, 3, 4, 5], [7, 8]), ([1, 2, 3, 4, 5], [9]), ([1, 2, 3, 6], [7, 7, 7])]


def test_rows_by_hand() -> None:
    assert grow_rows([GROUP[0]], LARGE) == [Branched((0,), 4, 6)]
    # The trunk is 1 2 3 4: prompts that are equal end in a token of their own, from which the response is predicted.
    assert grow_rows(GROUP[:2], LARGE) == [Branched((0, 1), 4, 4 + 2 + 1)]
    # With the third it is 1 2 3: 3 + (4 5 7) + (4 5) + (6 7 7).
    assert grow_rows(GROUP, LARGE) == [Branched((0, 1, 2), 3, 3 + 3 + 2 + 3)]
    assert grow_rows(GROUP, 10) == [Branched((0, 1), 4, 7), Branched((2,), 3, 6)]
    assert grow_rows(GROUP, 1) == [Branched((0,), 4, 6), Branched((1,), 4, 5), Branched((2,), 3, 6)]
    assert grow_rows([], LARGE) == []
    # Neighbours that share nothing but one token, which is the fewest that pays.
    assert [row.messages for row in grow_rows([([4, 5], [1]), ([6, 5], [1]), ([6, 7], [1])], LARGE)] == [(0,), (1, 2)]


def test_no_row_costs_more_than_its_messages_apart_nor_joins_tasks_that_share_little() -> None:
    system = list(range(100, 120))
    tasks = [[*system, *[200 + t] * 50] for t in range(3)]
    messages = [(task, [7] * 10) for task in tasks for _ in range(4)]
    assert [row.messages for row in grow_rows(messages, LARGE)] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    # Attention to columns that a mask hides is not free: a long row ends before it would cost more than another.
    long = [([5] * 200, [7] * 100) for _ in range(60)]
    assert 1 < len(grow_rows(long, LARGE)) < 60


def messages_of(seed: int, count: int) -> list[tuple[list[int], list[int]]]:
    """Some beginnings, each continued in several ways; responses of 1 to 6 tokens."""
    generator = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [generator.randrange(3, 290) for _ in range(generator.randint(low, high))]

    beginnings = [tokens(1, 12) for _ in range(3)]
    return [(generator.choice(beginnings) + tokens(0, 4), tokens(1, 6)) for _ in range(count)]


def columns_of(row: Branched, messages: list[tuple[list[int], list[int]]]) -> int:
    """Different nodes of the tree, but for branches that happen to go on alike."""
    return row.trunk + sum(len(messages[i][0]) - row.trunk + len(messages[i][1]) - 1 for i in row.messages)


@pytest.mark.parametrize("limit", [LARGE, 60, 25, 1])
def test_every_message_has_one_place_behind_a_trunk_that_is_its_own_beginning(limit: int) -> None:
    for seed in range(20):
        messages = messages_of(seed, 12)
        rows = grow_rows(messages, limit)
        assert sorted(i for row in rows for i in row.messages) == list(range(12))
        for row in rows:
            assert row.columns == columns_of(row, messages)
            assert row.columns <= limit or len(row.messages) == 1
            trunk = messages[row.messages[0]][0][: row.trunk]
            for i in row.messages:
                assert messages[i][0][: row.trunk] == trunk
                assert len(messages[i][0]) > row.trunk
        alone = sum(len(prompt) + len(response) - 1 for prompt, response in messages)
        assert sum(row.columns for row in rows) <= alone


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def adapted(folder: Path) -> tuple[LanguageModel, Adapter]:
    model = LanguageModel.from_pretrained(str(folder), "cpu")
    model.model.double()
    torch.manual_seed(3)
    adapter = model.adapters.add(rank=2, alpha=4.0, target_modules=TARGETS, key="x")
    with torch.no_grad():
        for matrix in adapter.matrices.values():
            matrix += 0.05 * torch.randn(matrix.shape)
    return model, adapter


def plain(
    folder: Path, matrices: dict[str, torch.nn.Parameter]
) -> tuple[PreTrainedModel, dict[str, torch.nn.Parameter]]:
    """The same by transformers and peft alone: their attention, their norms and gates."""
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa").eval()
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4.0, target_modules=TARGETS), model, adapter_name="agents")
    found = {p.replace(".agents.", "."): matrix for p, matrix in model.named_parameters() if ".agents." in p}
    assert found.keys() == matrices.keys()
    for path, matrix in found.items():
        matrix.data = matrices[path].data.clone()
    return model, found


@pytest.mark.parametrize("folder", ["tiny_model_dir", "other_model_dir"])
@pytest.mark.parametrize("limit", [LARGE, 40])
def test_logps_and_gradients_equal_those_of_each_message_alone(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, folder: str, limit: int
) -> None:
    path = request.getfixturevalue(folder)
    model, adapter = adapted(path)
    for kind in (LlamaRMSNorm, Qwen3RMSNorm):  # theirs compute in float32 whatever the model's type
        monkeypatch.setattr(
            kind, "forward", lambda m, x: m.weight * x / (x.square().mean(-1, True) + m.variance_epsilon).sqrt()
        )
    net, theirs = plain(path, adapter.matrices)
    messages = messages_of(1, 10)
    rows = grow_rows(messages, limit)
    assert any(len(row.messages) > 1 for row in rows)
    with model.as_agent(adapter.name) as agent:
        logps, mask = agent.branch_logps(rows, messages, 0.7)
    order = [i for row in rows for i in row.messages]
    weights = [1 + i % 4 for i in range(10)]

    def alone(i: int) -> Tensor:
        prompt, response = messages[i]
        logits = net(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] / 0.7
        return logits.log_softmax(1).gather(1, torch.tensor(response)[:, None])[:, 0]

    for k, i in enumerate(order):
        assert mask[k].sum() == len(messages[i][1])
        assert torch.allclose(logps[k, mask[k]], alone(i), rtol=0, atol=1e-11)
        assert (logps[k, ~mask[k]] == 0).all()
    sum(weights[i] * logps[k].square().sum() for k, i in enumerate(order)).backward()
    sum(weights[i] * alone(i).square().sum() for i in range(10)).backward()
    for path, matrix in adapter.matrices.items():
        wanted = theirs[path].grad
        assert float((matrix.grad - wanted).norm() / wanted.norm()) < 1e-10, path
