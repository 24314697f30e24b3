"""CAMEL: two chat agents, the second one told what the first has said."""

import json
import os

from asked import MODEL, PLACE, PORTER, SCOUT, STREAM, body, headers, kind_of_place, url
from camel.agents import ChatAgent
from camel.models import ModelFactory
from camel.toolkits import FunctionTool
from camel.types import ModelPlatformType
from camel.utils import BaseTokenCounter


class Characters(BaseTokenCounter):
    """The default counter downloads its vocabulary."""

    def count_tokens_from_messages(self, messages):
        return len(json.dumps(messages)) // 4

    def encode(self, text):
        return [ord(character) for character in text]

    def decode(self, token_ids):
        return "".join(map(chr, token_ids))


def run(role, system, tools, text):
    model = ModelFactory.create(
        model_platform=ModelPlatformType.OPENAI_COMPATIBLE_MODEL,
        model_type=MODEL,
        url=url(role),
        api_key=os.environ["OPENAI_API_KEY"],
        model_config_dict={"stream": STREAM} | ({"extra_body": body(role)} if body(role) else {}),
        token_counter=Characters(),
        default_headers=headers(role),
    )
    answer = ChatAgent(system, model=model, tools=tools, stream_accumulate=True).step(text)
    if not STREAM:
        return answer.msg.content
    parts = [part.msg.content for part in answer]
    assert len(parts) > 1
    return parts[-1]


said = run("scout", SCOUT, [FunctionTool(kind_of_place)], PLACE)
print(said, run("porter", PORTER, [], f"{PLACE}\nThe scout says: {said}"))
