"""The dashboard's dialog that says who a speaker is, and keeps a voice with its consent."""

from datetime import UTC, datetime, timedelta

import pytest

from stream.voiceprints import Voiceprints
from tests.e2e.browser import browser, chromium, daemon

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="chromium is not installed"),
]


def test_a_voice_is_kept_with_what_was_agreed_to(tmp_path):
    with daemon(tmp_path) as url, browser(tmp_path) as chrome:
        page = chrome.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.keyboard.press("m")
        page.locator("#speakers button").first.click(timeout=30_000)
        more, enrol = page.locator("#naming-voice"), page.get_by_role("checkbox")
        assert not more.is_visible()
        assert enrol.get_attribute("aria-expanded") == "false"
        enrol.check()
        assert more.is_visible()
        assert enrol.get_attribute("aria-expanded") == "true"
        page.get_by_label("Name").fill("Anna")
        page.get_by_label("What the person agreed to").fill("said yes at the start")
        page.get_by_label("Erase the voice after").fill("0")
        page.get_by_role("button", name="Save").click()
        assert page.locator("#naming").is_visible()  # 0 days: the browser holds it back
        # What is wrong and hidden holds nothing back.
        enrol.uncheck()
        assert not more.is_visible()
        page.get_by_role("button", name="Save").click()
        page.locator("#naming").wait_for(state="hidden", timeout=10_000)
        page.locator("#speakers .name", has_text="Anna").wait_for(timeout=10_000)
        # Another time, nothing of it is left in the dialog.
        page.locator("#speakers button", has_text="Anna").click()
        assert not more.is_visible()
        enrol.check()
        assert page.get_by_label("What the person agreed to").input_value() == ""
        page.get_by_label("What the person agreed to").fill("said yes at the start")
        page.get_by_label("Erase the voice after").fill("30")
        while page.locator("#naming").is_visible():  # until there is enough clean speech
            page.get_by_role("button", name="Save").click()
            page.wait_for_timeout(1000)
            said = page.locator("#naming-error").inner_text()
            assert not said or "s of clean speech so far" in said
        assert errors == []
    with Voiceprints.open(tmp_path / "voices.db") as store:
        (voice,) = store.voices()
    assert (voice.name, voice.consent) == ("Anna", "said yes at the start")
    assert timedelta(days=29) < voice.expires - datetime.now(UTC) < timedelta(days=30)
