"""The dashboard's page alone: its events and its microphone's server are made here."""

import json
import mimetypes
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from tests.e2e.browser import ROOT, browser, chromium

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="chromium is not installed"),
]


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("browser")) as made:
        yield made


class Server(ThreadingHTTPServer):
    """The page's files; sessions in `listed` are open."""

    daemon_threads = True
    listed: tuple[str, ...] = ()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/")
        kind = "application/json"
        if path == "v1/status":
            body = b'{"streams": 1, "busy_s": 0}'
        elif path == "v1/sessions":
            entries = [{"session": session, "state": "open"} for session in self.server.listed]
            body = json.dumps({"sessions": entries}).encode()
        else:
            file = ROOT / "stream/web" / (path or "static/index.html")
            kind = mimetypes.guess_type(file.name)[0] or ""
            body = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as made:
        thread = Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


class Page:
    """The page, and the daemon it believes to speak with.

    Attributes:
        audio: Connections of the microphone.
        feeds: Connections for events.
        errors: What went wrong in the page.
    """

    def __init__(self, chrome: Any, server: Server) -> None:
        self.audio: list[Any] = []
        self.feeds: list[Any] = []
        self.errors: list[str] = []
        self.page = chrome.new_page(viewport={"width": 1200, "height": 800})
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.route_web_socket("**/v1/events*", lambda socket: self.feeds.append(socket))
        self.page.route_web_socket("**/v1/audio*", self._call)
        self.page.goto(f"http://127.0.0.1:{server.server_port}/")

    def _call(self, socket: Any) -> None:
        socket.said = []
        socket.on_message(lambda message: socket.said.append(message))
        self.audio.append(socket)

    def tell(self, *events: dict[str, Any]) -> None:
        for event in events:
            self.feeds[-1].send(json.dumps({"cursor": "a.1", "event": event}))

    def until(self, true: str) -> None:
        self.page.wait_for_function(true, timeout=20_000)

    def wait_for(self, true: Any) -> None:
        for _ in range(400):
            if true():
                return
            self.page.wait_for_timeout(25)
        raise AssertionError("waited for too long")


@pytest.fixture
def page(chrome: Any, server: Server) -> Iterator[Page]:
    made = Page(chrome, server)
    yield made
    assert made.errors == []
    made.page.close()


class Talk:
    """A session of made-up events."""

    def __init__(self, session: str = "s1", seq: int = 0) -> None:
        self.session, self.seq = session, seq

    def event(self, kind: str, start: float = 0.0, end: float = 0.0, **more: Any) -> dict[str, Any]:
        seq, self.seq = self.seq, self.seq + 1
        ids = {"session_id": self.session, "stream_id": self.session, "seq": seq}
        return {"type": kind, "start": start, "end": end, "lag_ms": 200, **ids, **more}

    def opened(self) -> dict[str, Any]:
        return self.event("session.opened", source="made up", wall_time="2024-05-01T12:00:00Z")

    def closed(self) -> dict[str, Any]:
        return self.event("session.closed", reason="ended")

    def turn(self, number: int, label: str, start: float) -> dict[str, Any]:
        speaker = {"label": label, "identity": None}
        return self.event("turn.ended", start, start + 2, turn_id=f"t{number}", speaker=speaker)

    def said(
        self, number: int, label: str, start: float, text: str, kind: str = "final"
    ) -> dict[str, Any]:
        words = [
            {"word": word, "start": start + i / 10, "end": start + (i + 1) / 10, "confidence": 0.9}
            | {"speaker": label}
            for i, word in enumerate(text.split())
        ]
        end = start + len(words) / 10
        return self.event(f"transcript.{kind}", start, end, words=words, turn_id=f"t{number}")


class TestState:
    """The modules by themselves, as the page loads them."""

    def test_a_day_of_events_leaves_a_session_small_and_its_shares_right(self, page: Page) -> None:
        sizes = page.page.evaluate(
            """async () => {
              const { Session } = await import("/static/session.js");
              const session = new Session("a", "a");
              let seq = 0;
              const take = (type, more) => session.take({ type, seq: seq++, ...more });
              for (let n = 0; n < 20000; n++) {
                const label = `S${n % 4 + 1}`, turn_id = `t${n}`, start = n * 4, end = start + 2;
                take("turn.ended", { start, end, turn_id, speaker: { label, identity: null } });
                const word = { word: "well", start, end, confidence: 1, speaker: label };
                take("transcript.final", { start, end, turn_id, words: Array(6).fill(word) });
                take("gap", { start, end: start, reason: "network" });
              }
              session.take({ type: "speaker.revised", seq: seq++, start: 0, end: 0,
                reason: "merged", from_label: "S4", to_label: "S1", revision_of: [] });
              const { turns, words, gaps, labels, before } = session;
              return { turns: turns.size, words: words.length, gaps: gaps.length, labels, before,
                shares: Object.fromEntries(session.shares()) };
            }"""
        )
        assert sizes["turns"] <= 400
        assert sizes["words"] <= 5000
        assert sizes["words"] + sizes["before"] == 120_000
        assert sizes["gaps"] <= 100
        assert sizes["labels"] == ["S1", "S2", "S3"]
        assert sizes["shares"] == {"S1": 20_000, "S2": 10_000, "S3": 10_000}


class TestTranscript:
    def test_of_a_long_talk_the_latest_is_shown_and_the_page_says_so(self, page: Page) -> None:
        talk = Talk()
        page.wait_for(lambda: page.feeds)
        page.tell(talk.opened())
        for number in range(150):
            label = f"S{number % 3 + 1}"
            page.tell(talk.turn(number, label, 5 * number))
            page.tell(talk.said(number, label, 5 * number, f"this is number {number}"))
        page.until("document.body.innerText.includes('number 149')")
        assert page.page.locator(".said").count() == 120
        assert page.page.locator(".said").first.locator(".text").inner_text() == "this is number 30"
        assert (
            page.page.locator(".earlier").inner_text() == "What was said before is in the export."
        )
        assert (
            page.page.evaluate("document.querySelector('#words').firstChild.className") == "earlier"
        )

    def test_only_the_last_paragraph_is_looked_at_until_the_past_changes(self, page: Page) -> None:
        looked_at = page.page.evaluate(
            """async () => {
              const { Session } = await import("/static/session.js");
              const { Transcript } = await import("/static/transcript.js");
              const session = new Session("a", "a"), root = document.createElement("div");
              const transcript = new Transcript(root, document.createElement("button"), () => {});
              let seq = 0, looked = 0;
              const take = (type, more) => session.take({ type, seq: seq++, ...more });
              const say = (kind, n, ...texts) => take(`transcript.${kind}`, { turn_id: `t${n}`,
                words: texts.map((word, i) => ({ word, start: 5 * n + i, end: 5 * n + i + 1,
                  confidence: 1, speaker: `S${n % 2 + 1}` })) });
              for (let n = 0; n < 500; n++) say("final", n, "one", "two");
              session.words = new Proxy(session.words, { get(words, key) {
                if (typeof key === "string" && /^[0-9]+$/.test(key)) looked++;
                return Reflect.get(words, key);
              } });
              const counts = [];
              const draw = () => {
                looked = 0;
                transcript.draw(session);
                counts.push([looked, root.innerText ?? root.textContent]);
              };
              draw();
              say("partial", 500, "and", "three");
              draw();
              say("final", 500, "and", "three", "four");
              draw();
              take("speaker.revised", { reason: "merged", from_label: "S2", to_label: "S1",
                revision_of: [] });
              draw();
              return counts.map(([looked, text]) => [looked, text.slice(-30), text.includes("S2")]);
            }"""
        )
        (first, _, two), (partial, saying, _), (final, said, _), (revised, _, still) = looked_at
        assert (first, revised) == (1000, 1003)
        assert max(partial, final) <= 5
        assert saying.endswith("and three ")
        assert said.endswith("and three four ")
        assert (two, still) == (True, False)

    def test_a_page_that_turns_stays_at_the_end_and_one_scrolled_up_does_not(
        self, page: Page
    ) -> None:
        at_end = "(e => e.scrollHeight - e.scrollTop - e.clientHeight < 2)(words)"
        talk = Talk()
        page.wait_for(lambda: page.feeds)
        page.tell(talk.opened())
        for number in range(40):
            page.tell(talk.said(number, f"S{number % 2 + 1}", 5 * number, "well " * 30))
        page.until("document.querySelectorAll('.said').length === 40")
        page.until(at_end)
        page.page.set_viewport_size({"width": 390, "height": 844})
        page.until(at_end)
        assert page.page.locator("#latest").is_hidden()
        page.page.locator("#words").hover()
        page.page.mouse.wheel(0, -600)
        page.page.locator("#latest").wait_for()
        page.tell(talk.said(40, "S1", 200, "and on"))
        page.until("words.innerText.includes('and on')")
        assert not page.page.evaluate(at_end)
        page.page.click("#latest")
        page.until(at_end)

    def test_what_was_over_before_the_page_came_is_said(self, page: Page) -> None:
        talk = Talk(seq=700)
        page.wait_for(lambda: page.feeds)
        page.tell(talk.said(0, "S1", 900, "and so on"))
        page.until("document.body.innerText.includes('and so on')")
        assert "no longer kept" in page.page.locator(".earlier").inner_text()


class TestSessions:
    def test_those_that_are_over_go_but_the_latest(self, page: Page) -> None:
        page.wait_for(lambda: page.feeds)
        for number in range(60):
            talk = Talk(f"s{number}")
            page.tell(talk.opened(), talk.closed())
        page.tell(Talk("last").opened())
        page.until("document.querySelector('#title').innerText === 'last'")
        names = page.page.locator("#sessions .name").all_inner_texts()
        assert set(names) == {"last", *(f"s{number}" for number in range(40, 60))}

    def test_those_a_new_daemon_does_not_know_are_over(
        self, page: Page, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        page.wait_for(lambda: page.feeds)
        page.tell(Talk("lost").opened(), Talk("kept").opened())
        page.until("document.querySelectorAll('#sessions [data-state=open]').length === 2")
        monkeypatch.setattr(server, "listed", ("kept",))
        page.feeds[-1].close(code=1012)
        page.until("document.querySelectorAll('#sessions [data-state=open]').length === 1")
        assert page.page.locator("#sessions [data-state=open] .name").inner_text() == "kept"


class TestMicrophone:
    @staticmethod
    def ready(socket: Any, received: int) -> None:
        ready = {"type": "ready", "session_id": "s1", "resume_token": "r", "received": received}
        socket.send(json.dumps(ready))

    def test_stopped_while_the_connection_is_lost_it_comes_back_to_end_the_session(
        self, page: Page
    ) -> None:
        page.page.click("#mic")
        page.wait_for(lambda: page.audio)
        first = page.audio[0]
        self.ready(first, 0)
        page.wait_for(lambda: len(first.said) > 3)
        first.close(code=1011)
        page.page.locator("#toast", has_text="The connection broke").wait_for()
        page.page.click("#mic")
        page.page.locator("#mic[aria-pressed=false]").wait_for()
        page.wait_for(lambda: len(page.audio) > 1)
        page.audio[1].close(code=1011)  # not yet
        page.wait_for(lambda: len(page.audio) > 2)
        last = page.audio[2]
        assert "resume=r&have=0" in last.url
        half = len(first.said[0]) // 4
        self.ready(last, half)
        page.wait_for(lambda: '{"type":"close"}' in last.said)
        *audio, end = last.said
        assert end == '{"type":"close"}'
        assert b"".join(audio)[: len(first.said[0]) - 2 * half] == first.said[0][2 * half :]
        last.close(code=1000)
        page.page.wait_for_timeout(800)  # longer than the pause before another try
        assert len(page.audio) == 3
