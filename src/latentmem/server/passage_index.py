"""Search for passages by words (BM25), by meaning (embeddings), or by both; an index on disk is complete or absent.

Each kind of index is a folder. It is filled beside its final place, sealed with the size and checksum of every file,
and only then renamed into place. A reader accepts only a sealed index of exactly its corpus. Embedding takes long, so
an interrupted index continues at its last shard; counting words takes moments and starts again.
"""

import json
import logging
import mmap
import re
import threading
import unicodedata
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from latentmem.bank.exact import Rows, Vectors
from latentmem.errors import DataError, RetrieverError
from latentmem.files import Unchanged, append, put_folder, sync, take, write_atomic
from latentmem.progress import progress
from latentmem.server.corpus import Corpus

logger = logging.getLogger(__name__)

Method = Literal["bm25", "dense", "both"]
Hits = list[tuple[int, float]]
"""Positions of passages and their scores, best first."""
Embed = Callable[[list[str]], npt.NDArray[np.float32]]
"""Texts [n] to vectors [n, e] of length 1."""

K1, B = 0.9, 0.4
"""BM25's parameters: how fast a word's repetitions saturate, and how much a long passage is marked down. Lucene's
defaults for passages in Anserini (Yang et al. 2017), which Search-R1's own BM25 server uses too."""
RANK_OFFSET = 60
"""The constant of reciprocal rank fusion (Cormack et al. 2009)."""
FUSED_DEPTH = 100
"""The fewest hits of each method that are fused."""
SHARD = 256
"""Number of passages embedded before they are written to disk; a killed process loses no more."""
_FORMAT = 1
_SEAL = "sealed.json"
_WORD = re.compile(r"\w+")


class Search(Protocol):
    """A function that finds passages; it may be called from several threads."""

    def __call__(self, queries: Sequence[str], k: int) -> list[Hits]:
        """At most k hits for each query; what a query finds does not depend on the others, but for rounding.

        Raises:
            RetrieverError: the index was changed under our hands.
        """


def open_search(corpus: Corpus, method: Method, folder: Path, embedder: str, embed: Embed | None) -> Search:
    """Return a search over the corpus; its indexes are made in `folder`, or found there.

    Args:
        corpus: the passages.
        method: bm25, dense, or both, fused by rank.
        folder: the folder of the indexes; made if there is none.
        embedder: name of what `embed` computes; vectors under another name are made anew.
        embed: makes vectors of passages and queries; None is enough for bm25.

    Raises:
        RetrieverError: the folder cannot be written, or another process is indexing in it.
        DataError: the corpus was changed meanwhile, or holds no word that BM25 could find.
    """
    searches: list[Search] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if method in ("bm25", "both"):
            about = {"kind": "bm25", "k1": K1, "b": B, **corpus.identity}
            searches.append(WordSearch(_whole(folder / "bm25", about, lambda part: _count_words(corpus, part))))
        if method in ("dense", "both"):
            assert embed is not None
            about = {"kind": "dense", "embedder": embedder, **corpus.identity}
            found = _whole(folder / "dense", about, lambda part: _embed_passages(corpus, embed, part, about))
            searches.append(VectorSearch(found, len(corpus), embed))
    except OSError as error:
        raise RetrieverError(
            f"{folder}: the index cannot be kept there ({error.strerror}); name another folder with --index DIR"
        ) from None
    return searches[0] if len(searches) == 1 else FusedSearch(searches)


def words(text: str) -> list[str]:
    """Return the words of a text as BM25 counts them: lower case, without accents, no word left out.

    >>> words("Émile Zola's 2nd")
    ['emile', 'zola', 's', '2nd']
    """
    decomposed = unicodedata.normalize("NFKD", text.lower())
    return _WORD.findall("".join(c for c in decomposed if not unicodedata.combining(c)))


def _opened(folder: Path) -> dict[Path, Unchanged]:
    """The files of an index that is going to be mapped."""
    return {path: Unchanged(path) for path in folder.iterdir()}


def _check(files: Mapping[Path, Unchanged]) -> None:
    """Refuse to read what was changed in place.

    Raises:
        RetrieverError: a file was.
    """
    for path, file in files.items():
        if not file:
            raise RetrieverError(f"{path}: was changed while it was read; start the retriever again")


class WordSearch:
    """BM25 in Lucene's form; a passage that shares no word with the query is not a hit."""

    def __init__(self, folder: Path) -> None:
        self._files = _opened(folder)
        self._index = _bm25s().BM25.load(folder, mmap=True)

    def __call__(self, queries: Sequence[str], k: int) -> list[Hits]:
        """At most k passages for each query, equal scores by position."""
        _check(self._files)
        return [self._search(query, k) for query in queries]

    def _search(self, query: str, k: int) -> Hits:
        known = self._index.get_tokens_ids(words(query))
        if not known:
            return []
        scores = self._index.get_scores_from_ids(known)  # [N]
        k = min(k, int(np.count_nonzero(scores)))
        if k == 0:
            return []
        kth = np.partition(scores, len(scores) - k)[len(scores) - k]
        candidates = np.flatnonzero(scores >= kth)
        best = candidates[np.lexsort((candidates, -scores[candidates]))[:k]]
        return [(int(position), float(scores[position])) for position in best]


class VectorSearch:
    """Exact cosine similarity to every passage."""

    def __init__(self, folder: Path, num_passages: int, embed: Embed) -> None:
        self._embed = embed
        self._lock = threading.Lock()  # an embedder serves one caller at a time
        # Nobody writes to it; torch only takes what could be written to, here into a copy.
        self._files = _opened(folder)
        mapped = self._files[folder / "vectors.f32"].mapped(mmap.ACCESS_COPY)
        vectors = np.frombuffer(mapped, dtype="<f4").reshape(num_passages, -1)
        # Torch's product: numpy's keeps threads of its own awake, which then take turns with those that embed.
        self._rows = Rows(vectors, estimate=_products)

    def __call__(self, queries: Sequence[str], k: int) -> list[Hits]:
        """Return the k passages nearest to each query; ties are in the order of position."""
        with self._lock:
            vectors = self._embed(list(queries))
            _check(self._files)
            return self._rows.nearest(vectors, k)


def _products(queries: Vectors, vectors: Vectors) -> Vectors:
    import torch

    return (torch.from_numpy(vectors) @ torch.from_numpy(queries).T).T.contiguous().numpy()


class FusedSearch:
    """Several searches as one: a passage scores the sum of 1 / (60 + its rank) over those that found it."""

    def __init__(self, searches: Sequence[Search]) -> None:
        self._searches = searches

    def __call__(self, queries: Sequence[str], k: int) -> list[Hits]:
        """Return at most k passages per query; ties are in the order of position."""
        found = [search(queries, max(k, FUSED_DEPTH)) for search in self._searches]
        return [fuse([hits[i] for hits in found])[:k] for i in range(len(queries))]


def fuse(rankings: Sequence[Hits]) -> Hits:
    """Combine rankings by reciprocal rank fusion.

    >>> [position for position, _ in fuse([[(7, 9.0), (3, 8.0)], [(3, 0.9)]])]
    [3, 7]
    """
    scores: dict[int, float] = {}
    for hits in rankings:
        for rank, (position, _) in enumerate(hits, start=1):
            scores[position] = scores.get(position, 0.0) + 1 / (RANK_OFFSET + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


# Making and keeping indexes


def _whole(folder: Path, about: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """Return the folder of a sealed index of exactly this; if there is none, `make` it aside and put it there."""
    about = {"format": _FORMAT, **about}
    if _flaw(folder, about) is None:
        return folder
    with _sole_indexer(folder.parent):
        flaw = _flaw(folder, about)  # another process may have made it before we held the lock
        if flaw is None:
            return folder
        if folder.exists():
            logger.warning("%s: %s; it is made anew", folder, flaw)
        part = folder.with_name(f"{folder.name}.part")
        part.mkdir(exist_ok=True)
        make(part)
        _seal(part, about)
        put_folder(part, folder)
    return folder


def _flaw(folder: Path, about: Mapping[str, Any]) -> str | None:
    """Return why an index cannot be used; None if it can."""
    try:
        seal = json.loads((folder / _SEAL).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return "has no seal"
    if not isinstance(seal, dict) or seal.get("about") != about or not isinstance(seal.get("files"), dict):
        return "made of another corpus or by other settings"
    for name, measured in seal["files"].items():
        if not (folder / name).is_file() or _measure(folder / name) != measured:
            return f"{name} is damaged"
    return None


def _seal(part: Path, about: Mapping[str, Any]) -> None:
    """Sync all files to disk, then write the seal, so that no sealed file can be lost in a power cut."""
    files = {}
    for path in sorted(part.iterdir()):
        if path.name != _SEAL:
            sync(path)
            files[path.name] = _measure(path)
    write_atomic(part / _SEAL, json.dumps({"about": about, "files": files}, indent=1) + "\n")


def _measure(path: Path) -> list[int]:
    """Return the size and CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return [path.stat().st_size, crc]


@contextmanager
def _sole_indexer(folder: Path) -> Iterator[None]:
    """Let only one process index in a folder; the kernel frees the lock, however the process ends."""
    with (folder / ".lock").open("a") as lock:
        if not take(lock):
            raise RetrieverError(
                f"{folder}: another process is indexing here; wait until it ends, or name another folder with --index"
            )
        yield


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError:
        raise RetrieverError(
            "searching by BM25 needs the package bm25s; pip install 'latentmem[retriever]', or use --method dense"
        ) from None
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # importing it turns on its debug messages
    return bm25s


def _count_words(corpus: Corpus, part: Path) -> None:
    index = _bm25s().BM25(k1=K1, b=B, method="lucene")
    vocabulary: dict[str, int] = {}
    numbers = []
    with progress(len(corpus), "bm25", "passage") as bar:
        for position in range(len(corpus)):
            found = words(corpus[position].contents)
            numbers.append(array("i", [vocabulary.setdefault(word, len(vocabulary)) for word in found]))
            bar.update()
    if not vocabulary:
        raise DataError(
            f"{corpus.path}: no passage holds a word, so BM25 can find none; mend the corpus, or take --method dense"
        )
    index.index((numbers, vocabulary), show_progress=False)
    index.save(part, show_progress=False)


def _embed_passages(corpus: Corpus, embed: Embed, part: Path, about: Mapping[str, Any]) -> None:
    """Append shard after shard; a shard counts once its record is on disk, and its vectors are written before that."""
    record, vectors = part / "shards.json", part / "vectors.f32"
    try:
        done = json.loads(record.read_bytes())
    except (FileNotFoundError, ValueError):
        done = {}
    if done.get("about") != about:
        done = {"about": about, "passages": 0, "bytes": 0}
    with vectors.open("ab") as file:
        file.truncate(done["bytes"])  # a shard without its record is embedded again
    with progress(len(corpus), "dense", "passage", done["passages"]) as bar:
        for start in range(done["passages"], len(corpus), SHARD):
            end = min(start + SHARD, len(corpus))
            rows = embed([corpus[position].contents for position in range(start, end)])
            append(vectors, rows.astype("<f4", copy=False).tobytes())
            done |= {"passages": end, "bytes": vectors.stat().st_size}
            write_atomic(record, json.dumps(done, indent=1) + "\n")
            bar.update(end - start)
