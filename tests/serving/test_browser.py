"""The pages in a real browser: Debian's chromium and its driver. ``make server-test`` runs these."""

import dataclasses
import io
import threading
import time

import pytest
import uvicorn
from PIL import Image

from dalle_pytorch.data.npm import Package, fetch_packages
from dalle_pytorch.models.clip import CLIP
from dalle_pytorch.serving.app import make_app
from dalle_pytorch.serving.config import LimitsConfig, ServeConfig
from dalle_pytorch.text import BPETokenizer

from .conftest import Squares, wait_for

webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
pytestmark = pytest.mark.browser
EVIL = '<img src=x onerror="window.hurt=1"> & <b>bold</b>'
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1000,900",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture
def open_browser(tmp_path):
    """Start a browser, as somebody with a profile of their own; none may have logged anything in the end."""
    drivers = []

    def start(name: str = "one"):
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for flag in (*FLAGS, f"--user-data-dir={tmp_path / name}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        drivers.append(driver)
        return driver

    yield start
    logs = [driver.get_log("browser") for driver in drivers]
    for driver in drivers:
        driver.quit()
    assert logs == [[]] * len(drivers)


@pytest.fixture
def browser(open_browser):
    return open_browser()


def as_phone(browser) -> None:
    """A window of 390 x 844 with touch."""
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@pytest.fixture
def run(tmp_path, tiny_vae):
    """Start a server on a library that stays; gives its address and how to end it."""
    servers = []

    def start(engine, **limits):
        config = ServeConfig(library=str(tmp_path / "library"), limits=LimitsConfig(**limits))
        app = make_app(config, lambda: engine)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        wait_for(lambda: server.started and app.state.hub.engine is not None)

        def stop():
            server.should_exit = True
            thread.join(10)

        servers.append(stop)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", stop

    yield start
    for stop in servers:
        stop()


def find(browser, selector: str):
    """The first element of a selector, once it is shown."""

    def shown():
        return next((e for e in browser.find_elements("css selector", selector) if e.is_displayed()), None)

    return wait_for(shown)


def loaded(browser, selector: str, count: int):
    """Images of a selector, once so many have arrived."""
    script = f"return [...document.querySelectorAll('{selector}')].filter(i => i.naturalWidth > 0).length"
    wait_for(lambda: browser.execute_script(script) == count)
    return browser.find_elements("css selector", selector)


def test_a_prompt_becomes_images_and_the_library_keeps_them(browser, run, tiny_vae):
    """Progress, previews, the ranked grid; a prompt is text; after a restart the library has the images."""
    engine = Squares(tiny_vae, seconds=12.0, steps=48)
    url, stop = run(engine)
    browser.get(url)
    find(browser, "#prompt").send_keys(EVIL + "\n")
    find(browser, ".job progress")
    loaded(browser, ".job .preview", 1)
    assert len(loaded(browser, ".job .grid img", 8)) == 8
    assert find(browser, ".job h2").text == EVIL
    assert "done" in find(browser, ".job .status").text
    assert browser.execute_script("return window.hurt") is None
    engine.seconds = 0.0
    find(browser, ".job .redraw").click()
    wait_for(lambda: len(browser.find_elements("css selector", ".job")) == 2)
    loaded(browser, ".job:first-child .grid img", 1)
    stop()

    url, _ = run(Squares(tiny_vae))
    browser.get(f"{url}/#library")
    assert len(loaded(browser, "#images img", 9)) == 9
    find(browser, "#search").send_keys("nothing like it\n")
    find(browser, "#no-images")


def test_what_runs_can_be_canceled_and_errors_are_shown(browser, run, tiny_vae):
    engine = Squares(tiny_vae)
    engine.may_go_on.clear()
    url, _ = run(engine)
    browser.get(url)
    find(browser, "#prompt").send_keys("slow\n")
    find(browser, ".job .cancel").click()
    time.sleep(1)
    engine.may_go_on.set()
    wait_for(lambda: "canceled" in find(browser, ".job .status").text)


def test_an_image_goes_through_the_codec(browser, run, tiny_vae, tmp_path):
    file = tmp_path / "picture.png"
    content = io.BytesIO()
    Image.new("RGB", (40, 30), "orange").save(content, "PNG")
    file.write_bytes(content.getvalue())
    url, _ = run(Squares(tiny_vae))
    browser.get(f"{url}/#codec")
    find(browser, "#file").send_keys(str(file))
    size = find(browser, "#size")
    size.clear()
    size.send_keys("16")
    find(browser, "#codec-form button").click()
    loaded(browser, "#decoded", 1)
    assert find(browser, "#codec-note").text == "4 x 4 tokens"
    find(browser, "#perturb").click()
    time.sleep(0.5)
    assert find(browser, "#perturb").text == "Stop"
    find(browser, "#perturb").click()


def test_an_image_is_compared_and_the_codec_is_timed(browser, run, tiny_vae, tmp_path):
    file = tmp_path / "picture.png"
    Image.effect_noise((80, 70), 60).save(file)
    url, _ = run(Squares(tiny_vae))
    browser.get(f"{url}/#codec")
    find(browser, "#file").send_keys(str(file))
    wait_for(lambda: find(browser, "#size").get_attribute("value"))
    find(browser, "#codec-form button").click()
    wait_for(lambda: find(browser, "#compare").is_enabled())
    find(browser, "#compare").click()
    loaded(browser, "#comparison img", 4)
    notes = [note.text for note in browser.find_elements("css selector", "#comparison figcaption")]
    assert [note.split(":")[0] for note in notes] == ["original file", "tokens", "jpeg", "webp"]
    find(browser, "#benchmark").click()
    cells = wait_for(lambda: [cell.text for cell in browser.find_elements("css selector", "#speeds td")])
    assert cells[0] == "64"
    assert float(cells[1]) > 0


README = """
// After selecting a file with the file-picker:
let formData = new FormData();
formData.append("file", fileEl.files[0]);

// Encode:
let encoded = await fetch("http://0.0.0.0:8080/encode/256", {
  method: 'POST',
  body: formData,
}).then(r => r.json());

// Decode:
let decoded = await fetch("http://0.0.0.0:8080/decode", {
  method: 'POST',
  body: JSON.stringify(encoded),
}).then(r => r.blob());

imgEl.src = URL.createObjectURL(decoded);

let result = await fetch("http://0.0.0.0:8080/encode-decode/256", {
  method: 'POST',
  body: formData,
}).then(r => r.blob());
"""
"""The example of https://github.com/josephrocca/dall-e-encoder-decoder-server's README."""


def test_the_example_of_the_encoder_decoder_server_runs(browser, run, tiny_vae, tmp_path):
    """Unchanged but for the host; its image must arrive, as large as it says."""
    file = tmp_path / "picture.jpg"
    Image.effect_noise((300, 280), 60).convert("RGB").save(file)
    url, _ = run(Squares(tiny_vae))
    browser.get(f"{url}/#codec")
    find(browser, "#file").send_keys(str(file))
    code = README.replace("http://0.0.0.0:8080", url)
    script = f"""
        const done = arguments[arguments.length - 1];
        const fileEl = document.getElementById("file"), imgEl = document.getElementById("decoded");
        (async () => {{ {code}
            await imgEl.decode();
            return [encoded.length, encoded[0].length, encoded[0][0].length, imgEl.naturalWidth, result.type];
        }})().then(done, (error) => done(String(error)));
    """
    assert browser.execute_async_script(script) == [1, 64, 64, 256, "image/jpeg"]


def test_an_image_is_completed_and_found_by_what_it_shows(browser, run, tiny_vae, tiny_clip):
    clip = CLIP(dataclasses.replace(tiny_clip.config, text_vocab_size=260))
    clip.text_tokenizer = BPETokenizer.train(["red green"], 260)
    url, _ = run(Squares(tiny_vae, clip=clip))
    browser.get(url)
    find(browser, "#prompt").send_keys("red\n")
    loaded(browser, ".job .grid img", 8)
    find(browser, ".job .complete").click()
    wait_for(lambda: len(browser.find_elements("css selector", ".job")) == 2)
    loaded(browser, ".job:first-child .grid img", 8)
    browser.get(f"{url}/#library")
    loaded(browser, "#images img", 16)
    browser.execute_script("for (const figure of document.querySelectorAll('#images figure')) figure.id = 'old'")
    find(browser, "#meaning").click()
    find(browser, "#search").send_keys("green\n")
    wait_for(lambda: not browser.find_elements("css selector", "#old"))
    loaded(browser, "#images img", 16)


def test_the_api_is_described(browser, run, tiny_vae):
    url, _ = run(Squares(tiny_vae))
    browser.get(f"{url}/docs.html")
    find(browser, ".route code")
    shown = [code.text for code in browser.find_elements("css selector", ".route code")]
    assert {"POST /v1/jobs", "POST /v1/images/generations", "POST /encode/{size}"} <= set(shown)


# ---- the playground's pages


@pytest.mark.parametrize("phone", [False, True])
def test_two_people_draw_wait_their_turn_and_find_their_images(open_browser, run, tiny_vae, phone):
    """From prompt to library, inspiration, settings used again, deletion; each sees which prompts are theirs."""
    engine = Squares(tiny_vae)
    engine.may_go_on.clear()
    url, _ = run(engine)
    ann, bob = open_browser("ann"), open_browser("bob")
    for browser, name in ((ann, "Änn"), (bob, "bob")):
        if phone:
            as_phone(browser)
        browser.get(f"{url}/#advanced")
        find(browser, "#name").send_keys(name + "\t")
        find(browser, "[name=temperature]")
    for browser, prompts in ((ann, ("a1", "a2", "a3")), (bob, (EVIL,))):
        find(browser, "[name=count][value='2']").click()
        for prompt in prompts:
            box = find(browser, "#prompt")
            box.clear()
            box.send_keys(prompt + "\n")
            wait_for(lambda b=browser, p=prompt: p in [h.text for h in b.find_elements("css selector", ".job h2")])
    find(bob, "#queue-list summary").click()
    items = wait_for(lambda: (found := bob.find_elements("css selector", "#queue li")) and len(found) == 4 and found)
    assert [item.text.split(" (")[0] for item in items] == ["a1", "a2", EVIL, "a3"]
    assert ["yours" in item.text for item in items] == [False, False, True, False]
    find(bob, "#pause").click()
    wait_for(lambda: "paused" in find(ann, "#queue-status").text)
    engine.may_go_on.set()
    find(ann, "#pause").click()
    for browser, count in ((ann, 8), (bob, 8)):  # one library for both, without keys
        wait_for(lambda b=browser: len(b.find_elements("css selector", ".job .grid img")) >= 2)
        browser.get(f"{url}/#library")
        browser.refresh()
        loaded(browser, "#images img", count)
    assert [group.text for group in ann.find_elements("css selector", "#images h2")] == [EVIL, "a3", "a2", "a1"]
    assert ann.execute_script("return window.hurt") is None
    assert "seed" in find(ann, "#images .status").text
    find(ann, "#search").send_keys("a2\n")
    loaded(ann, "#images img", 2)
    find(ann, "#images .delete").click()
    ann.switch_to.alert.accept()
    wait_for(lambda: len(ann.find_elements("css selector", "#images img")) == 1)
    find(ann, "#images article > .buttons button").click()
    wait_for(lambda: find(ann, "#prompt").get_property("value") == "a2")
    assert find(ann, "[name=seed]").get_property("value")
    bob.get(f"{url}/inspiration.html")
    idea = wait_for(lambda: find(bob, "#idea").text)
    find(bob, "#inspiration button.main").click()
    wait_for(lambda: find(bob, "#prompt").get_property("value") == idea)
    for browser in (ann, bob):
        wide = "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        assert browser.execute_script(wide)


def test_a_list_of_prompts_is_drawn_and_what_failed_is_tried_again(browser, run, tiny_vae, tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,n\nred,1\ndefect,1\n")
    url, _ = run(Squares(tiny_vae))
    browser.get(f"{url}/#advanced")
    find(browser, "#list").send_keys(str(file))
    wait_for(lambda: sorted(h.text for h in browser.find_elements("css selector", ".job h2")) == ["defect", "red"])
    find(browser, ".job .retry").click()
    wait_for(lambda: find(browser, ".job .retry"))
    loaded(browser, ".job .grid img", 1)


def test_few_images_are_allowed_and_a_refusal_stays_to_be_read(browser, run, tiny_vae):
    """The form offers what the limit allows; an error is shown until the next request, whatever is drawn meanwhile."""
    engine = Squares(tiny_vae)
    engine.may_go_on.clear()
    url, _ = run(engine, images=3)
    browser.get(url)
    find(browser, "#prompt").send_keys("red\n")
    find(browser, ".job progress")
    find(browser, "#prompt").clear()
    find(browser, "#prompt").send_keys("forbidden\n")
    notice = find(browser, "#notice")
    time.sleep(2.5)
    assert "cannot be drawn" in notice.text
    engine.may_go_on.set()
    loaded(browser, ".job .grid img", 3)
    assert all("422" in entry["message"] for entry in browser.get_log("browser"))


AXE = Package("axe-core", "4.14.1", "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745")


@pytest.mark.parametrize("phone", [False, True])
def test_no_page_has_a_serious_fault_of_accessibility(browser, run, tiny_vae, tmp_path, phone):
    code = (fetch_packages([AXE], tmp_path / "npm") / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
    url, _ = run(Squares(tiny_vae))
    if phone:
        as_phone(browser)
    browser.get(url)
    find(browser, "#prompt").send_keys("red\n")
    loaded(browser, ".job .grid img", 8)
    for page in ("#draw", "#advanced", "#library", "#inspiration", "#codec", "docs.html"):
        browser.get(f"{url}/{page}")
        browser.refresh()
        if page == "#library":
            loaded(browser, "#images img", 8)
        wait_for(lambda: browser.find_elements("css selector", "main"))
        time.sleep(0.5)
        browser.execute_script(code)
        found = browser.execute_async_script("axe.run().then(arguments[0])")
        assert len(found["passes"]) > 5
        serious = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
        bad = [(each["id"], each["nodes"][0]["html"]) for each in serious]
        assert bad == [], page
