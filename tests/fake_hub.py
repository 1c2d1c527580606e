"""A hub on this machine, as far as banks need it: repositories are made, filled by commits, listed and read."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """Repositories by id, each a list of commits, {file: content}."""

    def __init__(self) -> None:
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.tokens: set[str | None] = set()
        self.requests: list[str] = []
        self.url = ""

    def commit_id(self, repo: str, revision: str) -> str | None:
        """Of a branch or commit; None where there is none."""
        ids = [self._id(repo, n) for n in range(len(self.repos.get(repo, [])))]
        return ids[-1] if ids and revision == "main" else revision if revision in ids else None

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Of a revision."""
        ids = [self._id(repo, n) for n in range(len(self.repos[repo]))]
        return self.repos[repo][ids.index(self.commit_id(repo, revision) or "")]

    def _id(self, repo: str, number: int) -> str:
        return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def missing(self) -> None:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            path, _, _ = self.path.partition("?")
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                repo, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
                if (commit := hub.commit_id(repo, revision)) is None:
                    if repo not in hub.repos:
                        return self.missing()
                    return self.answer({"error": "no"}, 404, {"X-Error-Code": "RevisionNotFound"})
                files = hub.files(repo, revision)
                if len(parts) > 4 and parts[4] == "tree":
                    return self.answer(
                        [
                            {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                            for n, c in files.items()
                        ]
                    )
                siblings = [{"rfilename": name} for name in files]
                return self.answer(
                    {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "private": False, "tags": []}
                )
            if len(parts) > 4 and parts[2] == "resolve":
                repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
                content = hub.files(repo, revision).get(name)
                if content is None:
                    return self.answer({"error": "no"}, 404, {"X-Error-Code": "EntryNotFound"})
                tag = hashlib.sha256(content).hexdigest()
                return self.answer(
                    content, 200, {"ETag": f'"{tag}"', "X-Repo-Commit": hub.commit_id(repo, revision) or ""}
                )
            return self.missing()

        do_HEAD = do_GET

        def do_POST(self) -> None:
            hub.requests.append(f"POST {self.path}")
            hub.tokens.add(self.headers.get("Authorization"))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = self.path.partition("?")[0].strip("/").split("/")
            if self.headers.get("Authorization") != "Bearer hf_good":
                return self.answer({"error": "Invalid username or password."}, 401)
            if parts == ["api", "validate-yaml"]:
                return self.answer({"errors": [], "warnings": []})
            if parts == ["api", "repos", "create"]:
                wanted = json.loads(body)
                repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
                status = 409 if repo in hub.repos else 200
                hub.repos.setdefault(repo, [{".gitattributes": b""}])
                return self.answer({"url": f"{hub.url}/{repo}", "id": repo}, status)
            repo = "/".join(parts[2:4])
            if parts[4] == "preupload":
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                return self.answer({"files": files})
            new = dict(hub.files(repo))
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    new[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    new = {n: c for n, c in new.items() if not fnmatch(n, value["path"])}
            hub.repos[repo].append(new)
            commit = hub.commit_id(repo, "main")
            return self.answer({"commitUrl": f"{hub.url}/{repo}/commit/{commit}", "commitOid": commit})

    return Handler


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Runs one."""
    hub = FakeHub()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()
