# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The HTML reports in a real browser, opened from the disk: what a person does, and what is then to be seen."""

import functools
import http.server
import io
import json
import os
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from fixtures.pages import browser, scenes
from PIL import Image

from diffusers_diffdoctor.evaluation import ImagePairs, TreatmentRun, diagnose_images, draw_pairs, measure, render
from diffusers_diffdoctor.evaluation.report import Card, Gallery, Section, Table, View, encode, html_report
from diffusers_diffdoctor.images import to_image_tensor


SHOTS = os.environ.get("DIFFDOCTOR_SCREENSHOTS")  # folder for pictures of the pages, for people
EVIL = "<img src=x onerror=alert(1)>"
REDS = {"a": 51, "b": 255, "c": 0, "d": 204, f"{EVIL} #1?": 102, "deep/f": 153}


class Red(torch.nn.Module):
    """The confidence of a pixel is its red channel."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.config = SimpleNamespace(image_size=32)

    def confidence(self, images):
        return images[:, :1] * self.weight


@pytest.fixture(scope="module")
def context():
    with browser() as found:
        yield found


@pytest.fixture
def opened(context):
    """A function that opens a file from the disk in a page. What the browser complains of fails the test, but for `forgiven`; so
    does a request that leaves the disk."""
    pages, complaints, forgiven = [], [], []

    def open_file(path: Path, **media):
        page = context.new_page()
        pages.append(page)
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith(("file:", "data:")) or complaints.append(request.url)
        )
        page.emulate_media(**media)
        page.goto(path.absolute().as_uri())
        return page

    open_file.forgiven = forgiven
    yield open_file
    for page in pages:
        page.close()
    assert not [text for text in complaints if not any(word in text for word in forgiven)]


def shoot(page, name: str) -> None:
    if SHOTS:
        page.wait_for_timeout(300)
        page.screenshot(path=Path(SHOTS, f"{name}.png"))


@pytest.fixture(scope="module")
def diagnosis(context, tmp_path_factory):
    """Six images, one in a folder of its own, one with a hostile name, one that no browser shows; and two bad files."""
    top = tmp_path_factory.mktemp("diagnosis")
    for name, red in REDS.items():
        array = np.zeros((400, 600, 3), np.uint8)
        array[..., 1] = 120
        array[:200, :300, 0] = red
        path = top / "images" / f"{name}{'.tif' if name == 'd' else '.png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    for name in ("empty.png", "text.jpg"):
        (top / "images" / name).write_bytes(b"")
    diagnose_images([top / "images"], top / "out", Red(), detector_name="red", show_progress=False)
    return top / "out/report.html"


@pytest.fixture(scope="module")
def treatment(context, tmp_path_factory):
    """Eight pairs of plain colours, whose red is their confidence: green 0.6 before, and 0.2 after."""
    before, after = torch.zeros(2, 8, 3, 200, 300)
    for i, (old, new) in enumerate(
        zip([0.9, 0.8, 0.1, 0.7, 0.2, 0.3, 0.9, 0.6], [0.1, 0.7, 0.8, 0.2, 0.3, 0.1, 0.4, 0.9])
    ):
        before[i, 0], after[i, 0], before[i, 1], after[i, 1] = old, new, 0.6, 0.2
    prompts = [f"a {thing}" for thing in ("hand", "hand", "cup", "face", "cup", "dog", "face", EVIL)]
    pairs = ImagePairs(before, after, prompts, range(8), [prompt.split()[1].strip("<") for prompt in prompts])
    folder = tmp_path_factory.mktemp("treatment")
    figures = measure(pairs, {"judge": Red()}, show_progress=False)
    run = TreatmentRun(training_log=[{"step": step, "loss": 1 / step} for step in range(1, 9)])
    render(figures, draw_pairs(pairs, Red()), folder, run)
    return folder / "report.html"


def titles(page) -> list[str]:
    """Of the cards that are shown, in the order of the page."""
    return page.locator(".card:not([hidden]) .title").all_text_contents()


def pixel(locator, x: float, y: float) -> tuple[int, int, int]:
    """The colour at a share of an element's width and height, as the browser painted it."""
    with Image.open(io.BytesIO(locator.screenshot())) as image:
        return image.convert("RGB").getpixel((int(x * image.width), int(y * image.height)))


def wait_until(page, expression: str) -> None:
    """Ask again and again: a page's policy does not let Playwright's own way of waiting evaluate texts."""
    end = time.monotonic() + 30
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(50)


def slide(page, locator, value: int) -> None:
    locator.evaluate("(range, value) => { range.value = value; range.dispatchEvent(new Event('input')); }", value)


# --- finding -----------------------------------------------------------------------------------------------------------------


def test_cards_are_searched_filtered_and_sorted(diagnosis, opened):
    page = opened(diagnosis)
    worst = ["b.png", "d.tif", "f.png", f"{EVIL} #1?.png", "a.png", "c.png"]
    assert titles(page) == worst
    count = page.locator(".tools output")
    assert count.inner_text() == "6 of 6"
    search, (verdict, folder, order) = page.locator("input[type=search]"), page.locator(".tools select").all()
    search.fill("ONERROR img")  # words in any order and case
    assert titles(page) == [f"{EVIL} #1?.png"] and count.inner_text() == "1 of 6"
    search.fill("")
    assert verdict.locator("option").all_inner_texts() == ["all", "artifact (3)", "clean (3)"]
    verdict.select_option("clean")
    assert titles(page) == worst[3:]
    order.select_option(label="confidence, lowest first")
    assert titles(page) == worst[:2:-1]
    verdict.select_option("")
    order.select_option(label="by name")
    assert titles(page) == [f"{EVIL} #1?.png", "a.png", "b.png", "c.png", "d.tif", "f.png"]
    folder.select_option(label="deep (1)")
    assert titles(page) == ["f.png"] and count.inner_text() == "1 of 6"
    folder.select_option("")
    order.select_option(label="worst first")
    assert titles(page) == worst
    search.fill("no such thing")
    assert titles(page) == [] and count.inner_text() == "0 of 6"
    assert page.locator("img[src=x]").count() == 0


def test_columns_of_tables_are_sorted_as_numbers_or_as_texts(tmp_path, opened):
    rows = [
        ("ten", "10 %", "file 10"),
        ("none", "undefined", ""),
        ("half", "9.5 %", "file 9"),
        ("quarter", "9.25 %", "file 9b"),
        ("less", "-3 %", "File 1"),
    ]
    tables = [Section("One", table=Table(("name", "share", "text"), rows))]
    tables.append(Section("Two", table=Table(("", ""), [row[:2] for row in rows])))
    page = opened(html_report(tmp_path / "report.html", "Tables", sections=tables))
    first = page.locator("table").first

    def names():
        return first.locator("tbody td:first-child").all_inner_texts()

    first.get_by_role("button", name="share").click()
    assert names() == ["less", "quarter", "half", "ten", "none"]
    assert first.locator("th[aria-sort]").all_inner_texts() == ["share"]
    first.get_by_role("button", name="share").click()
    assert names() == ["ten", "half", "quarter", "less", "none"]
    assert first.locator("th[aria-sort=descending]").count() == 1
    first.get_by_role("button", name="text").focus()
    page.keyboard.press("Enter")
    assert names() == ["less", "half", "quarter", "ten", "none"]
    assert page.locator("table").nth(1).locator("button").count() == 0  # columns without a name


# --- looking closely ---------------------------------------------------------------------------------------------------------


def test_the_keyboard_is_enough(diagnosis, opened):
    page = opened(diagnosis)
    focused = "document.activeElement.closest('.card')?.querySelector('.title').textContent"
    dialog = page.locator("dialog")
    for key, title in (
        ("j", "b.png"),
        ("j", "d.tif"),
        ("ArrowRight", "f.png"),
        ("k", "d.tif"),
        ("ArrowLeft", "b.png"),
    ):
        page.keyboard.press(key)
        assert page.evaluate(focused) == title
    page.keyboard.press("k")  # no further than the first
    assert page.evaluate(focused) == "b.png" and dialog.is_hidden()
    page.keyboard.press("Enter")
    assert dialog.is_visible() and dialog.locator(".title").inner_text() == "b.png"
    page.keyboard.press("j")
    page.keyboard.press("ArrowRight")
    assert dialog.locator(".title").inner_text() == "f.png"
    page.keyboard.press("Escape")
    wait_until(page, f"{focused} === 'f.png'")
    assert dialog.is_hidden()
    page.keyboard.press("z")
    assert dialog.locator(".title").inner_text() == "f.png" and dialog.locator(".verdict").inner_text() == "artifact"
    page.keyboard.press("z")
    assert dialog.is_hidden()
    page.keyboard.press("/")
    page.keyboard.type("a.jzk/")  # letters, while one types
    assert page.locator("input[type=search]").input_value() == "a.jzk/" and titles(page) == []
    page.keyboard.press("Control+a")
    page.keyboard.type("a.png")
    page.keyboard.press("Enter")
    page.keyboard.press("j")
    assert page.evaluate(focused) == "a.png"


def test_zoom_shows_the_original_and_the_heatmap(diagnosis, opened):
    page = opened(diagnosis)
    page.locator(".card a").first.click()
    dialog = page.locator("dialog")
    images = dialog.locator("img")
    wait_until(page, "[...document.querySelectorAll('dialog img')].every((image) => image.naturalWidth)")
    assert images.evaluate_all("(all) => all.map((image) => image.naturalWidth)") == [600, 600]
    sources = images.evaluate_all("(all) => all.map((image) => image.src)")
    assert sources[0].endswith("/images/b.png") and "/out/overlays/" in sources[1]
    shoot(page, "diagnosis-zoom")
    for title, width in ((f"{EVIL} #1?.png", 600), ("d.tif", 320)):  # no browser shows TIFF: the thumbnail does
        page.keyboard.press("Escape")
        page.locator(".card", has_text=title).locator("a").first.click()
        wait_until(page, f"document.querySelector('dialog img').naturalWidth === {width}")
    pair, slider = dialog.locator(".pair"), dialog.locator("input[type=range]")
    slide(page, slider, 100)
    left = pixel(pair, 0.25, 0.25)
    assert abs(left[0] - REDS["d"]) < 12 and abs(left[1] - 120) < 12 and left[2] < 12  # the image
    slide(page, slider, 0)
    assert pixel(pair, 0.25, 0.25)[2] > 40  # the heat over it
    dialog.get_by_role("button", name="Next").click()
    assert dialog.locator(".title").inner_text() == "f.png"
    dialog.get_by_role("button", name="Close").click()
    assert dialog.is_hidden()


def test_pairs_of_a_treatment_are_compared_by_a_slider(treatment, opened):
    page = opened(treatment)
    card = page.locator(".card").first
    assert card.locator(".title").inner_text() == f"a {EVIL}"  # 0.6 -> 0.9
    assert "confidence 0.60 → 0.90, harm +0.3000" in card.inner_text()
    card.scroll_into_view_if_needed()
    wait_until(
        page, "[...document.querySelector('.card').querySelectorAll('img')].every((image) => image.naturalWidth)"
    )
    images, slider = card.locator(".pair").first, card.locator("input[type=range]")
    before, after = (round(0.6 * 255), round(0.6 * 255)), (round(0.9 * 255), round(0.2 * 255))

    def is_split_at(share):
        for x in (0.1, 0.4, 0.6, 0.9):
            wanted = before if x < share else after
            assert pixel(images, x, 0.7)[:2] == pytest.approx(wanted, abs=6), (share, x)

    is_split_at(0.5)
    for value in (0, 25, 75, 100):
        slide(page, slider, value)
        is_split_at(value / 100)
    slider.focus()
    page.keyboard.press("ArrowLeft")  # of the slider, not to another card
    assert slider.input_value() == "99" and page.locator("dialog").is_hidden()
    verdict, category, order = page.locator(".tools select").all()
    assert verdict.locator("option").all_inner_texts() == [
        "all",
        "both sound (2)",
        "both wrong (2)",
        "harmed (1)",
        "healed (3)",
    ]
    verdict.select_option("healed")
    assert titles(page) == ["a face", "a face", "a hand"]
    category.select_option("hand")
    assert titles(page) == ["a hand"]
    verdict.select_option("")
    category.select_option("")
    order.select_option(label="harm, highest first")
    assert titles(page)[:2] == ["a cup", f"a {EVIL}"]
    assert page.locator("img[src=x]").count() == 0


# --- what must hold whatever one does ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["diagnosis", "treatment"])
def test_without_scripts_everything_is_there(kind, context, request):
    path = request.getfixturevalue(kind)
    plain = context.browser.new_context(java_script_enabled=False, viewport={"width": 1280, "height": 900})
    try:
        page = plain.new_page()
        page.goto(path.as_uri())
        cards = page.locator(".card:visible")
        assert cards.count() == len(REDS if kind == "diagnosis" else range(8))
        assert page.locator(".tools:visible, dialog, input:visible").count() == 0
        cards.first.scroll_into_view_if_needed()
        boxes = [image.bounding_box() for image in cards.first.locator("img").all()]
        for one, two in zip(boxes[::2], boxes[1::2]):  # side by side
            assert one["x"] + one["width"] <= two["x"] and one["y"] == two["y"] and one["width"] > 50
        links = [link.get_attribute("href") for link in page.locator(".card a, .files a").all()]
        assert links and all((path.parent / unquote(link)).is_file() for link in links)
    finally:
        plain.close()


def test_no_other_script_or_style_runs(diagnosis, tmp_path, opened):
    """Not even where a text would have got into the page unescaped."""
    evil = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\"><b style='color: red'>"
    html = diagnosis.read_text(encoding="utf-8").replace("<h1>", f"{evil}<h1>", 1)
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    opened.forgiven += ["Content Security Policy", "Failed to load resource"]
    page = opened(tmp_path / "report.html")
    page.wait_for_timeout(200)
    assert page.title() == "Diagnosis" and titles(page)
    assert page.locator("b").first.evaluate("(b) => getComputedStyle(b).color") != "rgb(255, 0, 0)"


def test_pictures_are_shown_from_a_server_too(diagnosis, context):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Quiet, directory=str(diagnosis.parent.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = context.new_page()
        try:
            page.goto(f"http://127.0.0.1:{server.server_port}/out/report.html")
            page.locator(".card a").first.click()
            wait_until(page, "document.querySelector('.card img').naturalWidth === 320")
            wait_until(page, "document.querySelector('dialog img').naturalWidth === 600")
        finally:
            page.close()
            server.shutdown()


def test_five_thousand_images_open_at_once_and_load_when_they_are_looked_at(tmp_path, opened):
    count = 5000
    (tmp_path / "report_files").mkdir()
    picture = encode(Image.effect_noise((320, 320), 60).convert("RGB"))
    cards = []
    for i in range(count):
        (tmp_path / f"report_files/{i}.webp").write_bytes(picture)
        view = View("image", f"report_files/{i}.webp", (320, 320))
        cards.append(
            Card(
                f"image {i}.png",
                [view, view],
                (1 - i / count,),
                "artifact" if i % 3 else "clean",
                category=f"folder {i % 7}",
            )
        )
    path = html_report(
        tmp_path / "report.html",
        "Many",
        sections=[Section("Images", gallery=Gallery(cards, ["confidence"], "worst first"))],
    )
    loaded = (
        "[...document.querySelectorAll('.card img')].filter((image) => image.complete && image.naturalWidth).length"
    )
    began = time.monotonic()
    page = opened(path)
    opening = time.monotonic() - began
    wait_until(page, f"{loaded} > 4")
    page.wait_for_timeout(1000)
    at_first = page.evaluate(loaded)
    assert page.locator(".card").count() == count and at_first < 300
    times = page.evaluate(
        """() => {
            const timed = (action) => { const began = performance.now(); action(); document.body.offsetHeight; return performance.now() - began; };
            const search = document.querySelector("input[type=search]"), order = document.querySelector(".by-order select");
            const type = (text) => () => { search.value = text; search.dispatchEvent(new Event("input")); };
            const sort = (value) => () => { order.value = value; order.dispatchEvent(new Event("change")); };
            return { search: timed(type("image 49")), all: timed(type("")), sort: timed(sort("+0")) };
        }"""
    )
    assert page.locator(".card .title").first.inner_text() == f"image {count - 1}.png"
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    wait_until(page, "document.querySelector('.card:last-child img').naturalWidth > 0")
    assert page.evaluate(loaded) < 900
    print(
        json.dumps(
            {"opening_s": round(opening, 2), "loaded": at_first, "ms": {key: round(ms) for key, ms in times.items()}}
        )
    )
    assert opening < 30 and max(times.values()) < 5000  # a hundred times what it takes, for busy machines


def luminance(color: str) -> float:
    """Relative luminance (WCAG 2) of rgb(...)."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_can_be_read(scheme, diagnosis, treatment, opened):
    for name, path in (("diagnosis", diagnosis), ("treatment", treatment)):
        page = opened(path, color_scheme=scheme)
        paper = luminance(page.locator("body").evaluate("(body) => getComputedStyle(body).backgroundColor"))
        assert paper > 0.9 if scheme == "light" else paper < 0.02
        texts = "h1, .summary, .figure .label, .figure .value, nav a, th, td, .card .title, .card .note, .verdict, .tools label"
        found = page.locator(texts).evaluate_all(
            """(all) => all.map((element) => {
                let ground = element;
                while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
                return [element.className, getComputedStyle(element).color, getComputedStyle(ground).backgroundColor];
            })"""
        )
        assert len(found) > 30
        for kind, color, ground in found:
            bright, dim = sorted((luminance(color), luminance(ground)), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (kind, color, ground)  # WCAG AA
        shoot(page, f"{name}-{scheme}")
        page.locator(".gallery").evaluate("(gallery) => gallery.scrollIntoView()")
        shoot(page, f"{name}-{scheme}-gallery")


def test_pictures_for_people(tmp_path, opened):
    """Only where screenshots are asked for."""
    if not SHOTS:
        pytest.skip("set DIFFDOCTOR_SCREENSHOTS to a folder")
    from diffusers_diffdoctor import ArtifactDetectorForSemanticSegmentation
    from diffusers_diffdoctor.miniature import load

    detector = ArtifactDetectorForSemanticSegmentation.from_pretrained(load("detector"), dtype=torch.float32).eval()
    before, after = (torch.stack([to_image_tensor(image) for image, _ in scenes(24, first)]) for first in (0, 200))
    categories = [category for _, category in scenes(24)]
    pairs = ImagePairs(before, after, [f"a {category}" for category in categories], range(24), categories)
    render(measure(pairs, {"judge": detector}, show_progress=False), draw_pairs(pairs, detector), tmp_path)
    for scheme in ("light", "dark"):
        page = opened(tmp_path / "report.html", color_scheme=scheme)
        page.locator(".gallery").evaluate("(gallery) => gallery.scrollIntoView()")
        shoot(page, f"pairs-{scheme}")
        page.keyboard.press("j")
        page.keyboard.press("z")
        shoot(page, f"pairs-{scheme}-zoom")
