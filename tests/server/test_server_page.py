"""The page at `/`, driven in headless Chromium: documents in, questions, answers, and where these looked."""

import os
import re
import shutil

import httpx
import pytest
from documents import pdf

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"
)
DOCUMENT = "Anna lives in Lisbon. Her brother Karl lives in Oslo. They write letters to each other. " * 24
NOISE = "The river is slow. The hill is round. The bread is warm. We walk on, and nothing happens here. "
NEEDLE = "One of the special magic numbers for fancy-tiger is: 4827135. "
HAYSTACK = f"{NOISE * 30}{NEEDLE}{NOISE * 25}"
HTML = """<!doctype html><title>No text</title><style>p {color: red}</style><h1>Letters</h1>
<script>window.wasRun = true; document.title = "run"</script><p style="color: red">Anna &amp; Karl
write <b>letters</b>.</p><ul><li>one</li><li>two</li></ul><img src="x" onerror="window.wasRun = true">"""
DROP = """files => {
    const data = new DataTransfer();
    for (const [name, text] of files) data.items.add(new File([text], name, {type: "text/plain"}));
    const target = document.getElementById("documents");
    target.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    # Not "requestfailed": Chromium says so of every streamed body that a script reads to its end.
    page.on("response", lambda answer: answer.ok or page.complaints.append(f"{answer.url}: {answer.status}"))
    page.goto(server.url)
    page.locator("#settings summary").click()
    page.uncheck("#looks")
    yield page
    page.close()


def ask(page, question: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.wait_for_selector("#ask:not([disabled])")


def asked(page, act, *arguments) -> dict:
    """The body of the chat that this makes the page ask for, and wait for."""
    with page.expect_request("**/v1/chat/completions") as sent:
        act(*arguments)
    page.wait_for_selector("#ask:not([disabled])")
    return sent.value.post_data_json


def screenshot(page, name: str) -> None:
    """For a person to look at."""
    if "PAGE_SCREENSHOTS" in os.environ:
        page.screenshot(path=f"{os.environ['PAGE_SCREENSHOTS']}/{name}.png")


def test_documents_are_read_once_and_two_questions_are_answered(page):
    page.fill("#document", DOCUMENT)
    page.fill("#tokens", "16")
    ask(page, "Where does Anna live?")
    ask(page, "What is the capital of France?")

    answers = page.locator(".answer").all_text_contents()
    assert len(answers) == 2 and all(answers) and answers[0] != answers[1]
    first, second = page.locator(".stats").all_text_contents()
    assert re.search(r"Context: \d+ tokens \(star, \d blocks of 256, anchor 256\), encoded in", first)
    assert "found encoded" in second and "ms a token" in second
    assert page.locator("#map").is_hidden() and page.complaints == []


def test_the_map_shows_that_the_answer_looked_at_the_needle(page):
    page.check("#looks")
    page.evaluate(DROP, [["haystack.txt", HAYSTACK], ["other.md", DOCUMENT[:400]]])
    page.wait_for_selector("#list li:nth-child(2)")
    page.fill("#tokens", "12")
    ask(page, "Which special magic number for fancy-tiger does the text mention?")
    playwright.expect(page.locator("#map")).to_be_visible()

    most = page.locator("#most button").all_text_contents()
    assert len(most) == 3 and any(piece.strip() in NEEDLE for piece in most)
    page.locator("#most button").nth([piece.strip() in NEEDLE for piece in most].index(True)).click()
    assert page.locator("#passage mark").text_content() in NEEDLE
    assert "haystack.txt, tokens" in page.locator("#passage").text_content()
    assert 0 < page.locator("#strip i.hot").count() < 12 < page.locator("#strip i").count()
    screenshot(page, "map")

    strip = page.locator("#strip")  # by keyboard and by pointer
    strip.press("Home")
    assert strip.get_attribute("aria-valuenow") == "1" and "Tokens 1 to 16" in strip.get_attribute(
        "aria-valuetext"
    )
    strip.press("ArrowRight")
    assert strip.get_attribute("aria-valuenow") == "2"
    page.locator("#strip i").last.click()
    assert strip.get_attribute("aria-valuenow") == strip.get_attribute("aria-valuemax")
    assert page.complaints == []


def test_the_answer_on_the_page_is_the_one_that_the_server_gives(page, server):
    page.fill("#document", DOCUMENT)
    page.fill("#tokens", "8")
    ask(page, "Where does Karl live?")

    body = {
        "model": "smollm2",
        "temperature": 0,
        "max_completion_tokens": 8,
        "messages": [{"role": "user", "content": f"{DOCUMENT}\n\n\u241eWhere does Karl live?"}],
        "star": {"separator": "\u241e"},
    }
    answer = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert page.locator(".answer").all_text_contents() == [answer]


def test_an_answer_is_stopped_asked_for_again_and_copied(page):
    page.fill("#tokens", "4000")
    page.fill("#question", "Tell me everything.")
    page.click("#ask")
    playwright.expect(page.locator(".answer")).not_to_be_empty()
    page.click("#stop")
    assert page.locator(".turn .error").text_content() == "Stopped."

    page.fill("#tokens", "5")
    again = asked(page, page.get_by_role("button", name="Regenerate").click)
    assert again["temperature"] == 0.7 and len(again["messages"]) == 1
    assert page.locator(".answer").count() == 1 and page.locator(".turn .error").count() == 0
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").click()
    playwright.expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == page.locator(".answer").text_content()
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # as over plain HTTP
    page.wait_for_selector("button:text-is('Copy')")
    page.get_by_role("button", name="Copy").click()
    playwright.expect(page.get_by_role("button", name="Copied")).to_be_visible()


def test_an_answer_that_the_limit_cut_says_so_and_is_continued(page):
    page.fill("#tokens", "3")
    ask(page, "Write a long story.")
    assert page.locator(".cut").text_content() == "Cut at 3 tokens."
    beginning = page.locator(".answer").text_content()

    body = asked(page, page.get_by_role("button", name="Continue").click)
    assert body["messages"][-1] == {"role": "assistant", "content": beginning}
    assert body["continue_final_message"] is True
    longer = page.locator(".answer").text_content()
    page.fill("#tokens", "6")
    ask(page, "Write a long story.")
    page.click("#forget")
    assert page.locator(".turn").count() == 0
    ask(page, "Write a long story.")
    assert page.locator(".answer").text_content() == longer


def test_a_following_question_is_asked_with_those_before_it_until_a_document_changes(page):
    page.fill("#document", DOCUMENT)
    page.fill("#tokens", "4")
    first = asked(page, ask, page, "Where does Anna live?")["messages"]
    second = asked(page, ask, page, "And \u241ehe?")["messages"]
    answer = page.locator(".answer").first.text_content()
    page.fill("#document", "Anna moved.")
    other = asked(page, ask, page, "Where to?")["messages"]
    page.click("#forget")
    alone = asked(page, ask, page, "Who?")["messages"]

    assert first == [{"role": "user", "content": f"{DOCUMENT}\n\n\u241eWhere does Anna live?"}]
    assert second == [
        *first,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And he?"},
    ]
    assert other == [{"role": "user", "content": "Anna moved.\n\n\u241eWhere to?"}]
    assert alone == [{"role": "user", "content": "Anna moved.\n\n\u241eWho?"}]


def test_several_documents_are_listed_put_in_order_and_removed(page):
    page.fill("#document", "Mine.")
    page.evaluate(DROP, [["b.txt", "Bee."], ["c.txt", "Sea."]])
    names = page.locator("#list .name")
    playwright.expect(names).to_have_text(["Text 1", "b.txt", "c.txt"])
    page.get_by_label("Move up: c.txt").click()
    page.get_by_label("Remove: Text 1").click()
    playwright.expect(names).to_have_text(["c.txt", "b.txt"])
    assert page.input_value("#document") == "Sea."
    names.last.click()
    page.fill("#document", "Bees.")
    page.fill("#tokens", "1")
    (message,) = asked(page, ask, page, "What?")["messages"]
    assert message["content"] == "# c.txt\n\nSea.\n\n# b.txt\n\nBees.\n\n\u241eWhat?"


def picked(page, name: str, content: bytes) -> str:
    """What the page says after a file was picked."""
    page.set_input_files("#files", {"name": name, "mimeType": "text/plain", "buffer": content})
    playwright.expect(page.locator("#files")).to_have_value("")
    return page.locator("#file-error").text_content()


def test_text_files_are_picked_and_what_is_no_text_is_refused_by_name(page):
    for name, content in (("b.docx", b"PK\x03\x04\xff\xfe"), ("c.bin", b"a\x00b"), ("d.txt", b"caf\xe9")):
        assert picked(page, name, content) == f"{name} is no plain text in UTF-8."
    assert page.input_value("#document") == ""

    for content in (DOCUMENT.encode(), DOCUMENT.encode("utf-8-sig"), DOCUMENT.encode("utf-16")):
        assert picked(page, "right.md", content) == ""
        assert page.input_value("#document") == DOCUMENT
    assert page.complaints == []


def test_a_pdf_is_read_by_the_server_and_one_that_is_none_is_refused_by_name(page):
    assert picked(page, "letters.pdf", pdf("Anna lives in Lisbon.")) == ""
    assert "Anna lives in Lisbon." in page.input_value("#document")
    assert "the PDF file is broken" in picked(page, "paper.txt", b"%PDF-1.7 damaged")


def test_an_html_file_becomes_its_text_and_nothing_of_it_runs(page):
    assert picked(page, "letters.html", HTML.encode()) == ""
    assert page.input_value("#document") == "Letters\n\nAnna & Karl\nwrite letters.\n\none\n\ntwo"
    page.fill("#question", "<img src=x onerror='window.wasRun = true'>")
    page.fill("#tokens", "1")
    page.press("#question", "Enter")
    page.wait_for_selector("#ask:not([disabled])")
    assert page.evaluate("window.wasRun") is None and page.locator("img").count() == 0
    assert page.complaints == []


def luminance(page, of: str) -> float:
    color = page.evaluate(f"getComputedStyle(document.body).{of}")
    return sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(","))) / 3


def test_the_page_is_dark_where_the_person_or_the_system_wants_that(page):
    def expect(theme: str) -> None:
        playwright.expect(page.locator("html")).to_have_attribute("data-theme", theme)
        assert (luminance(page, "backgroundColor") < luminance(page, "color")) == (theme == "dark")

    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        expect(scheme)
    page.click("#theme")
    expect("light")
    assert page.locator("#theme").text_content() == "Theme: light"
    page.reload()
    expect("light")
    page.click("#theme")
    page.emulate_media(color_scheme="light")
    expect("dark")


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_all_without_scrolling_sideways(page, width):
    page.set_viewport_size({"width": width, "height": 700})
    page.check("#looks")
    page.evaluate(DROP, [[f"{'a long name ' * 9}.txt", DOCUMENT], ["b.txt", "x" * 300]])
    page.fill("#tokens", "2")
    ask(page, "y" * 200)
    playwright.expect(page.locator("#map")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for button in page.locator("button:visible").all():
        box = button.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] >= 24
    screenshot(page, f"phone_{width}")


def test_all_that_can_be_used_has_a_name_and_is_reached_by_keyboard(page):
    page.evaluate(DROP, [["a.txt", "One."], ["b.txt", "Two."]])
    page.wait_for_selector("#list li:nth-child(2)")
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, input, select, textarea")].filter(element =>
            !element.textContent.trim() && !element.labels?.length && !element.ariaLabel).map(it => it.id)"""
    )
    assert nameless == []
    page.focus("#theme")
    reached = []
    for _ in range(22):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.ariaLabel"))
    for name in ("Remove: a.txt", "files", "document", "question", "ask", "tokens", "key"):
        assert name in reached


def test_an_error_is_shown_to_the_person(page):
    page.fill("#document", "Short. " * 9000)
    ask(page, "Why?")
    assert "the model's limit is 8192" in page.locator(".turn .error").text_content()


def test_the_key_is_sent(page):
    with page.expect_request("**/v1/chat/completions") as sent:
        page.fill("#key", "a-key")
        page.fill("#tokens", "1")
        ask(page, "Hello?")
    assert sent.value.headers["authorization"] == "Bearer a-key"


def test_the_page_loads_nothing_from_elsewhere_and_only_its_own_script_may_run(server):
    answer = httpx.get(server.url)
    html, policy = answer.text, answer.headers["content-security-policy"]
    assert "http://" not in html and "https://" not in html and "src=" not in html and "href=" not in html
    assert "unsafe" not in policy and policy.count("'sha256-") == 2
    assert not re.search(r"\son[a-z]+=", html) and "innerHTML" not in html
