# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The pages in a real browser: what a person does, and what is in the files afterwards."""

import io
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.pages import browser, free_port, scenes, served, write_scenes
from PIL import Image

from diffdoctor import main
from diffusers_diffdoctor import ArtifactDetectorForSemanticSegmentation
from diffusers_diffdoctor.data import load_rows
from diffusers_diffdoctor.data.annotate import ANNOTATIONS, DONE, read_annotation
from diffusers_diffdoctor.images import to_image_tensor
from diffusers_diffdoctor.miniature import load


pytest.importorskip("gradio", reason="needs gradio: make test-ui")
SIZES = [(97, 61), (200, 333), (64, 64)]  # none of them anything that an editor would have rescaled to
SHOTS = os.environ.get("DIFFDOCTOR_SCREENSHOTS")  # folder for pictures of the pages, for people


def shoot(page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS, f"{name}.png"))


@pytest.fixture(scope="module")
def context():
    with browser() as found:
        yield found


def stroke(mask: np.ndarray, points: list[tuple[int, int]], width: int, value: int) -> None:
    """What a brush does, written apart from the page: pixels within half of `width` of a pixel of the way."""
    rows, columns = np.indices(mask.shape)
    for (x, y), (to_x, to_y) in zip(points, points[1:] or points):
        steps = max(abs(to_x - x), abs(to_y - y), 1)
        for step in range(steps + 1):
            # halves go up, as in the browser
            column, row = (int(np.floor(a + (b - a) * step / steps + 0.5)) for a, b in ((x, to_x), (y, to_y)))
            mask[4 * ((columns - column) ** 2 + (rows - row) ** 2) <= width**2] = value


def open_annotate(page, url: str, annotator: str | None = None):
    """The page for painting, within the application; returns its frame."""
    page.goto(url)
    frame = page.frame_locator("#painting iframe")
    if annotator:
        frame.locator("#annotator").fill(annotator)
        frame.locator("#who button").click()
    frame.locator("body[data-item]").wait_for()
    return frame


def paint(page, frame, points: list[tuple[int, int]]) -> None:
    """Drag over these pixels of the image."""
    box = frame.locator("#view").bounding_box()
    scale, left, top = frame.locator("#view").evaluate("() => [scale, left, top_]")
    places = [(box["x"] + left + (x + 0.5) * scale, box["y"] + top + (y + 0.5) * scale) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place)
    page.mouse.up()
    frame.locator("#status", has_text="saved").wait_for()


def set_range(frame, name: str, value: int) -> None:
    frame.locator(name).evaluate(
        "(range, value) => { range.value = value; range.dispatchEvent(new Event('input')); }", value
    )


def shown_mask(frame, size: tuple[int, int]) -> np.ndarray:
    values = frame.locator("#view").evaluate("() => [...mask]")
    return np.array(values, np.uint8).reshape(size[::-1])


def shown_color(frame, x: int, y: int) -> np.ndarray:
    """What the screen has in the middle of a pixel of the image."""
    values = frame.locator("#canvas").evaluate(
        """(canvas, [x, y]) => {
            const ratio = devicePixelRatio, [column, row] = [left + (x + 0.5) * scale, top_ + (y + 0.5) * scale];
            return [...canvas.getContext("2d").getImageData(ratio * column, ratio * row, 1, 1).data];
        }""",
        [x, y],
    )
    assert values[3] == 255
    return np.array(values[:3])


def on_disk(folder: Path, key: str, annotator: str) -> np.ndarray:
    with Image.open(folder / ANNOTATIONS / key / f"{annotator}.png") as image:
        return np.array(image)


def test_a_painted_mask_outlives_a_reload_and_a_killed_server_and_is_in_the_dataset_exactly(tmp_path, context):
    dataset, queue, out = tmp_path / "dataset", tmp_path / "queue", tmp_path / "out"
    write_scenes(dataset, SIZES)
    arguments = ["--annotate", f"{dataset}:hard", "--queue", str(queue)]
    page, port = context.new_page(), free_port()
    expected = {}
    with served(arguments, port) as server:
        frame = open_annotate(page, server.url, "Anna")
        key = frame.locator("body").get_attribute("data-item")
        mask = np.zeros(SIZES[0][::-1], np.uint8)
        set_range(frame, "#size", 9)
        for tool, value, points in (
            ("Brush", 255, [(20, 20), (60, 41), (60, 10)]),
            ("Not sure", 128, [(0, 60), (30, 50)]),  # to the border of the image
            ("Eraser", 0, [(40, 30)]),
        ):
            frame.get_by_role("button", name=tool).click()
            paint(page, frame, points)
            stroke(mask, points, 9, value)
        assert np.array_equal(shown_mask(frame, SIZES[0]), mask)
        assert np.array_equal(on_disk(queue, key, "anna"), mask)
        shoot(page, "annotate")

        # opacity is for the eye alone
        image = scenes(1, 0, SIZES[0])[0][0].astype(int)
        for opacity in (0, 30, 100):
            set_range(frame, "#opacity", opacity)
            for (x, y), color in (((21, 20), (214, 51, 132)), ((10, 57), (240, 173, 40)), ((90, 5), None)):
                wanted = (
                    image[y, x] if color is None else image[y, x] + (np.array(color) - image[y, x]) * opacity / 100
                )
                assert np.abs(shown_color(frame, x, y) - wanted).max() <= 2
        assert np.array_equal(shown_mask(frame, SIZES[0]), mask)
        assert np.array_equal(on_disk(queue, key, "anna"), mask)

        page.reload()
        frame.locator("body[data-item]").wait_for()
        assert frame.locator("body").get_attribute("data-item") == key
        assert np.array_equal(shown_mask(frame, SIZES[0]), mask)
        set_range(frame, "#size", 9)
        frame.get_by_role("button", name="Brush").click()
        paint(page, frame, [(80, 50)])
        stroke(mask, [(80, 50)], 9, 255)
        server.kill()
    expected[key] = mask

    with served(arguments, port) as server:
        frame = open_annotate(page, server.url)
        assert frame.locator("body").get_attribute("data-item") == key
        assert np.array_equal(shown_mask(frame, SIZES[0]), mask)

        # undo and redo by keys
        set_range(frame, "#size", 9)
        paint(page, frame, [(5, 5)])
        page.keyboard.press("Control+z")
        frame.locator("#status", has_text="saved").wait_for()
        assert np.array_equal(shown_mask(frame, SIZES[0]), mask)
        page.keyboard.press("Control+y")
        stroke(mask, [(5, 5)], 9, 255)
        assert np.array_equal(shown_mask(frame, SIZES[0]), mask)
        frame.get_by_label("face").check()
        page.wait_for_timeout(100)
        frame.get_by_role("button", name="Done, next").click()

        frame.locator(f"body:not([data-item='{key}'])").wait_for()
        second = frame.locator("body").get_attribute("data-item")

        # back to it: it stays finished, whatever is painted, and is still there after a reload
        page.keyboard.press("p")
        frame.locator(f"body[data-item='{key}']").wait_for()
        assert np.array_equal(shown_mask(frame, SIZES[0]), mask) and frame.get_by_label("face").is_checked()
        paint(page, frame, [(85, 8), (90, 12)])
        stroke(mask, [(85, 8), (90, 12)], 9, 255)
        amended = read_annotation(queue / ANNOTATIONS / key / "anna.png")
        assert np.array_equal(amended.mask, mask) and amended.state == DONE
        page.reload()
        frame.locator(f"body[data-item='{key}']").wait_for()
        frame.locator("#view").focus()
        page.keyboard.press("Enter")
        frame.locator(f"body[data-item='{second}']").wait_for()
        set_range(frame, "#size", 9)
        frame.locator("#view").click(position={"x": 3, "y": 3})  # beside the image: paints nothing
        frame.get_by_role("button", name="Fit").click()
        for _ in range(3):
            page.keyboard.press("+")
        paint(page, frame, [(100, 150), (110, 170)])
        mask = np.zeros(SIZES[1][::-1], np.uint8)
        stroke(mask, [(100, 150), (110, 170)], 9, 255)
        expected[second] = mask
        assert np.array_equal(shown_mask(frame, SIZES[1]), mask)
        page.keyboard.press("Enter")

        frame.locator(f"body:not([data-item='{second}'])").wait_for()
        expected[frame.locator("body").get_attribute("data-item")] = np.zeros(SIZES[2][::-1], np.uint8)
        page.keyboard.press("n")
        frame.locator("#message", has_text="Nothing is left").wait_for()
        assert frame.locator("#progress").inner_text() == "3 of 3 masks, 3 yours"
    page.close()

    assert main(["data", "annotate", f"{dataset}:hard", "--queue", str(queue), "--output", str(out)]) == 0
    rows = load_rows(out)
    assert len(rows) == 3 and set(rows["source"]) == {"human"}
    for row, wanted in zip(rows, expected.values()):
        assert np.array_equal(np.array(row["artifact_map"]), np.where(wanted == 255, 255, 0))
        ignored = np.zeros_like(wanted) if row["ignore_map"] is None else np.array(row["ignore_map"])
        assert np.array_equal(ignored, np.where(wanted == 128, 255, 0))


def shown_pair(page, folder: Path, name: str) -> bool:
    """Wait until Compare shows the pair of this name; whether its two images are those of the files."""
    page.locator("strong", has_text=name).wait_for()
    wanted = [np.array(Image.open(folder / side / f"{name}.png")) for side in ("before", "after")]
    for _ in range(50):  # the images come after the name
        sources = page.locator("#slider img").evaluate_all("(images) => images.map((image) => image.src)")
        found = [np.array(Image.open(io.BytesIO(page.request.get(one).body())).convert("RGB")) for one in sources]
        if len(found) == 2 and all(any(np.array_equal(one, other) for other in found) for one in wanted):
            return True
        page.wait_for_timeout(100)
    return False


def test_images_are_dropped_and_compared(tmp_path, context):
    """On the pages for looking, with the bundled detector; what can be downloaded is what it says."""
    for number, ((image, category), (other, _)) in enumerate(zip(scenes(4), scenes(4, 100))):
        for side, array in (("before", image), ("after", other)):
            path = tmp_path / side / category / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    before, dropped = (sorted((tmp_path / side).rglob("*.png")) for side in ("before", "after"))
    (tmp_path / "broken.png").write_bytes(b"no image")
    detector = ArtifactDetectorForSemanticSegmentation.from_pretrained(load("detector"), dtype=torch.float32).eval()
    page = context.new_page()
    folders = ["--before", str(tmp_path / "before"), "--after", str(tmp_path / "after")]
    with served(["--detector", "miniature", *folders]) as server:
        page.goto(server.url)
        page.locator("#drop input[type=file]").set_input_files([*dropped, tmp_path / "broken.png"])
        page.get_by_text("broken.png:").wait_for()  # said, and the others are shown
        page.locator("#figures:enabled").or_(page.locator("#figures a")).first.wait_for()
        for threshold in (0.5, 1.0):
            number = page.locator("#threshold input[type=number]")
            number.fill(str(threshold))
            number.press("Enter")
            number.blur()
            page.wait_for_timeout(1500)
            with page.expect_download() as download:
                page.locator("#figures").click()
            told = json.loads(Path(download.value.path()).read_text())
            assert told["threshold"] == threshold and [one["image"] for one in told["images"]] == [
                f.name for f in dropped
            ]
            if threshold == 0.5:
                shoot(page, "diagnose")
                assert 0 < sum(one["artifact"] for one in told["images"]) < len(dropped)
            with page.expect_download() as download:
                page.locator("#maps").click()
            with zipfile.ZipFile(download.value.path()) as archive:
                for file, one in zip(dropped, told["images"]):
                    with torch.no_grad():
                        confidence = detector.confidence(to_image_tensor(file)[None])[0, 0]
                    found = np.array(Image.open(io.BytesIO(archive.read(one["map"]))))
                    assert np.abs(found - 255 * confidence.numpy()).max() < 1
                    assert one["artifact"] == bool((found >= round(255 * threshold)).any())

        page.get_by_role("tab", name="Compare").click()
        page.locator("#measure").click()
        page.get_by_text("4 pairs:").wait_for()
        page.locator("#slider img").first.wait_for()
        page.wait_for_timeout(1000)
        shoot(page, "compare")
        harms = [float(text) for text in re.findall(r"[+-]\d\.\d{4}", page.locator("#pairs").inner_text())]
        assert len(harms) >= 4 and harms == sorted(harms, reverse=True)

        # a row that is clicked is shown, of all categories or of one
        names = sorted(path.relative_to(tmp_path / "before").with_suffix("").as_posix() for path in before)
        ranked = sorted(names, key=page.locator("#pairs").inner_text().index)
        assert shown_pair(page, tmp_path, ranked[0])
        page.locator("#pairs").get_by_text(ranked[2], exact=True).first.click()
        assert shown_pair(page, tmp_path, ranked[2])
        chosen = ranked[-1].rpartition("/")[0]
        mine = [name for name in ranked if name.startswith(f"{chosen}/")]
        assert len(mine) < len(ranked)
        page.locator("#category input").click()
        page.get_by_role("option", name=chosen, exact=True).click()
        page.get_by_text(f"{len(mine)} pairs:").wait_for()
        assert shown_pair(page, tmp_path, mine[0])
        assert [name for name in ranked if name in page.locator("#pairs").inner_text()] == mine
        page.locator("#pairs").get_by_text(mine[-1], exact=True).first.click()
        assert shown_pair(page, tmp_path, mine[-1])
    page.close()
