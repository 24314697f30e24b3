"""Show what each agent reads, to the letter: an episode's prompts, decoded from the token ids that the model is given.

Nothing is worded a second time for display: the ids come from `encode_prompt`, as in the rollout, and control tokens
are spelled out. A line that begins with ==== stands before each text; the line break before it is not part of the text.
"""

from collections.abc import Iterator, Sequence

from latentmem.memory.composer import Composer
from latentmem.models.language_model import LanguageModel
from latentmem.trajectory import Message, Trajectory


def format_prompts(model: LanguageModel, trajectory: Trajectory, composer: Composer | None = None) -> str:
    """Format all prompts of an episode, in the order they were answered, with the responses.

    Args:
        model: the agents' model.
        trajectory: an episode that this model played.
        composer: composed the episode's latents, if there are any.
    """
    lines: list[str] = []
    for turn, step in enumerate(trajectory.steps, 1):
        for number, message in enumerate(step.messages, 1):
            lines += _message(f"turn {turn}, message {number}, {message.role}", model, message, composer)
        lines += [f"==== turn {turn}, the team's action", step.action]
        if step.observation:
            lines += [f"==== turn {turn}, what came back", step.observation]
    if trajectory.error:
        lines += ["==== the episode ended in an error", trajectory.error]
    return "\n".join(lines)


def _message(title: str, model: LanguageModel, message: Message, composer: Composer | None) -> Iterator[str]:
    ids = _prompt_ids(model, message)
    assert len(ids) == message.num_prompt_tokens, "the rollout and this page encode differently"
    text = model.spell(ids)
    yield f"==== {title}: the prompt, {len(ids)} tokens{_quotes(message.reads)}"
    yield text
    if model.tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
        yield f"==== {title}: what looks like a control token in a task or a response was read as ordinary characters"
    if message.recalled.num_latents:
        assert composer is not None
        length = len(composer.backbone.encode(message.recalled.text))
        latents = f"here stand {message.recalled.num_latents} latents; the composer read these {length} tokens"
        yield f"==== {title}: {latents}, of {len(message.recalled.sources)} retrieved trajectories"
        yield message.recalled.text
    end = {"stop": "", "length": ", cut by the limit", "cut": ", cut at a text to stop at"}[message.finish]
    yield f"==== {title}: the response, {len(message.token_ids)} tokens{end}"
    yield message.response


def _prompt_ids(model: LanguageModel, message: Message) -> list[int]:
    """Return what the model read, latents left out."""
    if message.served is None:
        return model.encode_prompt(message.system, message.recalled.before(message.user))
    return list(message.served.prompt_ids)  # a chat of any form, in which a memory's text is already


def _quotes(reads: Sequence[int]) -> str:
    return f", quoting message{'s' if len(reads) > 1 else ''} {', '.join(str(i + 1) for i in reads)}" if reads else ""
