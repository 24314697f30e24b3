"""Start a server for the agents' model, and check whether servers sample as the model here would."""

import os
import shlex
from pathlib import Path
from urllib.parse import urlsplit

from transformers import AutoConfig

from latentmem.config import Config, VLLMEngineSection
from latentmem.engines.command import ServerCommand, server_command
from latentmem.engines.probe import Unreachable, check_server
from latentmem.errors import ConfigError, EngineError, ModelError
from latentmem.models.assets import is_in_reach, resolve_model
from latentmem.recipes.parts import engine_of, load_model
from latentmem.recipes.phase import say

LONGEST = 8192
"""`max_model_len` for models with a longer window; servers set memory aside for it."""


def start_engine(
    config: Config, venv: Path, number: int = 1, max_model_len: int | None = None, only_print: bool = False
) -> None:
    """Become a server for the model of a configuration, or print the command that does so.

    Args:
        config: the experiment.
        venv: the virtual environment that holds vLLM.
        number: which of `model.engine.urls` to listen on, from 1.
        max_model_len: longest prompt with its latents and its response, in tokens; None: the model's window, at most
            `LONGEST`.
        only_print: print the command and return.

    Raises:
        ConfigError: the engine is not vLLM, or has fewer addresses.
        EngineError: there is no vLLM in `venv`.
        ModelError: the model is unknown.
    """
    section = _section(config)
    if number > len(section.urls):
        raise ConfigError(f"--number is {number}; model.engine.urls has {len(section.urls)} addresses")
    address = urlsplit(section.urls[number - 1])
    assert address.hostname is not None
    port = address.port or (443 if address.scheme == "https" else 80)
    source = resolve_model(config.model.name)
    length = max_model_len or min(_window(source, config.model.name), LONGEST)
    command = server_command(venv, str(source), config.model.name, config.model.dtype, address.hostname, port, length)
    if only_print:
        say(_as_text(command))
        return
    kept = {
        key: value for key, value in os.environ.items() if key != "PYTHONPATH"
    }  # of this environment, not of vLLM's
    path = f"{venv / 'bin'}{os.pathsep}{kept.get('PATH', '')}"
    os.execve(command.words[0], command.words, command.variables | kept | {"PATH": path})  # noqa: S606


def check_engine(config: Config) -> None:
    """Print what each server of a configuration does right.

    Raises:
        ConfigError: the engine is not vLLM.
        EngineError: a server is down or does something wrong; the message names the first.
    """
    _section(config)
    model = load_model(config.model, config.model.name)
    engine = engine_of(model, config.model.engine)
    assert engine is not None
    wrong: list[str] = []
    for url in engine.servers.urls:
        try:
            findings = check_server(engine, url, config.sampling.max_response_tokens)
        except Unreachable as error:
            wrong.append(str(error))
            continue
        for finding in findings:
            if finding.is_fine or not finding.is_needed:
                say(f"{url}: {'ok  ' if finding.is_fine else 'note'}  {finding.text}")
            else:
                wrong.append(f"{url}: {finding.text}")
    if wrong:
        for text in wrong[1:]:
            say(text)
        raise EngineError(wrong[0])


def _section(config: Config) -> VLLMEngineSection:
    section = config.model.engine
    if not isinstance(section, VLLMEngineSection):
        raise ConfigError(
            "model.engine is local, which has no server; set it to {kind: vllm, urls: [http://127.0.0.1:8001]}"
        )
    return section


def _window(source: Path | str, name: str) -> int:
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=not is_in_reach(source))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"model {name!r}: its configuration cannot be read ({reason})") from None
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or LONGEST)


def _as_text(command: ServerCommand) -> str:
    variables = " ".join(f"{key}={shlex.quote(value)}" for key, value in command.variables.items())
    return f"{variables} {shlex.join(command.words)}"
