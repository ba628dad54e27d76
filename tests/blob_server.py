"""A blob store on this machine, whose answers go wrong as a test asks."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class BlobServer(ThreadingHTTPServer):
    """Serves `files` (path to content). Each request takes the next of `faults`, if there is any left:

    `503`; `drop` (closes after half of what it announced); `short` and `long` (announces other lengths than it has);
    `html` (a page instead of the file); `damaged` (one byte differs); `stall` (says nothing until the test is over).
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.asked: list[tuple[str, str | None]] = []
        """Path and Range of each request."""
        self.ranges = True
        self.etags = True
        self.headers: dict[str, str] = {}
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is part of the test."""


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        assert isinstance(server, BlobServer)
        server.asked.append((self.path, wanted))
        fault = server.faults.pop(0) if server.faults else ""
        content = server.files.get(self.path)
        if fault == "stall":
            server.over.wait(30)
            return
        if content is None or fault == "503":
            self.answer(404 if content is None else 503, b"no such blob")
            return
        if fault == "html":
            self.answer(200, b"<!DOCTYPE html><title>Sign in</title>")
            return
        etag = {"ETag": f'"{hashlib.sha256(content).hexdigest()[:8]}"'} if server.etags else {}
        start, status = 0, 200
        if server.ranges and wanted and (at := re.fullmatch(r"bytes=(\d+)-", wanted)):
            start, status = int(at[1]), 206
            if start >= len(content):
                self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            etag["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if fault == "damaged":
            body = body[:-1] + bytes([body[-1] ^ 1])
        announced = len(body) + {"short": -len(body) // 3, "long": 100}.get(fault, 0)
        sent = body[: len(body) // 2] if fault == "drop" else body[:announced]
        self.answer(status, sent, {**etag, **server.headers, "Content-Length": str(announced)})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Connection": "close", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """The test's output stays its own."""


@contextmanager
def serving() -> Iterator[BlobServer]:
    """A server that runs until the end of the block."""
    server = BlobServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
