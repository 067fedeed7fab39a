"""The page of `rolldiff serve` in a real browser: pictures of it for the documentation.

    python benchmarks/page.py RUN docs/pictures --label Bag --groups 7

Needs the extra `dev` and Chromium with its driver, `apt install chromium chromium-driver`. The test
of the page drives it by the same functions.
"""

import argparse
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium.webdriver import ActionChains, Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait
from serve import serving

SECONDS = 60


def programs() -> tuple[str, str] | None:
    """Chromium and its driver; None where they are not installed."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Page:
    """The page at an address, as a person uses it."""

    def __init__(self, driver: Chrome, url: str, *, ready: str = "num_groups") -> None:
        self.driver = driver
        driver.get(url)
        self.until(lambda: self[ready].get_attribute("value") or self[ready].text)

    def __getitem__(self, name: str):
        return self.driver.find_element(By.ID, name)

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for something."""
        WebDriverWait(self.driver, SECONDS, poll_frequency=0.02).until(lambda _: condition())

    def set(self, **values: object) -> None:
        """Choose settings."""
        for name, value in values.items():
            element = self[name]
            if element.tag_name == "select":
                Select(element).select_by_visible_text(str(value))
            elif element.get_attribute("type") == "checkbox":
                if element.is_selected() != value:
                    element.click()
            else:  # typed numbers and sliders alike
                self.driver.execute_script(
                    "arguments[0].value = arguments[1];"
                    "arguments[0].dispatchEvent(new Event('input', {bubbles: true}));",
                    element,
                    str(value),
                )

    def generate(self) -> None:
        """Press the button, and wait for the finished image."""
        self["generate"].click()
        self.finished()

    def finished(self) -> None:
        """Wait for the finished image, or an error."""
        self.until(lambda: self["save-png"].is_enabled() or self["error"].text)

    def paint(self, fraction: float = 0.5) -> None:
        """A stroke of the mask from the middle to the right, over part of the width."""
        if self["draw"].get_attribute("aria-pressed") == "false":
            self["draw"].click()
        width = int(self["mask"].size["width"] * fraction / 2)
        stroke = ActionChains(self.driver).move_to_element(self["mask"]).click_and_hold()
        for _ in range(8):
            stroke = stroke.move_by_offset(width // 8, 0)
        stroke.release().perform()

    def picture(self, path: Path, *, height: int) -> None:
        """Save what a window of some height shows, from the top."""
        self.driver.execute_script("window.scrollTo(0, 0)")
        self.driver.save_screenshot(str(path))
        with Image.open(path) as picture:
            cut = picture.crop((0, 0, picture.width, min(height, picture.height)))
        cut.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(path, optimize=True)


@contextmanager
def opened(
    url: str,
    *,
    size: tuple[int, int] = (1000, 1500),
    dark: bool = False,
    ready: str = "num_groups",
) -> Iterator[Page]:
    """The page in a headless browser, which logs its console and all requests.

    It is ready when the element of this name holds something.
    """
    found = programs()
    if found is None:
        raise SystemExit("chromium and chromedriver must be installed")
    options = ChromeOptions()
    options.binary_location = found[0]
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        f"--window-size={size[0]},{size[1]}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(found[1]))
    try:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield Page(driver, url, ready=ready)
    finally:
        driver.quit()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run folder or a checkpoint")
    parser.add_argument("out", type=Path, help="a folder for serve.png and serve-phone.png")
    parser.add_argument("--label", help="the class")
    parser.add_argument("--groups", type=int, default=4, help="num_groups")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"num_groups": args.groups, "seed": args.seed, "new-seed": False}
    settings |= {"class": args.label} if args.label else {}
    for name, size, dark in (("serve", (1000, 1500), False), ("serve-phone", (500, 1700), True)):
        with serving(f"ckpt={args.run}") as url, opened(url, size=size, dark=dark) as page:
            page.set(**settings)
            page.generate()
            # In the middle of the animation on the right, and with a frame on the left.
            page.until(
                lambda page=page: page.driver.execute_script(
                    "return /at [4-6]. %/.test("
                    "document.getElementById('pretended').getAttribute('aria-label'))"
                )
            )
            page.driver.find_elements(By.CSS_SELECTOR, "#strip button")[2].click()
            page.picture(args.out / f"{name}.png", height=size[1])


if __name__ == "__main__":
    main()
