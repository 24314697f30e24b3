"""A few passages of our own, as a file."""

import json

import pytest

from latentmem.server.corpus import Corpus

TEXTS = [
    ("Moss Lantern", "Moss Lantern is a duo that plays dub techno in Wend."),
    ("Wend", "Wend is a town on a canal. Its canal has seven locks; the canal freezes in winter."),
    ("Ada Quill", "Ada Quill repaired the locks of the canal and wrote about doors."),
    ("Red door", "The red door of the old mill is red on both sides."),
    ("Blue door", "Nobody has opened the blue door since the flood."),
    ("Émile Sorrel", "Émile Sorrel painted winter scenes; critics called him the painter of ice."),
    ("!!!", "?!"),
]


@pytest.fixture
def passages(tmp_path):
    """The corpus file."""
    path = tmp_path / "passages.jsonl"
    rows = [{"id": f"p{i}", "contents": f'"{title}"\n{text}'} for i, (title, text) in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def corpus(passages):
    """The corpus."""
    opened = Corpus(passages)
    yield opened
    opened.close()
