"""The product in a browser: somebody fills the form, watches, loses the process, retries, and has a dataset.

With NEGFACEDIFF_PICTURES=docs/pictures the pages that are seen on the way are kept there, as ui-*.png; the
whole command is in docs/operations.md.
"""

import io
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from noted_units import promises, results
from PIL import Image
from served import Api, free_port, served, wait_for
from stage_builds import finish

from flows.examination import examine
from flows.results import PAGE
from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.stages.build import plan_build
from negfacediff_core.store.status import status

playwright = pytest.importorskip("playwright.sync_api", reason="the extra browser is not installed")
Locator, Page = playwright.Locator, playwright.Page

pytestmark = pytest.mark.slow

# The browser that drives the pages: Playwright's own is not needed.
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SIZE = {"width": 1280, "height": 900}
# Colours and bytes of a picture that is kept.
COLOURS, BYTES = 48, 150_000
# Seconds that pages may take, on a machine that has other work as well.
PATIENCE = 600


class Person:
    """Somebody at the pages, who sees what they show and clicks and types."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address
        self.asked_elsewhere: list[str] = []
        page.on("request", self._note)
        page.set_default_timeout(PATIENCE * 1000)

    def _note(self, request) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.asked_elsewhere.append(request.url)

    def open(self, path: str) -> None:
        self.page.goto(f"{self.address}{path}")

    def see(self, text: str | re.Pattern[str]) -> Locator:
        """Wait until a text is on the page."""
        found = self.page.get_by_text(text, exact=isinstance(text, str)).last
        found.wait_for()
        return found

    def click(self, text: str) -> None:
        self.see(text).click()

    def press(self, button: str) -> None:
        self.page.get_by_role("button", name=button, exact=True).last.click()

    def type(self, title: str, value: object) -> None:
        """Write into the box with a title, and again where the page was too slow to take it all."""
        label = self.page.locator(
            ".schema-form-property__label", has_text=re.compile(rf"^{title}( \(Optional\))?$")
        )
        box = label.locator("xpath=ancestor::div[contains(@class, 'p-label ')][1]").locator("input, textarea")

        def typed() -> bool:
            box.click()
            self.page.keyboard.press("ControlOrMeta+a")
            self.page.keyboard.type(str(value), delay=80)
            return box.input_value() == str(value)

        wait_for(typed, f"{title} does not take {value}", PATIENCE)

    def card(self, artifact: str) -> Locator:
        """The card of an artifact, by its whole title."""
        title = self.page.locator(".artifact-card__title", has_text=re.compile(f"^{artifact}$"))
        return self.page.locator(".artifact-card", has=title)

    def percent(self, artifact: str) -> int:
        """How far the bar of a stage is, as its card says."""
        return int(self.card(artifact).inner_text().partition("%:")[0].split()[-1])

    def keep(self, name: str, top: str = "") -> None:
        """Keep a picture of what is seen, from the text `top` on, where somebody wants it."""
        if top:
            self.see(top).evaluate("text => text.scrollIntoView()")
        folder = os.environ.get("NEGFACEDIFF_PICTURES")
        if not folder:
            return
        self.page.wait_for_timeout(1500)  # until what moves stands still
        seen = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        path = Path(folder, f"ui-{name}.png")
        seen.quantize(COLOURS).save(path, optimize=True)
        assert path.stat().st_size < BYTES


@pytest.fixture
def place(tmp_path) -> Iterator[tuple[Person, subprocess.Popen, Api]]:
    """Somebody at the pages of `negfacediff serve`, its process and its API."""
    assert CHROMIUM, "there is no Chromium: install Debian's package chromium"
    with served(tmp_path, port := free_port()) as (serving, api), playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield Person(browser.new_page(viewport=SIZE), f"http://127.0.0.1:{port}"), serving, api
        browser.close()


def open_form(somebody: Person, deployment: str) -> None:
    somebody.open("/deployments")
    somebody.page.get_by_role("link", name=deployment, exact=True).click()
    somebody.press("Run")
    somebody.click("Custom run")
    somebody.see("Validate parameters")


def submit(somebody: Person) -> str:
    """Send the form off, go to the page of the run, and return its id."""
    somebody.press("Submit")
    somebody.press("View run")
    somebody.page.wait_for_url("**/runs/flow-run/*")
    return somebody.page.url.rpartition("/")[2].partition("?")[0]


def kill_run(serving: subprocess.Popen) -> None:
    """Kill the process of the run that is served."""
    (process,) = (
        one for one in psutil.Process(serving.pid).children() if "prefect.engine" in " ".join(one.cmdline())
    )
    process.kill()


def assert_equals_one_left_alone(store: Path, build: BuildConfig, folder: Path) -> None:
    """The store is whole, undamaged, and what the same settings make where nobody kills anything."""
    assert [stage.pending for stage in status(str(store))] == [0] * 7
    assert examine(str(store), None, 1, 0, 2, lambda done, size: None).damage == []
    specs = finish(build, folder, ExecutionConfig(workers=2, device="cpu"))
    assert promises(plan_build(build, str(store))) == promises(specs.values())
    pages = {"report.html", PAGE}
    assert results(folder) == {
        path: content for path, content in results(store).items() if Path(path).name not in pages
    }


def test_a_dataset_is_built_by_form_though_its_process_is_killed(place, tmp_path):
    somebody, serving, api = place
    store = tmp_path / "store"
    open_form(somebody, "demo")
    somebody.type("Name", "faces")
    somebody.type("Images", 8)
    somebody.type("Identities", 16)
    somebody.keep("form")
    somebody.type("Identities", 1)
    somebody.press("Submit")
    somebody.see(re.compile("field 'build.identities'.*1 is less than the minimum of 2"))
    somebody.keep("refused")

    somebody.type("Identities", 16)
    run = submit(somebody)
    somebody.click("Artifacts")
    somebody.card("faces-samples").scroll_into_view_if_needed()
    seen: set[int] = set()

    def moves() -> bool:
        seen.add(now := somebody.percent("faces-samples"))
        return len(seen) > 1 and now < 100

    wait_for(moves, "the bar does not move", PATIENCE)
    somebody.keep("progress", top="Artifacts")
    kill_run(serving)
    somebody.see("Crashed")
    before = {(stage.stage, stage.done) for stage in status(str(store)) if stage.done}
    assert 0 < dict(before)["samples"] < 4
    somebody.page.reload()
    somebody.see("Crashed")
    somebody.keep("crashed")

    somebody.press("Retry")
    somebody.see("Retry faces?")
    somebody.press("Retry")
    api.wait(run, {"Completed"}, PATIENCE)
    somebody.page.reload()  # pages of runs that have ended do not ask again
    somebody.see("Completed")
    somebody.click("Artifacts")
    somebody.card("faces-report").wait_for()
    somebody.card("faces").click()
    somebody.see(re.compile("^128 images of 16 identities, from "))
    look_at_the_result(somebody)

    asked = api.call("GET", f"/flow_runs/{run}")["parameters"]["build"]
    assert (asked["name"], asked["identities"], asked["images"]) == ("faces", 16, 8)
    assert_equals_one_left_alone(store, BuildConfig.model_validate(asked), tmp_path / "alone")
    assert somebody.asked_elsewhere == []


def look_at_the_result(somebody: Person) -> None:
    """Figures, pictures that really show, licences and lineage."""
    somebody.keep("result")
    for heading, name in {
        "Images: a row an identity, a column a replicate": "images",
        "Scores of genuine and impostor pairs": "histogram",
        "Licences": "licences",
    }.items():
        somebody.keep(name, top=heading)
    widths = somebody.page.locator("img[src^='data:image/']").evaluate_all(
        "all => all.map(i => i.naturalWidth)"
    )
    assert len(widths) == 3 and min(widths) > 300
    table = somebody.page.locator("table", has_text="samples: generator")
    assert "Apache-2.0" in table.inner_text()


def test_a_long_build_waits_until_it_is_approved_in_the_browser(place, tmp_path):
    somebody, _, _ = place
    open_form(somebody, "demo")
    somebody.type("Identities", 4)
    somebody.type("Approve above hours", 0.0001)
    submit(somebody)
    somebody.see("Paused")
    somebody.press("Resume")
    somebody.see(re.compile("demo would take about .*, more than the"))
    somebody.keep("approval")
    assert not (tmp_path / "store" / "samples").exists()
    somebody.page.get_by_role("switch").last.click()
    somebody.press("Submit")
    somebody.see("Completed")
    assert [stage.pending for stage in status(str(tmp_path / "store"))] == [0] * 7
