"""The page of `make serve` in Chromium, as people use it: with a trained model, its real images, an experiment and a champion."""

import io
import re
import shutil
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from PIL import Image

import browser
from helpers import copied, run, served

# In the console: that another model was announced, and that these tests read canvases.
EXPECTED = "status of 409|getImageData"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not browser.CHROMIUM.exists(), reason="needs Debian's package chromium"),
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory, smoke_run) -> Path:
    """The smoke preset, whose model is the champion, and an experiment with other sampling."""
    clone = copied(smoke_run, tmp_path_factory.mktemp("page"))
    run(clone, "dvc", "exp", "run", "--temp", "-n", "few-steps", "-S", "sample.steps=3", "-S", "train.steps=50")
    return clone


@pytest.fixture(scope="module")
def address(clone):
    with served(clone) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as chromium:
        yield chromium


@pytest.fixture
def page(chromium, address):
    """The page, which must not complain, and must load nothing from elsewhere."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
    page, faults = context.new_page(), []
    page.on("console", lambda message: faults.append(message.text) if not re.search(EXPECTED, message.text) else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "request", lambda request: faults.append(request.url) if not request.url.startswith((address, "data:", "blob:")) else None
    )
    page.set_default_timeout(60_000)
    page.goto(address)
    page.locator("#choices img:not([hidden])").first.wait_for()
    yield page
    context.close()
    assert faults == []


def draw(page) -> None:
    page.get_by_role("button", name="Draw", exact=True).click()
    finished(page)


def finished(page) -> None:
    page.locator("#status").filter(has_text="Done").wait_for()


def shown(page, selector: str = ".grid canvas") -> list[list[int]]:
    """The pixels of the canvases."""
    script = (
        "all => all.map(c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 0))"
    )
    return page.locator(selector).evaluate_all(script)


def move_to_step(page, step: int) -> None:
    page.locator("#at").fill(str(step))


def test_classes_chosen_by_picture_are_drawn_and_are_what_the_server_draws(page, address):
    page.locator("#choices label", has_text="Bag").click()
    page.locator("#choices label", has_text="Sneaker").click()
    page.get_by_label("Images").fill("7")
    page.get_by_label("Seed", exact=True).fill("12")
    draw(page)
    labels = page.locator(".grid button").evaluate_all("all => all.map(b => b.getAttribute('aria-label'))")
    assert labels[:2] == ["image 1, Sneaker", "image 2, Bag"]
    assert len(labels) == 7
    assert "7 images in " in page.locator(".panel p").inner_text()
    query = urlsplit(page.url).query
    with Image.open(io.BytesIO(requests.get(f"{address}/drawing.png?{query}", timeout=60).content)) as sheet:
        pixels = np.asarray(sheet)
    assert (pixels[2:58:2, 2:58:2].flatten() == shown(page)[0]).all()


def test_the_slider_goes_back_through_the_steps(page):
    draw(page)
    finished_images = shown(page)
    move_to_step(page, 0)
    noise = shown(page)
    assert noise != finished_images
    assert np.std(noise[0]) > 50
    assert "times as strong as the image" in page.locator("#level").inner_text()
    page.get_by_role("button", name="Play").click()
    page.locator("#level").filter(has_text="no noise left").wait_for()
    assert shown(page) == finished_images


def test_one_image_shows_its_noise_the_guess_and_the_nearest_training_image(page):
    draw(page)
    page.locator(".grid button").nth(3).click()
    assert page.locator("#detail-title").inner_text() == "Image 4, Dress"
    move_to_step(page, 2)
    (x,), (guess,), (last,) = (shown(page, f"#{name}") for name in ("x", "guess", "last"))
    assert x == shown(page)[3]
    distances = [np.abs(np.subtract(some, last)).mean() for some in (x, guess)]
    assert distances[1] < distances[0]  # the guess is closer to what comes of it
    page.get_by_role("button", name="Find the nearest training image").click()
    page.locator("#neighbour-image").wait_for()
    assert "Real test images have" in page.locator("#neighbour-text").inner_text()


def test_two_settings_stand_beside_each_other(page):
    page.get_by_text("Compare with other settings").click()
    page.get_by_label("Beside it").check()
    page.locator("#steps2").fill("3")
    draw(page)
    assert page.locator(".panel").count() == 2
    assert page.locator(".panel h2").nth(1).inner_text().startswith("dpmpp_2m, 3 steps, guidance 1")
    images = shown(page)
    assert images[:20] != images[20:]


def test_a_strip_blends_from_one_class_to_another(page):
    page.locator("#choices label", has_text="Trouser").click()
    page.get_by_text("Blend", exact=True).click()
    page.get_by_label("To the class").select_option("Bag")
    page.get_by_label("Images").fill("6")
    draw(page)
    labels = page.locator(".grid button").evaluate_all("all => all.map(b => b.getAttribute('aria-label'))")
    assert labels[0].startswith("image 1, 0 % from Trouser")
    assert labels[-1].startswith("image 6, 100 % from Trouser")
    assert len(set(map(str, shown(page)))) == 6


def test_a_link_shows_the_same_pictures(page):
    page.locator("#choices label", has_text="Coat").click()
    page.get_by_role("button", name="Another seed").click()
    finished(page)
    before = shown(page)
    page.get_by_role("button", name="Copy link").click()
    page.locator("#copied").filter(has_text="Link copied.").wait_for()
    link = page.evaluate("navigator.clipboard.readText()")
    assert parse_qs(urlsplit(link).query)["classes"] == ["Coat"]
    page.goto("about:blank")
    page.goto(link)
    finished(page)
    assert shown(page) == before
    assert page.locator("#curl").inner_text().startswith("curl -o drawing.png 'http://127.0.0.1:")


@pytest.mark.parametrize("kind", ["PNG", "GIF", ".npz"])
def test_a_drawing_is_downloaded(page, kind):
    draw(page)
    with page.expect_download() as download:
        page.get_by_role("link", name=kind, exact=True).click()
    assert Path(download.value.path()).stat().st_size > 1000
    assert download.value.suggested_filename.endswith(kind.lower().lstrip("."))


def test_models_are_switched_without_a_restart(page, address):
    names = requests.get(f"{address}/models", timeout=60).json()
    assert list(names) == ["champion", "workspace", "pretrained", "experiment/few-steps"]
    page.get_by_label("Model", exact=True).select_option("experiment/few-steps")
    page.locator("#card", has_text="experiment few-steps").wait_for()
    assert page.locator("#steps").input_value() == "3"
    assert "FID (less is better)" in page.locator("#card").inner_text()
    draw(page)
    assert "model=experiment%2Ffew-steps" in page.url
    page.get_by_label("Model", exact=True).select_option("champion")
    page.locator("#card a", has_text="Its evaluation in MLflow").wait_for()
    assert "/runs/" in page.locator("#card a").get_attribute("href")


def test_another_model_is_announced(page, clone, address):
    model = clone / "models/diffusion_model.pth"
    old = model.read_bytes()
    page.get_by_label("Model", exact=True).select_option("workspace")
    page.locator("#card", has_text="models/diffusion_model.pth").wait_for()
    draw(page)
    run(clone, "dvc", "get", ".", "models/diffusion_model.pth", "--rev", "few-steps", "--out", "other.pth")
    model.unlink()
    shutil.move(clone / "other.pth", model)
    try:
        page.get_by_role("button", name="Draw", exact=True).click()
        page.locator("#changed").filter(has_text="is another model now").wait_for()
        page.get_by_role("button", name="Draw with the model as it is now").click()
        finished(page)
    finally:
        model.unlink()
        model.write_bytes(old)


def test_it_is_drawn_and_stopped_by_keyboard_alone(page):
    page.locator("#seed").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("31")
    page.keyboard.press("Enter")
    finished(page)
    page.locator(".grid button").nth(1).focus()
    page.keyboard.press("Enter")
    assert page.locator("#detail-title").inner_text() == "Image 2, Trouser"
    page.locator("#at").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#at").input_value() == str(int(page.locator("#at").get_attribute("max")) - 1)
    page.locator("#steps").fill("100")
    page.locator("#count").fill("100")
    page.locator("#draw").focus()
    page.keyboard.press("Enter")
    page.locator("#stop").focus()
    page.keyboard.press("Enter")
    page.locator("#status").filter(has_text="Stopped.").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1600])
def test_it_fits_and_everybody_can_use_it(chromium, address, width, scheme):
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(f"{address}/?classes=Bag&count=4&seed=1&steps=5&compare=1")
    finished(page)
    page.locator(".grid button").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    context.close()
