"""What LatentMem costs, measured against the plain way of doing the same: update, peak memory, tokens per second.

Both ways run alternately in one process on equal, seeded inputs, so a machine that is busy or throttled slows both;
medians are reported. The plain update is written here, as one would first write it: each message composes its own
memory and runs its whole sequence with logits for every position. It costs the same for every message, so by default
it runs on a quarter of them and its time is multiplied by four; `--full` runs all. Gradients of both ways are compared
first, in float64, so the speed is never that of a different result; how far each is off in float32 is reported too.

    python benchmarks/cost.py [--out results.json] [--full] [--only update|memory|rollout] [--threads N]
    python benchmarks/cost.py --quick --model FOLDER      a smoke run, seconds with a tiny model

About 12 minutes on two idle cores with the embedded model.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from latentmem.memory.composer import Composer
from latentmem.models.assets import quiet_loading, resolve_model
from latentmem.models.language_model import LanguageModel, Prompt, Sampling
from latentmem.training.losses import lmpo_loss
from latentmem.training.scoring import Example, accumulate

TEMPERATURE = 0.7
BUDGET = 1024
"""`micro_batch_positions` as configured by default."""
AGREEMENT = 1e-5
"""Largest allowed difference of gradients, relative to each tensor's largest entry. Asserted with a float64 model,
which rounds less; not 1e-12, for transformers computes norms in float32 there too."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    num_tasks: int = 2
    group_size: int = 8
    prompt_tokens: int = 500
    response_tokens: int = 64
    composer_tokens: int = 500
    num_latents: int = 8
    batch: int = 32
    chat_tokens: int = 150
    new_tokens: int = 48
    rounds: int = 3


QUICK = Size(2, 2, 40, 6, 40, 3, 4, 90, 5, 1)


@dataclass(frozen=True)
class Seconds:
    """Medians. The processor's time is over all threads, and what counts where other programs run as well."""

    wall: float
    cpu: float


def median_seconds(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, Seconds]:
    """What each way takes, run in turn, each round in the opposite order of the last."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for i in range(rounds):
        for name in list(ways)[:: -1 if i % 2 else 1]:
            wall, cpu = time.perf_counter(), time.process_time()
            ways[name]()
            taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: Seconds(*(statistics.median(kind) for kind in zip(*pairs, strict=True))) for name, pairs in taken.items()
    }


def text_of(model: LanguageModel, seed: int, num_tokens: int) -> str:
    """Sums, until there are `num_tokens` of them."""
    generator = torch.Generator().manual_seed(seed)
    text = ""
    while len(model.encode(text)) < num_tokens:
        a, b = torch.randint(0, 100, (2,), generator=generator).tolist()
        text += f"The sum of {a} and {b} is {a + b}. "
    return text


# The update


def make_examples(model: LanguageModel, size: Size) -> list[Example]:
    """Messages of a team of two: assistants of a group share the whole prompt, second agents all but what they read."""
    generator = torch.Generator().manual_seed(0)
    words = int(model.model.get_input_embeddings().weight.shape[0])

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, words, (count,), generator=generator).tolist())

    examples = []
    for task in range(size.num_tasks):
        texts = [text_of(model, 10 * task + role, size.composer_tokens) for role in range(2)]
        asked, quoting, closing = ids(size.prompt_tokens), ids(size.prompt_tokens - size.response_tokens - 6), ids(6)
        for _ in range(size.group_size):
            first, second = ids(size.response_tokens), ids(size.response_tokens)
            examples.append(Example(texts[0], asked, first, TEMPERATURE))
            examples.append(Example(texts[1], (*quoting, *first, *closing), second, TEMPERATURE))
    return examples


Update = Callable[[Composer, LanguageModel, Sequence[Example], Tensor], None]


def count_tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.token_ids) for example in examples)


def plain_update(composer: Composer, model: LanguageModel, examples: Sequence[Example], advantages: Tensor) -> None:
    """Gradients of the same loss, message by message, over whole sequences."""
    num_tokens = count_tokens(examples)
    lm = model.model
    embed = lm.get_input_embeddings()
    for example, advantage in zip(examples, advantages, strict=True):
        text = embed(torch.tensor([model.encode(example.composer_text)], device=model.device))
        queries = composer.query_latents[None].to(text.dtype)
        hidden = lm.base_model(inputs_embeds=torch.cat([text, queries], dim=1)).last_hidden_state
        latents = composer.projection(hidden[:, -composer.num_latents :].to(composer.dtype)).to(text.dtype)
        prompt = embed(torch.tensor([example.prompt_ids], device=model.device))
        response_ids = torch.tensor([example.token_ids], device=model.device)
        sequence = torch.cat([prompt, latents, embed(response_ids)], dim=1)
        with model.as_agent() as agent:
            logits = agent(inputs_embeds=sequence).logits / TEMPERATURE
        logps = logits[:, -response_ids.shape[1] - 1 : -1].log_softmax(2).gather(2, response_ids[..., None])[..., 0]
        mask = torch.ones_like(response_ids, dtype=torch.bool)
        loss, _ = lmpo_loss(logps, logps.detach(), advantage[None], mask, loss_type="dapo", num_tokens=num_tokens)
        loss.backward()  # type: ignore[no-untyped-call]


def our_update(composer: Composer, model: LanguageModel, examples: Sequence[Example], advantages: Tensor) -> None:
    """Gradients by the prefix-cached, composed-once path that the trainers use."""
    num_tokens = count_tokens(examples)

    def loss_of(rows: list[int], logps: Tensor, mask: Tensor) -> Tensor:
        chosen = advantages[torch.tensor(rows)]
        return lmpo_loss(logps, logps.detach(), chosen, mask, loss_type="dapo", num_tokens=num_tokens)[0]

    accumulate(composer, model, examples, loss_of, BUDGET)


def make_composer(name: str, size: Size, dtype: str) -> tuple[Composer, LanguageModel]:
    """The same composer in either precision. A fresh adapter is zero, and half of it would have no gradient."""
    model = LanguageModel.from_pretrained(name, dtype=dtype)
    composer = Composer(model, num_latents=size.num_latents)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in composer.trainable().items():
            if key.startswith("lora."):
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.02)
    return composer, model


def gradients(
    update: Update, composer: Composer, model: LanguageModel, examples: Sequence[Example], advantages: Tensor
) -> dict[str, Tensor]:
    """What an update adds to each parameter's gradient, in float64."""
    update(composer, model, examples, advantages)
    found = {}
    for key, parameter in composer.trainable().items():
        assert parameter.grad is not None, f"{key} has no gradient"
        found[key], parameter.grad = parameter.grad.double(), None
    return found


def gap(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest entry of its tensor; the worst of all tensors."""
    return max(float((found[key] - wanted[key]).abs().max() / wanted[key].abs().max()) for key in wanted)


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The L2 norm of the difference of whole gradients, relative to that of what is wanted."""
    apart = sum(float((found[key] - wanted[key]).square().sum()) for key in wanted)
    return math.sqrt(apart / sum(float(wanted[key].square().sum()) for key in wanted))


def measure_update(name: str, size: Size, full: bool) -> dict[str, Any]:
    """The LMPO update, ours against plain."""
    composer, model = make_composer(name, size, "float32")
    examples = make_examples(model, size)
    advantages = torch.randn(len(examples), generator=torch.Generator().manual_seed(2)).to(model.device)

    # Two rollouts of the first task: each text is used twice, each prompt's beginning is shared.
    some, some_advantages = examples[:4], advantages[:4]
    ours, plain = (gradients(way, composer, model, some, some_advantages) for way in (our_update, plain_update))
    exact_composer, exact_model = make_composer(name, size, "float64")
    with torch.no_grad():
        for key, parameter in exact_composer.trainable().items():
            parameter.copy_(composer.trainable()[key])
    exact, exact_plain = (
        gradients(way, exact_composer, exact_model, some, some_advantages.double())
        for way in (our_update, plain_update)
    )
    difference = gap(exact, exact_plain)
    assert difference <= AGREEMENT, f"gradients differ by {difference:.1e} of the largest entry"

    every = 1 if full else 4
    part = [i for i in range(len(examples)) if (i // 2) % every == 0]  # whole rollouts, so both roles have their share
    few, few_advantages = [examples[i] for i in part], advantages[part]
    seconds = median_seconds(
        {
            "ours": lambda: our_update(composer, model, examples, advantages),
            "plain": lambda: plain_update(composer, model, few, few_advantages),
        },
        size.rounds,
    )
    scale = len(examples) / len(few)
    return {
        "messages": len(examples),
        "plain_measured_on": len(few),
        "ours_seconds": seconds["ours"].wall,
        "plain_seconds": seconds["plain"].wall * scale,
        "times_faster": seconds["plain"].wall * scale / seconds["ours"].wall,
        "times_faster_by_cpu": seconds["plain"].cpu * scale / seconds["ours"].cpu,
        "gradient_gap_float64": difference,
        "gradient_gap_float32": gap(ours, plain),
        "gradient_distance_float32": distance(ours, plain),
        "rounding_of_ours": gap(ours, exact),
        "rounding_of_plain": gap(plain, exact),
    }


# Peak memory


def load_and_use(name: str, copies: int) -> None:
    """In a process of its own: load, compose once, let each copy answer, print the peak resident memory in MiB.

    Weights are mapped from their file and resident only once used, so a copy that never ran would cost nothing.
    """
    agents = LanguageModel.from_pretrained(name)
    backbone = LanguageModel.from_pretrained(name) if copies > 1 else agents
    further = [LanguageModel.from_pretrained(name) for _ in range(copies - 2)]
    composer = Composer(backbone, agents)
    with torch.no_grad():
        (latents,) = composer.compose(["The sum of 1 and 2 is 3."])
    for model in (agents, backbone, *further):
        model.respond([Prompt("assistant", "Answer.", "1 + 2?", "g", 0, latents)], Sampling(max_response_tokens=2))
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    print(json.dumps({"peak_mib": int(found[1]) / 1024, "copies": 1 + (copies > 1) + len(further)}))


def measure_memory(name: str, most_copies: int) -> dict[str, Any]:
    """Peak memory of one shared backbone, two separate copies, and three as the original holds."""
    peaks = {}
    for copies in range(1, most_copies + 1):
        command = [sys.executable, __file__, "--child", str(copies), "--model", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        report = json.loads(done.stdout.splitlines()[-1])
        assert report["copies"] == copies
        peaks[f"copies_{copies}_mib"] = report["peak_mib"]
    return peaks


# Rollout


def measure_rollout(name: str, size: Size) -> dict[str, Any]:
    """New tokens per second of `respond` and of `generate`, with and without beginnings that rows share."""
    ours = LanguageModel.from_pretrained(name, max_batch_size=size.batch)
    ours.eos_ids = frozenset()  # every row runs to the limit, so both ways make the same number of tokens
    with quiet_loading():
        theirs = (
            AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=ours.model.dtype).to(ours.device).eval()
        )
    theirs.generation_config = GenerationConfig()
    config = GenerationConfig(
        max_new_tokens=size.new_tokens, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, pad_token_id=0
    )
    sampling = Sampling(temperature=TEMPERATURE, max_response_tokens=size.new_tokens)
    num_new = size.batch * size.new_tokens
    result: dict[str, Any] = {}
    for kind, members in (("grouped", min(8, size.batch)), ("unshared", 1)):
        # 30 tokens or so are the chat template's.
        users = [text_of(ours, i // members, size.chat_tokens - 30) for i in range(size.batch)]
        prompts = [Prompt("a", f"{i // members}", user, str(i // members), i) for i, user in enumerate(users)]
        rows = [ours.encode_prompt(prompt.system, prompt.user) for prompt in prompts]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=ours.device)
        real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=ours.device)

        def respond(prompts: list[Prompt] = prompts) -> None:
            assert sum(len(s.token_ids) for s in ours.respond(prompts, sampling)) == num_new

        def generate(ids: Tensor = ids, real: Tensor = real) -> None:
            with torch.no_grad():
                new = theirs.generate(ids, attention_mask=real, generation_config=config)
            assert new.shape == (size.batch, ids.shape[1] + size.new_tokens)

        seconds = median_seconds({"respond": respond, "generate": generate}, size.rounds)
        result[kind] = {
            "prompt_tokens": longest,
            "respond_tokens_per_second": num_new / seconds["respond"].wall,
            "generate_tokens_per_second": num_new / seconds["generate"].wall,
            "times_faster": seconds["generate"].wall / seconds["respond"].wall,
            "times_faster_by_cpu": seconds["generate"].cpu / seconds["respond"].cpu,
        }
    result["bound"] = matmul_bound(ours, size, num_new / result["grouped"]["respond_tokens_per_second"])
    return result


@torch.no_grad()
def matmul_bound(model: LanguageModel, size: Size, seconds: float) -> dict[str, float]:
    """How much of the decoding is the model's matrices times a batch of columns, and how near to the peak that is."""
    layers = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
    flops = sum(2 * layer.weight.numel() for layer in layers) * size.batch
    inputs = {
        layer.in_features: torch.randn(size.batch, layer.in_features, dtype=model.model.dtype) for layer in layers
    }
    square = torch.randn(1024, 1024, dtype=model.model.dtype)

    def step() -> None:
        for layer in layers:
            layer(inputs[layer.in_features].to(model.device))

    times = median_seconds({"step": step, "square": lambda: square @ square}, max(3, size.rounds))
    peak = 2 * 1024**3 / times["square"].wall
    return {
        "peak_gflops": peak / 1e9,
        "share_of_peak": flops * size.new_tokens / seconds / peak,
        "share_of_time_in_linear_layers": times["step"].wall * size.new_tokens / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--full", action="store_true", help="run the plain update on all messages")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: only to see that it works")
    parser.add_argument("--only", choices=["update", "memory", "rollout"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.child:
        load_and_use(options.model, options.child)
        return
    size = QUICK if options.quick else Size()
    if options.rounds:
        size = Size(**{**vars(size), "rounds": options.rounds})
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "update": lambda: measure_update(options.model, size, options.full),
        "memory": lambda: measure_memory(options.model, 1 if options.quick else 3),
        "rollout": lambda: measure_rollout(options.model, size),
    }
    results: dict[str, Any] = {
        "model": options.model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "size": vars(size),
    }
    for part, measure in parts.items():
        if options.only in (None, part):
            results[part] = measure()
            show(part, results[part])
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def show(part: str, figures: dict[str, Any]) -> None:
    for key, value in figures.items():
        if isinstance(value, dict):
            show(f"{part}.{key}", value)
        else:
            print(f"{part + '.' + key:<48}{value:>14.4g}", flush=True)


if __name__ == "__main__":
    main()
