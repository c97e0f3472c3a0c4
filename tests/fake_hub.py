"""The few answers of the Hugging Face hub that uploading a model needs, on 127.0.0.1."""

from __future__ import annotations

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

#: Token → the role it has. Any other token is unknown.
ROLES = {"hf_writer": "write", "hf_reader": "read"}


class FakeHub:
    """repos: name → {"private", "files": path → bytes}; models: name → license of models that are there already."""

    def __init__(self, address: str, models: dict[str, str]):
        self.address, self.models = address, models
        self.repos: dict[str, dict] = {}
        self.refuses_commits = False

    def get(self, path: str, token: str) -> tuple[int, dict]:
        if path == "/api/whoami-v2":
            if token not in ROLES:
                return 401, {"error": "Invalid username or password."}
            orgs = [{"name": "team", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
            access = {"displayName": "laptop", "role": ROLES[token]}
            return 200, {"name": "ann", "type": "user", "orgs": orgs, "auth": {"accessToken": access}}
        name = path.removeprefix("/api/models/")
        if name in self.models:
            return 200, {"id": name, "modelId": name, "cardData": {"license": self.models[name]}}
        if name in self.repos:
            return 200, {"id": name, "modelId": name, "private": self.repos[name]["private"]}
        return 404, {"error": "Repository not found"}

    def post(self, path: str, token: str, body: bytes) -> tuple[int, dict]:
        if ROLES.get(token) != "write":
            return 403, {"error": "Forbidden"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'ann'}/{asked['name']}"
            if name in self.repos:
                return 409, {"url": f"{self.address}/{name}", "error": "You already created this model repo"}
            private = asked.get("private", False) or asked.get("visibility") == "private"
            self.repos[name] = {"private": private, "files": {}}
            return 200, {"url": f"{self.address}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name, _, action = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if action == "preupload":
            files = [f["path"] for f in json.loads(body)["files"]]
            return 200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]}
        if self.refuses_commits:
            return 403, {"error": "Storage quota exceeded"}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.repos[name]["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return 200, {"commitUrl": f"{self.address}/{name}/commit/abc", "commitOid": "abc", "hookOutput": ""}


@contextmanager
def fake_hub(models: dict[str, str]):
    """A hub that is up while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, status: int, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            if "error" in content:
                self.send_header("X-Error-Message", content["error"])
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _token(self) -> str:
            return self.headers.get("Authorization", "").removeprefix("Bearer ")

        def do_GET(self) -> None:
            self._answer(*hub.get(self.path.partition("?")[0], self._token()))

        def do_POST(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer(*hub.post(self.path.partition("?")[0], self._token(), body))

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_port}", models)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
