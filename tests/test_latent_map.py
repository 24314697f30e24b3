"""Maps of latents: the sentences follow from latents that were made to separate, or not."""

import numpy as np
import pytest

from latentmem.kept_latents import KeptLatents
from latentmem.report.latent_map import draw_maps, latent_cells, latents_as_json, map_findings, map_latents


def kept(role: float, domain: float, task: float, rest: float, num_roles: int = 2, num_domains: int = 2) -> KeptLatents:
    """24 tasks; the size of each source of difference is given, on top of latents of length about 16."""
    rng = np.random.default_rng(4)
    domains = [f"d{i % num_domains}" for i in range(24)]
    by_domain = {name: rng.standard_normal((1, 2, 128)) for name in sorted(set(domains))}
    latents = np.ones((24, num_roles, 2, 128)) + role * rng.standard_normal((1, num_roles, 2, 128))
    latents = latents + domain * np.stack([by_domain[name] for name in domains])
    latents = latents + task * rng.standard_normal((24, 1, 2, 128))
    latents = latents + rest * rng.standard_normal((24, num_roles, 2, 128))
    roles = tuple(f"role {i}" for i in range(num_roles))
    return KeptLatents(tuple(map(str, range(24))), tuple(domains), roles, latents.astype(np.float32))


def test_latents_that_differ_by_role_and_domain_are_told_so() -> None:
    found = map_findings([map_latents("latent:lmpo", kept(role=0.3, domain=0.3, task=0.02, rest=0.02))])
    assert found[1].startswith("latent:lmpo: latents differ by role, at the same task: separation 0.9")
    assert found[1].endswith("(p < 0.001 after correction for 2 tests).")
    assert found[2].startswith("latent:lmpo: latents differ by domain: separation 0.9")
    assert found[3].startswith("That latents differ does not mean that the difference helps")


def test_latents_that_differ_by_task_alone_are_told_so() -> None:
    found = map_findings([map_latents("latent:sft", kept(role=0, domain=0, task=0.3, rest=0.03))])
    assert "latent:sft: no difference was found by role, at the same task: separation 0.0" in found[1]
    assert "latent:sft: no difference was found by domain: separation 0.0" in found[2]
    assert "0% lies between roles" in found[0]
    # Chance puts one part in 23 of 24 tasks between two domains; of the rest 0.3^2 of 0.3^2 + 0.03^2 is the tasks'.
    assert "5% between domains, 95% between tasks of one domain, 1% is" in found[0]


def test_a_composer_that_gives_the_same_to_everything_is_a_finding() -> None:
    m = map_latents("latent:untrained", kept(0, 0, 0, 0))
    assert map_findings([m]) == ["latent:untrained: its latents are the same for every task and every role."]
    assert latent_cells([m])[1][:5] == ["latent:untrained", "24", "2", "2", "0%"]
    assert len(draw_maps(m, "x")) == 2


def test_p_values_are_corrected_for_all_memories_of_the_run() -> None:
    maps = [map_latents(f"latent:{i}", kept(0.3, 0.3, 0.1, 0.1)) for i in range(3)]
    assert sum("after correction for 6 tests" in sentence for sentence in map_findings(maps)) == 6


def test_one_role_and_one_domain_are_not_tested_and_have_no_map() -> None:
    m = map_latents("latent:x", kept(0.3, 0, 0.3, 0.3, num_roles=1, num_domains=1))
    (sentence,) = map_findings([m])
    assert "between domains" not in sentence
    assert "between tasks," in sentence
    assert draw_maps(m, "x") == []
    assert latent_cells([m])[1][9:] == ["-"] * 6
    assert latents_as_json(m)["by_role"] is None


def test_memories_of_different_k_have_a_map_each() -> None:
    narrow, wide = kept(0.3, 0, 0.1, 0.1), kept(0.3, 0, 0.1, 0.1)
    narrow = KeptLatents(narrow.tasks, narrow.domains, narrow.roles, narrow.latents[:, :, :1])
    maps = [map_latents("latent:a", narrow), map_latents("latent:b", wide)]
    assert [row[3] for row in latent_cells(maps)] == ["K", "1", "2"]


def test_the_map_puts_each_role_on_its_side_and_says_so_in_words() -> None:
    m = map_latents("latent:lmpo", kept(role=0.3, domain=0, task=0.02, rest=0.02))
    first, second = m.coordinates[:, 0, 0], m.coordinates[:, 1, 0]
    assert max(first) < 0 < min(second) or max(second) < 0 < min(first)
    assert m.explained[0] > 0.8
    picture = draw_maps(m, "latents_1_1")[0]
    assert picture.name == "latents_1_1_role"
    assert picture.title.startswith("latent:lmpo, by role: separation 1.00")
    assert "Map of the latents of latent:lmpo at 24 tasks, coloured by role" in picture.alt
    assert picture.png["light"] != picture.png["dark"]


def test_numbers_are_kept_as_json() -> None:
    found = latents_as_json(map_latents("latent:lmpo", kept(0.3, 0.1, 0.1, 0.1)))
    assert found["roles"] == ["role 0", "role 1"]
    assert found["domains"] == ["d0", "d1"]
    assert sum(found["shares"][part] for part in ("role", "domain", "task", "rest")) == pytest.approx(1)
