"""Search against slow twins, and an index on disk that is whole or is not there, whenever its maker was killed."""

import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest

from latentmem.errors import RetrieverError
from latentmem.server import passage_index
from latentmem.server.corpus import Corpus
from latentmem.server.passage_index import fuse, open_search, words

pytest.importorskip("bm25s")


@pytest.fixture
def many(tmp_path):
    """300 passages of 40 words, so that words repeat and scores tie."""
    rng = random.Random(3)
    known = [f"w{i}" for i in range(40)]
    path = tmp_path / "many.jsonl"
    with path.open("w") as file:
        for i in range(300):
            text = " ".join(rng.choices(known, [1 / (r + 1) for r in range(40)], k=rng.randint(1, 30)))
            file.write(json.dumps({"id": i, "contents": f"t{i % 7}\n{text}"}) + "\n")
    opened = Corpus(path)
    yield opened
    opened.close()


def slow_bm25(texts, query, k1=0.9, b=0.4):
    """BM25 with Lucene's idf as its formula reads, one passage and one word of the query at a time."""
    documents = [words(text) for text in texts]
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in words(query):
            df = sum(word in other for other in documents)
            tf = document.count(word)
            idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
            score += idf * tf / (tf + k1 * (1 - b + b * len(document) / average))
        scores.append(score)
    return scores


def test_words_are_lower_case_without_accents_and_all_of_them():
    assert words("The Émile-Zola's 2nd, ÅNGSTRÖM; и") == ["the", "emile", "zola", "s", "2nd", "angstrom", "и"]
    assert words("!?") == []


def test_bm25_scores_are_those_of_the_formula_and_ties_stand_in_order(many, tmp_path):
    texts = [many[i].contents for i in range(len(many))]
    search = open_search(many, "bm25", tmp_path / "index", "", None)
    queries = ["w0", "w39 w3", "w5 w5 w1", "t3 w20 unheard", "w1 w2 w3 w4 w5 w6"]
    for query, hits in zip(queries, search(queries, 20), strict=True):
        slow = slow_bm25(texts, query)
        assert len(hits) == min(20, sum(score > 0 for score in slow))
        for position, score in hits:
            assert score == pytest.approx(slow[position], rel=1e-5)
        assert [score for _, score in hits] == pytest.approx(sorted(slow, reverse=True)[: len(hits)], rel=1e-5)
        assert hits == sorted(hits, key=lambda hit: (-hit[1], hit[0]))


def test_bm25_finds_only_passages_that_share_a_word(corpus, tmp_path):
    search = open_search(corpus, "bm25", tmp_path / "index", "", None)
    found = search(["emile", "locks of the canal", "zzz", "?!", "winter " * 50], 3)
    assert [[position for position, _ in hits] for hits in found[:4]] == [[5], [2, 1, 3], [], []]
    assert {position for position, _ in found[4]} == {1, 5}


def test_dense_search_is_exact(many, tmp_path, fake_embed):
    search = open_search(many, "dense", tmp_path / "index", "fake", fake_embed)
    queries = ["w3 w9", "t4", "something else"]
    vectors = fake_embed([many[i].contents for i in range(len(many))]).astype(np.float64)
    for query, hits in zip(queries, search(queries, 12), strict=True):
        cosines = vectors @ fake_embed([query])[0].astype(np.float64)
        order = np.lexsort((np.arange(300), -cosines.astype(np.float32)))[:12]
        assert [position for position, _ in hits] == order.tolist()
        assert [score for _, score in hits] == pytest.approx(cosines[order], abs=1e-6)
    assert len(search(["w3"], 1000)[0]) == 300


def test_what_a_query_finds_does_not_depend_on_the_others(many, tmp_path, fake_embed):
    for method in ("bm25", "dense", "both"):
        search = open_search(many, method, tmp_path / "index", "fake", fake_embed)
        queries = [f"w{i} w{i + 1}" for i in range(9)]
        assert search(queries, 5) == [search([query], 5)[0] for query in queries]


def test_fusion_by_hand():
    first, second = [(7, 9.0), (3, 8.0), (5, 1.0)], [(3, 0.9), (8, 0.8)]
    assert fuse([first, second]) == [
        (3, pytest.approx(1 / 62 + 1 / 61)),
        (7, pytest.approx(1 / 61)),
        (8, pytest.approx(1 / 62)),
        (5, pytest.approx(1 / 63)),
    ]
    assert [position for position, _ in fuse([[(9, 1.0)], [(2, 1.0)]])] == [2, 9]


def test_both_fuses_what_the_two_find(many, tmp_path, fake_embed):
    found = {
        method: open_search(many, method, tmp_path / "index", "fake", fake_embed)(["w7 w11"], 100)[0]
        for method in ("bm25", "dense", "both")
    }
    assert found["both"] == fuse([found["bm25"], found["dense"]])[:100]
    both = open_search(many, "both", tmp_path / "index", "fake", fake_embed)
    assert both(["w7 w11"], 4)[0] == found["both"][:4]


# On disk


@pytest.fixture
def shards_of_2(monkeypatch):
    monkeypatch.setattr(passage_index, "SHARD", 2)


class Embedding:
    """Counts what it embeds, and may stop."""

    def __init__(self, embed, fails_after=None):
        self.embed, self.texts, self.fails_after = embed, [], fails_after

    def __call__(self, texts):
        if self.fails_after is not None and len(self.texts) >= self.fails_after:
            raise KeyboardInterrupt
        self.texts += texts
        return self.embed(texts)


def test_an_index_is_found_again_and_not_made_twice(corpus, tmp_path, fake_embed, shards_of_2):
    embed = Embedding(fake_embed)
    first = open_search(corpus, "both", tmp_path / "index", "fake", embed)(["canal"], 3)
    assert len(embed.texts) == 7 + 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*") if path.is_file()}
    embed.texts.clear()
    assert open_search(corpus, "both", tmp_path / "index", "fake", embed)(["canal"], 3) == first
    assert embed.texts == ["canal"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*") if path.is_file()} == before


def test_embedding_goes_on_at_the_last_shard(corpus, tmp_path, fake_embed, shards_of_2):
    with pytest.raises(KeyboardInterrupt):
        open_search(corpus, "dense", tmp_path / "index", "fake", Embedding(fake_embed, fails_after=4))
    assert [path.name for path in (tmp_path / "index").iterdir() if path.is_dir()] == ["dense.part"]
    embed = Embedding(fake_embed)
    search = open_search(corpus, "dense", tmp_path / "index", "fake", embed)
    assert len(embed.texts) == 3
    whole = open_search(corpus, "dense", tmp_path / "whole", "fake", fake_embed)
    assert search(["canal", "door"], 7) == whole(["canal", "door"], 7)


def test_what_was_begun_for_another_corpus_or_embedder_begins_again(corpus, tmp_path, fake_embed, shards_of_2, caplog):
    with pytest.raises(KeyboardInterrupt):
        open_search(corpus, "dense", tmp_path / "index", "fake", Embedding(fake_embed, fails_after=4))
    embed = Embedding(fake_embed)
    open_search(corpus, "dense", tmp_path / "index", "other", embed)
    assert len(embed.texts) == 7
    open_search(corpus, "bm25", tmp_path / "index", "", None)
    assert caplog.text == ""
    with corpus.path.open("a") as file:
        file.write(json.dumps({"id": "new", "contents": "Zinc\nZinc roofs."}) + "\n")
    embed.texts.clear()
    changed = Corpus(corpus.path)
    assert open_search(changed, "both", tmp_path / "index", "other", embed)(["zinc"], 1)[0][0][0] == 7
    assert len(embed.texts) == 8 + 1
    assert caplog.text.count("made of another corpus or by other settings; it is made anew") == 2
    changed.close()


@pytest.mark.parametrize("method", ["bm25", "dense"])
def test_a_damaged_index_is_noticed_and_made_anew(corpus, tmp_path, fake_embed, method, caplog):
    expected = open_search(corpus, method, tmp_path / "index", "fake", fake_embed)(["canal"], 3)
    for file in sorted((tmp_path / "index" / method).iterdir()):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        for damage in (bytes(content), bytes(content[:-1]), b""):
            file.write_bytes(damage)
            assert open_search(corpus, method, tmp_path / "index", "fake", fake_embed)(["canal"], 3) == expected
        file.unlink()
        assert open_search(corpus, method, tmp_path / "index", "fake", fake_embed)(["canal"], 3) == expected
    assert "made anew" in caplog.text


def test_a_folder_that_cannot_be_used_is_one_line(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RetrieverError, match=r"file: the index cannot be kept there .*; name another folder with --in"):
        open_search(corpus, "bm25", tmp_path / "file", "", None)


def test_two_processes_do_not_index_in_one_folder(corpus, tmp_path, fake_embed):
    def meanwhile(texts):
        with pytest.raises(RetrieverError, match="another process is indexing here; wait until it ends"):
            open_search(corpus, "bm25", tmp_path / "index", "", None)
        return fake_embed(texts)

    open_search(corpus, "dense", tmp_path / "index", "fake", meanwhile)
    open_search(corpus, "bm25", tmp_path / "index", "", None)


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import numpy as np
import torch
from latentmem.server import passage_index
from latentmem.server.corpus import Corpus

passages, root, method, step = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
passage_index.SHARD = 2
passage_index._bm25s()  # imported once, for all children, as torch is
os.fsync = lambda _: None  # a killed process leaves what it wrote to the kernel

def embed(texts):
    os.write(log, b"x" * len(texts))
    rows = np.array([[len(t), t.count("e"), t.count("o"), 1] for t in texts], dtype=np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

def play(folder, last):
    left = last

    def tick():
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def mortal(function):
        def wrapped(*args, **kwargs):
            tick()
            done = function(*args, **kwargs)
            tick()
            return done
        return wrapped

    rmtree = shutil, "rmtree"
    for module, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (np, "save"), rmtree):
        setattr(module, name, mortal(getattr(module, name)))
    search = passage_index.open_search(Corpus(passages), method, folder, "fake", embed)
    print(search(["canal", "red door"], 3), flush=True)

def in_child(folder, last):
    pid = os.fork()
    if pid == 0:
        play(folder, last)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)

for last in range(1, 500, step):
    folder = root / str(last)
    log = os.open(root / f"{last}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    ended = in_child(folder, last)
    assert ended in (0, -signal.SIGKILL), ended
    if (folder / method).exists():  # what stands in its place is whole, or lacks its seal
        about = {"format": 1, **passage_index.json.loads((folder / method / "sealed.json").read_bytes())["about"]}
        assert passage_index._flaw(folder / method, about) is None
    assert in_child(folder, 0) == 0
    if ended == 0:
        break
"""


@pytest.mark.parametrize(("method", "step"), [("bm25", 4), pytest.param("dense", 2, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_resumes_or_begins_again_and_ends_the_same(passages, tmp_path, method, step):
    """In a process of its own, whose children are killed a few file operations later each time."""
    (tmp_path / "runs").mkdir()
    command = [sys.executable, "-c", KILLED, str(passages), str(tmp_path / "runs"), method, str(step)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert len(found) > 8  # so many times it was killed
    assert len(set(found)) == 1
    folders = [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    assert all((folder / method).is_dir() and not list(folder.glob("*.part")) for folder in folders)
    if method == "dense":  # a kill costs at most the shard that it hit: 2 of 7 passages; and 2 queries each time
        embedded = [path.stat().st_size for path in (tmp_path / "runs").glob("*.log")]
        assert max(embedded) <= 7 + 2 + 2 * 2
        assert min(embedded) >= 7 + 2
