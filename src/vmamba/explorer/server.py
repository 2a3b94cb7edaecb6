"""The explorer's web server: the page's files and its queries, for browsers of this machine alone."""

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from torch import Tensor

from vmamba.errors import UserError
from vmamba.explorer.images import MOST_BYTES, UnknownImageError, too_many_bytes
from vmamba.explorer.queries import Explorer, ExplorerError

log = logging.getLogger(__name__)

HOST = "127.0.0.1"

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class _Refused(Exception):  # noqa: N818  (never leaves this file)
    """A request that is answered with a status and a message."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class ExplorerServer(ThreadingHTTPServer):
    """Serves an explorer on the loopback interface, until it is shut down.

    Args:
        explorer: Answers the queries.
        port: To listen on; 0 for any that is free.

    Raises:
        ExplorerError: The port is in use, or may not be used.
    """

    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # on Windows it would let two programs share a port

    def __init__(self, explorer: Explorer, port: int = 0) -> None:
        self.explorer = explorer
        self.files = _page_files()
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise ExplorerError(
                f"port {port} of {HOST}: {error.strerror or error}; is another explorer running? Choose "
                "another port, or 0 for any that is free"
            ) from error

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names under which the page may be asked for."""
        return tuple(f"{name}:{self.server_port}" for name in (HOST, "localhost"))

    @property
    def address(self) -> str:
        """Of the page."""
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves before the answer is no error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def _page_files() -> dict[str, tuple[str, bytes]]:
    """Type and content of each file of the page, by its path in the address. No other file is ever served."""
    folder = files("vmamba.explorer") / "static"
    served = {}
    for file in folder.iterdir():
        kind = _TYPES.get(file.name.rpartition(".")[2])
        if kind is not None:
            path = "/" if file.name == "index.html" else f"/{file.name}"
            served[path] = (f"{kind}; charset=utf-8", file.read_bytes())
    return served


class _Handler(BaseHTTPRequestHandler):
    """Answers one browser's requests."""

    server: ExplorerServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "vmamba", ""
    timeout = 60  # seconds without a byte

    def do_GET(self) -> None:
        self._respond(self._get)

    def do_POST(self) -> None:
        self._respond(self._post)

    def _respond(self, answer: Callable[[], None]) -> None:
        """Answer, or say in JSON why not."""
        try:
            self._check_sender()
            answer()
        except _Refused as error:
            self._refuse(error.status, str(error))
        except UnknownImageError as error:
            self._refuse(HTTPStatus.NOT_FOUND, str(error))
        except UserError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except OSError:  # the browser has left
            raise
        except Exception as error:
            log.exception("%s", self.path)
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"an error of the explorer's own: {error!r}")

    def _check_sender(self) -> None:
        """Refuse other sites that make a browser ask, also by a name that they let point to this machine."""
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        if host not in self.server.hosts:
            raise _Refused(HTTPStatus.FORBIDDEN, f"unknown host {host!r}; open {self.server.address}")
        if origin is not None and origin not in [f"http://{each}" for each in self.server.hosts]:
            raise _Refused(HTTPStatus.FORBIDDEN, f"unknown origin {origin!r}")
        site = self.headers.get("Sec-Fetch-Site", "none")
        if site not in ("same-origin", "none") and self.path != "/":  # a link to the page may be anywhere
            raise _Refused(HTTPStatus.FORBIDDEN, f"asked by another site ({site})")

    def _get(self) -> None:
        path = urlsplit(self.path).path
        if path in self.server.files:
            kind, content = self.server.files[path]
            self._send(content, kind)
            return
        query = _Query(urlsplit(self.path).query)
        explorer = self.server.explorer
        match path:
            case "/api/state":
                self._send_json(explorer.state())
            case "/api/picture":
                picture = explorer.picture(query.integer("model"), query.text("image"))
                self._send(picture, "image/png")
            case "/api/prediction":
                self._send_json(explorer.prediction(query.integer("model"), query.text("image")))
            case "/api/row":
                routes, row = explorer.row(
                    query.integer("model"),
                    query.text("image"),
                    query.text("block"),
                    query.integer("position"),
                    query.text("kind"),
                    query.integer("delta") != 0,
                )
                self._send_values(row, {"X-Routes": ",".join(map(quote, routes))})
            case "/api/field":
                at = query.number("x"), query.number("y")
                self._send_values(explorer.field(query.integer("model"), query.text("image"), at))
            case _:
                raise _Refused(HTTPStatus.NOT_FOUND, f"there is nothing at {path}")

    def _post(self) -> None:
        """An upload: the file itself is the body."""
        name = unquote(self.headers.get("X-Name", "upload"))[:200]
        try:
            length = int(self.headers["Content-Length"])
        except (TypeError, ValueError):
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "Content-Length: expected the file's size") from None
        if urlsplit(self.path).path != "/api/images":
            raise _Refused(HTTPStatus.NOT_FOUND, f"there is nothing at {self.path}")
        if not 0 <= length <= MOST_BYTES:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, too_many_bytes(name, length))
        body = self.rfile.read(length)
        self._send_json({"id": self.server.explorer.images.add(name, body), "name": name})

    def _send_values(self, values: Tensor, headers: Mapping[str, str] | None = None) -> None:
        """A float32 tensor as its bytes, little-endian, row by row."""
        shape = ",".join(map(str, values.shape))
        content = values.contiguous().numpy().astype("<f4").tobytes()
        self._send(content, "application/octet-stream", headers={"X-Shape": shape, **(headers or {})})

    def _send_json(self, values: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(values).encode(), "application/json", status)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self.close_connection = True  # what remains of the request is not read
        self._send_json({"error": message}, status)

    def _send(
        self,
        content: bytes,
        kind: str,
        status: HTTPStatus = HTTPStatus.OK,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        lengths = {"Content-Type": kind, "Content-Length": str(len(content))}
        if self.close_connection:
            lengths["Connection"] = "close"
        for name, value in {**_HEADERS, **lengths, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


class _Query:
    """The arguments of a request."""

    def __init__(self, text: str) -> None:
        self._values = parse_qs(text)

    def text(self, name: str) -> str:
        values = self._values.get(name, [])
        if len(values) != 1:
            raise ExplorerError(f"{name}: expected one value, got {len(values)}")
        return values[0]

    def integer(self, name: str) -> int:
        text = self.text(name)
        if not text.removeprefix("-").isdecimal() or len(text) > 18:
            raise ExplorerError(f"{name}: expected a whole number, got {text!r}")
        return int(text)

    def number(self, name: str) -> float:
        text = self.text(name)
        try:
            return float(text)
        except ValueError:
            raise ExplorerError(f"{name}: expected a number, got {text!r}") from None
