"""The page of python -m model.write in a real browser: by keyboard alone, light and dark, with hostile text."""

import base64
import io
import json
import threading

import pytest
from browser import browser

from model import GPT2, GPT2Config
from model.write.server import Server
from model.write.writer import Speaker, Writer
from tokenizer import GPT2Tokenizer

CTRL = 2
TEXT = "document.getElementById('text')"
STATUS = "document.getElementById('status').textContent"
OFFERS = "[...document.querySelectorAll('li span')].map((item) => item.textContent)"
DONE = f"{STATUS} === '' && document.querySelectorAll('li').length === 3"
HOSTILE = "<img src=x onerror=window.hit=1></textarea><script>window.hit=2</script>"


@pytest.fixture(scope="module")
def server():
    tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
    model = GPT2(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=128)).eval()
    writer = Writer({"tiny": Speaker(model, tokenizer), HOSTILE: Speaker(model, tokenizer)})
    with Server("127.0.0.1", 0, writer) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.02,))
        thread.start()
        yield served
        served.shutdown()
        thread.join()
    writer.close()


@pytest.fixture
def page(server):
    with browser() as opened:
        opened.open(server.url)
        yield opened
        assert opened.evaluate("window.hit") is None
        assert opened.errors == []


def brightness(page):
    """The mean grey of a screenshot, 0 to 1."""
    from matplotlib.image import imread

    return float(imread(io.BytesIO(base64.b64decode(page.screenshot())))[..., :3].mean())


def test_one_writes_by_keyboard_alone(page):
    assert page.evaluate("document.activeElement.id") == "text"
    page.type("Once upon a time")
    page.press("Tab")
    page.wait(DONE)
    offered = page.evaluate(OFFERS)
    assert len(set(offered)) == 3
    page.press("ArrowDown")
    assert page.evaluate(f"{TEXT}.getAttribute('aria-activedescendant')") == "offer1"
    assert page.evaluate("document.querySelector('[aria-selected=true]').id") == "offer1"
    page.press("Enter")
    assert page.evaluate(f"{TEXT}.value") == f"Once upon a time{offered[1]}"
    assert page.evaluate("document.getElementById('offers').hidden")
    page.press("z", CTRL, ["undo"])
    assert page.evaluate(f"{TEXT}.value") == "Once upon a time"

    page.press("Tab")
    page.wait(DONE)
    page.press("ArrowUp")
    offered = page.evaluate(OFFERS)
    page.press("Tab")
    assert page.evaluate(f"{TEXT}.value") == f"Once upon a time{offered[2]}"

    page.press("Tab")
    page.press("Escape")
    assert page.evaluate("document.getElementById('offers').hidden")
    page.press("Escape")
    assert page.evaluate(STATUS) == "Tab leaves the text."


def test_typing_on_cancels(page, server):
    page.evaluate("document.getElementById('length').value = 64")
    page.type("Hello")
    page.press("Tab")
    page.wait(f"{OFFERS}.length === 3")
    page.type(" there")
    assert page.evaluate("document.getElementById('offers').hidden")
    assert page.evaluate(f"{TEXT}.value") == "Hello there"
    page.press("Tab")  # those of the new text come, and none of the old
    page.wait(DONE)
    assert page.evaluate(OFFERS) != ["", "", ""]


def test_hostile_text_and_names_stay_text(page):
    page.evaluate(f"document.getElementById('model').value = {json.dumps(HOSTILE)}")
    for text in (HOSTILE, "\\ud83d", "x".join(["<b>"] * 25_000)):
        literal = f'"{text}"'
        page.evaluate(f"{TEXT}.value = {literal}, {TEXT}.setSelectionRange({TEXT}.value.length, {TEXT}.value.length)")
        page.press("Tab")
        page.wait(f"{OFFERS}.length === 3 && !{STATUS}.includes('Writing') && !{STATUS}.includes('Asking')")
        assert page.evaluate("document.querySelectorAll('li img, li b, li script, option img').length") == 0
        page.press("Escape")
    page.evaluate("document.getElementById('length').value = 0")
    page.press("Tab")
    assert page.evaluate("document.getElementById('offers').hidden")  # the browser says what is wrong with the length


def test_what_the_model_says_is_shown_as_text(page):
    page.evaluate(
        "window.fetch = async () => new Response(["
        f"{{before: 0}}, {{read: 1, left_out: 0}}, {{row: 0, text: {json.dumps(HOSTILE)}}}, {{end: 'done'}}"
        "].map(JSON.stringify).join('\\n') + '\\n')"
    )
    page.press("Tab")
    page.wait(DONE)
    assert page.evaluate(OFFERS) == [HOSTILE, "(the text ends here)", "(the text ends here)"]
    page.press("Tab")
    assert page.evaluate(f"{TEXT}.value") == HOSTILE


def test_light_and_dark(page):
    for theme in ("light", "dark"):
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        assert (brightness(page) > 0.5) == (theme == "light")
    page.evaluate("const t = document.getElementById('theme'); t.value = 'light'; t.dispatchEvent(new Event('change'))")
    assert brightness(page) > 0.5
