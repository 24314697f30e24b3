"""API keys: hashed, shown once, looked up anew for each request, ended at once."""

import hashlib
import re
import sqlite3
import stat
import subprocess
import sys

import pytest

from latentmem.errors import KeysError
from latentmem.serving.operators import keys as room
from latentmem.serving.operators.keys import Keys, shown


class Clock:
    now = 1_700_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def keys(tmp_path, clock):
    made = Keys(tmp_path / "serve" / "keys.sqlite", clock)
    yield made
    made.close()


def test_a_secret_finds_its_key_and_the_file_holds_only_its_digest(keys):
    key, secret = keys.create("acme", ["read", "infer"], requests_per_minute=5, tokens_per_minute=9, parallel=2)
    assert re.fullmatch(rf"lm_{key.id}_[A-Za-z0-9_-]{{43}}", secret)
    assert keys.find(secret) == key
    assert (key.tenant, key.scopes, key.requests_per_minute, key.parallel) == ("acme", {"infer", "read"}, 5, 2)
    content = keys.path.read_bytes()
    assert hashlib.sha256(secret.encode()).digest() in content
    assert secret.encode() not in content
    assert secret.split("_", 2)[2].encode() not in content
    assert secret not in repr(key) + repr(keys) + repr(vars(keys))


def test_only_its_user_may_read_the_file(keys):
    keys.create("acme", ["infer"])
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600


def test_secrets_that_differ_in_anything_find_nothing(keys):
    _, secret = keys.create("acme", ["infer"])
    other, _ = keys.create("other", ["infer"])
    wrong = [secret[:-1], secret + "A", secret[:-1] + ("A" if secret[-1] != "A" else "B"), secret.upper(), "", " ", "é"]
    wrong += [f"lm_{other.id}_{secret.split('_', 2)[2]}", f" {secret}", f"{secret}\n", "lm_", "\ud800", secret * 9]
    assert [keys.find(text) for text in wrong] == [None] * len(wrong)


def test_an_unknown_id_costs_a_comparison_too(keys, monkeypatch):
    """Whoever measures the time learns nothing about which ids exist."""
    compared = []
    monkeypatch.setattr(room.hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or a == b)
    _, secret = keys.create("acme", ["infer"])
    for text in (secret, f"lm_{'0' * 12}_{'x' * 43}", "no form at all"):
        keys.find(text)
    assert compared == [(32, 32)] * 3


def test_a_revoked_key_is_refused_at_once_by_who_has_the_file_open_already(keys, clock):
    key, secret = keys.create("acme", ["infer"])
    server = Keys(keys.path, clock)
    assert server.find(secret) == key
    assert keys.revoke(key.id).state(clock()) == "revoked"
    assert server.find(secret) is None
    assert server.valid(key.id) is None
    clock.now += 5
    assert keys.revoke(key.id).revoked == clock.now - 5
    server.close()


def test_a_key_expires(keys, clock):
    key, secret = keys.create("acme", ["infer"], days=2)
    clock.now += 2 * 86400 - 1
    assert keys.find(secret) == key
    clock.now += 1
    assert keys.find(secret) is None
    assert [each.state(clock()) for each in keys.all()] == ["expired"]


def test_there_are_keys_from_the_first_one_on_even_when_all_are_revoked_or_the_file_is_gone(keys, clock, tmp_path):
    server = Keys(keys.path, clock)
    assert not server.exist()
    assert server.all() == []
    assert server.find(f"lm_{'0' * 12}_{'x' * 43}") is None
    key, secret = keys.create("acme", ["infer"])
    assert server.exist()
    keys.revoke(key.id)
    assert server.exist()
    keys.path.rename(tmp_path / "moved")
    assert server.exist()
    assert server.find(secret) is None
    assert not Keys(keys.path, clock).exist()  # who never saw them takes the folder as it is
    server.close()


def test_a_file_that_takes_the_place_of_another_is_followed(keys, clock, tmp_path):
    _, first = keys.create("acme", ["infer"])
    server = Keys(keys.path, clock)
    assert server.find(first)
    other = Keys(tmp_path / "other.sqlite", clock)
    _, second = other.create("acme", ["infer"])
    other.close()
    (tmp_path / "other.sqlite").rename(keys.path)
    assert server.find(first) is None
    assert server.find(second)
    server.close()


@pytest.mark.parametrize(
    ("tenant", "scopes", "words"),
    [
        ("acme", [], "a key without scopes may do nothing; name some of infer, read, write, admin"),
        ("acme", ["infer", "wirte"], "scope 'wirte' is unknown; did you mean 'write'?"),
        ("a b", ["infer"], "tenant 'a b' is no name; expected up to 64 ASCII letters"),
        ("\u0430cme", ["infer"], r"tenant '\u0430cme' is no name"),  # a Cyrillic letter
        ("x" * 65, ["infer"], "is no name"),
        ("../x", ["infer"], "is no name"),
        ("-rf", ["infer"], "is no name"),
    ],
)
def test_what_no_key_can_be_made_of(keys, tenant, scopes, words):
    with pytest.raises(KeysError, match=re.escape(words)):
        keys.create(tenant, scopes)
    assert not keys.path.exists()


def test_revoking_takes_an_id_and_never_repeats_a_secret(keys):
    _, secret = keys.create("acme", ["infer"])
    with pytest.raises(KeysError, match="give the key's id alone") as raised:
        keys.revoke(secret)
    assert secret not in str(raised.value)
    with pytest.raises(KeysError, match="no key has the id '000000000000'; `latentmem keys list` shows their ids"):
        keys.revoke("0" * 12)


def test_a_file_that_is_something_else_is_one_line(tmp_path):
    path = tmp_path / "keys.sqlite"
    path.write_text("not a database, but long enough to look like one" * 40)
    for call in (Keys(path).exist, Keys(path).all, lambda: Keys(path).find("x")):
        with pytest.raises(KeysError, match=r"cannot be read or written \(file is not a database\)"):
            call()


def test_a_newer_form_is_refused(keys):
    keys.create("acme", ["infer"])
    keys.close()
    with sqlite3.connect(keys.path) as db:
        db.execute("PRAGMA user_version = 2")
    db.close()
    with pytest.raises(KeysError, match="form 2 is newer than 1; upgrade latentmem"):
        keys.all()


def test_keys_of_two_processes_are_all_there(keys):
    script = f"""
from pathlib import Path
from latentmem.serving.operators.keys import Keys
for i in range(20):
    Keys(Path({str(keys.path)!r})).create("t", ["infer"])
"""
    running = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [process.wait(120) for process in running] == [0, 0]
    assert len(keys.all()) == 40


def test_a_line_tells_all_but_the_secret(keys, clock):
    key, _ = keys.create("acme", ["write", "infer"], days=10, requests_per_minute=60, parallel=4, shares=True)
    assert shown(key, clock()) == (
        f"{key.id}  valid  acme  infer,write  made 2023-11-14  until 2023-11-24  60 requests a minute  4 at once  "
        "shares"
    )
    key, _ = keys.create("", ["admin"])
    assert shown(key, clock()) == f"{key.id}  valid  (operator)  admin  made 2023-11-14"
