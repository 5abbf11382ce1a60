import json
import re

import pytest
import soundfile
from websockets.sync.client import connect

from tests.e2e.browser import browser, chromium, daemon

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="chromium is not installed"),
]

TOKEN = "a-token-that-is-long-enough"


def test_a_voice_at_the_microphone_becomes_a_speaker_with_words(tmp_path):
    with daemon(tmp_path) as url, browser(tmp_path) as chrome:
        page = chrome.new_page()
        errors: list[str] = []
        outside: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: said.type == "error" and errors.append(said.text))
        page.on("request", lambda asked: asked.url.startswith(url) or outside.append(asked.url))
        page.goto(url)
        assert page.locator("#nobody").is_visible()
        page.keyboard.press("m")
        page.locator("#speakers li").first.wait_for(timeout=30_000)
        page.locator(".said .word").first.wait_for(timeout=30_000)
        page.locator(".said .word:not(.partial)").first.wait_for(timeout=30_000)
        assert page.locator("#mic").get_attribute("aria-pressed") == "true"
        assert re.search(r"\d+ stream", page.locator("#health").inner_text())
        # Say who it is: the lane and what was said take the name.
        page.locator("#speakers button").first.click()
        page.fill("#naming-name", "Anna")
        page.keyboard.press("Enter")
        page.locator("#speakers .name", has_text="Anna").wait_for(timeout=10_000)
        page.locator(".said .who", has_text="Anna").first.wait_for(timeout=10_000)
        session = page.locator("#sessions li").first.get_attribute("data-key")
        page.keyboard.press("m")
        page.locator("#about", has_text="ended").wait_for(timeout=15_000)
        # A page that comes later shows the same, from what the daemon keeps.
        other = chrome.new_page()
        other.goto(url)
        other.locator(".said .who", has_text="Anna").first.wait_for(timeout=10_000)
        with page.expect_download() as saved:
            page.click("#export-rttm")
        assert f"{session}.rttm" == saved.value.suggested_filename
        assert " Anna " in saved.value.path().read_text()
        assert errors == []
        assert outside == []


def test_a_session_is_saved_in_every_form_by_its_links(tmp_path, opening):
    samples, rate = soundfile.read(opening, dtype="int16")
    with daemon(tmp_path) as url, browser(tmp_path) as chrome:
        with connect(f"{url.replace('http', 'ws')}/v1/audio?rate={rate}&partials=false") as caller:
            session = json.loads(caller.recv())["session_id"]
            for at in range(0, len(samples), rate):
                caller.send(samples[at : at + rate].tobytes())
            caller.send('{"type": "close"}')
            events = [json.loads(message) for message in caller]
        page = chrome.new_page()
        page.goto(url)
        page.locator("#about", has_text="ended").wait_for(timeout=10_000)
        saved = {}
        for form in ("rttm", "vtt", "json", "txt"):
            with page.expect_download() as download:
                page.click(f"#export-{form}")
            assert download.value.suggested_filename == f"{session}.{form}"
            saved[form] = download.value.path().read_text()
    turns = [event for event in events if event["type"] == "turn.ended"]
    words = [
        word["word"]
        for event in events
        if event["type"] == "transcript.final"
        for word in event["words"]
    ]
    assert len(saved["rttm"].splitlines()) == len(turns) > 1
    assert saved["vtt"].startswith("WEBVTT")
    assert " --> " in saved["vtt"]
    assert json.loads(saved["json"])["events"] == [e for e in events if e["is_final"]]
    assert len(words) > 5
    for word in words:
        assert word in saved["txt"]


def test_what_asks_for_a_token_is_entered_with_one(tmp_path):
    with daemon(tmp_path, token=TOKEN) as url, browser(tmp_path) as chrome:
        page = chrome.new_page()
        page.goto(url)
        page.locator("#login").wait_for(timeout=10_000)
        page.fill("#login-token", "wrong")
        page.keyboard.press("Enter")
        page.locator("#login-error", has_text="not a token").wait_for(timeout=10_000)
        page.fill("#login-token", TOKEN)
        page.keyboard.press("Enter")
        page.locator("#health[data-state=good]").wait_for(timeout=10_000)
        assert not page.locator("#login").is_visible()
        # A browser that others use forgets it again.
        assert page.request.post(f"{url}/v1/logout").ok
        page.goto(url)
        page.locator("#login").wait_for(timeout=10_000)


def test_it_fits_a_phone_and_names_what_it_shows(tmp_path):
    with daemon(tmp_path) as url, browser(tmp_path) as chrome:
        page = chrome.new_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
        page.goto(url)
        page.click("#mic")
        page.locator("#speakers li").first.wait_for(timeout=30_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        nameless = page.evaluate(
            "[...document.querySelectorAll('button, a, input, canvas')].filter(e =>"
            " !e.hidden && !(e.innerText || e.ariaLabel || e.title || e.labels?.length))"
            ".map(e => e.outerHTML)"
        )
        assert nameless == []
        page.click("#mic")
