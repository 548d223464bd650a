"""The chat page as a person sees it, in headless Chromium."""

from __future__ import annotations

import re
import shutil

import pytest

api = pytest.importorskip("playwright.sync_api", reason="needs the extra `dev` (playwright)")
api.expect.set_options(timeout=20_000)
pytest.importorskip("openai", reason="needs the extra `test`")

from engines import slowed  # noqa: E402
from test_serve import folders, idle, serving  # noqa: E402, F401

SOME = re.compile(".{4}", re.DOTALL)


@pytest.fixture(scope="module")
def browser():
    """Playwright's own Chromium or the system's."""
    names = ("chromium", "chromium-browser", "google-chrome")
    installed = next(filter(None, map(shutil.which, names)), None)
    with api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"needs Chromium: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture
def page(browser):
    page = browser.new_page()
    page.set_default_timeout(20_000)
    failures = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    yield page
    page.close()
    assert failures == []


def ask(page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def answer(page) -> str:
    return page.locator(".assistant").last.inner_text()


def test_a_conversation(folders, page):  # noqa: F811
    with serving(folders) as (service, url), slowed(service.engine, 0.005):
        page.goto(url)
        api.expect(page.get_by_label("Model").locator("option")).to_have_text(["tiny", "red"])
        ask(page, "hé <b>there</b>")
        assert page.locator(".user").inner_text() == "hé <b>there</b>", "text, not markup"
        api.expect(page.locator(".assistant")).to_have_text(SOME)
        early = answer(page)
        api.expect(page.get_by_role("button", name="Stop")).to_be_visible()
        api.expect(page.locator(".note")).to_have_text(re.compile(r"\d+ tokens in \d+\.\d s"))
        assert len(answer(page)) > len(early) and answer(page).startswith(early[:2])
        api.expect(page.get_by_role("button", name="Send")).to_be_visible()
        page.get_by_label("Model").select_option("red")
        ask(page, "and again")
        api.expect(page.locator(".user")).to_have_count(2)
        page.get_by_role("button", name="New chat").click()
        api.expect(page.locator(".turn")).to_have_count(0)
        assert idle(service)


def test_a_reply_is_stopped(folders, page):  # noqa: F811
    with serving(folders) as (service, url), slowed(service.engine, 0.02):
        page.goto(url)
        ask(page, "a")
        api.expect(page.locator(".assistant")).to_have_text(SOME)
        page.get_by_role("button", name="Stop").click()
        api.expect(page.get_by_role("button", name="Send")).to_be_visible()
        kept = answer(page)
        assert idle(service), "the server stops too"
        assert answer(page) == kept and page.locator(".error").count() == 0
        sent = []
        page.on("request", lambda request: sent.append(request.post_data_json))
        ask(page, "b")
        api.expect(page.locator(".assistant")).to_have_count(2)
        api.expect(page.locator(".assistant").last).to_have_text(SOME)
        page.get_by_role("button", name="Stop").click()
        assert [turn["role"] for turn in sent[0]["messages"]] == ["user", "assistant", "user"]


def test_errors_are_shown(folders, page):  # noqa: F811
    with serving(folders, request_timeout=0.5) as (service, url), slowed(service.engine, 0.02):
        page.goto(url)
        api.expect(page.get_by_label("Model").locator("option")).to_have_count(2)
        ask(page, "a")
        api.expect(page.locator(".error")).to_have_text("the reply took too long")
        ask(page, "x" * 600)
        api.expect(page.locator(".error").last).to_have_text(re.compile("at most 512 tokens"))
    ask(page, "is someone there?")
    api.expect(page.locator(".error")).to_have_count(3)
    assert page.locator(".error").last.inner_text() != ""
    api.expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_a_key_is_asked_for(folders, page):  # noqa: F811
    with serving(folders, api_key="sesame") as (_, url):
        page.goto(url)
        key = page.get_by_label("API key")
        api.expect(key).to_be_visible()
        key.fill("sesame")
        key.press("Tab")
        api.expect(page.get_by_label("Model").locator("option")).to_have_count(2)
        ask(page, "a")
        api.expect(page.locator(".note")).to_have_count(1)
