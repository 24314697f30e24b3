"""Choose trajectories for a page: first the tasks where memories disagree, side by side, with long texts cut."""

import json
from typing import Any

from latentmem.report.read import RunRecord
from latentmem.report.values import Row, as_dict, as_list, short

MAX_TASKS = 24
"""Tasks per run whose trajectories are shown."""

_ENDS = {"length": ", cut by the limit", "cut": ", cut at a text to stop at"}
"""What ended a response, where it was not the response itself."""

MAX_CHARACTERS = 8_000
"""Length at which a prompt or response is cut; a page of full-length texts would not open."""


def sample_of(record: RunRecord) -> dict[str, Any]:
    """Choose the tasks to show, first those where memories disagree, each with its trajectories side by side."""
    tasks: dict[str, list[tuple[str, Row]]] = {}
    for memory, rows in record.trajectories.items():
        for row in rows:
            tasks.setdefault(_task_key(row), []).append((memory, row))
    disagree = {key for key, played in tasks.items() if len({bool(row.get("success")) for _, row in played}) > 1}
    chosen = sorted(tasks, key=lambda key: key not in disagree)[:MAX_TASKS]
    return {
        "memories": list(record.trajectories),
        "num_tasks": len(tasks),
        "num_disagree": len(disagree),
        "tasks": [_shown_task(tasks[key]) for key in chosen],
    }


def _task_key(row: Row) -> str:
    task = as_dict(row.get("task"))
    return f"{task.get('domain')}:{task['id']}" if task.get("id") is not None else f"text:{task.get('text')}"


def _shown_task(played: list[tuple[str, Row]]) -> Row:
    task = as_dict(played[0][1].get("task"))
    text = str(task.get("text", ""))
    return {
        "id": str(task.get("id") or ""),
        "title": _clip(" ".join(text.split()), 110),
        "text": _clip(text),
        "columns": [_shown_trajectory(memory, row) for memory, row in played],
    }


def _shown_trajectory(memory: str, row: Row) -> Row:
    return {
        "memory": memory,
        "success": bool(row.get("success")),
        "reward": short(row.get("reward")),
        "error": row.get("error"),
        "origin": _origin(row),
        "steps": [
            {
                "messages": [_shown_message(as_dict(message)) for message in as_list(step.get("messages"))],
                "action": _clip(step.get("action", "")),
                "observation": _clip(step.get("observation", "")),
                "info": _clip(json.dumps(step["info"], ensure_ascii=False)) if step.get("info") else "",
            }
            for step in map(as_dict, as_list(row.get("steps")))
        ],
    }


def _origin(row: Row) -> str:
    """Say where a served episode came from, and what its roles were paid; empty for any other episode."""
    origin = as_dict(row.get("origin"))
    parts = []
    if origin:
        judged = "" if origin.get("is_judged") else ", never judged"
        tenant = f", tenant {origin['tenant']}" if origin.get("tenant") else ""
        parts.append(f"Served: session {origin.get('session')}{tenant}{judged}.")
    if rewards := as_dict(row.get("rewards")):
        parts.append(f"Rewards: {', '.join(f'{role} {short(value)}' for role, value in rewards.items())}.")
    return " ".join(parts)


def _tools(conversation: Row) -> str:
    """Return the names of the tools that an agent may call."""
    named = [as_dict(as_dict(tool).get("function")).get("name") for tool in as_list(conversation.get("tools"))]
    return ", ".join(str(name) for name in named)


def _shown_message(message: Row) -> Row:
    recalled = as_dict(message.get("recalled"))
    return {
        "role": str(message.get("role", "?")),
        "num_tokens": len(as_list(message.get("token_ids"))),
        "end": _ENDS.get(str(message.get("finish")), ""),
        "tools": _tools(as_dict(as_dict(message.get("served")).get("conversation"))),
        "response": _clip(message.get("response", "")),
        "system": _clip(message.get("system", "")),
        "user": _clip(message.get("user", "")),
        "recalled": {
            "kind": str(recalled.get("kind", "none")),
            "text": _clip(recalled.get("text", "")),
            "num_latents": recalled.get("num_latents") or 0,
            "sources": [str(source) for source in as_list(recalled.get("sources"))],
        },
    }


def _clip(text: Any, limit: int = MAX_CHARACTERS) -> str:
    text = str(text)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} more characters)"
