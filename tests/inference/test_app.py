"""examples/app.py in headless Chromium: what the page shows, what it gives to download, and how its server ends.

Skipped without Gradio (requirements-app.txt), selenium, Chromium and ChromeDriver.
"""

import io
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import u2mamba_predict
from tests.inference.test_predict import ROOT, photo

gradio_client = pytest.importorskip("gradio_client", reason="Gradio is not installed")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("Chromium or ChromeDriver is not installed", allow_module_level=True)

FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --window-size=1100,1000"


@pytest.fixture(scope="module")
def server():
    """A running page: (process, address)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "examples.app", "--port", port, "--device", "cpu", "--precision", "fp32"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    address = re.search(r"http://\S+", process.stdout.readline())[0]
    yield process, address
    if process.poll() is None:
        process.kill()


@pytest.fixture(scope="module")
def browser(server, tmp_path_factory):
    options = webdriver.ChromeOptions()
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.get(server[1])
    yield driver
    driver.quit()


def wait_for(browser, selector: str, text: str = ""):
    """The first element with this text, once it is there."""

    def find(browser):
        elements = browser.find_elements("css selector", selector)
        return next((e for e in elements if text in e.get_attribute("textContent")), None)

    return WebDriverWait(browser, 60).until(find)


def upload(browser, path: Path) -> None:
    for button in browser.find_elements("css selector", "[aria-label='Clear']")[:1]:
        button.click()
    wait_for(browser, "input[type=file]").send_keys(str(path))


def test_the_downloaded_png_is_that_of_the_command(server, browser, tmp_path):
    photo(0, 600, 400).save(tmp_path / "cup.png")
    cfg = u2mamba_predict.Config((str(tmp_path / "cup.png"),), out=str(tmp_path / "out"), mode=("cutout",))
    assert u2mamba_predict.main(replace(cfg, device="cpu", precision="fp32")) == 0
    upload(browser, tmp_path / "cup.png")
    link = wait_for(browser, "#download a[href$='cup.png']").get_attribute("href")
    with urllib.request.urlopen(link) as file:  # noqa: S310 - our own server
        downloaded = np.asarray(Image.open(io.BytesIO(file.read())))
    assert np.array_equal(downloaded, np.asarray(Image.open(tmp_path / "out/cutout/cup.png")))
    wait_for(browser, "img[src*='.png']")
    hosts = browser.execute_script("return performance.getEntriesByType('resource').map(e => new URL(e.name).host)")
    assert {h for h in hosts if h} <= {server[1].split("/")[2]}


@pytest.mark.parametrize(
    ("size", "says"), [(99, "notes.jpg: not an image (JPEG"), (200_000_000, "maximum allowed size")]
)
def test_a_file_that_cannot_be_used_gets_a_message(size, says, browser, tmp_path):
    with (tmp_path / "notes.jpg").open("wb") as file:
        file.truncate(size)
    upload(browser, tmp_path / "notes.jpg")
    assert wait_for(browser, ".toast-body", says)


def test_twenty_uploads_at_once(server, tmp_path):
    process, address = server
    memory = psutil.Process(process.pid).memory_info().rss
    image = photo(1, 1500, 1000)
    image.save(tmp_path / "photo.jpg")
    client = gradio_client.Client(address, verbose=False)
    jobs = [
        client.submit(gradio_client.handle_file(tmp_path / "photo.jpg"), "small", "#ffffff", api_name="/cut_out")
        for _ in range(20)
    ]
    results = [job.result(timeout=300) for job in jobs]
    assert len({Path(r[2]).read_bytes() for r in results}) == 1
    assert psutil.Process(process.pid).memory_info().rss < memory + 2**30


def test_a_stopped_server_ends_without_a_traceback(server, browser):
    process, _ = server
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
