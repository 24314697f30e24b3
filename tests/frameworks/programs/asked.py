"""What the programs of all frameworks are asked, by their environment: how a role is told, and whether to stream."""

import json
import os
from urllib.parse import urlsplit

SCOUT = "You are the scout. You know passwords."
PORTER = "You are the porter. You know emblems."
PLACE = json.loads(os.environ["LATENTMEM_TASK"])["text"]
STREAM = os.environ["STREAM"] == "1"
MODEL = "served"


def headers(role):
    """Headers of the client of a role."""
    return {"X-LatentMem-Role": role} if os.environ["TOLD_BY"] == "header" else {}


def body(role):
    """What a role's requests hold besides what the framework writes."""
    return {"latentmem": {"role": role}} if os.environ["TOLD_BY"] == "body" else {}


def url(role):
    """The address of the server, for a role."""
    base = os.environ["OPENAI_BASE_URL"]
    if os.environ["TOLD_BY"] != "url":
        return base
    root, version = base.rsplit("/", 1)
    assert urlsplit(base).path.startswith("/sessions/"), f"{base} names no session"
    return f"{root}/agents/{role}/{version}"


def kind_of_place(name: str) -> str:
    """Tell what kind of place a name stands for.

    Args:
        name: The name of the place.
    """
    return name.split()[-1].lower()
