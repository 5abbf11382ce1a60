"""The dashboard's page alone: its events and its microphone's server are made here."""

import json
import mimetypes
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import MappingProxyType
from typing import Any, ClassVar

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
    """The page's files; sessions in `listed` are open, and the house is as `status` says.

    What is `refused` is answered with a status and a body.
    """

    daemon_threads = True
    listed: tuple[str, ...] = ()
    status: Mapping[str, Any] = MappingProxyType({"streams": 1, "busy_s": 0})
    refused: Mapping[str, tuple[int, str]] = MappingProxyType({})


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/")
        kind = "application/json"
        status = 200
        if path in self.server.refused:
            status, said = self.server.refused[path]
            body = said.encode()
        elif path == "v1/status":
            body = json.dumps(dict(self.server.status)).encode()
        elif path == "v1/sessions":
            entries = [{"session": session, "state": "open"} for session in self.server.listed]
            body = json.dumps({"sessions": entries}).encode()
        else:
            file = ROOT / "stream/web" / (path or "static/index.html")
            kind = mimetypes.guess_type(file.name)[0] or ""
            body = file.read_bytes()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_POST(self) -> None:
        self.do_PUT()

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
        shut: No connection for events stays.
    """

    def __init__(self, chrome: Any, server: Server) -> None:
        self.audio: list[Any] = []
        self.feeds: list[Any] = []
        self.errors: list[str] = []
        self.shut = False
        self.page = chrome.new_page(viewport={"width": 1200, "height": 800})
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.route_web_socket("**/v1/events*", self._feed)
        self.page.route_web_socket("**/v1/audio*", self._call)
        self.page.goto(f"http://127.0.0.1:{server.server_port}/")

    def _feed(self, socket: Any) -> None:
        self.feeds.append(socket)
        if self.shut:
            socket.close(code=1012)

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

    def turn(
        self, number: int, label: str, start: float, end: float | None = None
    ) -> dict[str, Any]:
        speaker = {"label": label, "identity": None}
        end = start + 2 if end is None else end
        return self.event("turn.ended", start, end, turn_id=f"t{number}", speaker=speaker)

    def revised(self, reason: str, label: str, to: str, *turns: str) -> dict[str, Any]:
        labels = {"from_label": label, "to_label": to}
        return self.event("speaker.revised", reason=reason, revision_of=list(turns), **labels)

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

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_words_that_may_still_change_are_lighter_until_they_are_final(
        self, page: Page, scheme: str
    ) -> None:
        contrast = """text => {
          const word = [...document.querySelectorAll(".word")].find(e => e.textContent === text);
          const bright = (colour) => {
            const [r, g, b] = colour.match(/[\\d.]+/g).map(Number);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const ground = bright(getComputedStyle(document.body).backgroundColor);
          return Math.abs(bright(getComputedStyle(word).color) - ground);
        }"""
        page.page.emulate_media(color_scheme=scheme)
        talk = Talk()
        page.wait_for(lambda: page.feeds)
        page.tell(talk.opened(), talk.said(0, "S1", 0, "certain"))
        page.tell(talk.said(1, "S1", 1, "perhaps", "partial"))
        page.until("words.innerText.includes('perhaps')")
        assert page.page.locator(".word.partial").all_inner_texts() == ["perhaps"]
        certain = page.page.evaluate(contrast, "certain")
        assert page.page.evaluate(contrast, "perhaps") < 0.75 * certain
        page.tell(talk.said(1, "S1", 1, "perhaps"))
        page.until("!document.querySelector('.word.partial')")
        assert page.page.evaluate(contrast, "perhaps") == certain

    @pytest.mark.parametrize(
        ("reason", "turns", "moved"), [("split", ["t2"], [2]), ("merged", [], [0, 2])]
    )
    def test_a_revision_is_seen_where_it_happens(
        self, page: Page, reason: str, turns: list[str], moved: list[int]
    ) -> None:
        shown = """[...document.querySelectorAll(".said")].map(e =>
          [e.mark, e.dataset.label, getComputedStyle(e).animationName === "revised"])"""
        talk = Talk()
        page.wait_for(lambda: page.feeds)
        page.tell(talk.opened())
        labels = ["S1", "S2", "S1", "S3"]
        for number, label in enumerate(labels):
            page.tell(talk.turn(number, label, 5 * number))
            page.tell(talk.said(number, label, 5 * number, f"number {number}"))
        page.until("document.querySelectorAll('.said').length === 4")
        page.page.evaluate("document.querySelectorAll('.said').forEach((e, i) => e.mark = i)")
        assert page.page.evaluate(shown) == [[i, x, False] for i, x in enumerate(labels)]
        page.tell(talk.revised(reason, "S1", "S4", *turns))
        page.until("document.querySelector('.said.revised')")
        for number in moved:
            labels[number] = "S4"
        assert page.page.evaluate(shown) == [[i, x, i in moved] for i, x in enumerate(labels)]


class TestLanes:
    COLOURS = """([lane, second, heard]) => {
      const canvas = document.querySelector("#canvas"), ratio = devicePixelRatio;
      const x = (second / heard) * (canvas.clientWidth - 16) + 4, y = 8 + 40 * lane + 20;
      const pixel = canvas.getContext("2d").getImageData(x * ratio, (y - 5) * ratio, 1, 1);
      return [...pixel.data];
    }"""

    def test_who_talks_over_whom_is_pale_in_both_lanes(self, page: Page) -> None:
        talk = Talk()
        page.wait_for(lambda: page.feeds)
        page.tell(talk.opened(), talk.turn(0, "S1", 0, 13), talk.turn(1, "S2", 7, 18))
        page.tell(talk.turn(2, "S3", 18, 20), talk.closed())
        page.page.locator("#about", has_text="ended").wait_for()
        page.until("document.querySelectorAll('#speakers li').length === 3")

        def colour(lane: int, second: float) -> list[int]:
            return page.page.evaluate(self.COLOURS, [lane, second, 20])

        def paled(colour: list[int]) -> list[float]:
            paper = [0xFF, 0xFE, 0xFB, 255]
            return [0.65 * c + 0.35 * p for c, p in zip(colour, paper, strict=True)]

        page.wait_for(lambda: colour(2, 19)[3] == 255)  # it has been drawn
        first, second = colour(0, 3), colour(1, 16)
        assert first[:3] == [0xC2, 0x41, 0x0C]
        assert second[:3] == [0x1D, 0x6F, 0xD1]
        for at in (7.5, 9, 12.5):
            assert colour(0, at) == pytest.approx(paled(first), abs=2)
            assert colour(1, at) == pytest.approx(paled(second), abs=2)
        assert colour(0, 6.5) == first
        assert colour(1, 13.5) == second
        assert (colour(0, 16)[3], colour(1, 3)[3]) == (0, 0)  # who is silent has no bar


class TestBadge:
    @pytest.mark.parametrize(
        ("status", "lag", "state", "text"),
        [
            ({"realtime_factor": 0.25}, 400, "good", "1 stream · 0.4 s behind · 25 % busy"),
            (
                {"streams": 2, "realtime_factor": 0.3},
                0,
                "good",
                "2 streams · 0.0 s behind · 60 % busy",
            ),
            ({}, 4200, "slow", "1 stream · 4.2 s behind"),
            ({"streams": 0}, 400, "good", "0 streams"),
            ({"busy_s": 9}, 400, "bad", "the engine is stuck"),
        ],
    )
    def test_it_says_how_far_behind_and_how_busy_the_house_is(
        self,
        chrome: Any,
        server: Server,
        monkeypatch: pytest.MonkeyPatch,
        status: dict[str, Any],
        lag: int,
        state: str,
        text: str,
    ) -> None:
        monkeypatch.setattr(server, "status", {"streams": 1, "busy_s": 0, **status})
        page = Page(chrome, server)
        page.wait_for(lambda: page.feeds)
        talk = Talk()
        page.tell(talk.opened(), talk.turn(0, "S1", 0) | {"lag_ms": lag})
        page.page.locator("#health", has_text=text).wait_for()
        badge = page.page.locator("#health")
        assert badge.inner_text() == text
        assert badge.get_attribute("data-state") == state
        assert page.errors == []
        page.page.close()

    def test_a_daemon_that_is_gone_is_said_and_so_is_its_return(self, page: Page) -> None:
        page.page.locator("#health[data-state=good]").wait_for()
        page.shut = True
        page.feeds[-1].close(code=1012)
        page.page.locator("#health[data-state=bad]", has_text="not connected").wait_for()
        page.shut = False
        page.page.locator("#health[data-state=good]", has_text="1 stream").wait_for()

    def test_a_house_that_does_not_answer_is_not_one_without_streams(
        self, chrome: Any, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        crowded = json.dumps({"err_code": "TOO_MANY_REQUESTS", "err_msg": "try again later"})
        monkeypatch.setattr(server, "refused", {"v1/status": (429, crowded)})
        page = Page(chrome, server)
        page.page.locator("#health", has_text="the server's state is not known").wait_for()
        assert page.page.locator("#health").get_attribute("data-state") == "unknown"
        monkeypatch.setattr(server, "refused", {})
        page.page.locator("#health[data-state=good]", has_text="1 stream").wait_for()
        page.page.close()


class TestRefusals:
    """What the server says no to, and why, is read where it was asked."""

    GATE: ClassVar = json.dumps({"err_code": "FORBIDDEN", "err_msg": "this origin is not allowed"})
    REASONS: ClassVar = [
        (403, GATE, "this origin is not allowed"),
        (422, json.dumps({"error": "this name is too long"}), "this name is too long"),
        (502, "<html>a proxy's page</html>", "Bad Gateway"),
        (503, "null", "Service Unavailable"),
        (None, "", "the server cannot be reached"),
    ]
    IDS: ClassVar = ["gate", "endpoint", "proxy", "nothing", "gone"]

    def refuse(
        self, page: Page, server: Server, patch: pytest.MonkeyPatch, path: str, *answer: Any
    ) -> None:
        if answer[0] is None:
            page.page.route(f"**/{path}", lambda route: route.abort())
        else:
            patch.setattr(server, "refused", {path: answer})

    @pytest.mark.parametrize(("status", "body", "reason"), REASONS, ids=IDS)
    def test_of_a_token(
        self,
        page: Page,
        server: Server,
        monkeypatch: pytest.MonkeyPatch,
        status: int | None,
        body: str,
        reason: str,
    ) -> None:
        page.wait_for(lambda: page.feeds)
        page.feeds[-1].close(code=1008, reason="expected a token")
        page.page.locator("#login").wait_for()
        self.refuse(page, server, monkeypatch, "v1/login", status, body)
        page.page.fill("#login-token", "a token")
        page.page.keyboard.press("Enter")
        page.page.locator("#login-error", has_text=reason).wait_for()

    @pytest.mark.parametrize(("status", "body", "reason"), REASONS, ids=IDS)
    def test_of_a_name(
        self,
        page: Page,
        server: Server,
        monkeypatch: pytest.MonkeyPatch,
        status: int | None,
        body: str,
        reason: str,
    ) -> None:
        page.wait_for(lambda: page.feeds)
        talk = Talk()
        page.tell(talk.opened(), talk.turn(0, "S1", 0))
        self.refuse(page, server, monkeypatch, "v1/sessions/s1/speakers/S1", status, body)
        page.page.locator("#speakers button").click()
        page.page.fill("#naming-name", "Anna")
        page.page.keyboard.press("Enter")
        page.page.locator("#naming-error", has_text=reason).wait_for()
        assert page.page.locator("#naming").is_visible()


class TestAloud:
    """What a screen reader is told: what changes in the page's live regions."""

    WATCH: ClassVar = """() => {
      window.told = [];
      for (const region of document.querySelectorAll("[role=status], [role=log], [aria-live]")) {
        if (region.getAttribute("aria-live") === "off") continue;
        new MutationObserver((changes) => {
          for (const change of changes) {
            for (const node of change.addedNodes) told.push(node.textContent);
          }
        }).observe(region, { childList: true, subtree: true, characterData: true });
      }
    }"""

    def test_finals_are_said_once_and_partials_never(self, page: Page) -> None:
        talk = Talk()
        page.wait_for(lambda: page.feeds)
        page.until("document.querySelector('#health').dataset.state === 'good'")
        page.page.evaluate(self.WATCH)
        final = talk.said(1, "S1", 0, "well then") | {"seq": 9}
        page.tell(talk.opened(), talk.said(1, "S1", 0, "well", "partial"))
        page.tell(talk.said(1, "S1", 0, "well the", "partial"), final, final)
        page.until("words.innerText.includes('well then')")
        page.tell(talk.said(2, "S2", 5, "so be it", "partial") | {"seq": 10})
        page.until("words.innerText.includes('so be it')")
        page.tell(talk.said(2, "S2", 5, "so be it") | {"seq": 11})
        page.until("told.includes('S2: so be it')")
        assert page.page.evaluate("told") == ["S1: well then", "S2: so be it"]

    def test_of_all_that_is_kept_the_latest_is_said(self, page: Page) -> None:
        aloud = page.page.evaluate(
            """async () => {
              let say;
              window.setInterval = (call) => (say = call);
              const { Aloud } = await import("/static/aloud.js");
              const root = document.createElement("div"), aloud = new Aloud(root), counts = [];
              for (let n = 0; n < 1000; n++) {
                aloud.take(`number ${n}`);
                if (n % 100 === 99) { say(); counts.push(root.childElementCount); }
              }
              return { counts, last: root.lastChild.textContent };
            }"""
        )
        assert aloud["counts"] == [5, 10, 15, *[20] * 7]
        assert aloud["last"] == "number 999"

    def test_the_badge_is_read_out_when_its_state_changes(self, page: Page) -> None:
        talk = Talk()
        page.wait_for(lambda: page.feeds)
        page.until("document.querySelector('#health').dataset.state === 'good'")
        page.page.evaluate(self.WATCH)
        page.tell(talk.opened())
        for number, lag in enumerate((500, 1500, 2500)):
            page.tell(talk.turn(number, "S1", 5 * number) | {"lag_ms": lag})
        page.page.locator("#health", has_text="0.8 s behind").wait_for()
        page.tell(talk.turn(3, "S1", 20) | {"lag_ms": 30_000})
        page.page.locator("#health[data-state=slow]").wait_for()
        page.until("told.length")
        assert page.page.evaluate("told") == ["1 stream · 3.7 s behind"]


class TestKeys:
    def test_j_and_k_go_down_and_up_the_sessions(self, page: Page) -> None:
        page.wait_for(lambda: page.feeds)
        for name in ("a", "b", "c"):
            page.tell(Talk(name).opened())
        page.until("document.querySelectorAll('#sessions li').length === 3")
        names = page.page.locator("#sessions .name").all_inner_texts()

        def press(key: str, chosen: str) -> None:
            page.page.keyboard.press(key)
            page.until(f"document.querySelector('#title').innerText === {chosen!r}")
            current = page.page.locator("#sessions [aria-current=true] .name")
            assert current.all_inner_texts() == [chosen]
            href = page.page.locator("#export-vtt").get_attribute("href")
            assert href == f"/v1/sessions/{chosen}/export.vtt"

        page.until("document.querySelector('#title').innerText === 'c'")
        for key in ("k", "k", "k"):
            page.page.keyboard.press(key)
        press("k", names[0])  # the first has none above it
        press("j", names[1])
        press("j", names[2])
        press("j", names[2])
        press("k", names[1])
        press("Control+j", names[1])  # the browser's own
        page.tell(Talk("new").opened())
        page.until("document.querySelectorAll('#sessions li').length === 4")
        assert page.page.locator("#title").inner_text() == names[1]  # what was chosen stays


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


class TestCall:
    """The microphone's stream by itself, with a server and a clock made here.

    A block is a second of ten samples, each of them its own position.
    """

    STAGE: ClassVar = """async () => {
      const { Call } = await import("/static/microphone.js");
      const later = [], sockets = [], states = [];
      window.setTimeout = (call) => later.push(call);
      window.WebSocket = class {
        constructor(url) {
          Object.assign(this, { url, said: [], closed: false, bufferedAmount: 0 });
          sockets.push(this);
        }
        send(what) { this.said.push(...what); }
        close() { this.closed = true; }
      };
      const call = new Call(10, (state, detail) => states.push([state, detail]));
      let at = 0;
      window.stage = { call, sockets, states,
        say(seconds) {
          for (; seconds > 0; seconds--) call.say(Int16Array.from({ length: 10 }, () => at++));
        },
        ready(received, resume_token = "r") {
          const value = { type: "ready", session_id: "s1", resume_token, received };
          sockets.at(-1).onmessage({ data: JSON.stringify(value) });
        },
        shut(code, reason = "") { sockets.at(-1).onclose({ code, reason }); },
        again() { later.shift()(); },
        have() { return Number(sockets.at(-1).url.searchParams.get("have")); },
        said() { return sockets.at(-1).said; },
      };
    }"""

    def play(self, page: Page, what: str) -> Any:
        page.page.evaluate(self.STAGE)
        return page.page.evaluate(f"() => {{ const s = stage; {what} }}")

    def test_what_a_slow_connection_keeps_waiting_is_left_out(self, page: Page) -> None:
        told = self.play(
            page,
            """
            s.ready(0);
            s.sockets[0].bufferedAmount = 2 * 10 * 1; s.say(1);
            s.sockets[0].bufferedAmount = 2 * 10 * 6; s.say(1);
            const patient = s.sockets.length;
            s.sockets[0].bufferedAmount = 2 * 10 * 6 + 2; s.say(1);
            const have = s.have();
            s.say(2);
            s.ready(have);
            return { patient, have, left: s.sockets[0].closed, said: s.said(), states: s.states };
            """,
        )
        assert told["patient"] == 1
        assert told["left"]
        assert told["have"] == 30
        assert told["said"] == list(range(30, 50))
        assert told["states"] == [["on", "s1"], ["slow", None], ["on", "s1"]]

    def test_what_a_new_connection_must_catch_up_with_may_wait(self, page: Page) -> None:
        counts = self.play(
            page,
            """
            s.ready(0);
            s.shut(1006);
            s.say(25);
            s.again();
            s.ready(0);
            const counts = [];
            for (const waits of [25, 29, 20, 10, 0, 5, 6]) {
              s.sockets.at(-1).bufferedAmount = 2 * 10 * waits;
              s.say(1);
              counts.push(s.sockets.length);
            }
            return counts;
            """,
        )
        assert counts == [2, 2, 2, 2, 2, 2, 3]

    def test_a_session_that_cannot_be_resumed_ends_where_it_is_too_slow(self, page: Page) -> None:
        states = self.play(
            page,
            """
            s.ready(0, null);
            s.say(1);
            s.sockets[0].bufferedAmount = 1000; s.say(1);
            return [s.states, s.sockets.length];
            """,
        )
        assert states == [[["on", "s1"], ["refused", "The connection is too slow."]], 1]

    def test_after_a_long_outage_it_goes_on_from_what_it_said_it_has(self, page: Page) -> None:
        have, said = self.play(
            page,
            """
            s.ready(0);
            s.say(2);
            s.shut(1006);
            s.say(60);
            s.again();
            const have = s.have();
            s.say(5);
            s.ready(have);
            return [have, s.said()];
            """,
        )
        assert have == 620 - 300
        assert said == list(range(have, 670))

    def test_what_is_kept_is_bounded_and_the_server_learns_what_is_not(self, page: Page) -> None:
        first, second, kept, said = self.play(
            page,
            """
            s.ready(0);
            s.shut(1006);
            s.again();
            const first = s.have();
            s.say(1000);
            s.ready(first);
            const second = s.have();
            s.ready(second);
            return [first, second, s.call.kept.length, s.said()];
            """,
        )
        assert (first, second, kept) == (0, 9700, 30)
        assert said == list(range(9700, 10_000))

    def test_a_session_begins_with_the_first_sample_it_is_given(self, page: Page) -> None:
        said, have = self.play(
            page,
            """
            s.say(100);
            s.shut(1006);
            s.again();
            s.ready(0);
            const said = s.said();
            s.say(1);
            s.shut(1006);
            s.again();
            return [said, s.have()];
            """,
        )
        assert said == list(range(700, 1010))
        assert have == 10  # its own: 300 samples and 10 more, of which it keeps 300

    def test_a_server_without_room_is_asked_again_by_whom_it_waits_for(self, page: Page) -> None:
        states, sockets = self.play(
            page,
            """
            s.ready(0);
            s.shut(1006);
            s.again();
            s.shut(1013, "no room");
            s.again();
            s.ready(0);
            return [s.states, s.sockets.length];
            """,
        )
        assert [state for state, _ in states] == ["on", "lost", "lost", "on"]
        assert sockets == 3

    def test_one_that_is_not_let_in_is_told_so(self, page: Page) -> None:
        states = self.play(page, 's.shut(1013, "no room"); return s.states;')
        assert states == [["refused", "no room"]]


class TestMicrophone:
    HEARD: ClassVar = {"type": "ready", "session_id": "s1", "resume_token": "r", "received": 0}

    def ready(self, socket: Any, received: int) -> None:
        socket.send(json.dumps(self.HEARD | {"received": received}))

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

    # The browser asks; `allow()` is the answer. What it gave is in `streams`.
    PROMPT: ClassVar = """() => {
      const media = navigator.mediaDevices, real = media.getUserMedia.bind(media);
      const answer = new Promise((done) => (window.allow = done));
      window.asked = 0;
      window.streams = [];
      media.getUserMedia = async (wanted) => {
        asked++;
        await answer;
        const stream = await real(wanted);
        streams.push(stream);
        return stream;
      };
    }"""
    LIVE: ClassVar = """streams.flatMap((stream) => stream.getTracks())
      .filter((track) => track.readyState === "live").length"""

    def test_pressed_twice_while_the_browser_asks_it_is_one_microphone(self, page: Page) -> None:
        page.page.evaluate(self.PROMPT)
        page.page.keyboard.press("m")
        page.until("asked")
        page.page.keyboard.press("m")
        page.page.click("#mic")
        page.page.evaluate("allow()")
        page.wait_for(lambda: page.audio)
        self.ready(page.audio[0], 0)
        page.page.locator("#mic[aria-pressed=true]").wait_for()
        assert page.page.evaluate(self.LIVE) == 1
        page.page.click("#mic")
        page.page.locator("#mic[aria-pressed=false]").wait_for()
        assert page.page.evaluate(self.LIVE) == 0
        assert (len(page.audio), page.page.evaluate("asked")) == (1, 1)

    @pytest.mark.parametrize(
        "broken",
        [
            "AudioWorklet.prototype.addModule = async () => { throw new Error('broken'); }",
            "window.AudioWorkletNode = class { constructor() { throw new Error('broken'); } }",
        ],
        ids=["module", "node"],
    )
    def test_one_that_fails_to_start_is_off_and_may_be_tried_again(
        self, page: Page, broken: str
    ) -> None:
        page.page.evaluate(self.PROMPT)
        page.page.evaluate(
            "() => { window.whole = [AudioWorklet.prototype.addModule, AudioWorkletNode];"
            f" allow(); {broken}; }}"
        )
        page.page.click("#mic")
        page.page.locator("#toast", has_text="No microphone: broken").wait_for()
        assert page.page.evaluate(self.LIVE) == 0
        page.page.evaluate("[AudioWorklet.prototype.addModule, window.AudioWorkletNode] = whole")
        page.page.click("#mic")
        page.wait_for(lambda: page.audio)
        page.page.click("#mic")
        page.page.locator("#mic[aria-pressed=false]").wait_for()

    def test_a_session_that_cannot_be_resumed_ends_with_its_connection(self, page: Page) -> None:
        page.page.click("#mic")
        page.wait_for(lambda: page.audio)
        page.audio[0].send(json.dumps(self.HEARD | {"resume_token": None}))
        page.wait_for(lambda: page.audio[0].said)
        page.audio[0].close(code=1011)
        page.page.locator("#toast", has_text="the connection broke").wait_for()
        page.page.locator("#mic[aria-pressed=false]").wait_for()
