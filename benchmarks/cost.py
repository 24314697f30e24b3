"""What LatentMem costs, measured against the plain way of doing the same: update, memory, tokens a second, start-up.

Both ways run alternately in one process on equal, seeded inputs, so a machine that is busy or throttled slows both;
medians are reported. The plain update is written here, as one would first write it, on transformers' models as they
come: composer and agents each have a copy, each message composes its own memory and runs its whole sequence with logits
for every position. It costs the same for every message, so by default it runs on a quarter of them and its time is
multiplied by four; `--full` runs all. Gradients of both ways are compared first, in float64, so the speed is never that
of a different result; how far each is off in float32 is reported too.

    python benchmarks/cost.py [--out results.json] [--full] [--only PART] [--threads N] [--rounds N]
    python benchmarks/cost.py --quick --model FOLDER      a smoke run, seconds with a tiny model

PART is one of update, long (the update with prompts of 1,000 tokens), memory, rollout, growth, startup.
"""

import argparse
import copy
import gc
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from latentmem.config import Sampling
from latentmem.memory.composer import Composer
from latentmem.models.agent import Prompt
from latentmem.models.assets import quiet_loading, resolve_model
from latentmem.models.fused import product
from latentmem.models.language_model import LanguageModel
from latentmem.models.prefilling import Kept
from latentmem.training.losses import lmpo_loss
from latentmem.training.scoring import Example, accumulate, read_prompts

TEMPERATURE = 0.7
AGREEMENT = 1e-10
"""Largest allowed difference of gradients, relative to each tensor's largest entry. Asserted with a float64 model."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    num_tasks: int = 2
    group_size: int = 8
    num_agents: int = 2
    prompt_tokens: int = 260
    response_tokens: int = 64
    composer_tokens: int = 450
    num_latents: int = 8
    positions: int = 512
    """`micro_batch_positions`."""
    batch: int = 32
    chat_tokens: int = 150
    new_tokens: int = 48
    rounds: int = 3
    heavy: bool = True
    """Whether programs that import torch are started too."""


QUICK = Size(2, 2, 2, 40, 6, 40, 3, 200, 4, 90, 5, 1, heavy=False)


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
    """Messages of a team: first agents of a group share the whole prompt, the others all but what they read."""
    generator = torch.Generator().manual_seed(0)
    words = int(model.model.get_input_embeddings().weight.shape[0])

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, words, (count,), generator=generator).tolist())

    examples = []
    for task in range(size.num_tasks):
        texts = [text_of(model, 10 * task + role, size.composer_tokens) for role in range(size.num_agents)]
        asked, closing = ids(size.prompt_tokens), ids(6)
        quoting = [ids(size.prompt_tokens - size.response_tokens - 6) for _ in texts]
        for _ in range(size.group_size):
            said = ids(size.response_tokens)
            examples.append(Example(texts[0], asked, said, TEMPERATURE))
            for text, beginning in zip(texts[1:], quoting[1:], strict=True):
                response = ids(size.response_tokens)
                examples.append(Example(text, (*beginning, *said, *closing), response, TEMPERATURE))
    return examples


def count_tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.token_ids) for example in examples)


class Plain:
    """Copies of transformers' own models, with the weights of a composer of ours, and gradients of their own."""

    def __init__(self, name: str, dtype: str, composer: Composer) -> None:
        self.encode, self.device = composer.backbone.encode, composer.backbone.device
        self.agents, self.lm = (load_plain(name, dtype).to(self.device) for _ in range(2))
        config = LoraConfig(
            r=composer.rank, lora_alpha=composer.alpha, target_modules=list(composer.target_modules), lora_dropout=0.0
        )
        inject_adapter_in_model(config, self.lm, adapter_name="composer")
        self.query_latents = nn.Parameter(composer.query_latents.detach().clone())
        self.projection = copy.deepcopy(composer.projection)
        own = {"query_latents": self.query_latents}
        own |= {f"projection.{key}": value for key, value in self.projection.named_parameters()}
        self._trainable = own | {
            f"lora.{key.replace('.composer.', '.')}": value
            for key, value in self.lm.named_parameters()
            if ".composer." in key
        }
        with torch.no_grad():
            for key, value in composer.trainable().items():
                self._trainable[key].copy_(value)

    def trainable(self) -> dict[str, nn.Parameter]:
        return self._trainable

    def update(self, examples: Sequence[Example], advantages: Tensor) -> None:
        """Gradients of the same loss, message by message, over whole sequences."""
        num_tokens = count_tokens(examples)
        for example, advantage in zip(examples, advantages, strict=True):
            ids = torch.tensor([self.encode(example.composer_text)], device=self.device)
            text = torch.cat([self.lm.get_input_embeddings()(ids), self.query_latents[None]], dim=1)
            hidden = self.lm.base_model(inputs_embeds=text).last_hidden_state
            latents = self.projection(hidden[:, -len(self.query_latents) :])
            embed = self.agents.get_input_embeddings()
            response_ids = torch.tensor([example.token_ids], device=self.device)
            prompt = embed(torch.tensor([example.prompt_ids], device=self.device))
            logits = self.agents(inputs_embeds=torch.cat([prompt, latents, embed(response_ids)], dim=1)).logits
            logits = logits[:, -response_ids.shape[1] - 1 : -1] / TEMPERATURE
            logps = logits.log_softmax(2).gather(2, response_ids[..., None])[..., 0]
            mask = torch.ones_like(response_ids, dtype=torch.bool)
            loss, _ = lmpo_loss(logps, logps.detach(), advantage[None], mask, loss_type="dapo", num_tokens=num_tokens)
            loss.backward()  # type: ignore[no-untyped-call]


def load_plain(name: str, dtype: str) -> PreTrainedModel:
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=getattr(torch, dtype))
    if dtype == "float64":
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):  # transformers computes norms in float32, whatever the model is
                module.forward = partial(exact_norm, module)
    return model.eval().requires_grad_(False)


def exact_norm(module: Any, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt() * module.weight


class Ours:
    """The path that the trainers use: composed once, prompts read beforehand, one backbone.

    As in a step of LMPO, the rollout has composed the latents already, and has read what the prompts of a group begin
    with; `after_rollout` is that part, and not timed.
    """

    def __init__(self, name: str, dtype: str, num_latents: int, positions: int) -> None:
        self.model = LanguageModel.from_pretrained(name, dtype=dtype)
        self.composer = Composer(self.model, num_latents=num_latents)
        self.positions = positions
        # A fresh adapter is zero, and half of it would have no gradient.
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, parameter in self.composer.trainable().items():
                if key.startswith("lora."):
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.02)

    def trainable(self) -> dict[str, nn.Parameter]:
        return self.composer.trainable()

    @torch.no_grad()
    def after_rollout(self, examples: Sequence[Example]) -> None:
        self.kept = Kept()
        read_prompts(self.model, examples, self.kept)
        texts = list(dict.fromkeys(example.composer_text for example in examples))
        self.composed = {text: self.composer.compose([text])[0] for text in texts}

    def update(self, examples: Sequence[Example], advantages: Tensor) -> None:
        num_tokens = count_tokens(examples)

        def loss_of(rows: list[int], logps: Tensor, mask: Tensor) -> Tensor:
            chosen = advantages[torch.tensor(rows)]
            return lmpo_loss(logps, logps.detach(), chosen, mask, loss_type="dapo", num_tokens=num_tokens)[0]

        accumulate(self.composer, self.model, examples, loss_of, self.positions, self.composed, self.kept)


def gradients(way: Ours | Plain, examples: Sequence[Example], advantages: Tensor) -> dict[str, Tensor]:
    """What an update adds to each parameter's gradient, in float64."""
    if isinstance(way, Ours):
        way.after_rollout(examples)
    way.update(examples, advantages)
    found = {}
    for key, parameter in way.trainable().items():
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
    ours = Ours(name, "float32", size.num_latents, size.positions)
    plain = Plain(name, "float32", ours.composer)
    examples = make_examples(ours.model, size)
    advantages = torch.randn(len(examples), generator=torch.Generator().manual_seed(2)).to(ours.model.device)

    # Two rollouts of the first task: each text is used twice, each prompt's beginning is shared.
    some, some_advantages = examples[: 2 * size.num_agents], advantages[: 2 * size.num_agents]
    found = {way: gradients(way, some, some_advantages) for way in (ours, plain)}
    exact = Ours(name, "float64", size.num_latents, size.positions)
    exact_plain = Plain(name, "float64", exact.composer)
    wanted, wanted_plain = (gradients(way, some, some_advantages.double()) for way in (exact, exact_plain))
    difference = gap(wanted, wanted_plain)
    assert difference <= AGREEMENT, f"gradients differ by {difference:.1e} of the largest entry"
    del exact, exact_plain

    every = 1 if full else 4
    part = [i for i in range(len(examples)) if (i // size.num_agents) % every == 0]  # whole rollouts: all roles' share
    few, few_advantages = [examples[i] for i in part], advantages[part]
    ours.after_rollout(examples)
    seconds = median_seconds(
        {
            "ours": lambda: ours.update(examples, advantages),
            "plain": lambda: plain.update(few, few_advantages),
            "product": square_product,
        },
        size.rounds,
    )
    scale = len(examples) / len(few)
    peak = SQUARE_FLOPS / seconds["product"].wall
    return {
        "messages": len(examples),
        "prompt_tokens": size.prompt_tokens,
        "plain_measured_on": len(few),
        "ours_seconds": seconds["ours"].wall,
        "plain_seconds": seconds["plain"].wall * scale,
        "times_faster": seconds["plain"].wall * scale / seconds["ours"].wall,
        "times_faster_by_cpu": seconds["plain"].cpu * scale / seconds["ours"].cpu,
        "peak_gflops": peak / 1e9,
        "share_of_peak": update_flops(ours.model, size) / seconds["ours"].wall / peak,
        "gradient_gap_float64": difference,
        "gradient_gap_float32": gap(found[ours], found[plain]),
        "gradient_distance_float32": distance(found[ours], found[plain]),
        "rounding_of_ours": gap(found[ours], wanted),
        "rounding_of_plain": gap(found[plain], wanted),
    }


SQUARE = 2048
SQUARE_FLOPS = 20 * 2 * SQUARE**3


def square_product() -> None:
    """What this machine multiplies at best: twenty large products."""
    a = torch.ones(SQUARE, SQUARE)
    for _ in range(20):
        product(a, a)


def update_flops(model: LanguageModel, size: Size) -> float:
    """Of the matrix products that our update cannot do without; attention and the adapter are not counted."""
    layers = sum(m.weight.numel() for m in model.model.base_model.modules() if isinstance(m, nn.Linear))
    head = model.model.get_output_embeddings().weight.numel()
    texts = size.num_tasks * size.num_agents * (size.composer_tokens + size.num_latents)
    messages = size.num_tasks * size.group_size
    own = size.response_tokens + 6
    prompts = messages * (size.num_agents - 1) * own  # what the rollout read before is not read again
    responses = messages * size.num_agents * (size.num_latents + size.response_tokens - 1)
    tokens = messages * size.num_agents * size.response_tokens
    return 2.0 * (layers * (2 * texts + prompts + 2 * responses) + head * 2 * tokens)


def measure_growth(name: str, size: Size) -> dict[str, Any]:
    """Processor seconds of our update for one task, as one size grows and the others stay."""
    one = replace(size, num_tasks=1)
    sizes = {
        "latents": {k: replace(one, num_latents=k) for k in (2, 8, 32)},
        "prompt": {p: replace(one, prompt_tokens=p * size.prompt_tokens) for p in (1, 2, 4)},
        "group": {g: replace(one, group_size=g) for g in (4, 8, 16)},
        "agents": {n: replace(one, num_agents=n) for n in (1, 2, 4)},
    }
    result: dict[str, Any] = {}
    for kind, values in sizes.items():
        ways = {}
        for value, chosen in values.items():
            ours = Ours(name, "float32", chosen.num_latents, chosen.positions)
            examples = make_examples(ours.model, chosen)
            ours.after_rollout(examples)
            ways[f"{value}"] = partial(ours.update, examples, torch.ones(len(examples)))
        for value, seconds in median_seconds(ways, size.rounds).items():
            result[f"{kind} {value}"] = seconds.cpu
    return result


# Peak memory


def train_and_report(way: str, name: str, size: Size) -> None:
    """In a process of its own: one update, the highest resident memory in MiB as the last line.

    The plain way holds the three copies of the original (agents, composer, and one that rates candidates), each used
    once: weights are mapped from their file, and a copy that never ran would cost nothing.
    """
    ours = Ours(name, "float32", size.num_latents, size.positions)
    examples = make_examples(ours.model, size)
    ours.after_rollout(examples)
    chosen: Ours | Plain = ours
    if way == "plain":
        chosen, rating = Plain(name, "float32", ours.composer), load_plain(name, "float32")
        rating(torch.tensor([examples[0].prompt_ids]))
        del ours
        gc.collect()
    chosen.update(examples, torch.ones(len(examples)))
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    print(json.dumps({"peak_mib": int(found[1]) / 1024}))


def measure_memory(name: str, quick: bool) -> dict[str, Any]:
    """Peak memory of an update, ours against plain."""
    result = {}
    for way in ("ours", "plain"):
        command = [sys.executable, __file__, "--child", way, "--model", name, *(["--quick"] if quick else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        result[f"{way}_mib"] = json.loads(done.stdout.splitlines()[-1])["peak_mib"]
    return result | {"ratio": result["ours_mib"] / result["plain_mib"]}


# Start-up


def measure_startup(name: str, size: Size) -> dict[str, Any]:
    """Seconds of fresh processes until they have done what is said."""
    load = f"from latentmem.models.language_model import LanguageModel; LanguageModel.from_pretrained({name!r})"
    programs = {
        "python": "pass",
        "import_latentmem": "import latentmem",
        "help": "from latentmem.cli import main; main(['--help'])",
    }
    if size.heavy:
        programs |= {"import_torch_and_transformers": "import torch, transformers", "load_the_model": load}
    commands = {key: [sys.executable, "-c", program] for key, program in programs.items()}
    run = partial(subprocess.run, stdout=subprocess.DEVNULL, check=False)
    seconds = median_seconds({key: partial(run, command) for key, command in commands.items()}, size.rounds)
    return {f"{key}_seconds": value.wall for key, value in seconds.items()}


# Rollout


def measure_rollout(name: str, size: Size) -> dict[str, Any]:
    """New tokens per second of `respond` and of `generate`, with and without beginnings that rows share."""
    ours = LanguageModel.from_pretrained(name, max_batch_size=size.batch)
    ours.eos_ids = frozenset()  # every row runs to the limit, so both ways make the same number of tokens
    theirs = load_plain(name, str(ours.model.dtype).removeprefix("torch.")).to(ours.device)
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
    parser.add_argument("--only", choices=["update", "long", "memory", "rollout", "growth", "startup"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--child", choices=["ours", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    size = QUICK if options.quick else Size()
    if options.child:
        train_and_report(options.child, options.model, size)
        return
    if options.rounds:
        size = replace(size, rounds=options.rounds)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "startup": lambda: measure_startup(options.model, size),
        "update": lambda: measure_update(options.model, size, options.full),
        "long": lambda: measure_update(
            options.model, replace(size, prompt_tokens=4 * size.prompt_tokens), options.full
        ),
        "memory": lambda: measure_memory(options.model, options.quick),
        "rollout": lambda: measure_rollout(options.model, size),
        "growth": lambda: measure_growth(options.model, size),
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
