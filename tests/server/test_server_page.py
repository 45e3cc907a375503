"""The page at `/`, driven in headless Chromium: a document in, two questions, two answers."""

import os
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"
)
DOCUMENT = "Anna lives in Lisbon. Her brother Karl lives in Oslo. They write letters to each other. " * 12


@pytest.fixture
def page(server):
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 1100})
        page.set_default_timeout(60_000)
        page.complaints = []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("requestfailed", lambda request: page.complaints.append(request.url))
        page.goto(server.url)
        yield page
        browser.close()


def test_a_document_is_pasted_and_two_questions_are_answered(page):
    page.fill("#document", DOCUMENT)
    page.fill("#tokens", "16")
    for count, question in enumerate(["Where does Anna live?", "What is the capital of France?"], 1):
        page.fill("#question", question)
        page.click("#ask")
        page.wait_for_selector(f"tbody tr:nth-child({count})")

    answers = page.locator(".answer").all_text_contents()
    assert "Lisbon" in answers[0] and "Paris" in answers[1]
    rows = page.locator("tbody tr").all_text_contents()
    assert "encoded now" in rows[0] and "was encoded" in rows[1]
    assert [text for text in page.complaints if "favicon" not in text] == []
    if "PAGE_SCREENSHOT" in os.environ:
        page.screenshot(path=os.environ["PAGE_SCREENSHOT"], full_page=True)


def test_an_error_is_shown_to_the_person(page):
    page.fill("#document", "Short. " * 9000)
    page.fill("#question", "Why?")
    page.click("#ask")
    page.wait_for_selector(".error")
    assert "the model's limit is 8192" in page.locator(".error").text_content()
