"""What samples the agents' responses: the model in this process, servers of vLLM, or any server of OpenAI's form."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from latentmem.config.section import AsTuple, PositiveFloat, PositiveInt, Section, Text, WebAddress


class LocalEngineSection(Section):
    """The model in this process samples, with the weights that also score."""

    kind: Literal["local"] = "local"
    """Chooses this engine."""


class VLLMEngineSection(Section):
    """Servers of vLLM sample; composing and scoring stay in this process. See docs/engines.md."""

    kind: Literal["vllm"]
    """Chooses this engine."""
    urls: Annotated[tuple[WebAddress, ...], AsTuple, Field(min_length=1)]
    """Addresses of the servers, such as `[http://127.0.0.1:8001]`. All serve the model under the name in `model.name`.
    The prompts of one task and role go to the same server as long as it answers."""
    parallel: PositiveInt = 64
    """Largest number of requests that one process of ours has in flight."""
    timeout_seconds: PositiveFloat = 600.0
    """Longest time for one attempt, in seconds of wall clock, from connecting to the whole answer."""
    retries: Annotated[int, Field(ge=0)] = 8
    """Further attempts after the first one, at another address where there is one. Without another, the first waits for
    half a second and each later one for twice as long, at most 30 seconds. If the last one fails, the command ends; the
    same command goes on."""

    @model_validator(mode="after")
    def _each_address_once(self) -> Self:
        if len(set(self.urls)) < len(self.urls):
            raise ValueError("names one address twice")
        return self


class OpenAIEngineSection(Section):
    """A server of OpenAI's chat completions speaks for the agents; no weights are loaded here, so no memory is latent
    and nothing is trained. See docs/engines.md.
    """

    kind: Literal["openai"]
    """Chooses this engine."""
    url: WebAddress
    """Address of the server, with the path before `/chat/completions`, such as `https://api.openai.com/v1`."""
    key_variable: Text | None = None
    """The environment variable that holds the server's key; null: no key is sent."""
    limit_key: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    """How the longest response is called in a request; older servers know `max_tokens` only."""
    parallel: PositiveInt = 16
    """Largest number of requests that one process of ours has in flight."""
    timeout_seconds: PositiveFloat = 600.0
    """Longest time for one attempt, in seconds of wall clock, from connecting to the whole answer."""
    retries: Annotated[int, Field(ge=0)] = 6
    """Further attempts after the first one, when the server is busy, down or answers nonsense. The first waits for half
    a second and each later one for twice as long, at most 30 seconds."""


EngineSection = Annotated[LocalEngineSection | VLLMEngineSection | OpenAIEngineSection, Field(discriminator="kind")]

ENGINES: dict[str, type[Section]] = {
    "local": LocalEngineSection,
    "vllm": VLLMEngineSection,
    "openai": OpenAIEngineSection,
}
"""The sections that `model.engine` may be, by their kind."""
ENGINE_FREE = ("urls", "url", "key_variable", "limit_key", "parallel", "timeout_seconds", "retries")
"""Keys that may change when a phase continues: none decides what is asked."""
