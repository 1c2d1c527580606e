"""The page as a person uses it, in a browser, and as a program calls it, by HTTP; on the tiny backbone."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from small_page import CHROMIUM, FLAGS, LONG, STRANGE, pictures_of, save_bank, save_results

from fewshot_diti import Backbone, Bank, cli
from fewshot_diti.app.banks import ServedBank
from fewshot_diti.app.guard import AT_ONCE, Limits
from fewshot_diti.app.page import served

pytest.importorskip("gradio")
pytestmark = [
    pytest.mark.usefixtures("quick_train"),
    pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning"),  # of gradio's queue
]
LIMITS = Limits(request_bytes=200_000, files=6, folder_bytes=2**24)
PATIENCE = 60_000  # ms, on a machine that does other things too


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def bank(quick_train: None, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> ServedBank:
    return save_bank(backbone, tmp_path_factory.mktemp("served") / "planes")


@pytest.fixture(scope="module")
def address(bank: ServedBank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    results = save_results(tmp_path_factory.mktemp("results"))
    with served(bank, results, free_port(), bank.folder.parent, LIMITS) as found:
        yield found.rstrip("/")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if find_spec("playwright") is None or not CHROMIUM.is_file():
        pytest.skip(f"playwright is not installed, or there is no {CHROMIUM}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, freshly loaded; nothing but it may be asked for anything."""
    asked: list[str] = []
    found = browser.new_page(viewport={"width": 1280, "height": 900})
    found.set_default_timeout(PATIENCE)
    found.on("request", lambda request: asked.append(request.url))
    found.goto(address)
    found.get_by_role("tab", name="Classify").wait_for()
    yield found
    found.close()
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()


def upload(address: str, *paths: str) -> httpx.Response:
    files = [("files", (Path(path).name, Path(path).read_bytes())) for path in paths]
    return httpx.post(f"{address}/gradio_api/upload", files=files, timeout=60)


def join(address: str, path: str, session: str) -> httpx.Response:
    """Asks for a picture to be classified, as the page does."""
    config = httpx.get(f"{address}/config", timeout=60).json()
    places = {x["id"]: x["props"].get("elem_id") for x in config["components"]}
    [event] = [
        x["id"]
        for x in config["dependencies"]
        if [[places.get(component), event] for component, event in x["targets"]] == [["picture", "change"]]
    ]
    picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = {"data": ["planes", picture], "fn_index": event, "session_hash": session}
    return httpx.post(f"{address}/gradio_api/queue/join", json=body, timeout=60)


def answer(address: str, session: str) -> str:
    """What the page is sent for the session's one event."""
    with httpx.stream("GET", f"{address}/gradio_api/queue/data?session_hash={session}", timeout=120) as stream:
        for line in stream.iter_lines():
            if "process_completed" in line:
                return line
    raise AssertionError("no answer")


@pytest.mark.browser
def test_a_picture_and_an_example_are_classified_and_explained(page: Any, bank: ServedBank) -> None:
    page.locator("#picture input[type=file]").set_input_files(pictures_of("A320", 1))
    page.locator("#answer h2").wait_for()
    assert page.locator("#answer .bar").count() == 4 and page.locator("#reasons .pair img").count() == 2
    shown = page.locator("#answer .bar-name").all_inner_texts()
    assert set(shown) == {"A319", "A320", STRANGE[:60], f"{LONG[:59]}\u2026"}
    assert page.title() != "1", "HTML in a class name ran"


@pytest.mark.browser
def test_examples_are_classified_one_after_the_other(page: Any) -> None:
    seen = page.locator("#answer").inner_html()
    for place in (1, 0, 1):
        page.locator(".gallery-item").nth(place).click()
        page.wait_for_function("before => document.querySelector('#answer').innerHTML != before", arg=seen)
        page.locator("#answer h2").wait_for()
        seen = page.locator("#answer").inner_html()


@pytest.mark.browser
def test_a_file_that_is_no_picture_gives_one_sentence(page: Any, tmp_path: Path) -> None:
    broken = tmp_path / "holiday.png"
    broken.write_text("no picture")
    page.locator("#picture input[type=file]").set_input_files(str(broken))
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    text = toast.inner_text()
    assert "holiday.png is not an image of a known format" in text and "/" not in text


@pytest.mark.browser
def test_a_picture_that_is_too_large_gives_one_sentence(page: Any, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(b"x" * (LIMITS.request_bytes + 1))
    page.locator("#picture input[type=file]").set_input_files(str(large))
    page.get_by_test_id("toast-body").wait_for()
    lines = page.get_by_test_id("toast-body").inner_text().splitlines()
    assert lines[-1] == "HTTP 413: One upload takes up to 0.19 MB; drop fewer or smaller pictures."


@pytest.mark.browser
def test_a_class_is_added_and_a_new_bank_is_made(page: Any, bank: ServedBank) -> None:
    page.get_by_role("tab", name="Classes").click()

    def put(name: str, *paths: str) -> None:
        page.locator("#class-name").get_by_role("textbox").fill(name)
        page.locator("#class-pictures input[type=file]").set_input_files(list(paths))
        page.locator("#class-pictures .file-preview").wait_for()
        page.get_by_role("button", name="Put the class on the list").click()
        page.locator("#class-list td", has_text=name).first.wait_for()

    strange = '<b onclick="x">E/170</b> \u00fc'
    put(strange, *pictures_of("E-170", 2))
    page.get_by_role("button", name="Add the classes").click()
    page.locator("#told", has_text="Learned").wait_for()
    assert strange in page.locator("#told").inner_text()
    assert strange in Bank.from_pretrained(bank.folder).labels
    assert page.locator("#class-list td").count() == 0, "the list is empty again"
    page.locator("#about", has_text="5 classes").wait_for()

    put("747-8", *pictures_of("747-8", 2))
    put("ATR-72", *pictures_of("ATR-72", 2))
    page.get_by_role("button", name="Make the new bank").click()
    page.get_by_test_id("toast-body").wait_for()
    assert "no name yet" in page.get_by_test_id("toast-body").inner_text()
    page.locator("#bank-name").get_by_role("textbox").fill("two")
    page.get_by_role("button", name="Make the new bank").click()
    page.locator("#told", has_text="Cross-validated accuracy").wait_for()
    assert Bank.from_pretrained(bank.folder.with_name("two")).labels == ("747-8", "ATR-72")
    page.locator("#about", has_text="2 classes").wait_for()
    page.get_by_role("tab", name="Classify").click()
    page.locator("#picture input[type=file]").set_input_files(pictures_of("747-8", 1))
    page.locator("#answer h2").wait_for()
    assert page.locator("#answer .bar").count() == 2


@pytest.mark.browser
def test_results_are_filtered_by_method_and_shots(page: Any) -> None:
    page.get_by_role("tab", name="Results").click()
    table = page.locator("#results-table")
    table.get_by_text("finetune").wait_for()
    assert "1 shot" in table.inner_text() and "4 shots" in table.inner_text()
    page.locator("#methods").get_by_label("finetune").uncheck()
    page.locator("#shots").get_by_label("1", exact=True).uncheck()
    page.wait_for_function("() => !document.querySelector('#results-table').innerText.includes('finetune')")
    page.wait_for_function("() => !document.querySelector('#results-table').innerText.includes('1 shot')")
    assert "fewshot-diti" in table.inner_text() and page.locator("#results-plots img").count() == 2


@pytest.mark.browser
def test_a_window_of_timesteps_changes_the_predictions_at_once(page: Any) -> None:
    page.get_by_role("tab", name="Timesteps").click()
    page.get_by_role("button", name="Compute the errors").click()
    page.locator("#window .large").wait_for()
    assert page.locator("#window .cell").count() == 6 and not page.locator("#compute").is_visible()
    assert "0 \u2264 t < 1000" in page.locator("#window").inner_text()
    page.get_by_role("button", name="little noise").click()
    page.locator("#window", has_text="0 \u2264 t < 200").wait_for()
    page.locator("#from-t input[type=range]").press("ArrowRight")
    page.locator("#window", has_text="40 \u2264 t < 200").wait_for()
    page.locator("#to-t input[type=range]").press("ArrowLeft")
    began = time.monotonic()
    page.locator("#window", has_text="40 \u2264 t < 160").wait_for()
    assert time.monotonic() - began < 20
    assert page.locator("#window .noised img").count() == 2


def test_another_host_and_another_page_are_refused(address: str) -> None:
    assert httpx.get(address).status_code == 200
    assert httpx.get(address, headers={"Host": "evil.example"}).status_code == 400
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "http://["},
    ):
        assert httpx.post(f"{address}/gradio_api/upload", headers=headers).status_code == 403


def test_uploads_are_capped_in_size_and_number(address: str, tmp_path: Path) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    small.write_bytes(b"x" * 100)
    large.write_bytes(b"x" * (LIMITS.request_bytes + 1))
    assert upload(address, *[str(small)] * LIMITS.files).status_code == 200
    for response, text in (
        (upload(address, *[str(small)] * (LIMITS.files + 1)), "up to 6 files"),
        (upload(address, str(large)), "One upload takes up to"),
    ):
        assert response.status_code == 413 and text in response.text

    def chunks() -> Iterator[bytes]:  # no length is announced
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        for _ in range(30):
            yield b"x" * 10_000
        yield b"\r\n--b--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    response = httpx.post(f"{address}/gradio_api/upload", content=chunks(), headers=headers, timeout=60)
    assert response.status_code == 413


def test_a_file_that_was_not_uploaded_is_not_read(address: str) -> None:
    response = join(address, "/etc/passwd", "outside")
    assert response.status_code != 200 or "passwd" not in answer(address, "outside")


def test_eight_people_are_served_or_wait_and_the_ninth_is_refused(address: str, bank: ServedBank) -> None:
    path = upload(address, *pictures_of("A320", 1)).json()[0]
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with bank.classifier.backbone_.lock:
            held.set()
            release.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        assert join(address, path, "0").status_code == 200
        time.sleep(2)  # it is being served now
        codes = [join(address, path, str(person)).status_code for person in range(1, AT_ONCE)]
        ninth = join(address, path, "9")
    finally:
        release.set()
        holder.join()
    assert codes == [200] * (AT_ONCE - 1)
    assert ninth.status_code == 503 and "Queue is full" in ninth.text
    assert "A320" in answer(address, str(AT_ONCE - 1))


def test_the_command_says_what_is_wrong_with_port_and_results(
    bank: ServedBank, address: str, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["app", "--bank", str(bank.folder), "--backbone", str(backbone_folder)]
    taken = address.rpartition(":")[2]
    assert cli.main([*command, "--port", taken]) == 2
    assert f"port={taken}" in capsys.readouterr().err
    assert cli.main([*command, "--port", str(free_port()), "--results", str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err
