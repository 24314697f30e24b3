"""What the second stage of retrieval costs, read off logits against sampled as text; and what composing costs, batched.

1. Rating. The plain way samples up to 20 tokens at temperature 1 for one candidate after the other, by
   `transformers.generate`, and takes a reply of one or two digits as a rating; any other reply loses the candidate.
   Ours reads the ten answers' logits of all candidates at once. Both are asked the same, about the same episodes.
2. Composing. The texts of a team's roles one by one; in batches, as `LatentMemory` composes them; and with what the
   texts of one task begin with read once, in the order of the built-in template and with the episodes before the role.

Ways run in turn on equal, seeded inputs; medians, by wall clock and by processor time, which is what counts where other
programs run as well. That they compute the same is asserted.

    python benchmarks/rating.py [--out results.json] [--only rating|composing] [--threads N] [--rounds N] [--tasks N]
    python benchmarks/rating.py --quick --model FOLDER      a smoke run, seconds with a tiny model
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cost import median_seconds, text_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from latentmem.memory.composer import TEMPLATE, Composer
from latentmem.memory.rating import ANSWERS, Rater
from latentmem.models.assets import quiet_loading, resolve_model
from latentmem.models.language_model import LanguageModel
from latentmem.models.prefilling import prefill
from latentmem.models.prefix import hidden_states
from latentmem.trajectory import Message, Recalled, Role, Step, Task, Trajectory

EPISODES_FIRST = """A team of agents works on a task. One of its members needs to remember what past episodes teach.

The task at hand:
{task}

Past episodes of the team:
{memory}

The member:
{role}

What this member said in them:
{role_messages}

In {num_latents} latent tokens, what helps this member with the task at hand:"""
"""The built-in template with the role after the episodes, so that all roles of a task share most of their texts."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    num_tasks: int = 3
    num_candidates: int = 6
    episode_tokens: int = 300
    new_tokens: int = 20
    num_composed_tasks: int = 8
    num_roles: int = 4
    num_retrieved: int = 3
    num_latents: int = 8
    rounds: int = 2


QUICK = Size(2, 3, 60, 4, 2, 2, 2, 3, 1)


def episode(text: str, said: dict[str, str], action: str) -> Trajectory:
    """A solved episode of one step."""
    messages = tuple(
        Message(
            role=role,
            system="",
            user=text,
            response=response,
            token_ids=(),
            logps=(),
            finish="stop",
            temperature=1.0,
            num_prompt_tokens=0,
            recalled=Recalled(kind="none"),
        )
        for role, response in said.items()
    )
    return Trajectory(
        task=Task(id=None, domain="sums", text=text),
        team="team",
        model="model",
        steps=(Step(messages=messages, action=action, observation=""),),
        reward=1.0,
        success=True,
        seed=0,
    )


# Rating


def make_pairs(model: LanguageModel, size: Size) -> list[tuple[Task, Trajectory]]:
    """Each task with candidates of `episode_tokens` or so."""
    pairs = []
    for i in range(size.num_tasks):
        task = Task(id=None, domain="sums", text=f"{text_of(model, 1000 + i, 30)}What is the largest of these sums?")
        for j in range(size.num_candidates):
            asked = f"What is {10 * i + j} + {7 * j}?"
            worked = text_of(model, 100 * i + j, size.episode_tokens - 30)
            pairs.append((task, episode(asked, {"assistant": worked}, worked)))
    return pairs


def load_plain(name: str) -> PreTrainedModel:
    """The model as transformers loads it."""
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=torch.float32).eval()
    eos = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos)
    return model


@torch.no_grad()
def sampled_replies(
    plain: PreTrainedModel, rater: Rater, pairs: Sequence[tuple[Task, Trajectory]], new: int
) -> list[str]:
    """A reply to each prompt, one after the other."""
    config = GenerationConfig(
        max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
        eos_token_id=plain.generation_config.eos_token_id,
    )  # fmt: skip
    replies = []
    for pair in pairs:
        ids = torch.tensor([rater._prompt(*pair)])
        made = plain.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        replies.append(rater.model.decode(made[0, ids.shape[1] :].tolist()))
    return replies


def parse(reply: str) -> float | None:
    """The rating that a reply is taken for; None loses the candidate."""
    found = re.fullmatch(r"\d{1,2}", reply.strip())
    return float(found[0]) if found and int(found[0]) <= 10 else None


def measure_rating(name: str, size: Size) -> dict[str, Any]:
    """Seconds of both ways, what the sampled one loses, and how the ratings lie."""
    model = LanguageModel.from_pretrained(name, device="cpu", dtype="float32")
    plain = load_plain(name)
    pairs = make_pairs(model, size)
    ratings: list[Tensor] = []
    replies: list[str] = []
    torch.manual_seed(0)

    def ours() -> None:
        ratings.append(Rater(model).probabilities(pairs))  # a new one: nothing is known yet

    def sampled() -> None:
        replies.extend(sampled_replies(plain, Rater(model), pairs, size.new_tokens))

    seconds = median_seconds({"ours": ours, "sampled": sampled}, size.rounds)
    probabilities = ratings[0]
    expected = probabilities @ torch.tensor(ANSWERS, dtype=torch.float64) / probabilities.sum(1)
    parsed = [(parse(reply), float(expected[i % len(pairs)])) for i, reply in enumerate(replies)]
    kept = [(score, wanted) for score, wanted in parsed if score is not None]
    result = {
        "candidates": len(pairs),
        "prompt_tokens": statistics.mean(len(Rater(model)._prompt(*pair)) for pair in pairs),
        "ours_seconds": seconds["ours"].wall,
        "sampled_seconds": seconds["sampled"].wall,
        "times_faster": seconds["sampled"].wall / seconds["ours"].wall,
        "times_faster_by_cpu": seconds["sampled"].cpu / seconds["ours"].cpu,
        "sampled_replies": len(replies),
        "sampled_share_lost": 1 - len(kept) / len(replies),
        "probability_of_the_ten_answers": float(probabilities.sum(1).mean()),
        "expected_mean": float(expected.mean()),
        "expected_spread_within_a_task": float(expected.view(size.num_tasks, -1).std(dim=1).mean()),
    }
    if len(kept) > 1:
        result["sampled_mean"] = statistics.mean(score for score, _ in kept)
        result["sampled_spread"] = statistics.stdev(score for score, _ in kept)
        result["sampled_distance_from_expected"] = statistics.mean(abs(score - wanted) for score, wanted in kept)
    for way in ("ours", "sampled"):
        command = [sys.executable, __file__, "--child", way, "--model", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        result[f"{way}_peak_mib"] = json.loads(done.stdout.splitlines()[-1])["peak_mib"]
    result["replies"] = replies[: min(8, len(replies))]
    return result


def rate_and_print_peak(name: str, way: str) -> None:
    """In a process of its own: rate one task's candidates, print the peak resident memory in MiB."""
    model = LanguageModel.from_pretrained(name, device="cpu", dtype="float32")
    rater = Rater(model)
    pairs = make_pairs(model, Size())[: Size.num_candidates]
    if way == "ours":
        rater(pairs)
    else:
        model.model = load_plain(name)  # in the other's place: one copy of the weights in either way
        sampled_replies(model.model, rater, pairs, Size.new_tokens)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    print(json.dumps({"peak_mib": int(found[1]) / 1024}))


# Composing


def make_texts(composer: Composer, size: Size) -> list[list[str]]:
    """For each task the texts of its roles; their lengths differ, and lie between 300 and 600 tokens by default."""
    model = composer.backbone
    roles = [Role(name=f"member {i}", profile=f"Works as number {i} of the team.") for i in range(size.num_roles)]
    texts = []
    for i in range(size.num_composed_tasks):
        worked = 15 + 30 * i // size.num_composed_tasks
        task = Task(id=None, domain="sums", text=text_of(model, 2000 + i, 20 + 2 * i))
        found = [
            episode(
                text_of(model, 3000 + 10 * i + j, 15),
                {role.name: text_of(model, 4000 + 100 * i + 10 * j + r, worked) for r, role in enumerate(roles)},
                text_of(model, 5000 + 10 * i + j, worked),
            )
            for j in range(size.num_retrieved)
        ]
        texts.append([composer.prompt(task, role, found) for role in roles])
    return texts


def compose_shared(composer: Composer, texts: list[str], groups: list[str]) -> Tensor:
    """Latents [B, K, d_agent], without gradients; what the texts of a group begin with alike is read once."""
    model = composer.backbone.model
    prefix = prefill(model, [composer.backbone.encode(text) for text in texts], groups, room=composer.num_latents)
    queries = composer.query_latents.expand(len(texts), -1, -1)
    new = torch.ones(queries.shape[:2], dtype=torch.bool)
    hidden = hidden_states(model, queries, prefix.seen, new, prefix.cache)
    return composer.projection(hidden)


def batches_of(texts: Sequence[str], batch: int = 8) -> list[list[int]]:
    """As `LatentMemory` composes: shortest together."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    return [order[start : start + batch] for start in range(0, len(order), batch)]


@torch.no_grad()
def measure_composing(name: str, size: Size) -> dict[str, Any]:
    """Seconds of composing one by one, in batches, and with shared beginnings."""
    model = LanguageModel.from_pretrained(name, device="cpu", dtype="float32")
    composer = Composer(model, num_latents=size.num_latents)
    for parameter in composer.trainable().values():  # a fresh adapter is zero, and says nothing
        parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02
    by_template = {}
    for order, template in (("built_in", TEMPLATE), ("episodes_first", EPISODES_FIRST)):
        composer.template = template
        by_template[order] = make_texts(composer, size)
    texts = [text for group in by_template["built_in"] for text in group]
    lengths = [len(model.encode(text)) for text in texts]

    def batched(texts: Sequence[str]) -> Tensor:
        rows = batches_of(texts)
        latents = torch.cat([composer.compose([texts[i] for i in chosen]) for chosen in rows])
        return latents[torch.tensor([i for chosen in rows for i in chosen]).argsort()]

    def shared(groups: Sequence[Sequence[str]]) -> Tensor:
        per_batch = max(1, 8 // size.num_roles)  # tasks in a batch of 8
        parts = []
        for start in range(0, len(groups), per_batch):
            chosen = groups[start : start + per_batch]
            named = [str(i) for i, group in enumerate(chosen) for _ in group]
            parts.append(compose_shared(composer, [text for group in chosen for text in group], named))
        return torch.cat(parts)

    for groups in by_template.values():
        some = groups[:2]
        assert (batched([text for group in some for text in group]) - shared(some)).abs().max() < 1e-4
    seconds = median_seconds(
        {
            "one_by_one": lambda: [composer.compose([text]) for text in texts],
            "batched": lambda: batched(texts),
            "shared_built_in": lambda: shared(by_template["built_in"]),
            "shared_episodes_first": lambda: shared(by_template["episodes_first"]),
        },
        size.rounds,
    )
    result: dict[str, Any] = {
        "texts": len(texts),
        "tokens": sum(lengths),
        "shortest": min(lengths),
        "longest": max(lengths),
        "padded": sum(len(rows) * max(lengths[i] for i in rows) for rows in batches_of(texts)) / sum(lengths),
    }
    for way, taken in seconds.items():
        result[f"{way}_seconds"] = taken.wall
        result[f"{way}_cpu_seconds"] = taken.cpu
        if way != "one_by_one":
            result[f"{way}_times_faster"] = seconds["one_by_one"].wall / taken.wall
            result[f"{way}_times_faster_by_cpu"] = seconds["one_by_one"].cpu / taken.cpu
    result["bound"] = matmul_bound(model, [length + size.num_latents for length in lengths], seconds["one_by_one"].cpu)
    return result


@torch.no_grad()
def matmul_bound(model: LanguageModel, positions: Sequence[int], seconds: float) -> dict[str, float]:
    """What the matrices of the layers alone take, on as many rows as one text has, and how near to the peak that is."""
    layers = [module for module in model.model.base_model.modules() if isinstance(module, nn.Linear)]
    rows = round(statistics.mean(positions))
    inputs = {layer.in_features: torch.randn(rows, layer.in_features) for layer in layers}
    square = torch.randn(1024, 1024)
    times = median_seconds(
        {"layers": lambda: [layer(inputs[layer.in_features]) for layer in layers], "square": lambda: square @ square}, 5
    )
    flops = 2 * sum(layer.weight.numel() for layer in layers) * sum(positions)
    peak = 2 * 1024**3 / times["square"].cpu
    return {
        "peak_gflops": peak / 1e9,
        "one_by_one_share_of_peak": flops / seconds / peak,
        "share_of_time_in_linear_layers": times["layers"].cpu * len(positions) / seconds,
        "most_times_faster_at_peak": seconds * peak / flops,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: only to see that it works")
    parser.add_argument("--only", choices=["rating", "composing"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--tasks", type=int, help="tasks in either part; 3 and 8 by default")
    parser.add_argument("--child", choices=["ours", "sampled"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.child:
        rate_and_print_peak(options.model, options.child)
        return
    size = QUICK if options.quick else Size()
    if options.rounds:
        size = replace(size, rounds=options.rounds)
    if options.tasks:
        size = replace(size, num_tasks=options.tasks, num_composed_tasks=options.tasks)
    parts: dict[str, Callable[[str, Size], dict[str, Any]]] = {
        "rating": measure_rating,
        "composing": measure_composing,
    }
    results: dict[str, Any] = {"model": options.model, "threads": torch.get_num_threads(), "size": vars(size)}
    for part, measure in parts.items():
        if options.only in (None, part):
            results[part] = measure(options.model, size)
            show(part, results[part])
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def show(part: str, figures: dict[str, Any]) -> None:
    for key, value in figures.items():
        if isinstance(value, dict):
            show(f"{part}.{key}", value)
        elif isinstance(value, list):
            for entry in value:
                print(f"{part + '.' + key:<48} {entry!r}", flush=True)
        else:
            print(f"{part + '.' + key:<48}{value:>14.4g}", flush=True)


if __name__ == "__main__":
    main()
