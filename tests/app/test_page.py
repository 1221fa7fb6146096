"""`sapiens-accel app` in a real browser: the command as a process of its own, and headless Chromium."""

import http.client
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from detectors import tiny
from networks import untrained

from benchmarks import film
from sapiens_accel.pose import draw
from sapiens_accel.sources import synthetic

pytest.importorskip("gradio", reason="an extra: pip install sapiens_accel[app]")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.launch,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
# Notes where the process of the page connects to; Python imports it at its start.
WATCH = """
import os, socket
connect = socket.socket.connect
def noted(self, address):
    with open(os.environ["CONNECTIONS"], "a") as stream:
        stream.write(f"{address}\\n")
    return connect(self, address)
socket.socket.connect = noted
"""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A page that is shown, and the folders of its process: files of tests, home, temporary and current one."""

    url: str
    files: Path
    home: Path
    temporary: Path
    current: Path
    connections: Path


def _folders(folder: Path) -> list[Path]:
    return [folder / name for name in ("home", "temporary", "current", "watch")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    drawn = synthetic.write(folder / "drawn", num_train=1, num_unlabelled=1, num_val=6)
    for name, path in zip(("first.jpg", "second.jpg"), sorted((drawn / "val2017").iterdir()), strict=False):
        shutil.copy(path, folder / name)
    (folder / "cut.jpg").write_bytes((folder / "first.jpg").read_bytes()[:500])
    (folder / "text.txt").write_text("no image")
    film.write(folder / "clip.mp4", 0, 12, (96, 128))
    untrained(folder / "weights")
    tiny(folder / "detector")
    return folder


@pytest.fixture(scope="module")
def site(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The command, stopped by Ctrl-C at the end: nothing of it is left, and it connected to nothing but itself."""
    folder = tmp_path_factory.mktemp("site")
    home, temporary, current, watch = _folders(folder)
    for one in (home, temporary, current, watch):
        one.mkdir()
    (watch / "sitecustomize.py").write_text(WATCH)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(watch), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": path}
    environment |= {"CONNECTIONS": str(folder / "connections"), "SAPIENS_ACCEL_CACHE": str(home / "cache")}
    words = [sys.executable, "-m", "sapiens_accel.cli", "app", str(files / "weights"), "--port", str(port)]
    words += ["--detector", str(files / "detector"), "--device", "cpu"]
    log = (folder / "log").open("w+")
    process = subprocess.Popen(words, cwd=current, env=environment, stdout=log, stderr=subprocess.STDOUT)
    until = time.monotonic() + 240
    while "Ctrl-C ends it" not in (folder / "log").read_text() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    assert process.poll() is None, (folder / "log").read_text()
    yield Site(url=f"http://127.0.0.1:{port}", files=files, home=home, temporary=temporary, current=current,
               connections=folder / "connections")  # fmt: skip
    process.send_signal(signal.SIGINT)
    said = f"{process.wait(60)}\n{(folder / 'log').read_text()}"
    assert process.returncode == 0 and "Traceback" not in said, said
    assert not list(temporary.glob("sapiens_accel_app_*")), said


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(site: Site, browser: Any) -> Iterator[Callable[..., Any]]:
    """A visitor: a browser of its own memory, whose requests are all to the page."""
    contexts = []

    def visit(width: int = 1400) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(site.url)
        page.wait_for_selector("#find")
        return page

    yield visit
    own = (site.url, "data:", "blob:")
    outside = [url for one in contexts for page in one.pages for url in page.asked if not url.startswith(own)]
    for context in contexts:
        context.close()
    assert not outside


def _upload(page: Any, path: Path) -> None:
    page.set_input_files("#file input[type=file]", str(path))
    page.wait_for_selector("#view img")


def _find(page: Any) -> dict[str, Any]:
    """Press the button, and download the JSON."""
    page.click("#find")
    page.wait_for_selector("#json", state="visible")
    with page.expect_download() as download:
        page.click("#json")
    assert download.value.suggested_filename == "keypoints.json"
    return json.loads(Path(download.value.path()).read_text())


def _screenshot(page: Any, selector: str) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(page.locator(selector).screenshot(), np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _num_colored(image: np.ndarray) -> int:
    """Pixels in the colors of left and right."""
    return int(sum((np.abs(image.astype(int) - color).max(axis=-1) < 12).sum() for color in (draw.LEFT, draw.RIGHT)))


def _eval(files: Path, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Path:
    monkeypatch.chdir(folder)
    main = importlib.import_module("sapiens_accel.eval").main
    main([str(files / "weights"), "--images", str(files / name), "--data.num_workers=0", "--csv=long", *words])
    return next(folder.glob("evaluations/*/images/*"))


@pytest.mark.parametrize("width", [1400, 420])
def test_an_image_is_uploaded_and_its_skeletons_are_seen_and_downloaded(
    site: Site, open_page: Callable[..., Any], width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page(width)
    _upload(page, site.files / "first.jpg")
    ours = _find(page)
    page.wait_for_selector("#result img")
    page.wait_for_timeout(500)
    theirs = _eval(site.files, "first.jpg", tmp_path, monkeypatch, "--boxes", str(site.files / "detector"))
    expected = json.loads((theirs / "keypoints.json").read_text())
    assert ours["annotations"] and {**ours, "info": 0} == {**expected, "info": 0}
    with page.expect_download() as download:
        page.click("#csv")
    assert Path(download.value.path()).read_text() == (theirs / "keypoints.csv").read_text()
    assert _num_colored(_screenshot(page, "#view")) < 50 < 500 < _num_colored(_screenshot(page, "#result"))
    assert page.inner_text("#status").startswith(f"{len(ours['annotations'])} people; ")
    assert page.locator("#table tr").count() == 1 + 17 * len(ours["annotations"])
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_boxes_are_drawn_by_two_clicks(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page()
    _upload(page, site.files / "first.jpg")
    page.click("text=Boxes of mine")
    page.wait_for_selector("#box_text textarea", state="visible")
    page.wait_for_timeout(500)
    for first, second in (((50, 20), (150, 220)), ((200, 200), (120, 100))):
        before = page.input_value("#box_text textarea")
        for x, y in (first, second):
            shown = page.get_attribute("#view img", "src")
            page.locator("#view img").click(position={"x": x, "y": y})
            page.wait_for_function("(was) => document.querySelector('#view img').src !== was", arg=shown)
        page.wait_for_function("(was) => document.querySelector('#box_text textarea').value !== was", arg=before)
    lines = page.input_value("#box_text textarea").splitlines()
    boxes = [[float(word) for word in line.split()] for line in lines]
    assert np.array(boxes) == pytest.approx(np.array([[50, 20, 100, 200], [120, 100, 80, 100]]), abs=1)
    assert [one["bbox"] for one in _find(page)["annotations"]] == boxes


@pytest.mark.parametrize(
    ("name", "said"), [("text.txt", "text.txt: neither an image ("), ("cut.jpg", "cut.jpg: does not decode")]
)
def test_a_wrong_file_is_one_line_on_the_page(site: Site, open_page: Callable[..., Any], name: str, said: str) -> None:
    page = open_page(420)
    page.set_input_files("#file input[type=file]", str(site.files / name))
    for _ in range(2):  # when it is opened, and when keypoints are asked for
        page.wait_for_selector("#status .error")
        line = page.inner_text("#status").strip()
        assert line.startswith(said) and "\n" not in line and "/" not in line.split(":")[0]
        page.click("#find")
        page.wait_for_timeout(1500)
    assert page.locator("#json").count() == 0 or not page.locator("#json").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 420


def test_no_file_is_one_line_too(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.click("#find")
    page.wait_for_selector("#status .error")
    assert page.inner_text("#status").strip() == "no file (expected an image or a video)"


def test_a_film_is_shown_with_identities(
    site: Site, open_page: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page()
    _upload(page, site.files / "clip.mp4")
    page.click("text=The whole image is one person")
    page.click("text=Smooth over time")
    ours = _find(page)
    theirs = _eval(site.files, "clip.mp4", tmp_path, monkeypatch, "--smooth")
    assert {**ours, "info": 0} == {**json.loads((theirs / "keypoints.json").read_text()), "info": 0}
    page.wait_for_function("document.querySelector('#film video')?.videoWidth === 128")
    assert page.evaluate("document.querySelector('#film video').duration") == pytest.approx(12 / 25, abs=0.05)


def test_two_visitors_at_once_see_their_own(site: Site, open_page: Callable[..., Any]) -> None:
    pages = [open_page(), open_page()]
    names = ("first.jpg", "second.jpg")
    for page, name in zip(pages, names, strict=True):
        _upload(page, site.files / name)
        page.click("text=The whole image is one person")
    for page in pages:
        page.click("#find")
    found = []
    for page, name in zip(pages, names, strict=True):
        tree = _find(page)
        assert [image["file_name"] for image in tree["images"]] == [name] == [tree["info"]["pictures"]]
        found.append(tree["annotations"][0]["keypoints"])
        other = names[1 - names.index(name)]
        assert name in page.content() and other not in page.content() and not any(other in url for url in page.asked)
    assert found[0] != found[1]
    third = open_page()
    third.wait_for_timeout(1000)
    assert not third.locator("#view img").count() and not any(name in third.content() for name in names)


def test_other_files_of_the_machine_are_not_served_and_the_api_is_closed(site: Site) -> None:
    host = site.url.removeprefix("http://")
    for path in ("/etc/passwd", site.files / "first.jpg", "eval.py"):
        connection = http.client.HTTPConnection(host)
        connection.request("GET", f"/gradio_api/file={path}")
        assert connection.getresponse().status in (403, 404), path
    connection = http.client.HTTPConnection(host)
    connection.request("GET", "/gradio_api/info")
    assert json.loads(connection.getresponse().read())["named_endpoints"] == {}


def test_nothing_is_written_outside_of_its_own_folder_and_no_other_host_is_asked(site: Site) -> None:
    """After the tests above: home and the current folder are empty; all connections were to itself."""
    (own,) = site.temporary.iterdir()
    assert own.name.startswith("sapiens_accel_app_") and (own / "gradio").is_dir()
    assert list((own / "answers").iterdir()) == []
    assert [path for folder in (site.home, site.current) for path in folder.rglob("*") if path.is_file()] == []
    noted = site.connections.read_text().splitlines() if site.connections.exists() else []
    assert {line for line in noted if not line.startswith("('127.0.0.1'")} == set()
