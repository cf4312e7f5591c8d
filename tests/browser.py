"""A real browser, Debian's Chromium, before MLflow's UI and the report: for the tests, and for the pictures of the README.

`python tests/browser.py http://127.0.0.1:5000 "train @1a2b3c4"` writes docs/images/{runs,charts,report}.png, from the server
that `make ui` starts, the run whose children are shown, and output/report.html.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
OPTIONS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
NO_ASSISTANT = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=list(OPTIONS))
        yield browser
        browser.close()


def ui(browser: Browser) -> Page:
    """A page for MLflow's UI, without its assistant."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.add_init_script(NO_ASSISTANT)
    page = context.new_page()
    page.set_default_timeout(60_000)
    return page


def run_link(page: Page, name: str) -> Locator:
    return page.get_by_role("link", name=name, exact=True)


def expand(page: Page, name: str) -> None:
    """Show the children of a run in the table of runs."""
    run_link(page, name).locator("xpath=ancestor::*[@role='gridcell'][1]").locator("button").first.click()


def charts(page: Page, address: str, search: str) -> Locator:
    """The cards of the charts whose titles have `search` in them."""
    page.goto(f"{address}&compareRunsMode=CHART")
    page.get_by_placeholder("Search metric charts").fill(search)
    return page.get_by_test_id("experiment-view-compare-runs-card").filter(has_text=search)


def artifact(page: Page, run: str, file: str) -> Locator:
    """The picture that the page of the run, at the address `run`, shows of an artifact."""
    page.goto(run)
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text(file).first.click()
    return page.locator(f"img[src^='blob:'], img[alt='{file}']").first


def report(browser: Browser, path: Path, **options) -> tuple[Page, list[str]]:
    """The report with the network off, and a list that what goes wrong in it is put into."""
    context = browser.new_context(offline=True, **options)
    page, faults = context.new_page(), []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("requestfailed", lambda request: faults.append(request.url[:100]))
    page.goto(path.resolve().as_uri())
    page.wait_for_load_state("load")
    return page, faults


def main(server: str, train: str) -> None:
    images, root = Path("docs/images"), Path(__file__).resolve().parents[1]
    address = f"{server}/#/experiments/1/runs?workflowType=machine_learning"
    with chromium() as browser:
        page = ui(browser)
        page.set_viewport_size({"width": 1280, "height": 560})
        page.goto(address)
        expand(page, train)
        page.wait_for_timeout(2000)
        page.screenshot(path=images / "runs.png")
        page.set_viewport_size({"width": 1280, "height": 900})
        charts(page, address, "loss").first.wait_for()
        page.wait_for_timeout(3000)
        page.screenshot(path=images / "charts.png")
        page, _ = report(browser, root / "output/report.html", viewport={"width": 1280, "height": 1500})
        page.screenshot(path=images / "report.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
