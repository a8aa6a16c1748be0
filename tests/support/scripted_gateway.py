"""A gateway that answers as it was told: real HTTP on a loopback port, in OpenAI's shape."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ScriptedGateway:
    """Start it; its attributes say what it is to answer."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.status = 200
        self.headers: dict[str, str] = {}
        self.body: dict[str, Any] = {}
        self.pieces: list[str] = []
        self.error_event: dict[str, Any] = {}
        self.done = True
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                gateway.requests.append((self.path, body))
                self.send_response(gateway.status)
                for name, value in gateway.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if gateway.status != 200 or not body["stream"]:
                    self.wfile.write(json.dumps(gateway.body).encode())
                    return
                chat = "chat" in self.path
                for piece in gateway.pieces:
                    choice = {"delta": {"content": piece}} if chat else {"text": piece}
                    self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
                if gateway.error_event:
                    self.wfile.write(f"data: {json.dumps(gateway.error_event)}\n\n".encode())
                elif gateway.done:
                    self.wfile.write(b"data: [DONE]\n\n")

            def log_message(self, format: str, *args: object) -> None:
                """Keep the tests' output to the tests."""

        return Handler
