import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import pytest

from explorer.explored import BLOCK, make_images, running, small_model
from vmamba.explorer import Explorer, ExplorerError, ExplorerServer


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def server(paths: list[str]) -> Iterator[ExplorerServer]:
    with running(Explorer([small_model()], paths)) as server:
        yield server


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    server: ExplorerServer, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    try:
        return Answer(connection.getresponse())
    finally:
        connection.close()


def row_path(**change: Any) -> str:
    query = {"model": 0, "image": "0", "block": BLOCK, "position": 100, "kind": "CwBw", "delta": 1, **change}
    return f"/api/row?{urlencode(query)}"


def test_the_page(server: ExplorerServer) -> None:
    page = ask(server, "/")
    assert page.status == 200
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    for name, kind in (
        ("explorer.css", "text/css"),
        ("explorer.js", "text/javascript"),
        ("icon.svg", "image/svg+xml"),
    ):
        assert name.encode() in page.body
        answer = ask(server, f"/{name}")
        assert (answer.status, answer.headers["Content-Type"]) == (200, f"{kind}; charset=utf-8")
    assert b"http://" not in page.body
    assert b"https://" not in page.body
    assert b"style=" not in page.body


def test_a_strict_policy_on_every_answer(server: ExplorerServer) -> None:
    for path in ("/", "/explorer.js", "/api/state", row_path(), "/none"):
        headers = ask(server, path).headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers


def test_only_this_machine_can_connect(server: ExplorerServer) -> None:
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:{port}"}, 200),
        ({"Host": "127.0.0.1"}, 403),
        ({"Host": "127.0.0.1:1"}, 403),
        ({"Host": "evil.example:{port}"}, 403),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Origin": "http://localhost:{port}"}, 200),
        ({"Origin": "https://127.0.0.1:{port}"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ],
    ids=str,
)
def test_foreign_hosts_and_origins_are_refused(
    headers: dict[str, str], status: int, server: ExplorerServer, paths: list[str]
) -> None:
    port = server.server_port
    sent = {name.replace("-", "_"): value.format(port=port) for name, value in headers.items()}
    assert ask(server, "/api/state", **sent).status == status
    body = Path(paths[0]).read_bytes()
    assert ask(server, "/api/images", "POST", body, **sent).status == status


def test_a_link_to_the_page_may_be_anywhere(server: ExplorerServer) -> None:
    assert ask(server, "/", Sec_Fetch_Site="cross-site").status == 200


@pytest.mark.parametrize(
    "path", ["/../server.py", "/%2e%2e/server.py", "//etc/passwd", "/static/", "/api", "/a.js"]
)
def test_no_other_file_is_served(path: str, server: ExplorerServer) -> None:
    answer = ask(server, path)
    assert answer.status == 404
    assert "there is nothing at" in answer.json["error"]


def test_a_row_as_bytes(server: ExplorerServer) -> None:
    answer = ask(server, row_path())
    assert answer.status == 200
    assert answer.headers["X-Routes"] == "row,column,row_reversed,column_reversed"
    assert answer.headers["X-Shape"] == "4,16,12"
    values = np.frombuffer(answer.body, "<f4").reshape(4, 16, 12)
    _, expected = server.explorer.row(0, "0", BLOCK, 100, "CwBw", True)
    np.testing.assert_array_equal(values, expected.numpy())


def test_a_field_a_picture_and_a_prediction(server: ExplorerServer) -> None:
    field = ask(server, "/api/field?model=0&image=0&x=0.25&y=0.75")
    assert field.headers["X-Shape"] == "64,48"
    assert len(field.body) == 4 * 64 * 48
    assert ask(server, "/api/picture?model=0&image=1").body.startswith(b"\x89PNG")
    assert len(ask(server, "/api/prediction?model=0&image=1").json["classes"]) == 3


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        (row_path(position=192), 400, "position: expected 0 to 191"),
        (row_path(position=-1), 400, "position: expected 0 to 191"),
        (row_path(position="a"), 400, "position: expected a whole number, got 'a'"),
        (row_path(position="9" * 30), 400, "position: expected a whole number"),
        (row_path(block="stages.7"), 400, "has no block 'stages.7'"),
        (row_path(kind="other"), 400, "kind: expected one of"),
        (row_path(model=3), 400, "there is no model 3"),
        (row_path(image="none"), 404, "there is no image 'none'"),
        (row_path() + "&position=1", 400, "position: expected one value, got 2"),
        ("/api/picture?model=0", 400, "image: expected one value, got 0"),
        ("/api/field?model=0&image=0&x=1&y=0", 400, "at: expected x and y in"),
        ("/api/field?model=0&image=0&x=nan&y=0", 400, "at: expected x and y in"),
        ("/api/field?model=0&image=0&x=left&y=0", 400, "x: expected a number"),
        ("/api/none", 404, "there is nothing at /api/none"),
    ],
)
def test_bad_queries_get_a_message(path: str, status: int, message: str, server: ExplorerServer) -> None:
    answer = ask(server, path)
    assert answer.status == status
    assert message in answer.json["error"]


def test_an_upload(server: ExplorerServer, paths: list[str]) -> None:
    name = "Bär <b>.png"
    answer = ask(server, "/api/images", "POST", Path(paths[1]).read_bytes(), X_Name=quote(name))
    assert answer.status == 200
    assert answer.json["name"] == name
    key = answer.json["id"]
    assert {"id": key, "name": name} in ask(server, "/api/state").json["images"]
    again = ask(server, row_path(image=key))
    assert again.body == ask(server, row_path(image="1")).body


def test_bad_uploads_get_a_message(server: ExplorerServer) -> None:
    broken = ask(server, "/api/images", "POST", b"no image", X_Name="mine")
    assert broken.status == 400
    assert broken.json["error"].startswith("mine: not an image")
    assert ask(server, "/api/state", "POST", b"").status == 404
    for length, status in (("21000000", 413), ("-1", 413), ("many", 411)):
        huge = ask(server, "/api/images", "POST", None, Content_Length=length, X_Name="mine")
        assert huge.status == status
        assert huge.headers["Connection"] == "close"
    assert ask(server, "/api/images", "PUT", b"").status == 501


def test_many_questions_at_once(server: ExplorerServer) -> None:
    expected = [ask(server, row_path(position=position)).body for position in range(8)]
    bodies: dict[int, bytes] = {}

    def question(position: int) -> None:
        bodies[position] = ask(server, row_path(position=position)).body

    threads = [threading.Thread(target=question, args=(position,)) for position in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [bodies[position] for position in range(8)] == expected


def test_an_error_of_its_own_is_told(
    server: ExplorerServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server.explorer, "state", lambda: 1 / 0)
    answer = ask(server, "/api/state")
    assert answer.status == 500
    assert "ZeroDivisionError" in answer.json["error"]
    assert "/api/state" in caplog.text


def test_a_browser_that_leaves(server: ExplorerServer, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.sendall(b"POST /api/images HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % server.server_port)
    assert ask(server, "/api/state").status == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_port_in_use(server: ExplorerServer) -> None:
    with pytest.raises(ExplorerError, match=f"port {server.server_port} of 127.0.0.1: .*another port"):
        ExplorerServer(server.explorer, server.server_port)
