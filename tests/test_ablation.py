"""Ablations: which key differs is found, and what is drawn against it is what the runs say."""

from typing import Any

import pytest

from latentmem.report.ablation import ablation_cells, differing_keys, draw_ablation, find_ablation


def config(num_latents: Any = 8, **keys: Any) -> str:
    return f"run: runs/{num_latents}\nseed: 0\ncomposer: {{num_latents: {num_latents}, template: null}}\n" + "".join(
        f"{key}: {value}\n" for key, value in keys.items()
    )


def results(accuracy: float, reward: float | None = None) -> dict[str, Any]:
    rows = []
    for name, more in (("none", 0.0), ("latent:sft", 0.2)):
        row: dict[str, Any] = {"name": name}
        for measure, mean in (("accuracy", accuracy + more), ("reward", reward or accuracy + more)):
            row |= {measure: mean, f"{measure}_low": mean - 0.1, f"{measure}_high": mean + 0.1}
        rows.append(row)
    return {"memories": rows}


NAMES = ["a", "b", "c"]


def test_the_one_key_that_differs_is_found_and_numbers_are_put_in_order() -> None:
    found = find_ablation(NAMES, [config(16), config(2), config(8)], [results(0.3), results(0.1), results(0.2)])
    assert found is not None
    assert (found.key, found.values) == ("composer.num_latents", [2, 8, 16])
    assert [(p.run, p.memory, p.value, p.mean, p.low) for p in found.points["accuracy"]][:2] == [
        ("a", "none", 16, 0.3, pytest.approx(0.2)),
        ("a", "latent:sft", 16, 0.5, pytest.approx(0.4)),
    ]


def test_seeds_names_and_memories_may_differ_beside_it() -> None:
    texts = [config(2, seed=1), config(2, seed=2), config(4, seed=1)]
    found = find_ablation(NAMES, [t.replace("seed: 0\n", "") for t in texts], [results(0.1)] * 3)
    assert found is not None
    assert found.values == [2, 4]
    assert len(found.points["accuracy"]) == 6
    assert [row[:2] for row in ablation_cells(found)] == [
        ["composer.num_latents", "run"], ["2", "a"], ["2", "b"], ["4", "c"],
    ]  # fmt: skip
    lists = [config(evaluate="{memories: [none]}"), config(evaluate="{memories: [text]}")]
    assert differing_keys(lists) == {}


def test_a_bank_that_lies_elsewhere_because_it_was_filled_otherwise_is_no_second_key() -> None:
    def at(path: str, num_latents: int = 8, **keys: Any) -> str:
        return config(num_latents, bank=f"{{path: {path}}}", **keys)

    sizes = [at("a", collect="{num_tasks: 6}"), at("b", collect="{num_tasks: 12}")]
    assert differing_keys(sizes) == {"collect.num_tasks": [6, 12]}
    apart = [config(bank=f"{{path: {path}, experience_tasks: {num}}}") for path, num in (("a", 0), ("b", 6))]
    assert differing_keys(apart) == {"bank.experience_tasks": [0, 6]}
    seeds = [at("a", 2), at("b", 2).replace("seed: 0", "seed: 1"), at("a", 4)]
    assert differing_keys(seeds) == {"composer.num_latents": [2, 2, 4]}
    given = [at("a", 2), at("b", 4)]  # what fills them is the same: two banks that somebody chose
    assert differing_keys(given) == {"composer.num_latents": [2, 4], "bank.path": ["a", "b"]}


def test_two_keys_or_none_make_no_ablation() -> None:
    two = [config(2, max_turns=1), config(4, max_turns=2)]
    assert differing_keys(two) == {"composer.num_latents": [2, 4], "max_turns": [1, 2]}
    assert find_ablation(NAMES[:2], two, [results(0.1)] * 2) is None
    assert find_ablation(NAMES[:2], [config(), config()], [results(0.1)] * 2) is None
    assert find_ablation(NAMES[:1], [config()], [results(0.1)]) is None
    assert find_ablation([], [], []) is None


def test_a_key_that_an_older_run_does_not_know_is_no_difference_and_damaged_yaml_is_none() -> None:
    assert differing_keys([config(), config(new_key=3)]) == {}
    assert differing_keys([config(2), "a: [\n"]) == {}
    assert differing_keys([config(2), "just text\n"]) == {}


def test_words_keep_the_order_in_which_runs_were_named_and_lists_are_values() -> None:
    texts = [config(composer_base=word) for word in ("zeta", "alpha", "[a, b]")]
    found = find_ablation(NAMES, texts, [results(0.1)] * 3)
    assert found is not None
    assert found.values == ["zeta", "alpha", ["a", "b"]]
    assert len(draw_ablation(found)) == 1


def test_the_table_has_a_column_for_each_memory_and_gaps_where_one_was_not_played() -> None:
    partial = {"memories": results(0.5)["memories"][:1]}
    found = find_ablation(NAMES[:2], [config(2), config(4)], [partial, results(0.4)])
    assert found is not None
    assert ablation_cells(found) == [
        ["composer.num_latents", "run", "none", "latent:sft"],
        ["2", "a", "50.0% [40.0, 60.0]", "-"],
        ["4", "b", "40.0% [30.0, 50.0]", "60.0% [50.0, 70.0]"],
    ]


def test_the_reward_is_drawn_where_it_says_more_than_the_accuracy() -> None:
    def pictures(*found: dict) -> list[str]:
        ablation = find_ablation(NAMES[:2], [config(2), config(4)], found)
        assert ablation is not None
        return [picture.name for picture in draw_ablation(ablation)]

    assert pictures(results(0.1), results(0.2)) == ["ablation_accuracy"]
    assert pictures(results(0.1, 0.4), results(0.2, 0.3)) == ["ablation_accuracy", "ablation_reward"]
    assert pictures({"memories": [{"name": "none"}]}, {}) == []


def test_a_picture_says_its_numbers_in_words() -> None:
    found = find_ablation(NAMES[:2], [config(2), config(4)], [results(0.1), results(0.2)])
    assert found is not None
    picture = draw_ablation(found)[0]
    assert picture.title == "Accuracy against composer.num_latents"
    assert "none at 2: 10.0% [0.0, 20.0]; latent:sft at 2: 30.0% [20.0, 40.0]; none at 4:" in picture.alt
    assert all(content.startswith(b"\x89PNG") for content in picture.png.values())
