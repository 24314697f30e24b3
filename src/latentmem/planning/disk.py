"""What a run writes to disk and sends to an engine, in bytes; figures a token were measured on stored episodes."""

_STORED_TOKEN = 13
"""Compressed bytes of a response's token in the bank: its text, its id and its log-probability."""
_STORED_MESSAGE = 150
_STORED_PROMPT_TOKEN = 2
"""Compressed bytes of a prompt's token; what the prompts of an episode repeat costs nothing."""
_STORED_EPISODE = 500
_JSON_TOKEN = 30
"""Bytes of a response's token in JSON that is not compressed: text, id and log-probability."""
_TEXT_TOKEN = 4.2
"""Bytes of text of one token."""
_JSON_MESSAGE = 400


def bank_growth(messages: int, prompt: int, response: int, width: int) -> int:
    """Return the bytes by which one episode makes a bank grow.

    Args:
        messages: messages of the episode.
        prompt: tokens of a prompt.
        response: tokens of a response.
        width: e, the number of dimensions of the embeddings; each vector is in the records and in the index.
    """
    said = messages * (_STORED_TOKEN * response + _STORED_MESSAGE)
    return round(said + _STORED_PROMPT_TOKEN * prompt + _STORED_EPISODE + 2 * 4 * width)


def kept_episode(messages: int, prompt: int, response: int, composer_text: int) -> int:
    """Return the bytes of one episode that an evaluation keeps, as JSON with what was recalled for each message."""
    return round(messages * (_JSON_TOKEN * response + _TEXT_TOKEN * (prompt + composer_text) + _JSON_MESSAGE))


def checkpoints(trained: int, *, evaluates: bool) -> int:
    """Return the bytes of a training's checkpoints while one more is written.

    Args:
        trained: number of trained parameters; each has its value and two moments, in float32.
        evaluates: whether the best checkpoint is kept beside the newest.
    """
    return (3 if evaluates else 2) * 3 * 4 * trained


def embeds(positions: int, width: int, item: int) -> int:
    """Return the bytes of input embeddings [positions, width] in a request to an engine, in base64."""
    return -(-positions * width * item // 3) * 4
