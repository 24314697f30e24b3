"""What processes share and tell each other, alone and as threads; test_sharded_recipes.py launches real ones."""

from importlib.resources import files

import pytest
import torch
import yaml

from latentmem import processes as module
from latentmem.errors import ConfigError, DataError, RunError
from latentmem.processes import Processes, sharding_asked
from peers import together


def test_alone_everything_is_its_own() -> None:
    processes = Processes()
    assert (processes.rank, processes.size, processes.is_first) == (0, 1, True)
    assert processes.shard([1, 2, 3]) == [1, 2, 3]
    assert processes.gather([1, 2]) == [1, 2]
    assert processes.map(str, [1, 2]) == ["1", "2"]
    assert processes.from_first(lambda: 7) == 7
    assert processes.sum({"a": 1.5, "b": 2.0}) == {"a": 1.5, "b": 2.0}
    parameter = torch.nn.Parameter(torch.ones(2))
    processes.sum_gradients([parameter])
    assert parameter.grad is None


def test_shares_hold_each_item_once_whatever_their_number() -> None:
    processes = Processes()
    for size in (1, 2, 3, 5):
        shares = []
        for rank in range(size):
            processes.rank, processes.size = rank, size
            shares.append(processes.shard(range(7)))
        assert sorted(item for share in shares for item in share) == list(range(7))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("num_items", [0, 1, 2, 3, 7])
def test_a_map_does_each_item_once_and_all_know_the_results_in_order(num_items):
    done = []

    def square(number):
        done.append(number)
        return number * number

    found = together(3, lambda peer: peer.map(square, range(num_items)))
    assert found == [[number * number for number in range(num_items)]] * 3
    assert sorted(done) == list(range(num_items))


def test_only_the_first_makes_what_it_tells_to_all():
    made = []
    assert together(3, lambda peer: peer.from_first(lambda: made.append(peer.rank) or "x")) == ["x"] * 3
    assert made == [0]


def test_gathered_items_and_sums_are_those_of_all_processes():
    assert together(3, lambda peer: peer.gather([peer.rank] * peer.rank)) == [[1, 2, 2]] * 3
    assert together(3, lambda peer: peer.sum({"a": peer.rank, "b": 1.5})) == [{"a": 3, "b": 4.5}] * 3


# Mistakes


@pytest.fixture
def no_delay(monkeypatch):
    monkeypatch.setattr(module, "_SILENT_SECONDS", 0.0)


@pytest.mark.parametrize("when", ["before any exchange", "between exchanges", "after the last exchange"])
@pytest.mark.parametrize("mistaken", [{0}, {2}, {1, 2}])
def test_a_mistake_is_raised_once_and_the_others_leave_with_status_2(no_delay, mistaken, when):
    def act(peer):
        with peer.one_fate():
            for moment in ("before any exchange", "between exchanges", "after the last exchange"):
                if moment == when and peer.rank in mistaken:
                    raise (RunError if peer.is_first else DataError)(f"rank {peer.rank} stumbles")
                if moment != "after the last exchange":
                    peer.wait()

    outcomes = together(3, act)
    for rank, outcome in enumerate(outcomes):
        if rank == min(mistaken):
            assert isinstance(outcome, RunError if rank == 0 else DataError)
            assert str(outcome) == f"rank {rank} stumbles"
        else:
            assert isinstance(outcome, SystemExit)
            assert outcome.code == 2


def test_a_bug_is_no_mistake_and_keeps_its_own_exception():
    def act(peer):
        with peer.one_fate():
            if peer.rank == 1:
                raise ZeroDivisionError
            peer.wait()

    assert isinstance(together(2, act)[1], ZeroDivisionError)


# What the launcher asks for


@pytest.fixture
def launched(monkeypatch):
    """Sets what accelerate's launcher sets for a packaged configuration; test_sharded_recipes.py really launches."""

    def launched(name, **changes):
        values = yaml.safe_load((files("latentmem") / f"configs/accelerate/{name}.yaml").read_text())
        monkeypatch.setenv(f"ACCELERATE_USE_{values['distributed_type']}", "true")
        for key, value in values.get("fsdp_config", {}).items():
            monkeypatch.setenv(key.upper(), str(value).lower())
        for key, value in changes.items():
            monkeypatch.setenv(key, value)

    return launched


def test_without_accelerate_nothing_is_spread():
    assert sharding_asked() == "none"


def test_the_packaged_launch_is_taken_as_what_it_is_called(launched):
    launched("fsdp")
    assert sharding_asked() == "fsdp"


def test_a_launch_by_deepspeed_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"launched with DeepSpeed, which is not used here: .* --multi_gpu"):
        sharding_asked()


@pytest.mark.parametrize(
    ("name", "key", "found", "honoured"),
    [
        ("fsdp", "FSDP_VERSION", "1", "2"),
        ("fsdp", "FSDP_RESHARD_AFTER_FORWARD", "false", "true"),
        ("fsdp", "FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "TRANSFORMER_BASED_WRAP"),
        ("fsdp", "FSDP_OFFLOAD_PARAMS", "true", "false"),
        ("fsdp", "FSDP_ACTIVATION_CHECKPOINTING", "true", "false"),
        ("fsdp", "FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "false"),
    ],
)
def test_what_would_silently_not_happen_is_refused_by_its_name(launched, name, key, found, honoured):
    launched(name, **{key: found})
    told = rf"launched with \w+ and {key}={found}; here it works with {honoured} only: .*accelerate/{name}\.yaml"
    with pytest.raises(ConfigError, match=told):
        sharding_asked()
