"""The questionnaire in real browsers: three raters at once, one of them killed in the middle and opened again."""

import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from pegs.evaluation.human import Study
from tests.pegs.evaluation import make
from tests.pegs.test_chat_browser import CHROMIUM, FLAGS


pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A study of three models as `pegs evaluate human serve` serves it: its folder and the raters' links."""
    folder = tmp_path_factory.mktemp("study")
    make.make_pack().save(folder / "pack")
    runs = [make.make_run(folder, model, every=n + 1) for n, model in enumerate(("alpha", "beta", "gamma"))]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).with_name("pegs"), "evaluate", "human", "serve", *(run.path for run in runs), "--study", folder / "study", "--stickers", folder / "pack", "--raters", 3, "--sessions", 3, "--port", port]  # fmt: skip
    server = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    links = [re.fullmatch(r"rater \d: (http\S+)\n", server.stdout.readline())[1] for _ in range(3)]
    for _ in range(120):
        try:
            urllib.request.urlopen(links[0], timeout=2)
            break
        except OSError:
            assert server.poll() is None, server.stderr.read()
            time.sleep(0.25)
    yield folder / "study", links
    server.terminate()
    server.wait(20)


@pytest.fixture(scope="module")
def playwright():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        yield started


def open_link(playwright, link, width=1280):
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    page = browser.new_page(viewport={"width": width, "height": 860})
    page.goto(link)
    with page.expect_navigation():
        page.click("#start")
    return browser, page


def answer(page, score, leave=0):
    """Answer the page's questions by keyboard, but for the last `leave`; without any left, go on."""
    count = page.locator("fieldset").count()
    for _ in range(count - leave):
        page.keyboard.press(str(score))
    if not leave:
        with page.expect_navigation():
            page.keyboard.press("Enter")
    else:
        page.locator("#saved:text-is('Saved')").wait_for()


def test_three_raters_at_once_and_one_killed_in_the_middle(playwright, served):
    folder, links = served
    study = Study(folder)
    raters = [open_link(playwright, link) for link in links]
    total = len(study.progress(1))
    for _ in range(4):
        for score, (_, page) in enumerate(raters, start=1):
            answer(page, score)
    browser, page = raters[1]
    answer(page, 2, leave=1)
    try:
        browser.new_browser_cdp_session().send("Browser.crash")
    except Exception as crashed:  # the answer to it is that the browser is gone
        assert "closed" in str(crashed)
    raters[1] = open_link(playwright, links[1])
    page = raters[1][1]
    assert page.url.endswith("/5") and page.locator("input:checked").count() == page.locator("fieldset").count() - 1
    page.locator("fieldset:not(:has(input:checked)) input").first.focus()
    page.keyboard.press("2")
    with page.expect_navigation():
        page.keyboard.press("Enter")
    for place, (_, page) in enumerate(raters):
        while "Thank you" not in page.locator("h1").inner_text():
            answer(page, place + 1)
    for browser, _ in raters:
        browser.close()
    assert [sum(study.progress(rater)) for rater in (1, 2, 3)] == [total] * 3
    ratings = study.ratings()
    assert all(row["score"] == row["rater"] for row in ratings)  # nothing lost, nothing of another's
    assert len(ratings) == 3 * len([row for row in ratings if row["rater"] == 1])


def test_a_phone_shows_everything_without_scrolling_sideways(playwright, served):
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    page = browser.new_page(viewport={"width": 390, "height": 844})
    for path in ("", "/1"):
        page.goto(served[1][0] + path)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    heights = page.locator(".scale span").evaluate_all("spans => spans.map(s => s.getBoundingClientRect().height)")
    assert min(heights) >= 44  # a thumb's
    page.locator("fieldset").last.locator("label").nth(1).click()
    page.locator("#saved:text-is('Saved')").wait_for()
    browser.close()


def test_it_works_without_scripts(playwright, served):
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(f"{served[1][2]}/1")
    for number in range(page.locator("fieldset").count()):
        page.locator("fieldset").nth(number).locator("label").nth(2).click()
    page.click("#next")
    assert page.url.endswith("/2")
    browser.close()


def until(page, condition):
    """Let the browser go on until a condition holds, at most 10 s."""
    for _ in range(100):
        if condition():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it did not happen within 10 s")


def test_saved_is_said_when_every_answer_is_and_a_lost_one_is_sent_again(playwright, served):
    folder, links = served
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    page = browser.new_page()
    page.goto(f"{links[0]}/2")
    first, second = page.locator("fieldset input[value='1']").evaluate_all(
        "inputs => inputs.slice(0, 2).map(i => i.name)"
    )
    held, told = [], page.locator("#saved")
    page.route("**/r/*/2", lambda route: held.append(route) if route.request.method == "POST" else route.continue_())
    page.keyboard.press("4")
    page.keyboard.press("5")
    until(page, lambda: held)
    held.pop(0).continue_()
    until(page, lambda: held)
    assert told.inner_text() == "Saving"  # the second one is still under way
    held.pop(0).abort()
    until(page, lambda: told.inner_text() == "Not saved")
    assert Study(folder).page(1, 2).scores[first] == 4
    page.unroute("**/r/*/2")
    until(page, lambda: told.inner_text() == "Saved")
    scores = Study(folder).page(1, 2).scores
    assert (scores[first], scores[second]) == (4, 5)
    browser.close()
