"""The page and hostile requests: paths, names, sizes, numbers and origins. Nothing beside its uploads is served."""

from __future__ import annotations

import http.client
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import httpx
import psutil
import pytest
from small_page import pictures_of, save_bank
from test_app_page import answer, free_port, join

from fewshot_diti import Backbone
from fewshot_diti.app import guard
from fewshot_diti.app.banks import ServedBank
from fewshot_diti.app.guard import Limits
from fewshot_diti.app.page import served

pytest.importorskip("gradio")
pytestmark = [
    pytest.mark.usefixtures("quick_train"),
    pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning"),  # of gradio's queue
]
LIMITS = Limits(request_bytes=3 * 2**20, files=6, folder_bytes=2**24)
SECRET = "nobody else reads this"
Count = Callable[[str, object], None]


@pytest.fixture(scope="module")
def bank(quick_train: None, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> ServedBank:
    return save_bank(backbone, tmp_path_factory.mktemp("served") / "planes")


@pytest.fixture(scope="module")
def address(bank: ServedBank) -> Iterator[str]:
    (bank.folder / "secret.txt").write_text(SECRET)
    with served(bank, None, free_port(), bank.folder.parent, LIMITS) as found:
        yield found.rstrip("/")


@pytest.fixture
def uploads(address: str) -> Path:
    """The page's folder, where uploads lie."""
    return Path(os.environ["GRADIO_TEMP_DIR"])


def raw(address: str, target: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    """Status and body of a request whose target is sent as it is."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection._validate_path = lambda url: None  # type: ignore[attr-defined]
    try:
        connection.request(method, target, headers=headers)
        response = connection.getresponse()
        return response.status, response.read(2**20)
    finally:
        connection.close()


def send(address: str, *files: tuple[str, bytes]) -> httpx.Response:
    return httpx.post(f"{address}/gradio_api/upload", files=[("files", file) for file in files], timeout=60)


def test_no_path_leads_out_of_the_folder_of_uploads(
    address: str, uploads: Path, bank: ServedBank, thorough: bool, record_property: Count
) -> None:
    secret = bank.folder / "secret.txt"
    beside = uploads.with_name(uploads.name + "-beside")
    beside.mkdir()
    (beside / "secret.txt").write_text(SECRET)
    try:
        up = os.path.relpath(secret, uploads)
        targets = [
            str(secret),
            up,
            f"{uploads}/{up}",
            str(beside / "secret.txt"),
            f"{uploads}/../{beside.name}/secret.txt",
        ]
        targets += [
            f"file://{secret}",
            f"/{secret}",
            f"{secret}/",
            f"{secret}\x00.png",
            str(bank.folder / "config.json"),
        ]
        targets += [os.path.relpath(secret), f"{'../' * 20}{str(secret)[1:]}", f"\\..\\..{secret}", str(Path(__file__))]
        ways = ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/svelte/", "/", "//"]
        ways += [
            "/gradio_api/proxy=",
            "/gradio_api/custom_component/x/client/",
            "/gradio_api/../",
            "/gradio_api/stream/",
        ]
        encodings = [lambda x: quote(x, safe="/"), lambda x: quote(x, safe="")]
        if thorough:
            encodings += [lambda x: quote(quote(x, safe="")), lambda x: quote(x.replace("/", "//"), safe="/")]
            encodings += [lambda x: quote(x).replace("..", "%2e%2e"), lambda x: quote(x).replace("../", "..%5c")]
            encodings += [
                lambda x: quote(x).replace(".", "%c0%ae"),
                lambda x: quote(x) + "?x",
                lambda x: quote(x) + ";x",
            ]
        tried, leaked = 0, []
        for way, target, encode in itertools.product(ways, targets, encodings):
            status, body = raw(address, way + encode(target))
            tried += 1
            if SECRET.encode() in body or b"pytest.mark" in body or (status == 200 and b'"fewshot_diti"' in body):
                leaked.append(way + encode(target))
    finally:
        (beside / "secret.txt").unlink()
        beside.rmdir()
    record_property("paths tried", tried)
    record_property("files given away", len(leaked))
    assert not leaked
    inside = send(address, ("a.png", b"mine")).json()[0]
    assert raw(address, f"/gradio_api/file={quote(inside)}") == (200, b"mine"), "the same route serves an upload"


def test_the_page_asks_no_other_server_for_anything(address: str, record_property: Count) -> None:
    asked: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(1)
        port = server.getsockname()[1]
        urls = [
            f"http://127.0.0.1:{port}/x.png",
            f"http://localhost:{port}/x.png",
            f"HTTP://[::ffff:127.0.0.1]:{port}/x",
        ]
        for number, url in enumerate(urls):
            for way in ("file=", "proxy=", "file/", "stream/"):
                assert raw(address, f"/gradio_api/{way}{quote(url, safe='')}")[0] in (403, 404)
                assert raw(address, f"/gradio_api/{way}{url}")[0] in (403, 404)
            session = f"elsewhere {number}"
            assert join(address, url, session).status_code != 200 or "<h2" not in answer(address, session)
        with suppress(TimeoutError):
            asked.append(str(server.accept()[1]))
    record_property("addresses tried", 9 * len(urls))
    record_property("other servers asked", len(asked))
    assert not asked


def test_routes_that_the_page_does_not_use_are_not_there(address: str, record_property: Count) -> None:
    routes = ["proxy=x", "process_recording", "deep_link?session_hash=x", "stream/x", "stream/x/close", "vibe-edit"]
    routes += ["dev/reload", "call/x", "call/v2/x", "api/predict", "mcp", "mcp/sse", "runs", "openapi.json", "token"]
    for route, method in itertools.product(routes, ("GET", "POST")):
        status, body = raw(address, f"/gradio_api/{route}", method)
        assert status in (404, 405, 411, 413), (route, status, body[:100])
    record_property("routes tried", 2 * len(routes))


def test_a_file_elsewhere_is_not_classified(
    address: str, uploads: Path, bank: ServedBank, record_property: Count
) -> None:
    (picture,) = pictures_of("A320", 1)
    mine = send(address, ("a.png", Path(picture).read_bytes())).json()[0]
    places = [picture, "/etc/passwd", f"{mine}/../../../etc/passwd", str(uploads), str(bank.folder / "secret.txt"), ""]
    places += [f"file://{picture}", "\x00", "~/.bashrc", "x" * 5000]
    for number, place in enumerate(places):
        session = f"not mine {number}"
        response = join(address, place, session)
        if response.status_code == 200:
            said = answer(address, session)
            assert "<h2>" not in said and SECRET not in said and "root:" not in said, place
    assert join(address, mine, "mine").status_code == 200 and "<h2" in answer(address, "mine")
    record_property("paths tried", len(places))
    record_property("files read", 0)


def test_names_of_uploads_lead_nowhere_else(
    address: str, uploads: Path, thorough: bool, record_property: Count
) -> None:
    names = [
        "../../up.png",
        "/tmp/same.png",
        "..",
        ".",
        "a/../../b.png",
        "..\\..\\c.png",
        "x" * 255,
        "x" * 4000,
        "\u202egnp",
    ]
    names += ["a\nb.png", "-rf", "CON", "<img src=x>", "%2e%2e%2fd.png", "e\u0301.png", "deep_links", "a;b|c&d`e`$(f)"]
    if thorough:
        names += ["../" * n + "z.png" for n in range(1, 30)] + [chr(n) + ".png" for n in range(0x20, 0x300)]
    parent = set(uploads.parent.iterdir())
    kept = 0
    for name in names:
        response = send(address, (name, b"bytes"))
        assert response.status_code < 500 or len(name) > 200, (name, response.text)
        if response.status_code == 200:
            kept += 1
            (place,) = map(Path, response.json())
            assert place.resolve().is_relative_to(uploads.resolve()) and place.read_bytes() == b"bytes"
    new = {path.name for path in set(uploads.parent.iterdir()) - parent}
    assert not {x for x in new if x.endswith((".png", "gnp"))} and kept
    record_property("names tried", len(names))
    record_property("files elsewhere", 0)


def test_an_upload_that_is_refused_or_cut_off_leaves_nothing(
    address: str, uploads: Path, thorough: bool, record_property: Count
) -> None:
    def everything() -> set[Path]:
        return {path for path in uploads.rglob("*") if path.is_file()}

    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=b"}

    def too_long() -> None:
        def chunks() -> Iterator[bytes]:
            yield head
            for _ in range(40):
                yield b"x" * 100_000

        with_no_length = httpx.post(f"{address}/gradio_api/upload", content=chunks(), headers=kind, timeout=60)
        assert with_no_length.status_code == 413 and "up to 3 MB" in with_no_length.text

    def too_many() -> None:
        assert send(address, *[(f"{n}.png", b"x" * 1000) for n in range(7)]).status_code == 413

    def cut_off() -> None:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            start = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 900000\r\n"
            connection.sendall(f"{start}Content-Type: {kind['Content-Type']}\r\n\r\n".encode() + head + b"x" * 300_000)

    def no_multipart() -> None:
        response = httpx.post(f"{address}/gradio_api/upload", content=head + b"x" * 1000, headers=kind, timeout=60)
        assert response.status_code < 500 or response.status_code == 500

    before, rounds = everything(), 20 if thorough else 2
    for _ in range(rounds):
        for attack in (too_long, too_many, cut_off, no_multipart):
            attack()
    for _ in range(100):  # until the page has noticed
        if not (left := everything() - before):
            break
        time.sleep(0.1)
    record_property("uploads cut short", 4 * rounds)
    record_property("files left", len(left))
    assert not left
    assert send(address, ("a.png", b"after")).status_code == 200


def test_the_folder_of_uploads_is_bounded_and_old_ones_make_room(
    address: str, uploads: Path, monkeypatch: pytest.MonkeyPatch, record_property: Count
) -> None:
    sent, codes = 0, []
    for number in range(20):
        response = send(address, ("large.bin", number.to_bytes(4, "big") * 2**19))
        codes.append(response.status_code)
        if response.status_code != 200:
            assert "deleted after an hour" in response.text
            break
        sent += 1
    assert codes[-1] == 507
    held = sum(path.stat().st_size for path in uploads.rglob("*") if path.is_file())
    assert held <= LIMITS.folder_bytes + LIMITS.request_bytes
    monkeypatch.setattr(guard, "KEPT_SECONDS", -1)  # all are too old now
    assert send(address, ("a.png", b"x")).status_code == 200
    record_property("uploads of 2 MB taken", sent)


def test_other_hosts_and_pages_are_refused_on_every_route(address: str, record_property: Count) -> None:
    port = address.rpartition(":")[2]
    hosts = ["evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", "0.0.0.0", ""]
    hosts += [
        f"[::1]:{port}",
        "127.0.0.2",
        "2130706433",
        "LOCALHOST.",
        "localhost@evil.example",
        "evil.example#localhost",
    ]
    origins = ["http://evil.example", "null", "http://localhost:3000", "https://localhost", "http://[", "", "file://"]
    origins += [f"https://127.0.0.1:{port}", f"http://127.0.0.1:{port}.evil.example", f"http://evil.example:{port}"]
    routes = ["/", "/config", "/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/info", "/static/x"]
    served_to = []
    for route, host in itertools.product(routes, hosts):
        if raw(address, route, Host=host)[0] < 400:
            served_to.append((route, "host", host))
    for route, origin, method in itertools.product(routes, origins, ("GET", "POST")):
        if raw(address, route, method, Origin=origin)[0] < 400:
            served_to.append((route, "origin", origin))
    record_property("requests tried", len(routes) * (len(hosts) + 2 * len(origins)))
    record_property("requests served", len(served_to))
    assert not served_to


def test_twenty_people_and_twenty_slow_ones_are_served_or_told_to_come_later(
    address: str, uploads: Path, thorough: bool, record_property: Count
) -> None:
    host, port = address.removeprefix("http://").split(":")
    (picture,) = pictures_of("A320", 1)
    content, process = Path(picture).read_bytes(), psutil.Process()
    start = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 2000000\r\n"
    head = 'Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\nContent-Disposition: form-data; name="files"'
    slow = [socket.create_connection((host, int(port))) for _ in range(20)]
    stop = threading.Event()

    def trickle() -> None:
        for connection in slow:
            connection.sendall(f'{start}{head}; filename="a.png"\r\n\r\n'.encode())
        while not stop.wait(0.05):
            for connection in slow:
                connection.sendall(b"x")

    def large_request(length: str) -> int:
        """A body of 16 MB that is no upload, in small pieces, until it is answered."""
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            begin = f"POST /gradio_api/queue/join HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json"
            with suppress(ConnectionError):
                connection.sendall(f"{begin}\r\n{length}\r\n\r\n".encode())
                for _ in range(2**8):
                    connection.sendall((b"10000\r\n" if "chunked" in length else b"") + b"[" * 2**16 + b"\r\n")
            with suppress(ConnectionError):
                return int(connection.recv(100).split()[1])
            return 413  # closed while it was sent

    def person(number: int) -> str:
        session = f"person {number}"
        place = send(address, ("a.png", content)).json()[0]
        joined = join(address, place, session)
        if joined.status_code == 503:
            assert "Queue is full" in joined.text
            return "told to come later"
        said = answer(address, session)
        assert "<h2" in said, said[:300]
        return "served"

    person(-1)
    trickler = threading.Thread(target=trickle)
    trickler.start()
    resident = [process.memory_info().rss]
    try:
        with ThreadPoolExecutor(20) as pool:
            lengths = ["Content-Length: 16777216", "Transfer-Encoding: chunked"] * 10
            refused = list(pool.map(large_request, lengths))
            resident.append(process.memory_info().rss)
            found = []
            for turn in range(10 if thorough else 2):
                found += pool.map(person, range(20 * turn, 20 * turn + 20))
                resident.append(process.memory_info().rss)
    finally:
        stop.set()
        trickler.join()
        for connection in slow:
            connection.close()
    steps = [round((after - before) / 2**20) for before, after in itertools.pairwise(resident)]
    for what in sorted(set(found)):
        record_property(what, found.count(what))
    record_property("requests of 16 MB refused", len(refused))
    record_property("MB grown in each turn", " ".join(map(str, steps)))
    assert set(refused) <= {400, 413} and found.count("served") >= 1
    assert steps[0] < 100 and steps[-1] < 100  # threads keep memory of their own from the first turn on
