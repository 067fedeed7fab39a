"""The page of `rolldiff serve` in headless Chromium."""

import json
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from servers import random_decoder, running

from rolldiff import DecodeConfig
from rolldiff.serving import Served

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import page as pages  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(pages.programs() is None, reason="chromium and chromedriver are missing"),
]


@pytest.fixture(scope="module")
def served():
    return Served(decoder=random_decoder(image_size=16), config=DecodeConfig(num_groups=4, steps=4))


@pytest.fixture
def page(served):
    with running(served) as port, pages.opened(f"http://127.0.0.1:{port}/") as page:
        page.set(**{"new-seed": False})
        yield page
        log = [entry["message"] for entry in page.driver.get_log("browser")]
        # What the tests themselves do, to read the pixels of a canvas.
        assert [message for message in log if "willReadFrequently" not in message] == []
        assert {urlsplit(url).netloc for url in requested(page)} == {f"127.0.0.1:{port}"}


def requested(page):
    """All addresses that the browser asked for, but for data that it holds itself."""
    for entry in page.driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if not url.startswith(("data:", "blob:")):
                yield url


def drawn(page, name):
    """The pixels of a canvas, `[H, W, 4]`."""
    width, height, values = page.driver.execute_script(
        "const c = document.getElementById(arguments[0]);"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return [c.width, c.height, Array.from(d)];",
        name,
    )
    return np.array(values, dtype=np.uint8).reshape(height, width, 4)


def strip(page):
    return page.driver.find_elements(By.CSS_SELECTOR, "#strip button")


def test_from_a_click_to_the_final_image(page, served):
    page.set(**{"class": "bee", "num_groups": 4, "frames": 9, "seed": 7})
    page.generate()
    assert not page["error"].text
    assert len(strip(page)) == 9
    alts = [img.get_attribute("alt") for img in page.driver.find_elements(By.TAG_NAME, "img")]
    rows = [int(alt.split(": ")[1].split(" of")[0]) for alt in alts]
    assert rows == sorted(rows)
    assert rows[0] == 0
    assert rows[-1] == 16
    assert "tau 0.00" in page["status"].text
    expected = served.decoder.decode([1], served.config, num_groups=4, seed=7).image
    expected = ((expected[0, 0] + 1) * 127.5).round().clamp(0, 255).numpy()
    assert np.abs(drawn(page, "sent")[..., 0] - expected).max() <= 1
    # A frame in the middle: the line lies under its finished rows, and the matrix is filled so far.
    strip(page)[4].click()
    top = float(page["line"].get_attribute("style").split("top: ")[1].split("%")[0])
    assert top == pytest.approx(100 * rows[4] / 16)
    assert "step 9 of 16" in page["matrix"].get_attribute("aria-label")
    matrix = drawn(page, "matrix")
    assert matrix.shape[:2] == (4, 17)
    assert (matrix[:, :10, 3] == 255).all()
    assert (matrix[:, 10:, 3] < 255).all()


def test_frames_are_seen_as_they_come(page):
    """A long decoding shows its first frames long before its last."""
    page.set(steps=400, frames=5)
    page["generate"].click()
    page.until(lambda: len(strip(page)) == 1)
    assert page["stop"].is_enabled()
    assert "tau 0.80" in page["status"].text
    page.finished()
    assert len(strip(page)) == 5


def test_stop(page):
    page.set(steps=1000, frames=2)
    page["generate"].click()
    page.until(lambda: page["stop"].is_enabled())
    time.sleep(0.2)
    page["stop"].click()
    page.until(lambda: page["error"].text == "Stopped.")
    page.set(steps=2)
    page.generate()
    assert not page["error"].text


def test_the_slider_moves_the_blur(page):
    page.set(seconds=2)
    page.generate()
    page.until(lambda: "frame 3" in page["pretended"].get_attribute("aria-label"))
    page["pause"].click()
    pictures = []
    for value in (0, 40, 100):
        page.set(blur=value)
        assert page["blur-value"].text == f"{value} %"
        pictures.append(drawn(page, "pretended").astype(int))
    for other in pictures[1:]:
        assert np.abs(other - pictures[0]).max() > 10
    assert all((picture[..., 3] == 255).all() for picture in pictures)
    label = page["pretended"].get_attribute("aria-label")
    time.sleep(0.2)
    assert page["pretended"].get_attribute("aria-label") == label  # paused
    page["pause"].click()
    page.until(lambda: "100 %" in page["pretended"].get_attribute("aria-label"))
    sharp = drawn(page, "sent")
    shown = drawn(page, "pretended")
    scale = len(shown) // len(sharp)
    assert (shown[scale // 2 :: scale, scale // 2 :: scale] == sharp).all()


def test_a_mask_is_decoded_again_and_nothing_else(page):
    page.generate()
    before = drawn(page, "sent")
    page.paint(0.5)
    masked = drawn(page, "mask")[..., 3] > 0
    assert 0 < masked.sum() < masked.size
    page.set(seed=99)
    page["redraw"].click()
    page.finished()
    assert not page["error"].text
    after = drawn(page, "sent")
    assert (after[~masked] == before[~masked]).all()
    assert (after[masked] != before[masked]).any()


def test_decoding_again_begins_at_once(page):
    """While the mask is made, a second click starts nothing and the old image is no result."""
    page.generate()
    page.paint(0.5)
    disabled = page.driver.execute_script(
        "document.getElementById('redraw').click();"
        "return ['redraw', 'save-png'].map((id) => document.getElementById(id).disabled);"
    )
    assert disabled == [True, True]
    page.finished()
    assert not page["error"].text


def test_the_keyboard_is_enough(page):
    page["generate"].send_keys(Keys.ENTER)
    page.finished()
    before = drawn(page, "sent")
    page["draw"].send_keys(Keys.ENTER)
    keys = [Keys.ARROW_UP] * 4 + [Keys.SPACE]
    ActionChains(page.driver).send_keys(*keys).perform()
    assert "25 % from the top" in page["status"].text
    masked = drawn(page, "mask")[..., 3] > 0
    assert masked[3:5, 7:9].all()
    assert not masked[8:].any()
    page.set(seed=98)
    page["redraw"].send_keys(Keys.SPACE)
    page.finished()
    assert (drawn(page, "sent") != before).any()
    # Everything that can be used can be reached.
    for element in page.driver.find_elements(By.CSS_SELECTOR, "button, input, select"):
        if element.is_displayed():
            assert element.get_attribute("tabindex") != "-1"


def test_files(page, tmp_path):
    page.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    page.set(frames=5)
    page.generate()
    page["save-png"].click()
    page["save-gif"].click()
    page.until(lambda: {"rolldiff.png", "rolldiff.gif"} <= {f.name for f in tmp_path.iterdir()})
    assert (
        np.asarray(Image.open(tmp_path / "rolldiff.png").convert("RGBA")) == drawn(page, "sent")
    ).all()
    with Image.open(tmp_path / "rolldiff.gif") as film:
        assert film.n_frames > 1
        assert film.size == (16, 16)
    page["replay"].click()
    page.until(lambda: "Frame 2:" in page["status"].text)
    page.until(lambda: "Frame 5:" in page["status"].text)


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_and_the_dark(served, dark):
    size = {"size": (390, 844), "dark": dark}
    with running(served) as port, pages.opened(f"http://127.0.0.1:{port}/", **size) as page:
        page.generate()
        wide, paper = page.driver.execute_script(
            "return [document.documentElement.scrollWidth - document.documentElement.clientWidth,"
            "getComputedStyle(document.body).backgroundColor]"
        )
        assert wide == 0
        light = np.array([int(part) for part in paper[4:-1].split(",")]).mean()
        assert (light < 60) if dark else (light > 200)
        for element in page.driver.find_elements(By.CSS_SELECTOR, "canvas, img"):
            assert element.get_attribute("aria-label") or element.get_attribute("alt")


def test_a_key_is_asked_for(served):
    with (
        running(served, api_key="sesame") as port,
        pages.opened(f"http://127.0.0.1:{port}/", ready="error") as page,
    ):
        page.until(lambda: page["error"].text == "the API key is missing or wrong")
        page.driver.find_element(By.TAG_NAME, "summary").click()
        page["key"].send_keys("sesame", Keys.TAB)
        page.until(lambda: page["num_groups"].get_attribute("value"))
        page.generate()
        assert not page["error"].text
