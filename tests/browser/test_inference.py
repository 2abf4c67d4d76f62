"""Scoring, sampling and checkpoints in the browser, compared with what the service says."""

import io
import zipfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from api.client import Client, Dataset, Job
from api.stack import Stack
from flowpp.data import encode_png
from tests.browser.pages import Open, colours, photograph, settled, violations
from worker.models import Checkpoint

pytestmark = pytest.mark.browser

DROP = """([place, files]) => {
    const data = new DataTransfer();
    for (const [name, bytes] of files) data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
    const options = { dataTransfer: data, bubbles: true, cancelable: true };
    for (const type of ["dragover", "drop"]) place.dispatchEvent(new DragEvent(type, options));
}"""
PIXELS = """(image) => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
}"""


def newest(client: Client, type: str) -> Job:
    return next(iter(client.jobs.list(type=type)))


def test_dropped_images_are_scored_with_a_map_of_each(
    open_page: Open, stack: Stack, client: Client, trained: Job, images: np.ndarray, tmp_path: Path
) -> None:
    page = open_page(stack.url, f"#/score?model={trained.id}")
    files = [[f"image {index}.png", list(encode_png(images[index]))] for index in (91, 0, 97)]
    drop = page.locator(".drop")
    drop.wait_for()
    page.evaluate(DROP, [drop.element_handle(), files])
    page.get_by_label("Leave out image 0.png").click()
    assert page.locator(".thumbnails li").count() == 2
    page.get_by_role("button", name="Score 2 images").click()
    page.locator(".scored li").nth(1).wait_for()

    job = newest(client, "likelihood")
    assert job.result is not None
    bits = [image["bits_per_dim"] for image in job.result["images"]]
    assert page.locator(".scored b").all_inner_texts() == [f"{each:.3f} bits/dim" for each in bits]
    client.jobs.download(job.id, "bits_map.npz", tmp_path / "map.npz")
    pixels = np.load(tmp_path / "map.npz")["bits"].sum(3)
    assert page.locator(".scale").inner_text().split() == [
        f"{pixels.min():.1f}",
        f"{pixels.max():.1f}",
        "bits",
        "a",
        "pixel",
    ]
    canvas = ".scored canvas >> nth=0"
    assert page.locator(canvas).evaluate("(canvas) => [canvas.width, canvas.height]") == [16, 16]
    drawn = np.array(page.locator(canvas).evaluate(PIXELS.replace("naturalW", "w").replace("naturalH", "h")))
    brightness = drawn.reshape(256, 4)[:, :3].sum(1)
    assert len(colours(page, canvas)) > 50
    order = pixels[0].ravel().argsort()
    assert (np.diff(brightness[order].astype(int)) >= -3).all(), "more bits are lighter"

    assert job.result["checkpoint"] in page.locator("main").inner_text()
    quantiles = httpx.get(f"{stack.url}/v1/checkpoints/{job.result['checkpoint']}", trust_env=False).json()
    assert page.locator(".mark").count() == 2
    places = page.locator(".scored small").filter(has_text="validation image").all_inner_texts()
    for place, each in zip(places, bits, strict=True):
        below = np.interp(each, quantiles["validation_quantiles"], np.arange(101))
        words = {0: "fewer bits than any", 100: "more bits than any"}.get(float(below), f"percentile {below:.0f}:")
        assert place.startswith(words)
    photograph(page, "score")
    assert violations(page) == []


def test_a_model_that_was_never_validated_has_no_distribution_and_says_so(
    open_page: Open, stack: Stack, unvalidated: Checkpoint
) -> None:
    page = open_page(stack.url, f"#/score?model={unvalidated.id}")
    image = {"name": "grey.png", "mimeType": "image/png", "buffer": encode_png(np.full((32, 32, 3), 99, np.uint8))}
    page.get_by_label("Images", exact=True).set_input_files(image)
    page.get_by_role("button", name="Score", exact=True).click()
    page.get_by_text("This checkpoint holds no distribution of its validation images").wait_for()
    assert page.locator(".scored canvas").count() == 1


def test_an_image_of_another_size_is_refused_in_words(open_page: Open, stack: Stack, trained: Job) -> None:
    page = open_page(stack.url, f"#/score?model={trained.id}", provoked=("status of 422",))
    wrong = {"name": "wrong.png", "mimeType": "image/png", "buffer": encode_png(np.zeros((8, 8, 3), np.uint8))}
    page.get_by_label("Images", exact=True).set_input_files(wrong)
    page.get_by_role("button", name="Score", exact=True).click()
    page.get_by_role("alert").filter(has_text="takes images that are").wait_for()


def test_arrays_are_read_as_numpy_has_written_them(open_page: Open, stack: Stack) -> None:
    page = open_page(stack.url)
    wanted = {
        "bits": np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32),
        "exact": np.array([[1e-300, np.pi]]),
        "pixels": np.arange(256, dtype=np.uint8),
        "names": np.array(["a.png", "größer 🌊.png", ""]),
    }
    read = """async (bytes) => {
        const { arrays } = await import("./dashboard/npz.js");
        const found = Object.entries(await arrays(new Uint8Array(bytes).buffer));
        return found.map(([name, { shape, data }]) => [name, shape, [...data]]);
    }"""
    for save in (np.savez, np.savez_compressed):
        save(content := io.BytesIO(), **wanted)
        found = {name: (shape, data) for name, shape, data in page.evaluate(read, list(content.getvalue()))}
        assert found == {name: (list(array.shape), array.ravel().tolist()) for name, array in wanted.items()}


def test_an_images_place_is_its_percentile_among_the_quantiles(open_page: Open, stack: Stack) -> None:
    scores = np.random.default_rng(0).normal(3, 0.5, 1000)
    quantiles = np.quantile(scores, np.linspace(0, 1, 101)).tolist()
    page = open_page(stack.url)
    of = "async ([quantiles, bits, f]) => (await import('./dashboard/distribution.js'))[f](quantiles, bits)"
    for part in (0.03, 0.5, 0.97):
        bits = float(np.quantile(scores, part))
        assert page.evaluate(of, [quantiles, bits, "share"]) == pytest.approx(part, abs=0.002)
    assert page.evaluate(of, [quantiles, 0.1, "place"]) == "fewer bits than any validation image"
    assert page.evaluate(of, [quantiles, 9, "place"]) == "more bits than any validation image"
    assert page.evaluate(of, [quantiles, quantiles[25], "place"]).startswith("percentile 25: more bits than 25 %")
    draw = """async ([quantiles, scored]) => {
        const { plot } = await import("./dashboard/distribution.js");
        const figure = plot(quantiles, scored);
        document.querySelector(".page").replaceChildren(figure);
        return [...figure.querySelectorAll(".mark line")].map((line) => Number(line.getAttribute("x1")));
    }"""
    left, right = page.evaluate(draw, [quantiles, [quantiles[10], quantiles[90]]])
    assert left < 320 < right
    photograph(page, "distribution")


def test_samples_are_drawn_at_a_temperature_from_a_seed(
    open_page: Open, stack: Stack, client: Client, trained: Job
) -> None:
    page = open_page(stack.url, f"#/sample?model={trained.id}")
    page.get_by_label("How many").fill("9")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Seed").fill("7")
    grids = []
    for _ in range(2):
        page.get_by_role("button", name="Draw").click()
        page.get_by_alt_text("9 samples").wait_for()
        job = newest(client, "sampling")
        wanted = {name: job.request[name] for name in ("num_samples", "temperature", "seed")}
        assert wanted == {"num_samples": 9, "temperature": 0.5, "seed": 7}
        grids.append(page.get_by_alt_text("9 samples").evaluate(PIXELS))
    assert len(grids[0]) == (3 * 16) ** 2 * 4
    assert grids[0] == grids[1], "the same seed draws the same images"
    photograph(page, "sample")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download samples.npz").click()
    assert np.load(download.value.path())["images"].shape == (9, 16, 16, 3)


def test_one_interpolates_between_two_images_of_a_dataset(
    open_page: Open, stack: Stack, client: Client, trained: Job, dataset: Dataset, images: np.ndarray
) -> None:
    page = open_page(stack.url, f"#/sample?model={trained.id}")
    page.get_by_label("the way between two images").check()
    page.get_by_label("Dataset", exact=True).select_option(dataset.id)
    page.get_by_role("button", name="Image 4", exact=True).click()  # the fourth on the sheet, which shows 64 of 100
    page.get_by_role("button", name="Image 98", exact=True).click()
    assert page.locator("[aria-pressed=true]").count() == 2
    page.get_by_label("Steps").fill("6")
    page.get_by_role("button", name="Draw").click()
    page.get_by_alt_text("Step 6 of 6 between the images 4 and 98").wait_for()
    assert newest(client, "sampling").request["between"] == {"dataset": dataset.id, "images": [4, 98]}
    for index, end in ((1, 4), (6, 98)):
        drawn = page.get_by_alt_text(f"Step {index} of 6 between the images 4 and 98").evaluate(PIXELS)
        assert np.array_equal(np.array(drawn).reshape(16, 16, 4)[..., :3], images[end]), "the ends are the images"
    tile = page.get_by_role("button", name="Image 98", exact=True).locator("canvas")
    shown = np.array(tile.evaluate(PIXELS.replace("naturalW", "w").replace("naturalH", "h"))).reshape(16, 16, 4)
    assert np.array_equal(shown[..., :3], images[98])
    photograph(settled(page), "interpolation")
    assert violations(page) == []


def test_checkpoints_are_downloaded_byte_for_byte(open_page: Open, stack: Stack, client: Client, trained: Job) -> None:
    assert trained.result is not None
    page = open_page(stack.url, "#/checkpoints")
    check_download(page, stack.url, trained.result["best_checkpoint"], {})
    photograph(page, "checkpoints")


def check_download(page: Any, url: str, checkpoint: str, headers: dict[str, str]) -> None:
    with page.expect_download() as download:
        page.locator(f"#save-{checkpoint}").click()
    assert download.value.suggested_filename == f"{checkpoint}.zip"
    content = Path(download.value.path()).read_bytes()
    assert content == httpx.get(f"{url}/v1/checkpoints/{checkpoint}/download", headers=headers, trust_env=False).content
    assert f"{checkpoint}/manifest.json" in zipfile.ZipFile(io.BytesIO(content)).namelist()
