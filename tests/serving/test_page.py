"""The page of the server in a real browser: a talk, the switch, the layers; no error in its console."""

import os
import shutil

import pytest

BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
KINDS = {"plain", "accepted", "corrected", "bonus"}
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt install chromium)")


@pytest.fixture
def with_exit():
    return False


@pytest.fixture
def page(serve, with_exit):
    """Return a page of a served tiny model, and what its console said."""
    with (
        serve(slots=1, drafting={"num_speculations": 4}, with_exit=with_exit) as server,
        playwright.sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(server.url)
        yield page, said
        browser.close()


def ask(page, text: str):
    """Send a message by the keyboard, and return the answer's element once it is complete."""
    answers = page.locator(".assistant")
    before = answers.count()
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    answer = answers.nth(before)
    answer.get_by_role("button", name="layers").wait_for()
    return answer


def test_a_talk(page):
    page, said = page
    page.get_by_role("option", name="tiny").wait_for(state="attached")
    answer = ask(page, "def add(a, b):")
    kinds = answer.locator("> span:not(.counts)").evaluate_all("all => all.map(each => each.className)")
    assert kinds[0] == "plain" and {"accepted", "corrected"} <= set(kinds) <= KINDS
    assert "accepted" in answer.locator(".counts").inner_text() and "tokens/s with drafts" in speeds(page)
    page.get_by_label("drafts").uncheck()
    page.get_by_label("message").focus()
    plain = ask(page, "again")
    kinds = plain.locator("> span:not(.counts)").evaluate_all("all => all.map(each => each.className)")
    assert set(kinds) == {"plain"} and "with drafts" in speeds(page) and "without" in speeds(page)
    answer.get_by_role("button", name="layers").click()
    answer.get_by_text("on average").wait_for()
    layers = answer.locator(".layer").evaluate_all("all => all.map(each => each.title)")
    assert len(layers) > 5 and all("of 4" in each for each in layers)
    assert page.locator(".error").count() == 0 and said == []


def test_a_message_sent_before_the_models_are_known_waits_for_them(page):
    page, said = page
    held = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload()
    page.keyboard.type("def add")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").wait_for()
    held[0].continue_()
    page.get_by_role("button", name="layers").wait_for()
    assert page.locator(".error").count() == 0 and said == []


def speeds(page) -> str:
    return page.locator("#speeds").inner_text()


@pytest.mark.parametrize("with_exit", [True])
def test_another_endpoint_is_chosen(page, tiny_generator):
    page, said = page
    page.get_by_label("model").select_option("exit")
    page.get_by_label("message").focus()
    pieces = ask(page, "def add(a, b):").locator("> span:not(.counts)")
    text = "".join(pieces.evaluate_all("all => all.map(each => each.textContent)"))
    early = tiny_generator.generate([{"role": "user", "content": "def add(a, b):"}], exit_layer=1)
    assert text == early.text and said == []


def test_escape_stops_an_answer(page):
    page, said = page
    page.keyboard.type("def add")
    page.keyboard.press("Enter")
    page.locator(".assistant > span").nth(3).wait_for(state="attached")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Send").wait_for()
    assert ask(page, "more").locator("> span").count() > 1 and said == []


def test_markup_in_a_message_is_text(page):
    page, said = page
    ask(page, "<img src=x onerror=document.title='broken'>")
    assert page.locator("img").count() == 0 and page.title() == "lskip" and said == []


def test_narrow_and_dark(page):
    page, _ = page
    page.set_viewport_size({"width": 320, "height": 560})
    ask(page, "a" * 200)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
