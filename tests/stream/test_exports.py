import pytest

from sinks.events import dump
from stream.feed import Line
from stream.web.exports import export, text
from tests.sinks.samples import Talk


def kept(*events):
    """Lines of the feed."""
    return [
        Line(n, e.session_id, e.stream_id, e.seq, e.type, e.is_final, dump(e))
        for n, e in enumerate(events, start=1)
    ]


@pytest.mark.parametrize("make", [Talk.closed, Talk.warning])
def test_a_session_of_which_nothing_was_said_is_an_empty_file(make):
    lines = kept(make(Talk()))
    got = {form: export(form, lines).data for form in ("vtt", "srt", "rttm", "txt")}
    assert got == {"vtt": b"WEBVTT\n\n", "srt": b"", "rttm": b"", "txt": b""}


def test_the_bare_header_says_what_is_no_longer_kept():
    talk = Talk()
    talk.warning()
    data = export("vtt", kept(talk.closed())).data
    assert data == b"WEBVTT\n\nNOTE What was said before 60.0 s is no longer kept.\n\n"


class TestText:
    def test_who_was_merged_has_the_name_of_the_one_he_is(self):
        talk = Talk()
        said = [
            talk.turn("t1", "S1", 0, 1),
            talk.said("hello", "S1", 0, 1, "t1"),
            talk.turn("t2", "S3", 1, 2),
            talk.said("again", "S3", 1, 2, "t2"),
            talk.identified("S1", "Anna"),
            talk.revised(["t2"], "S3", "S1"),
        ]
        assert text(said) == "Anna: hello again\n"

    def test_a_turn_that_moved_takes_its_words_along_and_no_others(self):
        talk = Talk()
        said = [
            talk.turn("t1", "S1", 0, 1),
            talk.said("hello", "S1", 0, 1, "t1"),
            talk.turn("t2", "S1", 1, 2),
            talk.said("well", "S1", 1, 2),  # of which turn its time says
            talk.said("then", None, 2, 3),
            talk.revised(["t2"], "S1", "S2", "split"),
        ]
        assert text(said) == "S1: hello\nS2: well\n?: then\n"
