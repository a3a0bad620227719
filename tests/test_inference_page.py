"""The page to draw on, in a real browser: its probabilities, what it makes of drawings and pictures, its manners."""

import base64
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import ARCHITECTURES, CONF, said, wait_until
from PIL import Image
from torch import nn

from mnist_cnn.data.datasets import load
from mnist_cnn.inference.page import folded, page, write_page
from mnist_cnn.models.checkpoint import FORMAT, Description, save_weights
from mnist_cnn.models.convnet import ConvNet
from mnist_cnn.pictures.digit_image import mnist_form

BROWSER = os.environ.get("MNIST_CNN_BROWSER")  # required: no test is skipped; all: on every test digit too
EVERYTHING = {  # that no shipped architecture has
    "blocks": [
        {"filters": 5, "kernel": 4, "stride": 2, "padding": 1, "batch_norm": "after", "activation": "silu", "pool": 2},
        {"filters": 6, "kernel": 3, "padding": 1, "separable": True, "residual": True, "activation": "leaky_relu"},
        {"filters": 7, "kernel": 3, "stride": 2, "separable": True, "batch_norm": True, "activation": "sigmoid"},
    ],
    "dense": [{"units": 9, "activation": "gelu", "dropout": 0.5}, 8],
}
STROKES = {  # lines through points of a square, as a hand draws them
    0: [[(50, 14), (30, 24), (24, 50), (30, 76), (50, 86), (70, 76), (76, 50), (70, 24), (50, 14)]],
    1: [[(50, 12), (50, 88)]],
    2: [[(26, 30), (36, 16), (56, 14), (70, 28), (66, 44), (44, 66), (26, 84), (76, 84)]],
    3: [[(28, 22), (46, 13), (66, 24), (62, 42), (46, 48), (64, 54), (70, 70), (52, 86), (28, 78)]],
    4: [[(34, 14), (28, 54), (74, 54)], [(64, 16), (62, 88)]],
    5: [[(70, 14), (34, 14), (30, 44), (52, 40), (70, 52), (68, 74), (50, 86), (28, 78)]],
    6: [[(62, 12), (40, 30), (28, 58), (34, 82), (54, 88), (70, 74), (62, 56), (44, 54), (30, 66)]],
    7: [[(24, 16), (76, 16), (56, 50), (44, 88)]],
    8: [[(66, 24), (50, 13), (34, 24), (40, 40), (62, 58), (68, 74), (50, 87), (32, 74), (38, 58), (60, 40), (66, 24)]],
    9: [[(68, 30), (52, 14), (34, 26), (38, 46), (58, 48), (68, 32), (66, 60), (58, 88)]],
}


@pytest.fixture(scope="module")
def browser():
    """Chromium; the tests are skipped without it, and fail where MNIST_CNN_BROWSER is set."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        program = None
    if program is None:
        (pytest.fail if BROWSER else pytest.skip)("no chromium or playwright: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """Open a page in a window of its own; whatever it says on the console or asks of a network is an error."""
    contexts, heard = [], []

    def open_page(path, **options):
        contexts.append(browser.new_context(viewport={"width": 1200, "height": 900}, **options))
        window = contexts[-1].new_page()
        window.on("console", lambda message: heard.append(message.text))
        window.on("pageerror", lambda error: heard.append(str(error)))
        window.on("request", lambda request: request.url == path.as_uri() or heard.append(request.url))
        window.goto(path.as_uri())
        settle(window)
        return window

    yield open_page
    for context in contexts:
        context.close()
    assert heard == []


@pytest.fixture(scope="module")
def digits_page(tmp_path_factory):
    """The page of the packaged network."""
    path = tmp_path_factory.mktemp("page") / "digits.html"
    write_page("pretrained", path)
    return path


def settle(window):
    """Let the page draw what it has been given."""
    window.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def points(window, stroke):
    box = window.locator("#paper").bounding_box()
    return [(box["x"] + x / 100 * box["width"], box["y"] + y / 100 * box["height"]) for x, y in stroke]


def draw(window, strokes):
    for stroke in strokes:
        first, *rest = points(window, stroke)
        window.mouse.move(*first)
        window.mouse.down()
        for point in rest:
            window.mouse.move(*point, steps=3)
        window.mouse.up()
    settle(window)


def wait_for(window, condition):
    wait_until(lambda: window.evaluate(condition))  # playwright's own waiting evaluates text, which the policy forbids


def text(window, selector):
    return window.locator(selector).inner_text()


def described(network, **more):
    data = {"name": "mnist", "validation": 0, "validation_from": "last", "normalization": "unit", "seed": 0}
    classes = [str(number) for number in range(network.logits.out_features)]
    about = {"format": FORMAT, "architecture": network.specification.model_dump(), "versions": {}}
    return Description.model_validate({**about, "classes": classes, "data": data, **more})


def random_network(specification, classes=10):
    """One whose batch norms do something."""
    torch.manual_seed(0)
    network = ConvNet(specification, classes, mean=33.0, std=78.0).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return network


# --- the network ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ARCHITECTURES, "robust", "everything"])
def test_probabilities_are_the_checkpoints(opened, tmp_path, mnist_root, name):
    recipe = "experiment/robust" if name == "robust" else f"architecture/{name}"
    found = EVERYTHING if name == "everything" else yaml.safe_load((CONF / f"{recipe}.yaml").read_text())
    network = random_network(found.get("architecture", found))
    description = described(network, temperature=0.3)
    (tmp_path / "x.html").write_text(page(folded(network, half=False), description, half=False))
    assert name != "robust" or (tmp_path / "x.html").stat().st_size < 2_000_000
    window = opened(tmp_path / "x.html")
    digits = load("mnist", mnist_root).test.images[: None if BROWSER == "all" else 200]
    for batch in digits.split(1000):
        with torch.inference_mode():
            expected = (network(batch) / description.temperature).softmax(1).numpy()
        shown = window.evaluate(
            """(text) => {
              const pixels = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
              return Array.from({ length: pixels.length / 784 }, (_, i) =>
                [...forward(network, pixels.subarray(784 * i, 784 * (i + 1))).probabilities]);
            }""",
            base64.b64encode(batch.numpy().tobytes()).decode(),
        )
        np.testing.assert_allclose(shown, expected, atol=1e-4)
    assert expected.std() > 0.01  # that they are not all the same


# --- drawing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digit", STROKES)
def test_a_digit_drawn_with_the_mouse_is_recognised(opened, digits_page, digit):
    window = opened(digits_page)
    assert text(window, "#answer") == "Draw a digit"
    draw(window, STROKES[digit])
    assert text(window, "#answer") == str(digit)
    assert text(window, "#bars .best").split()[0] == str(digit)


def assert_form_is_pythons(window):
    drawn, form = window.evaluate("[[...drawing()].join(), [...mnistForm(drawing())]]")  # many numbers take long
    expected = mnist_form(np.array(drawn.split(","), np.uint8).reshape(192, 192))
    difference = np.abs(np.array(form).reshape(28, 28) - expected.astype(int))
    assert (difference <= 2).mean() >= 0.99


def test_a_drawing_becomes_what_python_makes_of_it(opened, digits_page):
    """Thin and thick, small and large, in the middle and along the edge, with a stroke taken back."""
    window = opened(digits_page)
    generator = np.random.default_rng(1)
    for number in range(12):
        window.locator("#stroke").fill(str([6, 9, 14, 24][number % 4]))
        scale, (x, y) = generator.uniform(0.2, 1), generator.uniform(0, 1, 2)
        draw(window, [[(a * scale + 100 * x * (1 - scale), b * scale + 100 * y * (1 - scale)) for a, b in s]
                      for s in STROKES[number % 10]])  # fmt: skip
        if number < 4:  # in a frame, which is no part of the digit
            window.locator("#clear").click()
            draw(window, [[(0.6 * a + 20, 0.6 * b + 20) for a, b in s] for s in STROKES[number]])
            window.locator("#stroke").fill("6")
            draw(window, [[(8, 8), (92, 8), (92, 92), (8, 92), (8, 8)]])
        if number % 3 == 0:
            draw(window, [[(2, 50), (98, 50)]])
            window.keyboard.press("Control+z")
        assert_form_is_pythons(window)
        window.locator("#clear").click()


def test_fingers_keys_undo_clear_themes_and_sizes(opened, digits_page):
    window = opened(digits_page, has_touch=True)
    touch = window.context.new_cdp_session(window)
    first, *rest = points(window, STROKES[7][0])
    for kind, at in [("touchStart", first), *(("touchMove", each) for each in rest), ("touchEnd", None)]:
        places = [{"x": at[0], "y": at[1]}] if at else []
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})
    settle(window)
    assert text(window, "#answer") == "7"
    wait_for(window, "document.getElementById('spoken').textContent.startsWith('7 ')")
    window.set_viewport_size({"width": 390, "height": 800})
    settle(window)
    assert text(window, "#answer") == "7"
    assert window.evaluate("document.documentElement.scrollWidth") <= 390
    draw(window, [[(2, 2), (3, 3)]])
    window.keyboard.press("Control+z")
    settle(window)
    assert text(window, "#answer") == "7"
    window.locator("#clear").click()
    settle(window)
    assert text(window, "#answer") == "Draw a digit"
    assert window.locator("#undo").is_disabled()
    window.locator("#paper").focus()
    window.keyboard.press(" ")
    for _ in range(15):
        window.keyboard.press("ArrowDown")
    window.keyboard.press(" ")
    settle(window)
    assert text(window, "#answer") == "1"
    before = window.evaluate("getComputedStyle(document.body).backgroundColor")
    window.locator("#theme").click()
    assert window.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_layers_are_shown_and_enlarged(opened, digits_page):
    window = opened(digits_page)
    draw(window, STROKES[3])
    for maps in window.locator(".maps").all():
        maps.hover(position={"x": 5, "y": 5})
        assert "1 of " in text(window, "#lens figcaption")
        assert "Its " in text(window, "#lens figcaption")
        maps.focus()
        window.keyboard.press("ArrowRight")
        assert "2 of " in text(window, "#lens figcaption")
    maps.blur()
    assert not window.locator("#lens").is_visible()


def test_a_map_in_the_page_is_pythons(opened, tmp_path):
    network = random_network(EVERYTHING)
    (tmp_path / "x.html").write_text(page(folded(network, half=False), described(network), half=False))
    window = opened(tmp_path / "x.html")
    image = torch.randint(0, 256, (1, 1, 28, 28), dtype=torch.uint8)
    shown = window.evaluate(
        "(digit) => forward(network, digit).maps.map((map) => [...map.data])", image.flatten().tolist()
    )
    for block, expected in enumerate(network.feature_maps(image)):
        np.testing.assert_allclose(shown[block], expected.flatten(), atol=1e-4)
    effective = network.blocks[1][0].layers  # a separable convolution: what its two halves are together
    expected = effective[0][1].weight[3, :, 0, 0, None] * effective[0][0].weight.flatten(1)
    np.testing.assert_allclose(window.evaluate("[...kernel(1, 3).values]"), expected.detach().flatten(), atol=1e-6)


@pytest.mark.parametrize("way", ["drop", "paste", "file"])
def test_a_picture_is_taken(opened, digits_page, tmp_path, way):
    window = opened(digits_page)
    draw(window, STROKES[7])
    strokes = window.evaluate("[...drawing()]")
    page_of_paper = 235 - np.array(strokes).reshape(192, 192, 1) * [0.8, 0.7, 0.3]  # blue ink on grey
    Image.fromarray(page_of_paper.astype(np.uint8)).save(tmp_path / "seven.png")
    window.locator("#clear").click()
    if way == "file":
        window.locator("#file").set_input_files(tmp_path / "seven.png")
    else:
        window.evaluate(
            """([way, text]) => {
              const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
              const data = new DataTransfer();
              data.items.add(new File([bytes], "seven.png", { type: "image/png" }));
              const more = { bubbles: true, cancelable: true };
              document.body.dispatchEvent(way === "drop" ? new DragEvent("drop", { ...more, dataTransfer: data })
                : new ClipboardEvent("paste", { ...more, clipboardData: data }));
            }""",
            [way, base64.b64encode((tmp_path / "seven.png").read_bytes()).decode()],
        )
    wait_for(window, "document.getElementById('answer').textContent === '7'")
    assert_form_is_pythons(window)
    Image.new("L", (300, 200), 200).save(tmp_path / "blank.png")
    window.locator("#file").set_input_files(tmp_path / "blank.png")
    wait_for(window, "document.getElementById('answer').textContent.includes('no digit')")
    (tmp_path / "text.png").write_text("no picture")
    window.locator("#file").set_input_files(tmp_path / "text.png")
    wait_for(window, "document.getElementById('answer').textContent.includes('not a picture')")


# --- other classes, and the page's manners -----------------------------------------------------------------------


def test_other_classes_whose_names_stay_text(opened, tmp_path):
    names = ["<script>alert(1)</script>", "</script><b>", "[page.js]", "T-shirt/top"]
    network = random_network({"blocks": [], "dense": []}, len(names))
    data = described(network).data.model_dump() | {"name": "fashion_mnist"}
    save_weights(tmp_path / "x.ckpt", described(network, classes=names, data=data), network)
    write_page(str(tmp_path / "x.ckpt"), tmp_path / "x.html")
    window = opened(tmp_path / "x.html")
    assert text(window, "#answer") == "Draw one of 4 classes"
    assert [row.inner_text() for row in window.locator("#bars .name").all()] == names
    assert window.locator("b, script:not(head script)").count() == 4
    # 28×28 pixels are what a network of other things than digits sees, as they are.
    shirt = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    Image.fromarray(shirt).save(tmp_path / "shirt.png")
    window.locator("#file").set_input_files(tmp_path / "shirt.png")
    wait_for(window, "marks.length")
    assert window.evaluate("[...marks[0].digit]") == shirt.flatten().tolist()


@pytest.mark.parametrize("width", [390, 1200])
def test_the_bars_of_many_classes_fit(opened, tmp_path, width):
    names = [f"class number {number}, with a nameverylongandwithoutspaces" for number in range(47)]
    network = random_network({"blocks": [], "dense": []}, len(names))
    (tmp_path / "x.html").write_text(page(folded(network, half=False), described(network, classes=names), half=False))
    window = opened(tmp_path / "x.html")
    window.set_viewport_size({"width": width, "height": 800})
    assert window.evaluate("document.documentElement.scrollWidth") <= width
    assert all(track.bounding_box()["width"] > 40 for track in window.locator("#bars .track").all())
    assert not window.locator("#layers").is_visible()  # there are none


def test_an_unsure_network_says_so(opened, tmp_path):
    network = random_network({"blocks": [], "dense": []})
    nn.init.zeros_(network.logits.weight)
    save_weights(tmp_path / "x.ckpt", described(network, unsure_below=0.11), network)
    write_page(str(tmp_path / "x.ckpt"), tmp_path / "x.html")
    window = opened(tmp_path / "x.html")
    draw(window, STROKES[3])
    assert text(window, "#answer") == "Not sure"
    assert text(window, "#confidence") == "perhaps 0 (10.0 %) or 1 (10.0 %)"


def test_the_policy_forbids_every_request(browser, digits_page):
    window = browser.new_page()
    window.goto(digits_page.as_uri())
    refused = window.evaluate(
        """async () => {
          const found = [];
          document.addEventListener("securitypolicyviolation", (event) => found.push(event.effectiveDirective));
          await fetch("http://127.0.0.1:9/").catch(() => {});
          document.body.append(Object.assign(document.createElement("script"), { textContent: "window.ran = 1" }));
          document.body.append(Object.assign(document.createElement("img"), { src: "http://127.0.0.1:9/x.png" }));
          await new Promise((done) => setTimeout(done, 200));
          return [window.ran ?? 0, ...found.sort()];
        }"""
    )
    window.close()
    assert refused == [0, "connect-src", "img-src", "script-src-elem"]


# --- the commands ------------------------------------------------------------------------------------------------


def test_mnist_draw_opens_the_page(run, trained, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or len(opened) == 1)
    first, second = (run("mnist-draw", f"checkpoint={trained}") for _ in range(2))
    assert first.status == second.status == 0
    assert "no browser" not in first.out
    file, advice = second.out.splitlines()
    assert opened[1] == "file://" + file.partition(",")[0]
    assert advice == "there is no browser here: open that file in one"


def test_mnist_export_writes_the_page(run, trained, tmp_path):
    assert run("mnist-export", f"checkpoint={trained}", "output=new/x.html").status == 0
    assert "<!doctype html>" in (tmp_path / "new" / "x.html").read_text()


def test_a_layer_of_ones_own_is_refused(run, tmp_path, monkeypatch):
    (tmp_path / "page_layers.py").write_text(
        "import torch\n\n\nclass Square(torch.nn.Module):\n    forward = torch.square\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    network = random_network({"blocks": [], "dense": [4], "activation": {"_target_": "page_layers.Square"}})
    save_weights(tmp_path / "x.ckpt", described(network), network)
    for words in (["mnist-draw"], ["mnist-export", "output=x.html", "modules=[page_layers]"]):
        said(run(*words, "checkpoint=x.ckpt"), "layers of your own (page_layers)", "which no page can compute")
    assert not (tmp_path / "x.html").exists()
