"""Embedders that map texts to vectors of length 1 and remember them, because tasks are looked up many times.

By default each text is embedded by itself, so a vector depends on its own text only, to the last bit: a resumed run
stores the same vectors although it embeds the text in other company. On a CPU this costs a quarter of the speed for
long texts and two thirds for short ones.
"""

import hashlib
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from latentmem.errors import ModelError
from latentmem.models.assets import is_in_reach, quiet_loading, resolve_embedder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MAX_REMEMBERED = 16_384
"""Number of vectors kept, the most recently used ones; 24 MB at 384 dimensions."""


class HashingEmbedder:
    """An embedder without a model: each word has its own direction, so texts that share words lie near each other.

    It is a stand-in for tests and first trials, and knows nothing of meaning. Its vectors are equal in every process.
    """

    name = "hashing"

    def __init__(self, width: int = 64) -> None:
        """Set `width`: e, the number of dimensions."""
        self.width = width

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Embed texts [n] to float32 [n, e], each row of length 1."""
        rows = np.zeros((len(texts), self.width))
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split() or [""]:
                seed = int.from_bytes(hashlib.sha256(word.encode("utf-8", "surrogatepass")).digest()[:8], "big")
                row += np.random.default_rng(seed).standard_normal(self.width)
        unit: np.ndarray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        return unit


def load_embedder(name: str) -> "Embedder | HashingEmbedder":
    """Return the embedder of a name: `hashing`, or a model that `Embedder` loads.

    Raises:
        ModelError: see `Embedder`.
    """
    return HashingEmbedder() if name == HashingEmbedder.name else Embedder(name)


def _missing(model: "SentenceTransformer") -> list[str]:
    """Return the weights that a loaded model's files lack; they are looked up without reading any values."""
    inner = getattr(model[0], "auto_model", None)
    if inner is None:  # no transformer, such as a bag of words
        return []
    with quiet_loading():
        _, found = type(inner).from_pretrained(
            inner.name_or_path, device_map="meta", output_loading_info=True, use_safetensors=True
        )
    lacks = found["missing_keys"] | {key for key, *_ in found["mismatched_keys"]}
    return sorted(key for key in lacks if "pooler" not in key)  # sentence-transformers pools by itself


class Embedder:
    """A sentence-transformers model as a plain function from texts to vectors; the bank takes it as `embed`."""

    def __init__(self, name: str = "all-minilm-l6-v2", device: str = "cpu", batch_size: int = 1):
        """Load the model in float32.

        `name` is `all-minilm-l6-v2` (embedded), a folder or a hub id; `device` is a torch device; `batch_size` is the
        number of texts embedded at once. More than 1 is faster, but changes a vector in about the seventh decimal. Only
        the beginning of a text longer than the model's window (256 tokens for the embedded one) is embedded.

        Raises:
            ModelError: the name cannot be resolved, or it names something that sentence-transformers cannot load.
        """
        source = resolve_embedder(name)
        import torch
        from sentence_transformers import SentenceTransformer

        try:
            with quiet_loading():
                self._model = SentenceTransformer(
                    str(source),
                    device=device,
                    local_files_only=not is_in_reach(source),
                    model_kwargs={"use_safetensors": True, "dtype": torch.float32},
                )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"{name}: cannot be loaded by sentence-transformers: {reason}") from error
        if lacks := _missing(self._model):
            raise ModelError(
                f"{name}: the embedder's files lack {len(lacks)} of its weights, such as {lacks[0]}, which would be "
                "random; take the whole model"
            )
        self._model.eval()
        self._name = name
        self._batch_size = batch_size
        self._remembered: OrderedDict[str, np.ndarray] = OrderedDict()
        self._state = threading.Lock()
        self._embedding = threading.Lock()

    @property
    def name(self) -> str:
        """The name that was asked for; vectors of different names are not comparable."""
        return self._name

    @property
    def width(self) -> int:
        """e, the number of dimensions of a vector."""
        return int(self._model.get_embedding_dimension())

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Embed texts [n] to float32 [n, e], each row of length 1, in the order of the texts.

        Many threads may ask; the model embeds for one of them at a time.
        """
        rows = self._known(texts)
        unknown = [text for text in dict.fromkeys(texts) if text not in rows]
        if unknown:
            with self._embedding:
                rows |= self._known(unknown)  # another thread may have embedded them meanwhile
                unknown = [text for text in unknown if text not in rows]
                if unknown:
                    rows |= zip(unknown, self._embed(unknown), strict=True)
        with self._state:
            self._remembered.update((text, rows[text]) for text in unknown)
            while len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        return np.stack([rows[text] for text in texts]) if texts else np.empty((0, self.width), dtype=np.float32)

    def _known(self, texts: list[str]) -> dict[str, np.ndarray]:
        """Return the vectors that are remembered."""
        with self._state:
            known = {text: self._remembered[text] for text in dict.fromkeys(texts) if text in self._remembered}
            for text in known:
                self._remembered.move_to_end(text)
        return known

    def _embed(self, texts: list[str]) -> np.ndarray:
        raw = self._model.encode(texts, batch_size=self._batch_size, show_progress_bar=False, convert_to_numpy=True)
        rows: np.ndarray = np.asarray(raw, dtype=np.float64)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if not (np.isfinite(lengths) & (lengths > 0)).all():
            raise ModelError(f"{self._name}: gave a vector without a direction (zero, infinite or not a number)")
        unit: np.ndarray = (rows / lengths).astype(np.float32)
        return unit
