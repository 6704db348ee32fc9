"""EC2's instance metadata as far as spot notices go: a session first, then 404 until a notice lies in a file.

As a program it is the service of one host: `python -m tests.support.metadata ADDRESS PORT NOTICE_FILE`.
"""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SESSION = "a-session"


def metadata_server(address: str, port: int, notice: Path) -> ThreadingHTTPServer:
    """A server that was not started yet; it asks for a session as EC2 does where HttpTokens is required."""

    class Service(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            wanted = self.path == "/latest/api/token" and self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
            self._answer(200 if wanted else 400, SESSION if wanted else "")

        def do_GET(self) -> None:
            if self.headers.get("X-aws-ec2-metadata-token") != SESSION:
                self._answer(401, "")
            elif self.path == "/latest/meta-data/spot/instance-action" and notice.is_file():
                self._answer(200, notice.read_text(encoding="utf-8"))
            else:
                self._answer(404, "")

        def _answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *words: object) -> None:
            pass

    return ThreadingHTTPServer((address, port), Service)


if __name__ == "__main__":
    server = metadata_server(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    print("listens", flush=True)
    server.serve_forever()
