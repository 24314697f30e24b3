"""Whole runs in which a program is the team: the same curves as those of a fixed team that does the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from keepers import keepers

from latentmem import cli, recipes
from latentmem.bank import ExperienceBank
from latentmem.config import load_config
from latentmem.errors import ConfigError, RunError
from latentmem.grid.file import load_grid
from latentmem.memory_names import MemoryName
from latentmem.recipes import lessons
from latentmem.recipes.memories import memory_of
from latentmem.recipes.parts import Parts
from latentmem.rollout import prompt_of, turns
from latentmem.seeds import stream_seed
from latentmem.serving.programs.session import _digest
from latentmem.teams.team import load_team
from latentmem.trajectory import Conversation, Trajectory

CONFIG = """
run: {run}
team: {team}
model: {{name: {model}, device: cpu, dtype: float32}}
data: {{kind: "worlds:OddWorld"}}
composer:
  num_latents: 3
  rank: 2
  max_prompt_tokens: 500
  template: '{{task}} {{memory}} {{role_messages}} {{role}}'
bank: {{embedder: hashing, num_retrieved: 2, only_successes: false}}
sampling: {{temperature: 1.0, max_response_tokens: 4}}
collect: {{batch_size: 4, rollouts_per_task: 2}}
sft: {{num_steps: 2, trajectories_per_step: 2, save_every: 2}}
lmpo: {{num_steps: 3, tasks_per_step: 2, group_size: 4, save_every: 1, initial: sft, learning_rate: 1.0e-3}}
grpo: {{num_steps: 2, tasks_per_step: 2, group_size: 3, save_every: 2, rank: 2}}
evaluate: {{batch_size: 2, num_bootstraps: 50, memories: [none, text, "latent:lmpo", "latent:lmpo:other-role"]}}
"""

PHASES = {
    "collect": recipes.collect,
    "sft": recipes.train_sft,
    "lmpo": recipes.train_lmpo,
    "grpo": recipes.train_grpo,
    "evaluate": recipes.compare,
}


def program_of(function, **fields):
    return {"kind": "program", "call": f"sample_programs:{function}", "name": "ours", **fields}


def listed(name):
    return [{"name": role.name, "profile": role.profile} for role in load_team(name).roles]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(recipes.evaluate, "write_report", lambda runs: "no report")


@pytest.fixture
def configure(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def configure(run, team, *overrides):
        path = tmp_path / f"{run}.yaml"
        path.write_text(CONFIG.format(run=tmp_path / run, model=tiny_model_dir, team=json.dumps(team)))
        return load_config(str(path), list(overrides))

    return configure


def do(config, *phases):
    parts = Parts(config)
    try:
        for phase in phases:
            PHASES[phase](config, parts)
    finally:
        parts.close()


def metrics(config):
    lines = map(json.loads, (Path(config.run) / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.endswith("_seconds")} for line in lines]


def said(trajectories):
    return [
        (t.task.id, t.reward, [(m.role, m.token_ids, m.reads, m.recalled.text) for m in t.messages])
        for t in trajectories
    ]


def assert_alike(mine, theirs):
    """Two rows are the same, up to the rounding of batches of other sizes."""
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert value == (theirs[key] if isinstance(value, str) else pytest.approx(theirs[key], rel=5e-3, abs=5e-4)), key


def collected(config):
    with ExperienceBank(Path(config.run) / "bank.sqlite") as bank:
        return list(bank)


def streams_of_programs(monkeypatch):
    """Let fixed teams, each of whose agents speaks once, draw from the streams that a program's agents draw from."""

    def prompt(call, recall, group, seed):
        asked = ({"role": "system", "content": call.system}, {"role": "user", "content": call.user})
        lineage = _digest(Conversation(messages=asked))
        return prompt_of(call, recall, group, stream_seed(seed[0], "call", call.role.name, lineage, 0, 0))

    monkeypatch.setattr(turns, "stream_seed", lambda *parts: parts)
    monkeypatch.setattr(turns, "prompt_of", prompt)


def test_curves_and_trajectories_are_those_of_the_fixed_team_that_does_the_same(configure, monkeypatch):
    own = configure("own", program_of("plays_autogen", roles=listed("autogen")))
    do(own, "collect", "sft", "lmpo", "evaluate")
    streams_of_programs(monkeypatch)
    fixed = configure("fixed", "autogen")
    do(fixed, "collect", "sft", "lmpo", "evaluate")
    assert said(collected(own)) == said(collected(fixed))
    for mine, theirs in zip(metrics(own), metrics(fixed), strict=True):
        assert_alike(mine, theirs)
    assert sum(line.get("updated", 0) for line in metrics(own)) > 2  # there was something to learn
    mine, theirs = (json.loads((Path(c.run) / "results.json").read_text()) for c in (own, fixed))
    for key in ("task_ids", "num_tasks"):
        assert mine[key] == theirs[key]
    for one, other in zip(mine["memories"], theirs["memories"], strict=True):
        assert (one["name"], one["accuracy"], one["rewards"]) == (
            other["name"], other["accuracy"], other["rewards"]
        )  # fmt: skip


FACTS = """{kind: hidden_facts, attributes: 2, needs: {scout: [password], porter: [emblem]}, train_entities: 4,
test_entities: 4, values: 8}"""


def test_members_who_are_judged_one_by_one_play_hidden_facts_as_the_fixed_team_does(configure, monkeypatch):
    few = [f"data={' '.join(FACTS.split())}", "collect.num_tasks=6", 'evaluate.memories=[none, "latent:untrained"]']
    own = configure("own", program_of("plays_pair", roles=listed("pair")), *few)
    do(own, "collect", "evaluate")
    streams_of_programs(monkeypatch)
    fixed = configure("fixed", "pair", *few)
    do(fixed, "collect", "evaluate")
    assert said(collected(own)) == said(collected(fixed))
    mine, theirs = (json.loads((Path(c.run) / "results.json").read_text()) for c in (own, fixed))
    for one, other in zip(mine["memories"], theirs["memories"], strict=True):
        assert (one["name"], one["rewards"]) == (other["name"], other["rewards"])
    carried = [row["memories"][1]["carried"]["nats"] for row in (mine, theirs)]  # of responses that each acted out
    assert carried[0] == pytest.approx(carried[1], abs=1e-3)


def test_roles_that_nobody_listed_are_learned_from_and_evaluated(configure):
    config = configure(
        "found", program_of("planner_and_solver"), 'evaluate.memories=[none, text, "latent:lmpo", "latent:lmpo:empty"]'
    )
    do(config, "collect", "sft", "lmpo", "evaluate")
    updates = [line["updated"] for line in metrics(config) if line.get("phase") == "lmpo"]
    assert sum(updates) > 0
    results = json.loads((Path(config.run) / "results.json").read_text())
    (lmpo,) = [row for row in results["memories"] if row["name"] == "latent:lmpo"]
    assert lmpo["carried"] is None or lmpo["carried"]["num_tasks"] > 1
    assert {m.role for t in collected(config) for m in t.messages} == {"agent-68bc7353b4", "agent-888c1b5a1d"}


def test_the_rival_trains_on_programs_too_and_phases_end_their_programs(configure):
    config = configure("rival", program_of("planner_and_solver"))
    before = keepers()
    do(config, "collect", "grpo")
    assert keepers() <= before
    assert [line["step"] for line in metrics(config) if line["phase"] == "grpo"] == [1, 2]


def test_several_programs_share_the_work_and_another_team_is_evaluated(configure):
    several = [program_of("planner_and_solver", name="one"), program_of("plays_solo", name="two", roles=listed("solo"))]
    config = configure("several", "autogen", f"train_teams={json.dumps(several)}", "evaluate.memories=[none]")
    do(config, "collect", "evaluate")
    assert {t.team for t in collected(config)} == {"one", "two"}
    assert json.loads((Path(config.run) / "results.json").read_text())["team"] == "autogen"


def test_a_phase_that_needs_roles_beforehand_says_so_and_names_the_remedy(configure):
    config = configure("unknown", program_of("planner_and_solver"))
    parts = Parts(config)
    with pytest.raises(ConfigError, match=r"other-role needs the roles beforehand, and program ours lists none"):
        memory_of(parts, MemoryName.parse("latent:untrained:other-role"))
    parts.close()
    judged = ["data={kind: hidden_facts, needs: {scout: [color]}, attributes: 3}"]
    with pytest.raises(ConfigError, match=r"data.needs: role 'scout' is judged, and program ours does not list it"):
        Parts(configure("judged", program_of("planner_and_solver"), *judged))


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (
            "raises",
            "latentmem: collect: all 16 episodes ended in an error, the last with: program: ValueError: the program "
            "broke in two lines; mend that, and name a new run folder with run=FOLDER",
        ),
        (
            "makes_no_call",
            "latentmem: collect: in none of 16 episodes an agent spoke, so nothing can be learned; mend that, and "
            "name a new run folder with run=FOLDER",
        ),
    ],
)
def test_episodes_that_all_failed_are_stored_and_the_status_keeps_a_script_from_going_on(
    configure, tmp_path, capsys, function, told
):
    config = configure("run", program_of(function))
    for _ in range(2):  # a finished phase says so again
        assert cli.main(["collect", str(tmp_path / "run.yaml")]) == 1
        assert capsys.readouterr().err.splitlines()[-1] == told
    assert collected(config)


@pytest.mark.parametrize("phase", ["lmpo", "grpo"])
def test_a_training_by_reward_whose_episodes_all_failed_ends_with_status_1(configure, tmp_path, capsys, phase):
    do(configure("run", program_of("plays_autogen")), "collect")
    configure("run", program_of("raises"))
    command = ["train", phase, str(tmp_path / "run.yaml"), "lmpo.initial=untrained"]
    for cause in (", the last with: program: ValueError: the program broke in two lines", ""):
        assert cli.main(command) == 1
        n = {"lmpo": 3 * 2 * 4, "grpo": 2 * 2 * 3}[phase]
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"latentmem: {phase}: all {n} episodes ended in an error{cause}; nothing was learned; mend that, and name "
            "a new run folder with run=FOLDER"
        )


def test_an_evaluation_whose_episodes_all_failed_keeps_its_table_and_ends_with_status_1(configure, tmp_path, capsys):
    config = configure("run", program_of("raises"))
    assert cli.main(["evaluate", str(tmp_path / "run.yaml"), "evaluate.memories=[none]"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "all 4 episodes ended in an error, the last with: program: ValueError: the program broke in two" in told
    assert (Path(config.run) / "results.json").is_file()


def test_a_program_plays_one_turn(configure):
    with pytest.raises(ConfigError, match="max_turns is 3, but team ours is a program, which plays an episode in"):
        Parts(configure("turns", program_of("plays_solo"), "max_turns=3"))


def test_another_program_is_another_run_but_how_many_play_at_once_may_change(configure):
    do(configure("same", program_of("plays_solo"), "collect.num_tasks=4"), "collect")
    do(configure("same", program_of("plays_solo", parallel=2, timeout_seconds=9.0), "collect.num_tasks=4"), "collect")
    with pytest.raises(RunError, match=r"team\.call was 'sample_programs:plays_solo' when this phase was started"):
        do(configure("same", program_of("streams"), "collect.num_tasks=4"), "collect")


def test_a_grid_plays_programs_beside_fixed_teams(tmp_path, tiny_model_dir):
    values = yaml.safe_load(CONFIG.format(run=tmp_path / "grid", model=tiny_model_dir, team="autogen"))
    del values["data"], values["team"], values["evaluate"]
    data = {"data": {"kind": "worlds:OddWorld"}}
    grid = load_grid(
        {**values, "grid": {"benchmarks": {"odd": data}, "teams": ["autogen", program_of("plays_solo")]}}, "grid.yaml"
    )
    assert [run.place.name for run in grid.runs] == ["odd-autogen-seed0", "odd-ours-seed0"]
    assert grid.runs[1].config.team.call == "sample_programs:plays_solo"
    assert [run.bank.config.team == run.config.team for run in grid.runs] == [True, True]


def test_a_grid_of_a_program_and_a_team_is_played_and_reported(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    values = yaml.safe_load(CONFIG.format(run=tmp_path / "grid", model=tiny_model_dir, team="autogen"))
    del values["data"], values["team"], values["evaluate"]
    teams = ["solo", program_of("plays_solo", roles=listed("solo"))]
    grid = {"benchmarks": {"odd": {"data": {"kind": "worlds:OddWorld"}}}, "teams": teams, "memories": ["none", "text"]}
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.dump({**values, "grid": grid, "evaluate": {"num_bootstraps": 50}}))
    assert cli.main(["evaluate", str(path)]) == 0
    table = json.loads((tmp_path / "grid" / "grid.json").read_text())
    assert table["grid"]["teams"] == ["solo", "ours"]
    assert [(cell["team"], cell["memory"]) for cell in table["cells"]] == [
        (team, memory) for team in ("solo", "ours") for memory in ("none", "text")
    ]
    assert cli.main(["evaluate", str(path)]) == 0  # and does not play again
    assert cli.main(["report", str(tmp_path / "grid")]) == 0


def test_plan_and_prompts_know_programs(configure, capsys):
    config = configure("shown", program_of("planner_and_solver"))
    recipes.show_prompts(config, memory="none")
    out = capsys.readouterr().out
    assert "You plan." in out
    assert "sample_programs:planner_and_solver" in out
    assert recipes.Planner(config).messages == 1


def test_hidden_facts_are_learned_from_demonstrations_that_a_program_acted_out(tmp_path, wordy_model_dir, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    team = program_of("plays_solo", parallel=4)  # roles are found while playing
    overrides = [
        f"run={tmp_path / 'facts'}",
        f"model.name={wordy_model_dir}",
        "model.device=cpu",
        "bank.embedder=hashing",
        f"team={json.dumps(team)}",
        "sft.demonstrations=domain",
        "warmup.lessons_per_step=8",
        'evaluate.memories=[none, text, "latent:lmpo", "latent:lmpo:irrelevant"]',
    ]
    config = load_config("quickstart-short", overrides)
    recipes.quickstart(config)
    results = json.loads((tmp_path / "facts" / "results.json").read_text())
    rows = {row["name"]: row for row in results["memories"]}
    assert rows["latent:lmpo"]["carried"]["num_tasks"] == 8  # the right responses, acted out by the program
    with monkeypatch.context() as patched:  # they are kept, and not acted out again
        patched.setattr(lessons, "demonstrate", None)
        recipes.compare(config)
    assert json.loads((tmp_path / "facts" / "results.json").read_text()) == results
    kept = tmp_path / "facts" / "evaluate" / "right.responses"
    of, *right = kept.read_bytes().splitlines()
    kept.write_bytes(b"of other demonstrations\n")
    recipes.compare(config)
    of_again, *again = kept.read_bytes().splitlines()
    assert of_again == of
    assert [Trajectory.from_json(line).id for line in again] == [Trajectory.from_json(line).id for line in right]
    assert {line.get("phase") for line in metrics(config)} >= {"collect", "warmup", "sft", "lmpo"}


def assert_no_program_runs():
    """Programs end with the process that started them; theirs are told by the folder of the sample programs."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        commands = [_command(path) for path in Path("/proc").glob("[0-9]*")]
        if not any(b"sample_programs:planner_and_solver" in command for command in commands):
            return
        time.sleep(0.05)
    raise AssertionError("a program still runs")


def _command(process):
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


KILLED = """
import os, sys
from latentmem.serving.programs.desk import ProgramDesk
left, admit = [int(sys.argv.pop(1))], ProgramDesk.admit
async def admit_or_die(self, who, ask):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), 9)
    return await admit(self, who, ask)
ProgramDesk.admit = admit_or_die
from latentmem.cli import main
main()
"""
"""The command, killed when its programs make the request of this number: programs are running then."""


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "moments"), [("collect", (13, 7)), ("lmpo", (20, 10))])
def test_a_run_that_is_killed_goes_on_with_the_same_command_and_ends_the_same(configure, tmp_path, phase, moments):
    team = program_of("planner_and_solver", parallel=3)
    whole, killed = configure("whole", team), configure("killed", team)
    before = [] if phase == "collect" else ["collect", "sft"]
    do(whole, *before, phase)
    do(killed, *before) if before else None
    words = ["collect"] if phase == "collect" else ["train", phase]
    for moment in moments:
        command = [sys.executable, "-c", KILLED, str(moment), *words, str(tmp_path / "killed.yaml")]
        ended = subprocess.run(command, env=os.environ, cwd=Path(__file__).parent, capture_output=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert_no_program_runs()
    do(killed, phase)
    assert said(collected(killed)) == said(collected(whole))
    assert [line["step"] for line in metrics(killed)] == [line["step"] for line in metrics(whole)]
    for mine, theirs in zip(metrics(killed), metrics(whole), strict=True):
        assert_alike(mine, theirs)
