"""What samples the agents' responses: the model in this process, or servers of vLLM."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from latentmem.config.section import AsTuple, PositiveFloat, PositiveInt, Section, WebAddress


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


EngineSection = Annotated[LocalEngineSection | VLLMEngineSection, Field(discriminator="kind")]

ENGINES: dict[str, type[Section]] = {"local": LocalEngineSection, "vllm": VLLMEngineSection}
"""The sections that `model.engine` may be, by their kind."""
ENGINE_FREE = ("urls", "parallel", "timeout_seconds", "retries")
"""Keys that may change when a phase continues: none decides what is asked."""
