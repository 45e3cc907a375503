"""The page at `/`, driven in headless Chromium: a document in, two questions, two answers."""

import os
import shutil

import httpx
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"
)
DOCUMENT = "Anna lives in Lisbon. Her brother Karl lives in Oslo. They write letters to each other. " * 24
DROP = """text => {
    const data = new DataTransfer();
    data.items.add(new File([text], "document.txt", {type: "text/plain"}));
    const target = document.getElementById("document");
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
    page = browser.new_page(viewport={"width": 1000, "height": 1100})
    page.set_default_timeout(30_000)
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    # Not "requestfailed": Chromium says so of every streamed body that a script reads to its end.
    page.on("response", lambda answer: answer.ok or page.complaints.append(f"{answer.url}: {answer.status}"))
    page.goto(server.url)
    yield page
    page.close()


def ask(page, question: str) -> None:
    page.fill("#question", question)
    page.click("#ask")
    page.wait_for_selector("#ask:not([disabled])")


def test_a_document_is_pasted_and_two_questions_are_answered(page):
    page.fill("#document", DOCUMENT)
    page.fill("#tokens", "16")
    ask(page, "Where does Anna live?")
    ask(page, "What is the capital of France?")

    answers = page.locator(".answer").all_text_contents()
    assert len(answers) == 2 and all(answers) and answers[0] != answers[1]
    rows = page.locator("tbody tr").all_text_contents()
    assert "encoded now" in rows[0] and "was encoded" in rows[1]
    assert page.complaints == []
    for scheme in ("light", "dark") if "PAGE_SCREENSHOTS" in os.environ else ():
        page.emulate_media(color_scheme=scheme)
        page.screenshot(path=f"{os.environ['PAGE_SCREENSHOTS']}/{scheme}.png", full_page=True)


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


def test_a_text_file_is_dropped_and_the_answer_is_stopped(page):
    page.evaluate(DROP, DOCUMENT)
    playwright.expect(page.locator("#document")).to_have_value(DOCUMENT)

    page.fill("#tokens", "4000")
    page.fill("#question", "Tell me everything.")
    page.click("#ask")
    playwright.expect(page.locator(".answer")).not_to_be_empty(timeout=60_000)
    page.click("#stop")
    page.wait_for_selector(".error")
    assert page.locator(".error").text_content() == "Stopped."


def test_a_following_question_is_asked_with_those_before_it_until_the_document_changes(page):
    def asked(question: str) -> list[dict]:
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, question)
        return sent.value.post_data_json["messages"]

    page.fill("#document", DOCUMENT)
    page.fill("#tokens", "4")
    first, second = asked("Where does Anna live?"), asked("And \u241ehe?")
    answer = page.locator(".answer").first.text_content()
    page.fill("#document", "Anna moved.")
    other = asked("Where to?")
    page.click("#forget")
    alone = asked("Who?")

    assert first == [{"role": "user", "content": f"{DOCUMENT}\n\n\u241eWhere does Anna live?"}]
    assert second == [
        *first,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And he?"},
    ]
    assert other == [{"role": "user", "content": "Anna moved.\n\n\u241eWhere to?"}]
    assert alone == [{"role": "user", "content": "Anna moved.\n\n\u241eWho?"}]
    rows = page.locator("tbody tr").all_text_contents()
    assert "was encoded" in rows[1] and "encoded now" in rows[2] and "was encoded" in rows[3]


def test_an_answer_that_the_limit_cut_off_says_so(page):
    page.fill("#tokens", "3")
    ask(page, "Write a long story.")
    page.fill("#tokens", "20")
    ask(page, "What is the capital of France?")

    cuts = page.locator(".turn").filter(has=page.locator(".cut"))
    assert cuts.locator(".question").all_text_contents() == ["Write a long story."]
    assert page.locator(".cut").text_content() == "[cut off at the limit of 3 tokens]"


def picked(page, name: str, content: bytes) -> str:
    """What the page says after a file was picked."""
    page.set_input_files("#file", {"name": name, "mimeType": "text/plain", "buffer": content})
    playwright.expect(page.locator("#file")).to_have_value("")
    return page.locator("#file-error").text_content()


def test_a_text_file_is_picked_and_what_is_no_text_is_refused_by_name(page):
    for name, content in (("a.pdf", b"anything"), ("paper.txt", b"%PDF-1.7\n...")):
        assert f"{name} is a PDF" in picked(page, name, content)
    for name, content in (("b.docx", b"PK\x03\x04\xff\xfe"), ("c.bin", b"a\x00b"), ("d.txt", b"caf\xe9")):
        assert picked(page, name, content) == f"{name} is no plain text in UTF-8."
    assert page.input_value("#document") == ""

    for content in (DOCUMENT.encode(), DOCUMENT.encode("utf-8-sig"), DOCUMENT.encode("utf-16")):
        page.fill("#document", "")
        assert picked(page, "right.md", content) == ""
        assert page.input_value("#document") == DOCUMENT
    assert page.complaints == []


def test_the_page_is_dark_where_the_person_wants_that(page):
    def luminance(of: str) -> float:
        color = page.evaluate(f"getComputedStyle(document.body).{of}")
        return sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(","))) / 3

    for scheme, is_dark in (("light", False), ("dark", True)):
        page.emulate_media(color_scheme=scheme)
        assert (luminance("backgroundColor") < luminance("color")) == is_dark


def test_an_error_is_shown_to_the_person(page):
    page.fill("#document", "Short. " * 9000)
    ask(page, "Why?")
    assert "the model's limit is 8192" in page.locator(".error").text_content()


def test_the_key_is_sent(page, server):
    with page.expect_request("**/v1/chat/completions") as sent:
        page.fill("#key", "a-key")
        page.fill("#tokens", "1")
        ask(page, "Hello?")
    assert sent.value.headers["authorization"] == "Bearer a-key"


def test_the_page_loads_nothing_from_elsewhere(server):
    html = httpx.get(server.url).text
    assert "http://" not in html and "https://" not in html and "src=" not in html
