"""What goes wrong on the way to a server, S3 or OCI: over real HTTP, by servers that fail."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from urllib3.connection import HTTPConnection

from pipeline.core.errors import PipelineError, TransientError
from pipeline.core.published import FileDigest, Package
from pipeline.registry.manifest import files_of
from pipeline.registry.store import Store
from pipeline.registry.stores import open_reader, open_store, transfer
from pipeline.registry.stores.publication import WritableStore
from tests.registry.packages import place_of, raw_statement, read_back, sealed_package
from tests.registry.stores.faulty import (
    Fault,
    FaultyHandler,
    FaultyServer,
    Seen,
    answering,
    dripping,
    lose_reply,
    refusing,
    reset,
    spoil,
    stall,
)

PLAN = "engine/model.plan"
REQUESTS = {
    "s3": [
        ("HEAD", "model.plan"),
        ("PUT", ".lease"),
        ("PUT", "tokenizer.json"),
        ("POST", "uploads"),
        ("PUT", "partNumber=2"),
        ("POST", "uploadId"),
        ("PUT", "statement.dsse.json"),
        ("PUT", "manifest.json"),
        ("PUT", "registry.json"),
        ("GET", "manifest.json"),
    ],
    "oci": [
        ("POST", "/uploads/"),
        ("HEAD", "/blobs/"),
        ("PATCH", "/uploads/"),
        ("PUT", "/uploads/"),
        ("PUT", "/manifests/"),
        ("GET", "/referrers/"),
        ("GET", "/manifests/"),
    ],
}


@dataclass(frozen=True, kw_only=True)
class Served:
    """A store on a server that fails when asked, and a package with a file of 11 MiB."""

    kind: str
    server: FaultyServer
    store: WritableStore
    package: Package

    @property
    def manifest(self) -> str:
        """What is in the path of a request for a package's manifest."""
        return {"s3": "manifest.json", "oci": "/manifests/"}[self.kind]

    @property
    def blob(self) -> str:
        """The same for the large file, once the rest is known."""
        return {"s3": PLAN, "oci": "/blobs/"}[self.kind]

    @property
    def plan(self) -> FileDigest:
        return next(file for file in files_of(self.package.manifest) if file.path == PLAN)

    @property
    def data(self) -> bytes:
        return (self.package.dir / PLAN).read_bytes()

    def reader(self) -> Store:
        """A store that knows nothing yet."""
        return open_reader(self.store.url)

    def publish(self) -> bool:
        return self.store.put_package(self.package, [raw_statement(model_sig=b"s")], lambda _: None)

    def assert_whole(self) -> None:
        """A reader sees exactly this package, and nothing is left over."""
        place = place_of(self.package)
        assert self.store.places("tiny") == [place]
        assert [one.name for one in self.store.read_statements(place)] == [raw_statement().name]
        for path, data in read_back(self.store, self.package).items():
            assert data == (self.package.dir / path).read_bytes()
        assert self.store.leftovers(0.0, delete=False) == []

    def read(self, offset: int = 0, end: int | None = None) -> bytes:
        place = place_of(self.package)
        with self.store.open_file(place, self.plan, offset, end) as chunks:
            return b"".join(chunks)


@pytest.fixture(params=["s3", "oci"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Served:
    files = {"model.plan": os.urandom(11 << 20), "tokenizer.json": b"{}"}
    return Served(
        kind=request.param,
        server=request.getfixturevalue(f"memory_{request.param}"),
        store=request.getfixturevalue(f"memory_{request.param}_store"),
        package=sealed_package(tmp_path / "package", files),
    )


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "fault",
    [
        refusing(503, "SlowDown"),
        refusing(429, "TOOMANYREQUESTS", Retry_After="0"),
        answering(lambda handler: handler.answer(500, b"<html>", "text/html")),
        reset,
        pytest.param(stall(1.2), marks=pytest.mark.slow),  # waits 0.7 s at each request
    ],
    ids=["503", "429", "500", "reset", "stall"],
)
def test_a_fault_of_any_request_that_passes_is_not_noticed(served: Served, fault: Fault) -> None:
    for method, part in REQUESTS[served.kind]:
        served.server.fail(method, part, fault)
    served.publish()
    served.assert_whole()
    assert served.server.unmet() == []


def test_a_write_whose_reply_got_lost_counts_as_done(served: Served) -> None:
    for method, part in REQUESTS[served.kind]:
        if method == "PUT":
            served.server.fail(method, part, lose_reply)
    served.publish()
    served.assert_whole()


def test_a_fault_that_stays_ends_after_a_bounded_number_of_attempts(served: Served) -> None:
    served.server.fail("GET", served.manifest, refusing(503, "SlowDown"), times=99)
    with pytest.raises(TransientError, match=r"503|SlowDown"):
        served.store.read_manifest(place_of(served.package))
    assert served.server.count("GET", served.manifest) == transfer.ATTEMPTS


@pytest.mark.parametrize("sent_most", [0, 1, 3 << 20])
def test_a_body_that_breaks_off_is_noticed_and_read_on_from_there(
    served: Served, sent_most: int
) -> None:
    served.publish()
    served.server.fail("GET", served.manifest, spoil(sent_most=min(sent_most, 1)))
    assert served.reader().read_manifest(place_of(served.package))
    served.server.fail("GET", served.blob, spoil(sent_most=sent_most))
    got = bytearray()

    def read_until_it_breaks() -> None:
        with served.store.open_file(place_of(served.package), served.plan) as chunks:
            for chunk in chunks:
                got.extend(chunk)

    with pytest.raises(TransientError):
        read_until_it_breaks()
    assert got == served.data[: len(got)]
    assert got + served.read(len(got)) == served.data


def test_a_server_that_ignores_ranges_still_gives_the_right_bytes_within_a_bound(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.publish()
    for offset in (0, 1, 3 << 20, len(served.data) - 1):
        served.server.fail("GET", served.blob, spoil(ignores_range=True))
        assert served.read(offset) == served.data[offset:]
    monkeypatch.setattr(transfer, "_MAX_SKIP_BYTES", 1 << 20)
    served.server.fail("GET", served.blob, spoil(ignores_range=True))
    with pytest.raises(TransientError, match="ignores Range"):
        served.read(3 << 20)


def test_a_reader_that_says_where_it_ends_gets_no_more_and_leaves_the_connection(
    served: Served,
) -> None:
    served.publish()
    served.read(0, 1)
    connections = served.server.connections
    for start in (0, 1 << 20):
        assert len(served.read(start, start + (1 << 20))) == 1 << 20
    asked = [one.headers["Range"] for one in served.server.seen[-2:]]
    spans = [text.removeprefix("bytes=").split("-") for text in asked]
    assert [int(last) - int(first) + 1 for first, last in spans] == [1 << 20] * 2
    assert served.server.connections == connections


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_slow_server_gets_an_upload(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SILENCE_S", 2.0)
    monkeypatch.setattr(transfer, "CONNECT_S", 2.0)
    small = (socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)  # else the kernel takes most at once
    defaults: Any = HTTPConnection.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "socket_options", [small])
    served.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    plain = FaultyHandler.setup

    def setup(handler: Any) -> None:
        def read(count: int) -> bytes:
            return b"".join(pieces(count))

        def pieces(count: int) -> Iterator[bytes]:
            for start in range(0, count, 1 << 16):
                time.sleep(0.025 if count > 1 << 20 else 0.0)
                yield quick(min(count - start, 1 << 16))

        plain(handler)
        quick, handler.rfile.read = handler.rfile.read, read

    monkeypatch.setattr(FaultyHandler, "setup", setup)
    began_s = time.monotonic()
    served.publish()
    assert time.monotonic() - began_s > 2.0
    served.assert_whole()


def half_a_continue(handler: Any) -> bool:
    """What botocore waits for the end of, if it asked for it."""
    handler.wfile.write(b"HTTP/1.1 100 Continue\r\n")
    handler.close_connection = True
    return False


def takes_nothing(handler: Any, plain: Callable[[Any], None] = FaultyHandler.do_GET) -> None:
    if int(handler.headers.get("Content-Length", 0)) > 1 << 20:
        handler.server.closing.wait()
    plain(handler)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["takes nothing", "drips a reply", "half a continue"])
def test_an_upload_ends_whatever_becomes_of_it(
    served: Served, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "SILENCE_S", 0.5)
    monkeypatch.setattr("pipeline.core.patience.PATIENCE_S", 2.0)
    store, server = open_store(served.store.url), served.server
    if how == "takes nothing":
        monkeypatch.setattr(transfer, "FLOOR_BYTES_PER_S", float(8 << 20))
        for method in ("PUT", "PATCH"):
            monkeypatch.setattr(FaultyHandler, f"do_{method}", takes_nothing)
    elif how == "half a continue":
        monkeypatch.setattr(FaultyHandler, "handle_expect_100", half_a_continue)
    else:
        drip = dripping(b"HTTP/1.1 2")

        def fault_for(seen: Seen) -> Fault | None:
            return drip if int(seen.headers.get("Content-Length", 0)) > 1 << 20 else None

        monkeypatch.setattr(server, "fault_for", fault_for)
    ended: list[bool] = []

    def publish() -> None:
        with contextlib.suppress(TransientError):
            store.put_package(served.package, [], lambda _: None)
        ended.append(True)

    thread = threading.Thread(target=publish, daemon=True)
    thread.start()
    thread.join(30.0)
    assert ended


@pytest.mark.parametrize("kind", ["s3", "oci"])
def test_a_host_of_many_addresses_is_not_waited_for_at_each(
    kind: str, memory_s3: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in {"SILENCE_S": 0.5, "CONNECT_S": 0.5, "ATTEMPTS": 2}.items():
        monkeypatch.setattr(transfer, name, seconds)
    with socket.socket() as silent, contextlib.ExitStack() as waiting:
        silent.bind(("0.0.0.0", 0))
        silent.listen(0)
        port = silent.getsockname()[1]
        for _ in range(4):  # then it takes no more
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{last}", port))
            for last in range(1, 41)
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://evil.localhost:{port}")
        urls = {"s3": "s3://bucket/x", "oci": f"oci://evil.localhost:{port}/x"}
        began_s = time.monotonic()
        with pytest.raises(PipelineError):
            open_reader(urls[kind]).places("tiny")
        assert time.monotonic() - began_s < 15.0


def test_the_callers_own_fault_is_not_taken_for_one_of_the_connection(served: Served) -> None:
    served.publish()

    def write() -> None:
        with served.store.open_file(place_of(served.package), served.plan) as chunks:
            for _ in chunks:
                raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write()


def test_a_forked_child_has_connections_of_its_own(served: Served) -> None:
    assert served.store.places("tiny") == []
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os._exit(0 if served.publish() else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    served.assert_whole()
