"""A memory's kept latents as a map and in words: do they differ by role, by domain, or from task to task at all?

The map is for the eye and shows two axes out of thousands. The sentences rest on the numbers of `separation`, which use
all axes; `map_findings` alone derives them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from latentmem.kept_latents import KeptLatents
from latentmem.report.figures import COLOURS, MARKERS, THEMES, Picture, add_legend, dress, in_both_themes, label, png
from latentmem.report.separation import (
    Array,
    Separation,
    Shares,
    principal_axes,
    separation_by_domain,
    separation_by_role,
    shares,
)
from latentmem.stats import holm

NUM_PERMUTATIONS = 2_000
"""Permutations behind each p-value."""


@dataclass(frozen=True)
class LatentMap:
    """The analysis of one memory's latents."""

    memory: str
    kept: KeptLatents
    shares: Shares
    by_role: Separation | None
    """Separation of roles at the same task; None if the team has one role."""
    by_domain: Separation | None
    """Separation of domains; None if all tasks are of one domain."""
    coordinates: Array
    """[T, R, 2]: positions on the two axes along which the latents vary most."""
    explained: Array
    """[2]: share of the variance on each axis."""


def map_latents(memory: str, kept: KeptLatents) -> LatentMap:
    """Compute everything that is shown of one memory's latents."""
    num_tasks, num_roles = kept.latents.shape[:2]
    latents = kept.latents.reshape(num_tasks, num_roles, -1).astype(np.float64)
    coordinates, explained = principal_axes(latents.reshape(num_tasks * num_roles, -1))
    return LatentMap(
        memory=memory,
        kept=kept,
        shares=shares(latents, kept.domains),
        by_role=separation_by_role(latents, NUM_PERMUTATIONS, seed=0),
        by_domain=separation_by_domain(latents, kept.domains, NUM_PERMUTATIONS, seed=0),
        coordinates=coordinates.reshape(num_tasks, num_roles, 2),
        explained=explained,
    )


def map_findings(maps: Sequence[LatentMap]) -> list[str]:
    """Return sentences that the numbers support; p-values are corrected for all tests of these memories (Holm)."""
    tests = [found for m in maps for found in (m.by_role, m.by_domain) if found is not None and m.shares.varying]
    adjusted = iter(holm([found.p_value for found in tests]))
    corrected = f" after correction for {len(tests)} tests" if len(tests) > 1 else ""
    sentences: list[str] = []
    for m in maps:
        if not m.shares.varying:
            sentences.append(f"{m.memory}: its latents are the same for every task and every role.")
            continue
        sentences.append(f"{m.memory}: {_variation(m)}")
        for what, found in (("role, at the same task", m.by_role), ("domain", m.by_domain)):
            if found is not None:
                p = next(adjusted)
                differ = "latents differ by" if p < 0.05 else "no difference was found by"
                sentences.append(
                    f"{m.memory}: {differ} {what}: separation {found.score:.3f}, where chance gives {found.chance:.3f} "
                    f"(p {f'= {p:.3f}' if p >= 0.001 else '< 0.001'}{corrected})."
                )
    if tests:
        sentences.append(
            "That latents differ does not mean that the difference helps; whether it does is what the controls "
            "other-role, irrelevant and random are for."
        )
    return sentences


def _variation(m: LatentMap) -> str:
    parts = [(m.shares.role, "lies between roles")]
    one_domain = len(set(m.kept.domains)) < 2
    if not one_domain:
        parts.append((m.shares.domain, "between domains"))
    parts.append((m.shares.task, "between tasks" if one_domain else "between tasks of one domain"))
    parts.append((m.shares.rest, "is what a role has of a task that others have not"))
    told = ", ".join(f"{100 * share:.0f}% {where}" for share, where in parts)
    return f"{_percent(m.shares.varying)} of its latents' squared length varies with task and role. Of that {told}."


def latent_cells(maps: Sequence[LatentMap]) -> list[list[str]]:
    """Return header and rows of the table."""
    header = ["memory", "tasks", "roles", "K", "varies", "role", "domain", "task", "rest",
              "separation by role", "chance", "p", "by domain", "chance", "p"]  # fmt: skip
    rows = [header]
    for m in maps:
        num_tasks, num_roles, num_latents, _ = m.kept.latents.shape
        row = [m.memory, str(num_tasks), str(num_roles), str(num_latents), _percent(m.shares.varying)]
        row += [_percent(share) for share in (m.shares.role, m.shares.domain, m.shares.task, m.shares.rest)]
        for found in (m.by_role, m.by_domain):
            row += ["-"] * 3 if found is None else [f"{found.score:.3f}", f"{found.chance:.3f}", _p(found.p_value)]
        rows.append(row)
    return rows


def latents_as_json(m: LatentMap) -> dict[str, Any]:
    """Return the numbers of one map as JSON values."""
    return {
        "memory": m.memory,
        "num_tasks": len(m.kept.tasks),
        "roles": list(m.kept.roles),
        "domains": sorted(set(m.kept.domains)),
        "num_latents": m.kept.latents.shape[2],
        "shares": vars(m.shares),
        "by_role": None if m.by_role is None else vars(m.by_role),
        "by_domain": None if m.by_domain is None else vars(m.by_domain),
    }


def draw_maps(m: LatentMap, name: str) -> list[Picture]:
    """Draw the map coloured by role and by domain, each if there is more than one.

    Args:
        m: the map to draw.
        name: the beginning of the pictures' names.
    """
    num_tasks, num_roles = m.coordinates.shape[:2]
    colourings: dict[str, tuple[list[list[str]], Separation | None]] = {
        "role": ([list(m.kept.roles)] * num_tasks, m.by_role),
        "domain": ([[domain] * num_roles for domain in m.kept.domains], m.by_domain),
    }
    pictures = []
    for what, (labels, found) in colourings.items():
        if found is None:
            continue
        score = f"separation {found.score:.2f}, chance {found.chance:.2f}, p {_p(found.p_value)} by itself"
        alt = (
            f"Map of the latents of {m.memory} at {num_tasks} tasks, coloured by {what}: {score}. The axes hold "
            f"{_percent(m.explained[0])} and {_percent(m.explained[1])} of the variance; a line joins what "
            "one task gave to its roles."
        )
        draw = _drawing(m, labels)
        pictures.append(Picture(f"{name}_{what}", f"{m.memory}, by {what}: {score}", alt, in_both_themes(draw)))
    return pictures


def _drawing(m: LatentMap, labels: list[list[str]]) -> Callable[[str], bytes]:
    def draw(theme: str) -> bytes:
        figure = Figure(figsize=(3.7, 3.1), layout="constrained")
        axes = figure.add_subplot()
        for points in m.coordinates:
            axes.plot(points[:, 0], points[:, 1], color=THEMES[theme][1], linewidth=0.6, zorder=1)
        points, flat = m.coordinates.reshape(-1, 2), [found for row in labels for found in row]
        for i, found in enumerate(sorted(set(flat), key=flat.index)):
            chosen = points[[row == found for row in flat]]
            look: Mapping[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            axes.scatter(chosen[:, 0], chosen[:, 1], s=16, linewidth=0, label=label(found), zorder=2, **look)
        axes.locator_params(nbins=5)  # the panel is narrow, and numbers may be long
        axes.set_xlabel(f"first axis, {_percent(m.explained[0])} of the variance")
        axes.set_ylabel(f"second axis, {_percent(m.explained[1])}")
        dress(axes, theme)
        add_legend(axes, theme, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
        return png(figure)

    return draw


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.1 or not share else f"{100 * share:.2g}%"


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"
