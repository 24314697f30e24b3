"""What a GPU has to compute as the CPU does. Each test runs on the CPU too, which shows that the test is right."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from golden_set import LARGE, Golden, our_name, plain_logps, relative_gap
from latentmem.config import Sampling
from latentmem.memory.composer import Composer
from latentmem.models.agent import Prompt
from latentmem.models.decoding import pick
from latentmem.models.language_model import LanguageModel
from latentmem.models.plain import PlainReader
from latentmem.models.prefix import pad
from latentmem.training.losses import group_advantages, lmpo_loss
from latentmem.training.scoring import accumulate

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Products of float32 are of float32: on some GPUs they may be of TF32, which has 10 bits of fraction."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Raise where the processor would wait for a GPU."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_golden_latents_and_log_probs(device: str, shared_dir: Path) -> None:
    golden = Golden(shared_dir, control_tokens=True, device=device)
    numbers, logps = golden.numbers("composer"), golden.numbers("logps")
    with torch.no_grad():
        latents = golden.composer.compose([case["prompt"] for case in golden.json("composer")]).cpu()
    for i in range(7):
        assert relative_gap(latents[i], numbers[f"latents_{i}"]) < 1e-5
    for i, found in enumerate(golden.logps(golden.examples())):
        assert relative_gap(found.cpu(), logps[f"logps_{i}"]) < 1e-5


def test_golden_gradients(device: str, shared_dir: Path) -> None:
    golden = Golden(shared_dir, control_tokens=True, device=device)
    numbers, examples = golden.numbers("lmpo"), golden.lmpo_examples()[0]
    advantages = group_advantages(numbers["rewards"].view(2, 4)).flatten().to(device)

    def loss_of(rows: list[int], logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        kinds = {"loss_type": "bnpo", "epsilon_low": float(numbers["epsilon"][0])}
        sizes = {"epsilon_high": float(numbers["epsilon"][1]), "num_messages": len(examples)}
        limits = {"max_response_tokens": int(numbers["max_completion_length"])}
        tokens = sum(len(example.token_ids) for example in examples)
        every = {**kinds, **sizes, **limits, "num_tokens": tokens}
        return lmpo_loss(logps, logps.detach(), advantages[rows], mask, **every)[0]

    accumulate(golden.composer, golden.model, examples, loss_of, LARGE)
    found = golden.take_gradients()
    expected = {n.removeprefix("grad_agent0/"): g for n, g in numbers.items() if n.startswith("grad_agent0/")}
    assert found.keys() == {our_name(name) for name in expected}
    for name, gradient in expected.items():
        assert relative_gap(found[our_name(name)].cpu(), gradient) < 5e-5, name


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-4), ("bfloat16", 6e-2)])
def test_the_fast_way_the_plain_way_and_a_pass_of_its_own_agree(
    device: str, dtype: str, most: float, other_model_dir: Path
) -> None:
    model = LanguageModel.from_pretrained(str(other_model_dir), device, dtype)
    assert model._reader.is_fast
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 300, (n,), generator=random).tolist() for n in (9, 14, 14)]
    responses = [torch.randint(3, 300, (n,), generator=random).tolist() for n in (6, 3, 5)]
    latents = (torch.randn(3, 4, model.width, generator=random) * 0.2).to(device)
    ids, mask = pad(responses, model.device)
    given = [latents.clone().requires_grad_() for _ in range(2)]
    with model.as_agent() as fast:
        found = fast.response_logps(fast.prefill(prompts, ["a", "b", "b"], 12), given[0], ids, mask, 1.0)
        plain = PlainReader(model.model)
        other = plain.response_logps(plain.prefill(prompts, ["a", "b", "b"], 12), given[1], ids, mask, 1.0)
    exact = copy.deepcopy(model.model).float().cpu()
    for row in range(3):
        alone = plain_logps(exact, prompts[row], latents[row].cpu(), responses[row])
        for way in (found, other):
            gap = (way[row][mask[row]].detach().cpu() - alone).abs().max()
            assert gap < most * alone.abs().max()
    found.sum().backward()
    other.sum().backward()
    assert relative_gap(given[0].grad.cpu(), given[1].grad.cpu()) < (1e-4 if dtype == "float32" else 1e-1)


def test_greedy_responses_are_those_of_whole_passes(device: str, other_model_dir: Path) -> None:
    model = LanguageModel.from_pretrained(str(other_model_dir), device, "float32")
    composer = Composer(model, num_latents=4, rank=2)
    with torch.no_grad():
        latents = composer.compose(["What is 12 + 7?", "Plan the steps."])
    prompts = [Prompt(f"r{i}", "Solve it.", f"{i} + 7", f"g{i}", i, latents=latents[i]) for i in range(2)]
    model.eos_ids = frozenset()
    sampled = model.respond(prompts, Sampling(temperature=0.0, max_response_tokens=9))
    plain = LanguageModel.from_pretrained(str(other_model_dir), "cpu", "float32").model
    for prompt, said, row in zip(prompts, sampled, latents.cpu(), strict=True):
        ids = model.encode_prompt(prompt.system, prompt.user)
        logps = plain_logps(plain, ids, row, list(said.token_ids))
        assert torch.tensor(said.logps) == pytest.approx(logps, abs=1e-3)
        embed = plain.get_input_embeddings()
        with torch.no_grad():
            before = torch.cat([embed(torch.tensor(ids)), row, embed(torch.tensor(said.token_ids[:-1]))])
            best = plain(inputs_embeds=before[None]).logits[0, -9:].log_softmax(-1).max(1).values
        assert torch.allclose(best, logps, atol=1e-3)  # each token is the likeliest, or as likely


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), Sampling(temperature=0.7, top_p=0.9, top_k=20)])
def test_steps_of_decoding_do_not_wait_for_the_gpu(device: str, sampling: Sampling, other_model_dir: Path) -> None:
    model = LanguageModel.from_pretrained(str(other_model_dir), device)
    embed = model.model.get_input_embeddings()
    draws = torch.full((2,), 0.5, dtype=torch.float64, device=device)
    new = torch.ones(2, 1, dtype=torch.bool, device=device)
    chosen = []
    with torch.no_grad(), model.as_agent() as agent:
        prefix = agent.prefill([[5, 6, 7], [8, 9, 10, 11]], ["a", "b"], 8)
        prefix.extend(model.model, embed(torch.tensor([[7], [7]], device=device)), new)  # whatever happens only once
        with no_waiting(device):
            for _ in range(3):
                token, _ = pick(prefix.logits(model.model), draws, sampling)
                prefix.extend(model.model, embed(token[:, None]), new)
                chosen.append(token)
    assert torch.stack(chosen).shape == (3, 2)
