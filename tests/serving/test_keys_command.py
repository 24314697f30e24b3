"""`latentmem keys` and `latentmem audit`: what they print, where, and what they leave on record."""

import json
import re
from contextlib import closing

import pytest

from latentmem.serving.operators.keys import Keys


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"run: {tmp_path / 'run'}\n")
    return str(path)


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run/serve/audit.jsonl").read_text().splitlines()]


def test_the_secret_alone_goes_to_standard_output_and_opens_the_server(run, config, tmp_path):
    status, out, err = run("keys", "create", config, "--tenant", "acme", "--scopes", "read, infer", "--expires", "2",
                           "--parallel", "3", "--tokens-per-minute", "9", "--shares")  # fmt: skip
    assert status == 0
    secret = out.strip()
    with closing(Keys(tmp_path / "run/serve/keys.sqlite")) as keys:
        key = keys.find(secret)
    assert (key.tenant, key.scopes, key.parallel, key.tokens_per_minute) == ("acme", {"infer", "read"}, 3, 9)
    assert key.shares
    assert key.expires == pytest.approx(key.created + 2 * 86400)
    assert err == f"key {key.id} of tenant acme; its secret is shown only here:\n"


def test_keys_are_listed_revoked_and_put_on_record_without_their_secrets(run, config, tmp_path):
    secret = run("keys", "create", config)[1].strip()
    id = secret.split("_")[1]
    assert re.fullmatch(rf"{id}  valid  \(operator\)  infer,read,write  made [-\d]+\n", run("keys", "list", config)[1])
    assert run("keys", "revoke", config, id) == (0, f"key {id} is revoked\n", "")
    assert "revoked" in run("keys", "list", config)[1]
    assert [(line["event"], line["key"]) for line in lines(tmp_path)] == [("key created", id), ("key revoked", id)]
    everything = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert secret.split("_", 2)[2].encode() not in everything
    log = tmp_path / "run/serve/audit.jsonl"
    status, out, _ = run("audit", "verify", str(log))
    assert (status, out.split("; the last")[0]) == (0, f"{log}: 2 lines, nothing altered or removed")
    log.write_text(log.read_text().replace('"tenant":""', '"tenant":"x"', 1))
    status, _, err = run("audit", "verify", str(log))
    assert (status, err) == (2, f"latentmem: {log}: line 1 was altered; the 0 lines before it are whole\n")


def test_the_files_lie_where_the_configuration_says(run, config, tmp_path):
    run("keys", "create", config, f"serve.keys={tmp_path / 'k'}", f"serve.audit={tmp_path / 'a'}")
    with closing(Keys(tmp_path / "k")) as keys:
        assert len(keys.all()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["create", "CONFIG", "--scopes", "infer,everything"], "scope 'everything' is unknown; known: admin"),
        (["create", "CONFIG", "--tenant", "a/b"], "tenant 'a/b' is no name; expected up to 64 ASCII letters"),
        (["revoke", "CONFIG", "nothing"], "no key has the id 'nothing'; `latentmem keys list` shows their ids"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(run, config, words, told):
    status, out, err = run("keys", *[config if word == "CONFIG" else word for word in words])
    assert (status, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1
