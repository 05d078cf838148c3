"""The page in a real browser: Chromium, driven by the DevTools protocol over a pipe."""

import json
import re
import shutil
import subprocess
from threading import Timer

import pytest
import torch

from lskip.evaluation.layers.settling import Settling
from lskip.evaluation.layers.settling_page import layer_colors, settling_page, token_ids

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BINARY is None, reason="there is no chromium or chrome to open the page with")

SPELLINGS = {
    0: "The",
    1: " </script><b>x</b>",
    2: "\n",
    3: "\t ",
    4: "<!--",
    5: "\\xf0",
    6: "\u200b",
    7: " \"&amp;'",
    8: "__SETTLING__",
    9: "",
}
TOP = [
    [[4, 3], [2, 7], [9, 8], [5, 4]],
    [[1, 3], [6, 2], [3, 8], [6, 4]],
    [[1, 0], [2, 7], [5, 3], [6, 4]],
]


def make_page() -> str:
    ids = torch.tensor(TOP)
    shares = torch.tensor([0.75, 0.0625]).expand(3, 4, 2)
    settling = Settling(torch.tensor([0, 1, 2, 3, 6]), ids, shares, torch.full((3, 4), 0.5))
    assert set(token_ids(settling)) <= set(SPELLINGS)
    return settling_page(settling, SPELLINGS, "a model <i>on</i> a text")


class Chromium:
    """One page of a headless browser.

    Attributes:
        events: what the browser reported so far, (method, params).
    """

    def __init__(self, folder):
        flags = "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --window-size=1400,900"
        # The protocol's pipes are file descriptors 3 and 4.
        command = f'exec "$0" {flags} --user-data-dir="$1" about:blank 3<&0 4>&1 2>/dev/null'
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(["sh", "-c", command, BINARY, str(folder)], **pipes)
        self.watchdog = Timer(60, self.process.kill)  # a browser that hangs ends the test
        self.watchdog.start()
        self.events, self.calls, self.session = [], 0, {}
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.calls += 1
        message = {"id": self.calls, "method": method, "params": params, **self.session}
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while (message := self._read()).get("id") != self.calls:
            pass
        assert "error" not in message, message
        return message["result"]

    def _read(self) -> dict:
        text = bytearray()
        while (byte := self.process.stdout.read(1)) != b"\0":
            assert byte, "the browser has gone"
            text += byte
        message = json.loads(text)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def open(self, path) -> None:
        self.call("Page.navigate", url=path.as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self._read()

    def evaluate(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression) -> None:
        """Until it is true; a test that waits for ever is ended by the watchdog."""
        while not self.evaluate(expression):
            pass

    def hover(self, selector) -> None:
        middle = "(r => [r.x + r.width / 2, r.y + r.height / 2])"
        x, y = self.evaluate(f"{middle}(document.querySelector('{selector}').getBoundingClientRect())")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=9 * (key == "Tab"))

    def complaints(self) -> list:
        """Errors and warnings of the console, exceptions, and whatever was fetched but the page itself."""
        self.evaluate("0")  # what was reported before this answer has been read
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        fetched = [params["request"]["url"] for method, params in self.events if method == "Network.requestWillBeSent"]
        return [params for method, params in self.events if method in kinds] + [
            url for url in fetched if not url.startswith(("file:", "data:"))
        ]

    def close(self) -> None:
        self.watchdog.cancel()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def browser(tmp_path):
    chromium = Chromium(tmp_path / "profile")
    yield chromium
    chromium.close()


@pytest.fixture
def page(browser, tmp_path):
    path = tmp_path / "settling.html"
    path.write_text(make_page(), encoding="utf-8")
    browser.open(path)
    return browser


ROWS = "[...document.querySelectorAll('#panel tbody tr')].map(row => [...row.cells].map(cell => cell.innerText))"
CHOSEN = "document.querySelector('.token.chosen').dataset.index"


@needs_browser
def test_hover_shows_each_layers_top_tokens_and_the_console_stays_empty(page):
    assert page.evaluate(ROWS) == []
    page.hover('[data-index="1"]')
    script = "·</script><b>x</b>"
    assert page.evaluate(ROWS) == [
        ["1", "50 %", "<!-- 75 %", "⇥· 6.3 %"],
        ["2", "50 %", f"{script} 75 %", "⇥· 6.3 %"],
        ["3", "50 %", f"{script} 75 %", "The 6.3 %"],
    ]
    assert "settles at layer 2 of 3" in page.evaluate("document.querySelector('#panel h2').innerText")
    page.hover('[data-index="3"]')
    assert [row[2] for row in page.evaluate(ROWS)] == ["∅ 75 %", "⇥· 75 %", r"\xf0 75 %"]
    assert page.evaluate("document.querySelectorAll('b, i').length") == 0  # no token became markup
    assert page.complaints() == []


@needs_browser
def test_tokens_are_coloured_by_layer_marked_and_in_order(page):
    tokens = page.evaluate("[...document.querySelectorAll('#text .token')].map(t => t.innerText)")
    assert tokens == ["The", "·</script><b>x</b>", "⏎", "⇥·", "U+200B"]
    colors = page.evaluate("[...document.querySelectorAll('#text .token')].map(t => t.style.backgroundColor)")
    expected = [tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in layer_colors(3)]
    said = [tuple(map(int, re.findall(r"\d+", color))) for color in colors]
    assert said == [(), expected[1], expected[2], expected[2], expected[1]]
    marked = page.evaluate(
        "['returns', 'loses'].map(kind => [...document.querySelectorAll('#text .' + kind)].map(t => t.dataset.index))"
    )
    # 2 had token 2, left it for 6, came back; 3 had token 3 (the one that follows) and ends with 5
    assert marked == [["2"], ["3"]]


@needs_browser
def test_the_keyboard_does_what_the_mouse_does(page):
    page.press("Tab")
    assert page.evaluate(CHOSEN) == "1"
    page.press("ArrowRight")
    assert page.evaluate(CHOSEN) == "2"
    assert [row[2] for row in page.evaluate(ROWS)] == ["⏎ 75 %", "U+200B 75 %", "⏎ 75 %"]
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    assert page.evaluate(CHOSEN) == "0"
    assert "nothing before it predicts it" in page.evaluate("document.querySelector('#panel').innerText")


def long_page(num_layers: int) -> str:
    """300 tokens, some of them long, each with five guesses a layer."""
    words = {0: "The", 1: " reconsideration", 2: " a", 3: " \u200b" + "x" * 60, 4: "\n"}
    shape = (num_layers, 299, 5)
    ids = torch.arange(5).expand(shape)
    settling = Settling(torch.arange(300) % 5, ids, torch.full(shape, 0.2), torch.full(shape[:2], 0.5))
    return settling_page(settling, words, f"a model of {num_layers} layers on {'a/very/long/path' * 9}")


BOX = "(r => [r.left, r.top, r.right, r.bottom])(document.querySelector('%s').getBoundingClientRect())"


@needs_browser
@pytest.mark.kind("M a new user's first hour")
@pytest.mark.parametrize(
    ("width", "num_layers"),
    [
        pytest.param(375, 30, id="M6 a phone"),
        pytest.param(1100, 30, id="M6 half a screen"),
        pytest.param(320, 96, id="a small phone and many layers"),
    ],
)
def test_on_narrow_screens_a_tap_shows_the_panel_and_nothing_is_too_wide(browser, tmp_path, width, num_layers):
    path, height = tmp_path / "settling.html", 667
    path.write_text(long_page(num_layers), encoding="utf-8")
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True)
    browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
    browser.open(path)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    for index in (1, 40, 296, 299):
        token = f'[data-index="{index}"]'
        browser.evaluate(f"document.querySelector('{token}').scrollIntoView({{block: 'end'}})")
        left, top, right, bottom = browser.evaluate(BOX % token)
        x, y = left + 3, (top + min(bottom, top + 20)) / 2
        browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        browser.wait_for(f"document.querySelector('.token.chosen')?.dataset.index === '{index}'")
        assert len(browser.evaluate(ROWS)) == num_layers
        left, top, right, bottom = browser.evaluate(BOX % "#panel")
        assert (left, right, bottom) == (0, width, height) and top > height / 2
        assert browser.evaluate(BOX % token)[1] >= 0 and browser.evaluate(BOX % token)[3] <= top
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.complaints() == []


@needs_browser
def test_what_the_browser_complains_about_is_noticed(browser, tmp_path):
    path = tmp_path / "broken.html"
    path.write_text('<img src="https://example.org/a.png"><script>console.error("x"); undefined.y;</script>')
    browser.open(path)
    complaints = str(browser.complaints())
    assert "console-api" in complaints or "'error'" in complaints
    assert "TypeError" in complaints and "https://example.org/a.png" in complaints


@pytest.mark.parametrize("num_layers", [1, 2, 30])
def test_a_colour_for_each_layer(num_layers):
    colors = layer_colors(num_layers)
    assert len(set(colors)) == num_layers and all(re.fullmatch("#[0-9a-f]{6}", color) for color in colors)


@pytest.mark.kind("B34 names and words of strangers")
@pytest.mark.parametrize(
    "title",
    ["</script><script>x</script>", "a & b", "'\"", "<!--", "\u2028", "B34 \x1b]0;t\x07", "\ud83d", "__SETTLING__"],
)
def test_a_title_stays_a_title(title):
    ids = torch.zeros(1, 1, 1, dtype=torch.long)
    settling = Settling(torch.tensor([0, 0]), ids, torch.full((1, 1, 1), 1.0), torch.full((1, 1), 1.0))
    html = settling_page(settling, {0: "a"}, title)
    html.encode("utf-8")
    assert html.count("<script") == 2 and html.count("</script>") == 2
    content = re.search(r'<script id="settling" type="application/json">(.*?)</script>', html, re.S)[1]
    said = json.loads(content)["title"]
    assert said == title or (said.isprintable() and "\\" in said)


def test_the_file_holds_everything_itself():
    html = make_page()
    assert not re.search(r"https?://|src=|url\(|@import", html)
    content = re.search(r'<script id="settling" type="application/json">(.*?)</script>', html, re.S)[1]
    assert "<" not in content
    assert json.loads(content)["spellings"] == {str(token): text for token, text in SPELLINGS.items()}
    assert json.loads(content)["title"] == "a model <i>on</i> a text"
