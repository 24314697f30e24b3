"""As much of the hub's HTTP interface as its client needs to push and pull: repositories, commits, and files by LFS.

Repositories of `others/` may not be written; `broken/` answers 500; without the token nothing may be written.
"""

import base64
import hashlib
import json
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_stand_in"
LARGE = (".safetensors", ".sqlite")
"""What goes by LFS, as the hub's own attributes say."""


class StandIn(ThreadingHTTPServer):
    """The state of the hub."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.objects_url = f"http://localhost:{self.server_port}/objects"
        """Under another name: the client follows redirects to the hub itself and stops at those to its stores."""
        self.commits = defaultdict(list)
        """By (kind, repository): of each commit its id and its files, each bytes or the digest of an object."""
        self.private = {}
        self.objects = {}
        self.requests = []

    def files(self, kind, repo):
        """The contents of the files of the last commit."""
        return {name: self.content(held) for name, held in self.commits[kind, repo][-1][1].items()}

    def content(self, held):
        return held if isinstance(held, bytes) else self.objects[held]

    def commit(self, kind, repo, changed):
        """Add a commit, as somebody may by other means."""
        before = self.commits[kind, repo][-1][1] if self.commits[kind, repo] else {}
        files = {**before, **changed}
        id_ = hashlib.sha1(f"{len(self.commits[kind, repo])} {repo} {sorted(files)}".encode()).hexdigest()
        self.commits[kind, repo].append((id_, files))
        self.private.setdefault((kind, repo), False)
        return id_


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        length = headers.pop("Content-Length", len(content))
        for key, value in {"Content-Length": length, **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status, code, message="no"):
        self._answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def _read(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while length := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _handle(self):
        self.body = self._read()
        split = urlsplit(self.path)
        self.server.requests.append((self.command, split.path))
        words = [unquote(word) for word in split.path.strip("/").split("/")]
        self.query = parse_qs(split.query)
        if words[0] == "objects":
            return self._object(words[1])
        if words[:3] == ["api", "repos", "create"]:
            return self._create(json.loads(self.body))
        if words[:2] == ["api", "validate-yaml"]:
            assert json.loads(self.body)["content"].startswith("---\n")
            return self._answer(200, {"errors": [], "warnings": []})
        if words[0] == "api" and len(words) < 4:  # of no matter here, such as what names of tools it knows
            return self._answer(404, {"error": "not here"})
        if words[0] == "api":
            return self._api(words[1].removesuffix("s"), f"{words[2]}/{words[3]}", words[4:])
        kind = "dataset" if words[0] == "datasets" else "model"
        words = words[1:] if kind == "dataset" else words
        if words[2:] == ["info", "lfs", "objects", "batch"]:
            return self._batch()
        assert words[2] == "resolve"
        return self._resolve(kind, f"{words[0]}/{words[1]}", words[3], "/".join(words[4:]))

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _may_write(self, repo):
        if repo.startswith("broken/"):
            self._answer(500, {"error": "it burns"})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif repo.startswith("others/"):
            self._answer(403, {"error": "You don't have the rights"})
        else:
            return True
        return False

    def _create(self, asked):
        repo, kind = f"{asked['organization']}/{asked['name']}", asked.get("type") or "model"
        if not self._may_write(repo):
            return None
        if (kind, repo) in self.server.private:
            return self._answer(409, {"error": "You already created this repo", "url": f"{self.server.url}/{repo}"})
        self.server.private[kind, repo] = asked.get("private", asked.get("visibility") == "private")
        return self._answer(200, {"url": f"{self.server.url}/{'datasets/' * (kind == 'dataset')}{repo}"})

    def _found(self, kind, repo, revision):
        """The commit of a revision; None after it was refused."""
        if (kind, repo) not in self.server.private:
            self._refuse(404, "RepoNotFound", "Repository not found")
            return None
        commits = self.server.commits[kind, repo]
        named = {"main": commits[-1]} | dict(zip((id_ for id_, _ in commits), commits, strict=True))
        if revision not in named:
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
            return None
        return named[revision]

    def _api(self, kind, repo, rest):
        if repo.startswith("gated/"):
            return self._refuse(403, "GatedRepo", "Access is restricted")
        if not rest or rest[0] == "revision":
            found = self._found(kind, repo, rest[1] if rest else "main")
            return None if found is None else self._answer(200, self._described(repo, *found))
        if not self._may_write(repo):
            return None
        if rest[0] == "preupload":
            files = json.loads(self.body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                 "shouldIgnore": False} for file in files
            ]  # fmt: skip
            return self._answer(200, {"files": modes})
        assert rest == ["commit", "main"]
        changed = {}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                assert len(self.server.objects[value["oid"]]) == value["size"]
                changed[value["path"]] = value["oid"]
        id_ = self.server.commit(kind, repo, changed)
        return self._answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{id_}", "commitOid": id_})

    def _described(self, repo, id_, files):
        siblings = []
        for name, held in files.items():
            size = len(self.server.content(held))
            lfs = {} if isinstance(held, bytes) else {"lfs": {"sha256": held, "size": size, "pointerSize": 130}}
            siblings.append({"rfilename": name, "size": size, "blobId": "0" * 40, **lfs})
        return {"_id": "1", "id": repo, "modelId": repo, "sha": id_, "private": False, "disabled": False,
                "gated": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}  # fmt: skip

    def _batch(self):
        objects = []
        for asked in json.loads(self.body)["objects"]:
            url = f"{self.server.url}/objects/{asked['oid']}"
            known = asked["oid"] in self.server.objects
            actions = {} if known else {"actions": {"upload": {"href": url}, "verify": {"href": url}}}
            objects.append({**asked, **actions})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _object(self, digest):
        if self.command == "PUT":
            assert hashlib.sha256(self.body).hexdigest() == digest
            self.server.objects[digest] = self.body
        elif self.command == "POST":
            assert len(self.server.objects[digest]) == json.loads(self.body)["size"]
        else:
            return self._answer(200, self.server.objects[digest], ETag=f'"{digest}"')
        return self._answer(200, {})

    def _resolve(self, kind, repo, revision, name):
        found = self._found(kind, repo, revision)
        if found is None:
            return None
        id_, files = found
        if name not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        held = files[name]
        if isinstance(held, bytes):
            return self._answer(200, held, X_Repo_Commit=id_, ETag=f'"{hashlib.sha1(held).hexdigest()}"')
        return self._answer(
            302, b"", X_Repo_Commit=id_, X_Linked_Etag=f'"{held}"', X_Linked_Size=len(self.server.content(held)),
            Location=f"{self.server.objects_url}/{held}",
        )  # fmt: skip
