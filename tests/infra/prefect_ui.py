"""The Prefect UI as a person uses it, through Chromium; every request it makes is remembered."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

#: Nothing but the pages themselves: no updates, no sync, no first-run pages, no GPU.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
#: Milliseconds for anything to appear: the machine may be busy.
PATIENCE = 60_000


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def open_ui(address: str, shots: Path | None = None) -> Iterator[PrefectUI]:
    """A browser on the UI at `address`; `shots` is the folder for screenshots, None for none."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=list(FLAGS))
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(PATIENCE)
            yield PrefectUI(page, address, shots)
        finally:
            browser.close()


class PrefectUI:
    """One page of the UI. Methods are named after what a person does."""

    def __init__(self, page: Page, address: str, shots: Path | None) -> None:
        self.page, self.address, self.shots = page, address, shots
        self.asked: set[str] = set()
        page.on("request", lambda request: self.asked.add(request.url))

    @property
    def strangers(self) -> set[str]:
        """Hosts other than loopback that any page has asked."""
        hosts = {urlsplit(url).hostname for url in self.asked if urlsplit(url).scheme in ("http", "https", "ws", "wss")}
        return {str(host) for host in hosts} - {"127.0.0.1"}

    def shoot(self, name: str) -> None:
        """Keeps a screenshot as ``ui-<name>.png``."""
        if self.shots is not None:
            self.page.mouse.move(0, 0)
            self.page.screenshot(path=self.shots / f"ui-{name}.png", animations="disabled")

    def open_deployment(self, name: str) -> None:
        self.page.goto(f"{self.address}/deployments")
        self.page.get_by_role("link", name=name, exact=True).click()
        self.page.get_by_role("button", name="Run", exact=True).wait_for()

    def edit_deployment(self) -> None:
        """Opens the form with the settings of the deployment that is open."""
        self.page.locator(".deployment-menu button, .p-icon-button-menu button").first.click()
        self.page.get_by_text("Edit", exact=True).first.click()
        self.page.get_by_role("button", name="Save").wait_for()

    def save(self) -> None:
        self.page.get_by_role("button", name="Save").click()
        self.page.get_by_role("button", name="Run", exact=True).wait_for()

    def toggle_schedule(self) -> None:
        """Of the deployment that is open."""
        self.page.get_by_role("switch").first.click()

    def toggle_automation(self, name: str) -> None:
        self.page.goto(f"{self.address}/automations")
        self.page.get_by_role("link", name=name, exact=True).first.wait_for()
        card = self.page.locator(".p-card, .automation-card").filter(has=self.page.get_by_text(name, exact=True))
        # The card of its action is inside, has the deployment's name as well, and no switch.
        card.filter(has=self.page.get_by_role("switch")).last.get_by_role("switch").click()

    def custom_run(self) -> None:
        """Opens the form of the deployment that is open."""
        self.page.get_by_role("button", name="Run", exact=True).click()
        self.page.get_by_text("Custom run").click()
        self.page.get_by_role("button", name="Submit").wait_for()

    def field(self, title: str) -> Locator:
        """The form's field with that title."""
        label = self.page.locator(".schema-form-property__label").get_by_text(title)
        return self.page.locator(".schema-form-property").filter(has=label)

    def fill(self, title: str, value: str) -> None:
        self.field(title).locator("textarea, input").first.fill(value)

    def add(self, title: str, value: str) -> None:
        """An item to a list."""
        self.field(title).get_by_role("button", name="Add item").click()
        self.field(title).locator("textarea, input").last.fill(value)

    def submit(self) -> None:
        self.page.get_by_role("button", name="Submit").click()

    def open_run(self, flow_run: str) -> None:
        """The page of a flow run, once its graph is drawn."""
        self.page.goto(f"{self.address}/runs/flow-run/{flow_run}")
        self.page.locator("canvas").first.wait_for()

    def tab(self, name: str) -> None:
        self.page.get_by_role("listitem").filter(has_text=name).click()

    def open_artifact(self, key: str) -> None:
        """The newest of that key, from the run's page. That list is drawn anew at times: so by the address."""
        self.tab("Artifacts")
        link = self.page.get_by_role("link", name=key).last.get_attribute("href")
        self.page.goto(f"{self.address}{link}")
        self.page.get_by_text(key).first.wait_for()

    def picture_width(self) -> int:
        """Width in pixels of the artifact's picture, once it has loaded."""
        picture = self.page.locator("img[src^='data:image']").first
        picture.wait_for()
        return int(picture.evaluate("picture => picture.decode().then(() => picture.naturalWidth)"))

    def cancel(self) -> None:
        """The run whose page is open."""
        self.page.get_by_role("button", name="Cancel", exact=True).click()
        self.page.get_by_role("button", name="Confirm", exact=True).click()

    def retry(self) -> None:
        """The run whose page is open."""
        retry = self.page.get_by_role("button", name="Retry", exact=True)
        retry.click()
        self.page.get_by_role("button", name="Close", exact=True).wait_for()
        retry.last.click()  # that of the question
