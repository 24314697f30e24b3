"""CAMEL: a scout and a porter, each a chat agent of its own."""

import json
import os

from camel.agents import ChatAgent
from camel.models import ModelFactory
from camel.types import ModelPlatformType
from camel.utils import BaseTokenCounter

SCOUT = "You are the scout. Say the password, like this: apple"
PORTER = "You are the porter. Say the emblem, like this: lion"


class Characters(BaseTokenCounter):
    """Counts four characters as a token; the default counter downloads its vocabulary."""

    def count_tokens_from_messages(self, messages: list[dict[str, object]]) -> int:
        """Return about how many tokens some messages have."""
        return len(json.dumps(messages)) // 4

    def encode(self, text: str) -> list[int]:
        """Return a number for every character."""
        return [ord(character) for character in text]

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of such numbers."""
        return "".join(map(chr, token_ids))


def solve(task: dict[str, str]) -> str:
    """Return the team's answer."""
    model = ModelFactory.create(
        model_platform=ModelPlatformType.OPENAI_COMPATIBLE_MODEL,
        model_type="smollm2-135m",
        url=os.environ["OPENAI_BASE_URL"],
        api_key=os.environ["OPENAI_API_KEY"],
        token_counter=Characters(),
    )
    agents = [ChatAgent(system_message, model=model) for system_message in (SCOUT, PORTER)]
    return " ".join(agent.step(task["text"]).msg.content for agent in agents)


if __name__ == "__main__":
    print(solve(json.loads(os.environ["LATENTMEM_TASK"])))
