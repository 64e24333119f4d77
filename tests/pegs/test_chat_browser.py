"""The chat page in a real browser: a person types, picks a sticker, and sees text and stickers appear."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]


@pytest.fixture(scope="module")
def url():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("pegs")), "chat", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        if server.poll() is not None:
            raise AssertionError(f"pegs chat ended: {server.stderr.read()}")
        try:
            urllib.request.urlopen(address, timeout=2)
            break
        except OSError:
            time.sleep(0.5)
    yield address
    server.terminate()
    server.wait(20)


@pytest.fixture
def page(url):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(url)
        page.wait_for_selector("#box textarea")
        yield page
        browser.close()


def send(page, text: str) -> None:
    page.fill("#box textarea", text)
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#box textarea').value === ''", timeout=60_000)


def wait_for_reply(page, count: int) -> str:
    page.wait_for_function(
        """n => {
            const replies = [...document.querySelectorAll('#chat .bot.message')];
            return replies.length >= n && !replies.at(-1).innerText.includes('Loading content');
        }""",
        arg=count,
        timeout=120_000,
    )
    return page.locator("#chat .bot.message").last.inner_text()


def test_a_message_gets_words_and_in_the_end_a_sticker(page):
    for count, text in enumerate(
        ("my dog died yesterday", "he was fourteen", "his lead is still by the door", "thank you"), start=1
    ):
        send(page, text)
        page.wait_for_function(
            "n => document.querySelectorAll('#chat .user.message').length >= n", arg=count, timeout=60_000
        )
        assert len(wait_for_reply(page, count).split()) >= 3
        if page.locator("#chat .bot img").count():
            break
    picture = page.locator("#chat .bot img").first
    picture.wait_for(timeout=60_000)
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") >= 128


def test_the_slider_says_how_often_a_sticker_comes(page):
    for count, (rate, pictures) in enumerate(((0, 0), (1, 1)), start=1):
        page.fill("#rate input[type=number]", str(rate))
        page.keyboard.press("Tab")
        send(page, "my cat is ill")
        wait_for_reply(page, count)
        page.wait_for_timeout(500)
        assert page.locator("#chat .bot img").count() == pictures


def test_a_picked_sticker_is_sent_and_undo_takes_it_back(page):
    page.get_by_text("Send a sticker of the pack").click()
    page.locator("#gallery button.thumbnail-item").first.click()
    page.wait_for_selector("text=Picked.")
    send(page, "this is me today")
    wait_for_reply(page, 1)
    assert page.locator("#chat .user img").count() == 1
    page.get_by_role("button", name="Undo").click()
    page.wait_for_function("document.querySelectorAll('#chat .message').length === 0")
    assert page.input_value("#box textarea") == "this is me today"


def test_what_is_typed_while_a_reply_is_under_way_stays(page):
    send(page, "i moved to a new town")
    page.fill("#box textarea", "and it is ra")
    wait_for_reply(page, 1)
    page.wait_for_timeout(500)
    assert page.input_value("#box textarea") == "and it is ra"


def test_the_attribution_is_shown(page):
    assert "CC BY-SA 4.0" in page.locator("#attribution").inner_text()
