"""A stand-in for the hub on loopback: the calls of an upload, as huggingface_hub makes them.

    GET  /api/models/USER/NAME                     404 with X-Error-Code, or what is there
    POST /api/repos/create                         a repository, private or not
    POST /api/validate-yaml                        front matter of the card, parsed for real
    POST /api/models/USER/NAME/preupload/main      which files go through LFS (the tensors)
    POST /USER/NAME.git/info/lfs/objects/batch     where they are put; PUT; verify
    POST /api/models/USER/NAME/commit/main         one commit, as lines of JSON
    HEAD, GET /USER/NAME/resolve/main/FILE         a file of the repository

It keeps everything that it was sent, so that a test can look for what should not be in it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import yaml


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Hub:
    """What the stand-in knows and was told."""

    token: str
    user: str = "me"
    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *words: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._take()
        if "/resolve/" in self.path:
            self._resolve(with_body=True)
            return
        repo = self.path.removeprefix("/api/models/")
        found = self.hub.repositories.get(repo)
        if not self._authorised():
            return
        if found is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        siblings = [{"rfilename": name} for name in found.files]
        self._answer(200, {"id": repo, "private": found.private, "siblings": siblings})

    def do_HEAD(self) -> None:
        self._resolve(with_body=False)

    def _resolve(self, *, with_body: bool) -> None:
        repo, _, name = self.path[1:].partition("/resolve/main/")
        if not self._authorised():
            return
        body = self.hub.repositories[repo].files[name]
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def do_PUT(self) -> None:
        body = self._take()
        self.hub.objects[self.path.removeprefix("/store/")] = body
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self._take()
        if self.path != "/api/validate-yaml" and not self._authorised():
            return
        if self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif self.path == "/verify":
            told = json.loads(body)
            held = self.hub.objects[told["oid"]]
            good = hashlib.sha256(held).hexdigest() == told["oid"] and len(held) == told["size"]
            self._answer(200 if good else 422, {})
        elif "/commit/" in self.path:
            self._commit(body)
        else:
            self._answer(400, {"error": f"no such call: {self.path}"})

    def _create(self, told: dict[str, Any]) -> None:
        owner = told["organization"] or self.hub.user
        if owner != self.hub.user:
            self._answer(403, {"error": "You don't have the rights to create a model there"})
            return
        private = told.get("visibility") == "private" or told.get("private") is True
        repo = f"{owner}/{told['name']}"
        self.hub.repositories[repo] = Repository(private)
        self._answer(200, {"url": f"{self.hub.endpoint}/{repo}"})

    def _validate(self, content: str) -> None:
        try:
            front = yaml.safe_load(content.split("---\n")[1])
            assert content.startswith("---\n") and isinstance(front["tags"], list)
            assert front["license"] != "other" or front["license_name"]
            assert front.get("base_model", "a/b").count("/") == 1
        except (AssertionError, KeyError, IndexError, yaml.YAMLError) as error:
            self._answer(400, {"errors": [{"message": repr(error)}], "warnings": []})
            return
        self._answer(200, {"errors": [], "warnings": []})

    def _batch(self, told: dict[str, Any]) -> None:
        objects = [
            {
                **item,
                "actions": {
                    "upload": {"href": f"{self.hub.endpoint}/store/{item['oid']}"},
                    "verify": {"href": f"{self.hub.endpoint}/verify"},
                },
            }
            for item in told["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, body: bytes) -> None:
        repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
        files = self.hub.repositories[repo].files
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        url = f"{self.hub.endpoint}/{repo}/commit/{'0' * 40}"
        self._answer(200, {"commitUrl": url, "commitOid": "0" * 40})

    def _authorised(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        message = "Invalid credentials in Authorization header"
        self._answer(401, {"error": message}, {"X-Error-Message": message})
        return False

    def _take(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append((self.command, self.path, dict(self.headers), body))
        return body

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def running(token: str) -> Iterator[Hub]:
    """A hub that accepts `token` and nothing else."""
    hub = Hub(token)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
