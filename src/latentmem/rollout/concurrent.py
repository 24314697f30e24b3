"""A model behind a door for many threads, for programs, whose agents speak when they want."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from threading import Lock

from latentmem.config import Sampling
from latentmem.engines.batching import Batcher
from latentmem.models.agent import AgentModel, Prompt, Sampled
from latentmem.models.language_model import KeepingModel, LanguageModel
from latentmem.rollout.turns import Ask


@contextmanager
def asked_by_many(model: AgentModel, sampling: Sampling) -> Iterator[tuple[Ask, AbstractContextManager[object]]]:
    """Yield a function that many threads may call, and what has to be held while a memory recalls.

    The model in this process makes batches of what they ask, and a memory may use it between two tokens. Another model
    that cannot be asked by several threads serves one at a time.
    """
    own = model.model if isinstance(model, KeepingModel) else model
    if model.concurrent:
        yield partial(model.respond, sampling=sampling), nullcontext()
    elif isinstance(own, LanguageModel):
        with closing(Batcher(own, kept=model.kept if isinstance(model, KeepingModel) else None)) as batcher:
            yield partial(batcher.respond, sampling=sampling), nullcontext()
    else:
        alone = Lock()

        def ask(prompts: Sequence[Prompt]) -> list[Sampled]:
            with alone:
                return model.respond(prompts, sampling)

        yield ask, alone
