"""Two hosts against one process: two network namespaces that a cable joins stand for them, and they share the disk."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from test_recipes import results
from test_sharded_recipes import ENVIRONMENT, Launcher, assert_same_training, assert_same_trajectories, phase_metrics

pytestmark = pytest.mark.slow

ADDRESSES = ("10.77.31.1", "10.77.31.2")
STEPS = ("lmpo.num_steps=3", "lmpo.save_every=1")


def ip(words):
    done = subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no network namespaces here: `ip {words}` says {done.stderr.strip()}")


class Hosts:
    """Starts a command on two hosts, by the words of docs/training.md."""

    def __init__(self, launcher):
        self.launcher = launcher
        self.names = [f"lm{os.getpid()}-{i}" for i in (0, 1)]
        self.links = [f"lm{os.getpid() % 10**6}v{i}" for i in (0, 1)]

    def plug(self):
        ip(f"link add {self.links[0]} netns {self.names[0]} type veth peer name {self.links[1]} netns {self.names[1]}")
        for name, link, address in zip(self.names, self.links, ADDRESSES, strict=True):
            ip(f"-n {name} addr add {address}/24 dev {link}")
            ip(f"-n {name} link set {link} up")

    def unplug(self):
        subprocess.run(["ip", "-n", self.names[0], "link", "del", self.links[0]], capture_output=True, check=False)

    def __call__(self, config, *phases, deeds=()):
        """What each of the two launchers returned and said."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank, (name, link) in enumerate(zip(self.names, self.links, strict=True)):
            starter = (
                *("-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}"),
                *(f"--master_addr={ADDRESSES[0]}", f"--master_port={port}"),
            )
            words = self.launcher.words(starter, config, *phases, deeds=deeds)
            started.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *words],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": link},
                )
            )
        said = [process.communicate(timeout=580) for process in started]
        return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


@pytest.fixture(scope="module")
def launch(tmp_path_factory, tiny_model_dir):
    return Launcher(tmp_path_factory.mktemp("runs"), tiny_model_dir)


@pytest.fixture(scope="module")
def hosts(launch):
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("no network namespaces here: they need `ip` and root")
    hosts = Hosts(launch)
    try:
        for name in hosts.names:
            ip(f"netns add {name}")
            ip(f"-n {name} link set lo up")
        yield hosts
    finally:
        for name in hosts.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture
def plugged(hosts):
    hosts.plug()
    yield hosts
    hosts.unplug()


@pytest.fixture(scope="module")
def alone(launch, hosts):
    """The whole run by one process."""
    config = launch.config("alone", *STEPS)
    done = launch((), config, "collect", "sft", "lmpo", "evaluate")
    assert done.returncode == 0, done.stderr
    return config


def test_two_hosts_make_the_run_of_one_process(launch, alone, plugged):
    config = launch.config("both", *STEPS)
    (first, said, why), (second, silent, _) = plugged(config, "collect", "sft", "lmpo", "evaluate")
    assert (first, second) == (0, 0), why
    assert said.count("report: no report") == 1
    assert silent == ""
    assert_same_trajectories(config, alone)
    for phase in ("sft", "lmpo"):
        assert_same_training(config, alone, phase)
    assert results(config)["memories"][:2] == results(alone)["memories"][:2]  # those without trained weights


# Words of `train lmpo`: two to begin, two before the first step, and some ten in each.
@pytest.mark.parametrize(("deed", "lost"), [("lose", 1), ("lose", 0), ("cut", 1)])
def test_a_host_that_is_lost_in_a_step_ends_the_other_and_the_same_command_goes_on(launch, alone, plugged, deed, lost):
    config = launch.config(f"{deed}-{lost}", *STEPS)
    Path(config.run).mkdir()
    shutil.copy(Path(alone.run) / "bank.sqlite", config.run)
    ended = plugged(
        config, "lmpo", deeds=[[deed, lost, 22, *plugged.links[lost : lost + 1]][: 4 if deed == "cut" else 3]]
    )
    assert 0 < len(phase_metrics(config, "lmpo")) < 3
    lines = [[line for line in why.splitlines() if line.startswith("latentmem: ")] for _, _, why in ended]
    assert all(status != 0 for status, _, _ in ended)
    left = 1 - lost
    assert len(lines[left]) == 1
    assert "give the same command again" in lines[left][0]
    assert "Traceback" not in ended[left][2].partition("failed (exitcode: 2)")[0]  # behind it the launcher's own
    plugged.unplug()
    plugged.plug()
    again = plugged(config, "lmpo")
    assert [status for status, _, _ in again] == [0, 0], again[0][2]
    assert_same_training(config, alone, "lmpo")
