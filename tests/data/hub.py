"""A hub on 127.0.0.1: serves folders as repositories, with as much of the protocol as the hub's library needs.

It can simulate failures: `faults` maps the end of a path to the faults of its first GET requests, in order: a status
code such as 500 or 429, "cut" (half of the file, then the connection closes), "stall" (half of it, then nothing),
"slow" (in small pieces), "wrong" (other bytes of the same number), "redirect" (to another path).
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


class Hub:
    """Repositories by (kind, "owner/name") -> folder; `requests` lists the paths asked for."""

    def __init__(self, repositories: dict[tuple[str, str], Path], faults: dict[str, list] | None = None) -> None:
        self.repositories = repositories
        self.requests: list[str] = []
        self.faults = faults or {}
        self.ranges: list[str] = []
        """The byte ranges that resumed downloads asked for."""
        self.closing = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_arguments):
                pass

            def do_GET(self):
                hub.answer(self, body=True)

            def do_HEAD(self):
                hub.answer(self, body=False)

            def do_POST(self):
                length = int(self.headers.get("Content-Length") or 0)
                hub.answer(self, body=True, form=self.rfile.read(length))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_error) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, body: bool, form: bytes = b"") -> None:
        path = unquote(urlsplit(handler.path).path)
        self.requests.append(f"{handler.command} {path}")
        fault = next((left.pop(0) for end, left in self.faults.items() if body and path.endswith(end) and left), None)
        if isinstance(fault, int):
            handler.send_response(fault)
            if fault == 429:
                handler.send_header("Retry-After", "0")
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        if fault == "redirect":
            handler.send_response(302)
            handler.send_header("Location", f"/redirected{handler.path}")
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        path = path.removeprefix("/redirected")
        for (kind, name), folder in self.repositories.items():
            prefix = "" if kind == "model" else "datasets/"
            if path.startswith(f"/{prefix}{name}/resolve/"):
                file = folder / path.split("/resolve/")[1].split("/", 1)[1]
                if file.is_file():
                    return self.send(handler, file.read_bytes(), "application/octet-stream", body, fault)
            for start in (f"/api/{kind}s/{name}",):
                if path == start or path.startswith((f"{start}/revision/",)):
                    return self.send_json(handler, self.info(name, folder), body)
                if path.startswith(f"{start}/tree/"):
                    under = path.removeprefix(f"{start}/tree/").partition("/")[2]
                    return self.send_json(handler, self.tree(folder, under), body)
                if path.startswith(f"{start}/paths-info/"):
                    wanted = self.wanted_paths(form)
                    return self.send_json(handler, [e for e in self.tree(folder, "") if e["path"] in wanted], body)
        handler.send_response(404)
        handler.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in path else "RepoNotFound")
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return None

    @staticmethod
    def wanted_paths(form: bytes) -> list[str]:
        try:
            return json.loads(form)["paths"]
        except ValueError:
            return [unquote(part.partition("=")[2]).replace("+", " ") for part in form.decode().split("&")]

    @staticmethod
    def info(name: str, folder: Path) -> dict:
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return {
            "_id": "0" * 24,
            "id": name,
            "sha": COMMIT,
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": file} for file in files],
        }

    @staticmethod
    def tree(folder: Path, under: str) -> list[dict]:
        entries = []
        for path in sorted((folder / under).rglob("*")):
            entry = {"path": path.relative_to(folder).as_posix(), "oid": "0" * 40}
            if path.is_file():
                entry |= {"type": "file", "size": path.stat().st_size}
            else:
                entry |= {"type": "directory", "size": 0}
            entries.append(entry)
        return entries

    def send_json(self, handler, value, body: bool) -> None:
        self.send(handler, json.dumps(value).encode(), "application/json", body)

    def send(self, handler, content: bytes, kind: str, body: bool, fault: str | None = None) -> None:
        # The hub announces large files by their sha256, and the library stores them under that name.
        etag = hashlib.sha256(content) if content[8:9] == b"{" else hashlib.sha1(content)
        start, asked = 0, handler.headers.get("Range")
        if asked and body:
            self.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").split("-")[0])
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(content) - start))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.send_header("ETag", f'"{etag.hexdigest()}"')
        handler.send_header("X-Repo-Commit", COMMIT)
        handler.end_headers()
        if not body:
            return
        content = content[start:]
        if fault in ("cut", "stall"):
            handler.wfile.write(content[: len(content) // 2])
            handler.wfile.flush()
            if fault == "stall":
                self.closing.wait(20)
            handler.close_connection = True
        elif fault == "slow":
            for at in range(0, len(content), 1 + len(content) // 20):
                handler.wfile.write(content[at : at + 1 + len(content) // 20])
                handler.wfile.flush()
                time.sleep(0.02)
        else:
            handler.wfile.write(bytes(reversed(content)) if fault == "wrong" else content)
