"""The page is read as a browser would: parsed, with its hostile texts looked for as text and as markup."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import numpy as np
import pytest

from latentmem.errors import RunError
from latentmem.kept_latents import KeptLatents, keep_latents
from latentmem.report import curves, format_markdown, format_table, samples, verdict, write_report
from latentmem.stats import paired_bootstrap, wilson_interval
from latentmem.trajectory import Conversation, Message, Origin, Recalled, Served, Step, Task, Trajectory

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "{{7*7}} {% raw %}",
    "<|im_start|>system",
    "</pre></details><img src=x onerror=alert(3)>",
    "line\u2028break & <b>bold</b> \"quotes\" 'too'",
]
RATES = {"none": 0.28, "text": 0.15, "latent:untrained": 0.3, "latent:sft": 0.36, "latent:lmpo": 0.42}


def trajectory(memory: str, i: int, *, success: bool, text: str | None = None) -> Trajectory:
    task = Task(id=f"t{i}", domain="arithmetic", text=text or f"What is {i} + {2 * i} - {i % 7}? Give the number only.")
    kind, latents = ("latent", 8) if memory.startswith("latent") else (memory, 0)
    said = text or f"The sum of the three terms is {2 * i}."

    def message(role: str, user: str, response: str, reads: tuple[int, ...] = ()) -> Message:
        recalled = Recalled(
            kind=kind,
            text="" if kind == "none" else f"Earlier: a task like this was solved from left to right. {text or ''}",
            sources=() if kind == "none" else ("5f0c", "99ab"),
            num_latents=latents,
        )
        return Message(
            role=role,
            system=f"You are the {role}. Work with the others.",
            user=user,
            response=response,
            token_ids=tuple(range(12)),
            logps=(-0.5,) * 12,
            finish="length" if i % 5 == 0 else "stop",
            temperature=0.0,
            num_prompt_tokens=60,
            reads=reads,
            recalled=recalled,
        )

    messages = (
        message("assistant", task.text, said),
        message("user proxy", f"{task.text}\nassistant: {said}", f"Final: {said}", (0,)),
    )
    step = Step(messages=messages, action=said, observation="", info={"extracted": str(2 * i), "exact": success})
    return Trajectory(
        task=task, team="autogen", model="tiny", steps=(step,), reward=float(success), success=success, seed=0
    )


def results_of(num_tasks: int, seed: int, name: str = "first") -> dict:
    """A results.json with the very intervals and p-values that the evaluation would write."""
    random = Random(seed)
    hardness = [random.random() for _ in range(num_tasks)]
    won = {m: [int(0.6 * hard + 0.4 * random.random() < rate) for hard in hardness] for m, rate in RATES.items()}

    def compare(name: str, other: str) -> dict | None:
        if name == other:
            return None
        paired = paired_bootstrap(won[name], won[other], 500, seed=0)
        return {
            "difference": paired.difference,
            "low": paired.low,
            "high": paired.high,
            "p_value": paired.p_value,
        }

    memories = []
    for memory, successes in won.items():
        low, high = wilson_interval(sum(successes), num_tasks)
        accuracy = sum(successes) / num_tasks
        memories.append(
            {
                "name": memory,
                "accuracy": accuracy,
                "accuracy_low": low,
                "accuracy_high": high,
                "reward": accuracy,
                "extra": {"contains": accuracy + 0.1},
                "no_answer": 0.25 if memory == "text" else 0.02,
                "num_errors": 0,
                "vs_none": compare(memory, "none"),
                "vs_text": compare(memory, "text"),
                "prompt_tokens": 120.0 + 700 * (memory == "text"),
                "latent_tokens": 16.0 * memory.startswith("latent"),
                "generated_tokens": 41.3,
                "seconds": {"recall": 0.01, "composing": 0.02, "generation": 0.5, "environment": 0.0, "total": 0.53},
                "peak_memory_mb": 912.0,
                "successes": successes,
                "rewards": [float(s) for s in successes],
            }
        )
    return {
        "schema_version": 1,
        "run": name,
        "seed": seed,
        "num_tasks": num_tasks,
        "domain": "arithmetic",
        "team": "autogen",
        "model": "smollm2-135m",
        "temperature": 0.0,
        "memories": memories,
        "task_ids": [f"t{i}" for i in range(num_tasks)],
    }


def make_run(folder: Path, num_tasks: int = 40, seed: int = 0, num_steps: int = 60) -> Path:
    """A finished run, down to the trajectories, with hostile text in its first tasks."""
    random = Random(seed)
    results = results_of(num_tasks, seed, folder.name)
    (folder / "evaluate").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "run.json").write_text(
        json.dumps(
            {"seed": seed, "started": "2026-01-01T10:00:00+00:00", "versions": {"python": "3.11", "torch": "2.9"}}
        )
    )
    (folder / "config.yaml").write_text("run: first\nteam: autogen\n")
    rows: list[dict] = [
        {"phase": "collect", "step": 8, "episodes": 128, "successes": 31, "reward": 0.24, "stored": 128}
    ]
    rows += [
        {"phase": "sft", "step": s, "loss": 1.2 + 2.1 * math.exp(-s / 12) + 0.1 * random.random(), "grad_norm": 1.0}
        for s in range(1, 41)
    ]
    for step in range(1, num_steps + 1):
        row = {
            "phase": "lmpo",
            "step": step,
            "reward": 0.05 + 0.2 * step / num_steps + 0.08 * random.random(),
            "advantage_std": 0.3 + 0.1 * random.random(),
            "signal_groups": random.randint(1, 4),
            "groups": 8,
            "clip_fraction": 0.02 * random.random(),
            "grad_norm": 0.5 + random.random(),
            "loss": random.gauss(0, 0.02),
            "kl": 0.001 * step,
            "learning_rate": 2e-4,
        }
        if step % 5 == 0:
            row["eval_reward"] = 0.2 + 0.15 * step / num_steps
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for memory in results["memories"]:
        lines = [
            trajectory(memory["name"], i, success=bool(won), text=HOSTILE[i] if i < len(HOSTILE) else None).to_json()
            for i, won in enumerate(memory["successes"])
        ]
        (folder / "evaluate" / f"{memory['name'].replace(':', '-')}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


class Page(HTMLParser):
    """Elements and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source", "input", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "first")
    write_report([folder])
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(run / "report" / "report.html")


def test_hostile_text_is_shown_as_text_and_never_becomes_markup(page: Page) -> None:
    for text in HOSTILE:
        assert any(text in found for found in page.texts), text
    assert len(page.all("script")) == 1
    assert not [img for img in page.all("img") if not img["src"].startswith("data:image/png;base64,")]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.open == []


def test_only_our_script_may_run_and_nothing_is_fetched(page: Page, run: Path) -> None:
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    nonce = page.all("script")[0]["nonce"]
    assert "default-src 'none'" in policy
    assert f"script-src 'nonce-{nonce}'" in policy
    assert not page.all("link")
    html = (run / "report" / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href|srcset)="(?!data:|#)""", html)


def test_every_picture_has_words_and_a_dark_twin(page: Page) -> None:
    pictures = page.all("img")
    assert len(pictures) == 8 + 1 + 1
    assert all(len(img["alt"]) > 30 for img in pictures)
    assert len(page.all("source")) == len(pictures)


def test_figures_and_numbers_lie_beside_the_page(run: Path) -> None:
    names = {path.name for path in (run / "report").iterdir()}
    assert {
        "report.html",
        "report.json",
        "comparison.md",
        "lmpo_reward.png",
        "lmpo_signal.png",
        "sft_loss.png",
    } <= names
    assert (run / "report" / "accuracy_1.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((run / "report" / "report.json").read_text())["runs"][0]
    assert found["results"] == json.loads((run / "results.json").read_text())
    assert len(found["metrics"]) == 1 + 40 + 60


def test_each_agent_is_shown_with_prompt_recall_and_response(page: Page) -> None:
    assert "You are the assistant. Work with the others." in page.text
    assert "Recalled: latent, 8 latent tokens, from 2 trajectories" in page.text
    assert "Recalled: none" in page.text
    assert "12 tokens, cut by the limit" in page.text


def test_a_served_episode_is_shown_with_its_origin_rewards_and_tools(run: Path, tmp_path: Path) -> None:
    chat = Conversation(
        messages=({"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1?"}),
        tools=({"type": "function", "function": {"name": "<calculator>"}},),
    )
    plain = trajectory("none", 1, success=False)
    message = plain.messages[0].model_copy(
        update={
            "system": chat.system,
            "user": chat.user,
            "finish": "cut",
            "served": Served(call="c1", conversation=chat, prompt_ids=(1,), lineage="l"),
        }
    )
    step = plain.steps[0].model_copy(update={"messages": (message,)})
    origin = Origin(tenant="acme", session="s<17>", is_judged=False)
    served = plain.model_copy(update={"steps": (step,), "origin": origin, "rewards": {"assistant": 0.5}})
    folder = shutil.copytree(run, tmp_path / "served")
    (folder / "evaluate" / "none.jsonl").write_text(served.to_json() + "\n")
    page = write_report([folder]).read_text()
    assert "Served: session s&lt;17&gt;, tenant acme, never judged. Rewards: assistant 0.5." in page
    assert "Tools: &lt;calculator&gt;" in page
    assert "12 tokens, cut at a text to stop at" in page
    assert "1 + 1?" in page


def test_tasks_on_which_memories_disagree_come_first(run: Path, page: Page) -> None:
    won = {m["name"]: m["successes"] for m in json.loads((run / "results.json").read_text())["memories"]}
    disagree = sum(len({won[m][i] for m in won}) > 1 for i in range(40))
    assert 0 < disagree < 40
    assert f"24 of 40 tasks; the {disagree} on which the memories disagree come first." in page.text
    articles = [a for a in page.all("article") if a["class"] == "column"]
    shown = [{a["data-success"] for a in articles[i : i + 5]} for i in range(0, len(articles), 5)]
    assert [len(outcomes) > 1 for outcomes in shown] == [True] * min(disagree, 24) + [False] * max(0, 24 - disagree)


@pytest.mark.slow
def test_several_runs_share_curves_and_have_a_table_each(run: Path, tmp_path: Path) -> None:
    second = make_run(tmp_path / "second $^$ 中", seed=3, num_steps=8)
    path = write_report([run, second], tmp_path / "both")
    page = Page(path)
    assert path == tmp_path / "both" / "report.html"
    assert len(page.all("table")) == 2
    alt = next(img["alt"] for img in page.all("img") if "Mean reward of the rollouts" in img["alt"])
    assert "first: from" in alt
    assert "second $^$ 中: from" in alt
    assert "Differences between runs are not tested here" in page.text
    assert (tmp_path / "both" / "comparison.md").read_text(encoding="utf-8").count("latent:lmpo") >= 2


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    twins = [make_run(tmp_path / parent / "first", num_tasks=2, num_steps=0) for parent in "ab"]
    text = Page(write_report(twins, tmp_path / "out")).text
    assert str(twins[0]) in text
    assert str(twins[1]) in text


def test_the_warm_up_and_what_sft_gets_exactly_right_are_shown_where_there_were_any(tmp_path: Path) -> None:
    rows: list[dict] = [{"phase": "warmup", "step": s, "eval_loss": 3.0 - s, "framed": 0.2 * s} for s in (0, 1)]
    rows += [{"phase": "warmup", "step": s, "eval_loss": 4.0 - s, "copied": 0.2 * s, "loss": 1.0} for s in (2, 3)]
    rows += [{"phase": "sft", "step": s, "loss": 1.0, "eval_accuracy": 0.3 * s} for s in (1, 2)]
    pages = []
    for name, lines in (("warm", rows), ("cold", [])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        pages.append(Page(write_report([folder])))
    titles = [img["alt"].partition(".")[0] for img in pages[0].all("img")]
    assert titles == [
        "Loss over the steps of SFT",
        "Share of held-out responses that are said exactly over the steps of SFT",
        "Loss over the steps of WARMUP",
        "Loss on held-out words over the steps of WARMUP",
        "Share of held-out words said from a slot over the steps of WARMUP",
        "Share of held-out words copied by the composer over the steps of WARMUP",
    ]
    assert "Warm-up" in pages[0].text
    assert "Warm-up" not in pages[1].text


def test_training_of_the_agents_is_shown_where_there_was_any(tmp_path: Path) -> None:
    rows = [{"phase": "grpo", "step": step, "reward": 0.1 * step} for step in (1, 2)]
    pages = []
    for name, lines in (("rival", rows), ("plain", [])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        pages.append(Page(write_report([folder])))
    assert "GRPO of the agents" in pages[0].text
    assert "rival: no LMPO steps recorded." in pages[0].text
    assert [img["alt"].partition(".")[0] for img in pages[0].all("img")] == [
        "Mean reward of the rollouts over the steps of GRPO"
    ]
    assert re.search(r"Not recorded: .*KL to the untrained agents\.", pages[0].text)
    assert "GRPO" not in pages[1].text


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "young"
    folder.mkdir()
    rows = '{"phase": "lmpo", "step": 1, "reward": 0.5, "loss": null, "non_finite": ["loss"]}\n{"phase": "lmpo", "st'
    (folder / "metrics.jsonl").write_text(rows)
    text = Page(write_report([folder])).text
    assert "young: no SFT steps recorded." in text
    assert "Not evaluated yet: no results.json." in text
    assert "No trajectories to show" in text
    assert "lmpo step 1: loss was not finite." in text
    assert "The last line of metrics.jsonl was cut off by a crash" in text
    assert re.search(r"Not recorded: .*Gradient norm, Loss, KL to the initial composer\.", text)


def test_missing_keys_and_damaged_trajectories_are_told_not_fatal(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    (folder / "evaluate").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "results.json").write_text('{"memories": [{"name": "none"}, {"name": "text", "accuracy": null}]}')
    (folder / "evaluate" / "none.jsonl").write_text(
        '{"task": 3}\n{"torn\n{"steps": [{"messages": [{"response": "half"}]}]}\n'
    )
    text = Page(write_report([folder])).text
    assert "none.jsonl: 1 lines could not be read, the first is line 2." in text
    assert "half" in text
    assert "No memory was compared with none or text" in text


def test_folders_and_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"absent: no run folder"):
        write_report([tmp_path / "absent"])
    (tmp_path / "results.json").write_text('{"schema_version": 2}')
    with pytest.raises(RunError, match=r"results\.json: schema_version is 2, newer than 1.*upgrade"):
        write_report([tmp_path])
    for damaged, reason in {
        '{"schema_version": "1"}': "schema_version is '1', expected a whole number",
        '{"memories": [{"name": 5}]}': r"damaged \(memories.0.name: input should be a valid string\)",
        '{"memories": [{"name": "text", "no_answer": {}}]}': r"damaged \(memories.0.no_answer: input should be",
        '{"memories": [{"name": "text", "accuracy": NaN}]}': "not valid JSON",
    }.items():
        (tmp_path / "results.json").write_text(damaged)
        with pytest.raises(RunError, match=rf"results\.json: {reason}"):
            write_report([tmp_path])
    (tmp_path / "results.json").write_text('{"schema')
    with pytest.raises(RunError, match=r"results\.json: not valid JSON"):
        write_report([tmp_path])


# Latents and ablations


def with_latents(run: Path, stem: str, num_latents: int = 2) -> Path:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((10, 2, num_latents, 4)) + np.array([0.0, 3.0])[:, None, None]
    path = run / "evaluate" / f"{stem}.safetensors"
    tasks = tuple(f"arithmetic:t{i}" for i in range(10))
    keep_latents(path, KeptLatents(tasks, ("a<b>", "c") * 5, ("assistant", "user proxy"), values.astype(np.float32)))
    return path


def test_kept_latents_are_mapped_on_the_page_and_in_every_file(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "mapped", num_tasks=10, num_steps=0)
    with_latents(folder, "latent-untrained")
    with_latents(folder, "latent-lmpo", num_latents=5)
    page = Page(write_report([folder]))
    assert "latent:lmpo: latents differ by role, at the same task: separation" in page.text
    assert "No latents were kept of latent:sft, so there is no map of them" in page.text
    assert sum("Map of the latents of" in img["alt"] for img in page.all("img")) == 4
    assert (folder / "report" / "latents_1_2_domain.png").exists()
    found = json.loads((folder / "report" / "report.json").read_text())["runs"][0]
    assert [m["memory"] for m in found["latents"]] == ["latent:untrained", "latent:lmpo"]
    assert [m["num_latents"] for m in found["latents"]] == [2, 5]
    assert len(found["latents_verdict"]) == 7
    markdown = (folder / "report" / "comparison.md").read_text()
    assert "### Latents\n\n| memory | tasks | roles | K |" in markdown
    assert "- latent:lmpo: latents differ by role" in markdown


def test_damaged_latents_are_a_line_on_the_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "damaged", num_tasks=2, num_steps=0)
    path = with_latents(folder, "latent-lmpo")
    path.write_bytes(path.read_bytes()[:50])
    text = Page(write_report([folder])).text
    assert "latent-lmpo.safetensors: damaged (" in text
    assert "Map of the latents" not in text


def test_what_latents_say_is_a_table_for_each_task_and_role_and_hostile_tokens_are_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "read", num_tasks=2, num_steps=0)
    after = [
        {"gate": 1.0, "length": 0.9, "nearest": [[HOSTILE[0], 0.93], ["b", 0.02]], "frame": ["is", 0.4]},
        {"gate": 0.0, "length": 0.0, "nearest": [["is", 0.97]], "frame": None},
    ]
    roles = [{"role": "scout", "after": after, "before": None}, {"role": "<b>", "after": after, "before": after}]
    value = {"memory": "latent:lmpo", "before": "latent:untrained", "tasks": [{"task": "t1", "roles": roles}]}
    path = folder / "evaluate" / "latent-lmpo.read.json"
    path.write_text(json.dumps(value))
    page = Page(write_report([folder]))
    assert "What the latents of latent:lmpo say" in page.text
    assert "t1, scout" in page.text
    assert "t1, <b>" in page.text
    assert page.text.count(f"{HOSTILE[0]} 0.93, b 0.02") == 3
    assert page.text.count("nearest in latent:untrained") == 1
    path.write_text('{"tasks": [{"task": "t1", "roles": [{"role": "r"}]}]}')
    text = Page(write_report([folder])).text
    assert "latent-lmpo.read.json: damaged ('before'); remove it and run `latentmem evaluate` again." in text
    assert "What the latents of" not in text


def test_runs_that_differ_in_one_key_are_drawn_against_it(tmp_path: Path) -> None:
    runs = []
    for k in (4, 2):
        runs.append(make_run(tmp_path / f"k{k}", num_tasks=4, num_steps=0))
        (runs[-1] / "config.yaml").write_text(f"run: k{k}\ncomposer: {{num_latents: {k}, rank: 4}}\n")
    page = Page(write_report(runs, tmp_path / "out"))
    assert "Against composer.num_latents" in page.text
    assert "Accuracy against composer.num_latents" in page.text
    assert (tmp_path / "out" / "ablation_accuracy.png").exists()
    assert (tmp_path / "out" / "comparison.md").read_text().startswith("## Against composer.num\\_latents\n\n| ")
    (runs[1] / "config.yaml").write_text("run: k2\ncomposer: {num_latents: 2, rank: 8}\n")
    text = Page(write_report(runs, tmp_path / "two")).text
    assert "These runs differ in 2 settings (composer.num_latents, composer.rank), so none is drawn against" in text


def test_a_control_is_told_against_what_it_controls_and_against_nothing_else() -> None:
    memories = [
        memory("none"),
        memory("latent:lmpo", vs_none=against(0.2, 0.001)),
        memory("latent:lmpo:random", vs_none=against(-0.3, 0.001), vs_real=against(-0.5, 0.0001)),
        memory("latent:lmpo:other-role", vs_none=against(0.2, 0.001), vs_real=against(0.0, 1.0)),
    ]
    found = verdict({"num_tasks": 40, "memories": memories})
    assert found[1].startswith("latent:lmpo against none: +20.0 ")
    assert found[2] == (
        "latent:lmpo:random against latent:lmpo: -50.0 [-60.0, -40.0] points, worse, significant at 5% "
        "(p < 0.001 after correction for 3 comparisons)."
    )
    assert found[3] == "The other difference is not."
    assert "-50.0 [-60.0, -40.0]" in format_table({"num_tasks": 40, "memories": memories})


def carries(nats: float, low: float, high: float, num_tasks: int = 30) -> dict:
    return {"nats": nats, "low": low, "high": high, "p_value": 0.001, "num_tasks": num_tasks}


def test_what_a_memory_carries_is_said_in_words() -> None:
    memories = [
        memory("none", carried=None),
        memory("text", carried=carries(0.02, -0.1, 0.14)),
        memory("latent:untrained", carried=carries(-0.01, -0.03, 0.01)),
        memory("latent:sft", carried=carries(0.01, -0.02, 0.04)),
        memory("latent:runs/x", carried=carries(0.06, 0.01, 0.11)),
        memory("latent:lmpo", carried=carries(4.7, 4.1, 5.3)),
        memory("latent:lmpo:random"),  # as in results of older versions
    ]
    results = {"num_tasks": 40, "memories": memories}
    found = [sentence for sentence in verdict(results) if "nats" in sentence]
    told = "nats a response over another task's memory, on 30 tasks."
    assert found == [
        "text: it is open whether it carries what it read; more tasks would tell: +0.02 [-0.10, +0.14] " + told,
        f"latent:untrained carries nothing that helps: -0.01 [-0.03, +0.01] {told}",
        "latent:sft is a learned prompt at most, because its content hardly matters: +0.01 [-0.02, +0.04] " + told,
        "latent:runs/x carries a trace of what it read: +0.06 [+0.01, +0.11] nats a response over another task's "
        "memory, on 30 tasks.",
        "latent:lmpo carries what it read: +4.70 [+4.10, +5.30] nats a response over another task's memory, on 30 "
        "tasks.",
    ]
    table = format_table(results)
    assert "carried, nats [95%]" in table
    assert "+4.70 [+4.10, +5.30]" in table.split("\n\n")[0]
    assert "carried, nats" not in format_table({"num_tasks": 40, "memories": [memory("none")]})


FEW = "too few tasks to say whether it carries what it read, 16 are needed: "
NOT_ENOUGH = (
    "makes the right responses likelier by what it read, but not likely enough: none of its 40 episodes succeeded"
)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"carried": carries(4.7, 4.1, 5.3, 8)}, f"latent:x: {FEW}"),
        ({"carried": carries(0.0, 0.0, 0.0, 15)}, f"latent:x: {FEW}"),
        ({"carried": carries(4.7, 4.1, 5.3), "accuracy": 0.0}, f"latent:x {NOT_ENOUGH}; +4.70"),
        ({"carried": carries(-2.0, -3.0, -1.0)}, "latent:x makes the right responses less likely than another task's"),
        ({"carried": carries(4.7, 4.1, 5.3) | {"p_value": 0.03}}, "latent:x: it is open whether it carries what it"),
    ],
)
def test_what_is_carried_is_said_no_stronger_than_tasks_successes_and_their_number_allow(
    found: dict, said: str
) -> None:
    other = memory("latent:y", carried=carries(1.0, 0.5, 1.5) | {"p_value": 0.04})  # its test counts in the correction
    results = {"num_tasks": 40, "memories": [memory("latent:x", **found), other]}
    (sentence,) = (sentence for sentence in verdict(results) if "latent:x" in sentence)
    assert sentence.startswith(said)


def test_without_a_success_nothing_is_said_about_which_is_better() -> None:
    memories = [memory("none", accuracy=0.0), memory("text", accuracy=0.0, vs_none=against(0.0, 1.0))]
    found = verdict({"num_tasks": 40, "memories": memories})
    assert found[1] == "No memory solved any of the 40 tasks, so nothing is said about which is better."
    assert not any("significant" in sentence for sentence in found)


def test_too_few_tasks_for_any_finding_are_told() -> None:
    memories = [
        memory("none"),
        memory("text", vs_none=against(1.0, 0.0312)),  # as if each of six tasks was won
        memory("latent:x", vs_none=against(0.1, 0.6)),
    ]
    told = verdict({"num_tasks": 6, "memories": memories})[1]
    assert told == "With 6 tasks and 2 comparisons no difference could be significant at 5%; play more tasks."
    assert "text against none: +100.0" in verdict({"num_tasks": 6, "memories": memories[:2]})[1]
    memories[1]["vs_none"]["p_value"] = 2 ** (1 - 7)
    assert "significant at 5% (p = 0.031 after" in verdict({"num_tasks": 7, "memories": memories})[1]


def test_hits_and_groups_are_shown_where_tasks_have_them(tmp_path: Path) -> None:
    def share(accuracy: float | None, num_tasks: int) -> dict:
        return {"accuracy": accuracy, "low": 0.1, "high": 0.9, "num_tasks": num_tasks}

    memories = [
        memory("none", retrieval_hits=None, accuracy_hit=None, groups={"old": {**share(0.25, 8), "hit": None}}),
        memory(
            "text",
            retrieval_hits=0.75,
            accuracy_hit=share(0.5, 6),
            groups={
                "old": {**share(0.5, 8), "hit": share(0.6, 5)},
                "new": {**share(0.0, 4), "hit": share(None, 0)},
            },
        ),
    ]
    results = {"num_tasks": 12, "memories": memories}
    first, groups, *_ = format_table(results).split("\n\n")
    assert "75%" in first
    assert "50.0% [10.0, 90.0], 6" in first
    assert [line.split() for line in groups.splitlines()[1:]] == [
        ["old", "25.0%", "[10.0,", "90.0],", "8", "50.0%", "[10.0,", "90.0],", "8"],
        ["old,", "given", "a", "hit", "-", "60.0%", "[10.0,", "90.0],", "5"],
        ["new", "-", "0.0%", "[10.0,", "90.0],", "4"],
        ["new,", "given", "a", "hit", "-", "-"],
    ]
    assert "| old, given a hit | - | 60.0%" in format_markdown(results)
    run = make_run(tmp_path / "run", num_tasks=4, num_steps=0)
    whole = json.loads((run / "results.json").read_text())
    for row in whole["memories"]:
        row["groups"] = memories[1]["groups"]
        row["carried"] = carries(0.5, 0.4, 0.6)
    (run / "results.json").write_text(json.dumps(whole))
    text = Page(write_report([run], tmp_path / "out")).text
    assert "old, given a hit" in text
    assert "carries what it read: +0.50 [+0.40, +0.60] nats" in text


def test_what_latents_carry_is_drawn_over_the_steps_with_its_band() -> None:
    curve = next(c for c in curves.CURVES if (c.phase, c.key) == ("sft", "carried"))
    rows = [
        {"step": 0, "eval_loss": 1.0, "carried": 0.0, "carried_low": -0.1, "carried_high": 0.1},
        {"step": 1, "loss": 1.0},
        {"step": 2, "carried": 0.5, "carried_low": None, "carried_high": 0.6},
        {"step": 4, "carried": 1.0, "carried_low": 0.8, "carried_high": 1.2},
    ]
    assert curves._series(rows, curve) == [(0, 0.0), (2, 0.5), (4, 1.0)]
    assert curves._band(rows, curve) == [(0, -0.1, 0.1), (4, 0.8, 1.2)]
    loss = next(c for c in curves.CURVES if (c.phase, c.key) == ("sft", "loss"))
    assert curves._band(rows, loss) == []
    plain = curves._draw_curve({"a": curves._series(rows, curve)}, {"a": []}, {"a": "a"}, "light")
    banded = curves._draw_curve(
        {"a": curves._series(rows, curve)}, {"a": curves._band(rows, curve)}, {"a": "a"}, "light"
    )
    assert plain != banded


def memory(name: str, **values: object) -> dict:
    return {"name": name, "accuracy": 0.5, "accuracy_low": 0.35, "accuracy_high": 0.65, **values}


def against(difference: float, p: float) -> dict:
    return {"difference": difference, "low": difference - 0.1, "high": difference + 0.1, "p_value": p}


def test_verdict_says_when_nothing_is_significant() -> None:
    found = verdict(
        {
            "num_tasks": 40,
            "seed": 7,
            "memories": [
                memory("none"),
                memory("text", vs_none=against(-0.1, 0.4)),
                memory("latent:x", vs_none=against(0.1, 0.3), vs_text=against(0.2, 0.2)),
            ],
        }
    )
    assert found == [
        "With 40 tasks the 95% interval of an accuracy is up to ±15 points.",
        "None of the 3 differences is significant at 5% (smallest p = 0.60 after correction for 3 comparisons).",
        "The intervals cover the choice of tasks, not the luck of training: this is one seed (7).",
    ]


def test_verdict_corrects_for_the_number_of_comparisons() -> None:
    memories = [
        memory("none"),
        memory("text", vs_none=against(-0.3, 0.0001)),
        memory("latent:x", vs_none=against(0.2, 0.03), vs_text=against(0.1, 0.6)),
    ]
    found = verdict({"num_tasks": 40, "memories": memories})
    assert found[1] == (
        "text against none: -30.0 [-40.0, -20.0] points, worse, significant at 5% "
        "(p < 0.001 after correction for 3 comparisons)."
    )
    assert found[2] == "The other 2 differences are not."
    assert found[3] == "Below 5% only before that correction, and so no finding: latent:x against none (p = 0.030)."


def test_verdict_counts_text_against_none_once() -> None:
    both = [memory("none", vs_text=against(0.3, 0.04)), memory("text", vs_none=against(-0.3, 0.04))]
    found = verdict({"num_tasks": 40, "memories": both})
    assert found[1] == "text against none: -30.0 [-40.0, -20.0] points, worse, significant at 5% (p = 0.040)."


def test_verdict_tells_errors_and_unread_answers() -> None:
    found = verdict({"num_tasks": 40, "memories": [memory("none", num_errors=3, no_answer=0.45)]})
    assert "none: 3 of 40 episodes ended in an error, not an answer." in found
    assert "none: no answer could be read in 45% of the episodes." in found


def test_table_is_aligned_and_leaves_out_columns_that_nobody_has() -> None:
    memories = [
        memory("none", prompt_tokens=120.2, latent_tokens=0.0, seconds={"total": 0.5}),
        memory(
            "latent:lmpo",
            vs_none=against(0.047, 0.53),
            prompt_tokens=1220.0,
            latent_tokens=16.0,
            seconds={"total": 12.25},
        ),
    ]
    table = format_table({"num_tasks": 40, "memories": memories}).splitlines()
    assert table[:4] == [
        "memory           accuracy [95%]     vs none, points  p vs none  prompt tok  latent tok  s/task",
        "-----------  ------------------  ------------------  ---------  ----------  ----------  ------",
        "none         50.0% [35.0, 65.0]                   -          -         120           0    0.50",
        "latent:lmpo  50.0% [35.0, 65.0]  +4.7 [-5.3, +14.7]       0.53        1220          16   12.25",
    ]
    assert table[4] == ""
    assert table[5].startswith("With 40 tasks")


def test_what_memories_spend_is_a_column_and_what_they_learned_before_a_sentence() -> None:
    learning = {"num_trajectories": 16, "prompt_tokens": 3991, "generated_tokens": 1103, "seconds": 100.3,
                "malformed": {"empty brief": 1, "reply without an operation": 4}}  # fmt: skip
    memories = [
        memory("none", memory_prompt_tokens=0.0, memory_generated_tokens=0.0, learning=None),
        memory(
            "gmemory", memory_prompt_tokens=331.2, memory_generated_tokens=20.0, memory_malformed=2, learning=learning
        ),
    ]
    table = format_table({"num_tasks": 40, "memories": memories}).splitlines()
    assert [line.split("  ")[-1].strip() for line in table[:4]] == ["memory tok", "----------", "-", "331+20"]
    assert table[-3:-1] == [
        "gmemory: learned from 16 trajectories before; a language model read 3991 tokens for it and wrote 1103, in "
        "100 s; 5 of its replies, or lines of them, could not be used.",
        "gmemory: 2 replies could not be used while recalling.",
    ]


def test_markdown_escapes_what_would_break_the_table() -> None:
    lines = format_markdown({"num_tasks": 40, "memories": [memory("latent:a|b<i>_x_")]}).splitlines()
    assert lines[:3] == [
        "| memory | accuracy \\[95%\\] |",
        "| --- | ---: |",
        "| latent:a\\|b&lt;i>\\_x\\_ | 50.0% \\[35.0, 65.0\\] |",
    ]


def test_long_texts_are_cut_and_the_rest_is_counted() -> None:
    assert samples._clip("x" * 8_005) == "x" * 8_000 + "… (5 more characters)"


def test_curves_of_several_runs_are_told_apart_by_what_differs_in_their_folders():
    told = curves._told_apart(["runs/a/cells/k2", "runs/a/cells/k4", "runs/a/cells/k4/again"])
    assert list(told.values()) == ["k2", "k4", "k4/again"]
    assert list(curves._told_apart(["runs/mine"]).values()) == ["mine"]
    assert list(curves._told_apart(["/x/a", "runs/a"]).values()) == ["/x/a", "runs/a"]
