"""How processes agree on passes, as threads; test_sharded_training.py and test_sharded_recipes.py spread models."""

import random
import threading
from types import SimpleNamespace

import pytest
import torch

from latentmem.errors import ModelError
from latentmem.models import sharding
from latentmem.models.language_model import LanguageModel


class Layer:
    """Notes down when its parts are sent."""

    def __init__(self, name, sent):
        self.name, self.sent = name, sent

    def unshard(self):
        self.sent.append(self.name)

    def reshard(self):
        assert self.sent[-1] == self.name

    def reset_iter_state(self):
        pass


def meet(monkeypatch, works, num_models=2):
    """What each of several processes sent, where `works` are the passes that each makes before the one exchange."""
    barrier, table = threading.Barrier(len(works)), {}

    def all_reduce(number, operation, group):
        assert operation == torch.distributed.ReduceOp.MIN
        table[group] = int(number)
        barrier.wait(timeout=60)
        number.fill_(min(table.values()))
        barrier.wait(timeout=60)

    monkeypatch.setattr(
        sharding, "distributed", SimpleNamespace(all_reduce=all_reduce, ReduceOp=torch.distributed.ReduceOp)
    )
    sent = [[] for _ in works]

    def run(rank):
        meeting = sharding._Meeting.__new__(sharding._Meeting)
        meeting.group, meeting.seen, meeting.passes = rank, set(), []
        for model in range(num_models):
            base = torch.nn.Module()
            meeting.add(SimpleNamespace(base_model=base), [Layer((model, i), sent[rank]) for i in range(3)])
        for kind in works[rank]:
            meeting.agree(kind)
            for layer in meeting.passes[kind]:
                layer.unshard()
                layer.reshard()
        meeting.end()
        sent[rank].append("exchange")

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    return sent


@pytest.mark.parametrize("seed", range(20))
def test_whatever_passes_processes_make_all_send_the_same_layers_in_the_same_order(monkeypatch, seed):
    chance = random.Random(seed)
    works = [[chance.randrange(4) for _ in range(chance.randrange(7))] for _ in range(3)]
    sent = meet(monkeypatch, works)
    assert sent[0] == sent[1] == sent[2]
    assert sent[0][-1] == "exchange"
    for work in works:  # enough was sent for each, in its own order
        rest = iter(sent[0])
        for kind in work:
            model, backward = divmod(kind, 2)
            layers = [(model, i) for i in range(3)]
            assert all(layer in rest for layer in (layers[::-1] if backward else layers))


def test_equal_work_is_done_at_once_and_a_backward_pass_waits_for_forward_passes(monkeypatch):
    forward, backward = [(0, 0), (0, 1), (0, 2)], [(0, 2), (0, 1), (0, 0)]
    expected = [*forward, *forward, *backward, "exchange"]
    assert meet(monkeypatch, [[0, 0, 1], [0, 0, 1]]) == [expected] * 2
    assert meet(monkeypatch, [[0, 1], [0, 0, 1]]) == [expected] * 2


def test_a_process_alone_keeps_the_whole_model(tiny_model_dir):
    whole = LanguageModel.from_pretrained(str(tiny_model_dir), "cpu")
    model = LanguageModel.from_pretrained(str(tiny_model_dir), "cpu", place=sharding.shard)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], weight)
    assert sharding._meeting is None
    sharding.end_passes()


def test_a_model_without_a_list_of_layers_is_refused():
    model = SimpleNamespace(base_model=SimpleNamespace(h=[]))
    with pytest.raises(ModelError, match=r"no list of decoder layers .*launch with --multi_gpu"):
        sharding.shard(model, torch.device("cpu"))
