"""What memories spend adds up, and can be taken apart again."""

from latentmem.memory.memory import NoMemory, Recall, Recalls, Spent
from latentmem.trajectory import Recalled, Role, Task


def test_sums_and_what_came_since() -> None:
    first = Spent(1, 10, 3, 0, {"empty": 1}, 0.5)
    second = Spent(2, 5, 4, 1, {"empty": 2, "odd": 1}, 0.25)
    total = first + second
    assert total == Spent(3, 15, 7, 1, {"empty": 3, "odd": 1}, 0.75)
    assert total.num_malformed == 4
    assert total - first == second
    assert total - second == first  # a reason that is gone stands no longer there
    assert total - total == Spent()


def test_recalls_are_a_sequence_in_the_order_of_the_queries() -> None:
    texts = ["a", "b", "c"]
    recalls = Recalls([Recall(Recalled(kind="text", text=text)) for text in texts], Spent(1))
    assert [recall.record.text for recall in recalls] == texts
    assert (len(recalls), recalls[1].record.text, recalls[-1].record.text) == (3, "b", "c")
    assert [recall.record.text for recall in recalls[1:]] == texts[1:]
    asked = [(Task(id=str(i), domain="d", text="t"), Role(name="a", profile="p")) for i in range(2)]
    assert len(NoMemory().recall_many(asked)) == 2
    assert NoMemory().recall_many(asked).spent == Spent()
