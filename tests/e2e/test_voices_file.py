"""Which file of voices a command means: the option's, the configuration's, the user's own."""

from types import SimpleNamespace

import numpy as np
import pytest

from stream.voiceprints import Voiceprints


@pytest.fixture
def house(monkeypatch, tmp_path):
    """A folder to be in, and a home, neither with voices yet."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.platform", "linux")
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return SimpleNamespace(
        config=folder / "config.yaml",
        own=tmp_path / "home" / "livesat" / "voices.db",
        theirs=tmp_path / "daemon.db",
        other=tmp_path / "other.db",
        elsewhere=tmp_path / "elsewhere.yaml",
    )


def write(config, voices, more=""):
    config.write_text(f"sources: {{a: {{kind: stdin}}}}\nvoiceprints: {voices}\n{more}")


def fill(path, *names):
    with Voiceprints.open(path) as store:
        for name in names:
            vector = np.ones(4, np.float32)
            store.add(name, vector, checkpoint="c", evidence_s=2.0, consent="said yes")


def names(path):
    if not path.exists():
        return []
    with Voiceprints.open(path) as store:
        return [voice.name for voice in store.voices()]


@pytest.fixture
def heard(monkeypatch):
    """What `enroll` hears without an engine: the settings it was given."""
    given = []

    async def listen(settings, clips):
        given.append(settings)
        recording = SimpleNamespace(embedding=np.ones(4, np.float32), evidence_s=2.0)
        return SimpleNamespace(recordings=[recording], checkpoint="c")

    monkeypatch.setattr("stream.enrolment.listen", listen)
    return given


CHOICES = [
    # what the command is given, whether ./config.yaml is there → which file is meant
    ((), False, "own"),
    ((), True, "theirs"),
    (("--config", "elsewhere"), False, "theirs"),
    (("--config", "elsewhere"), True, "other"),
    (("--voices", "other"), True, "other"),
    (("--voices", "other", "--config", "elsewhere"), False, "other"),
]


@pytest.mark.parametrize(("given", "here", "meant"), CHOICES)
class TestFile:
    @pytest.fixture
    def chosen(self, house, given, here, meant):
        """The options, and the file that they should lead to."""
        if here:
            write(house.config, house.theirs)
        write(house.elsewhere, house.other if here else house.theirs)
        arguments = [part if part[0] == "-" else getattr(house, part) for part in given]
        return arguments, getattr(house, meant)

    def test_every_command_means_it(self, livesat, heard, house, chosen, tmp_path):
        options, file = chosen
        clip, copy = tmp_path / "clip.wav", tmp_path / "voices.json"
        clip.touch()
        told = livesat("enroll", "Anna", clip, *options)
        assert told.code == 0, told.err
        assert names(file) == ["Anna"]
        assert "Anna" in livesat("voices", *options).out
        assert livesat("rename", "Anna", "Ada", *options).code == 0
        assert names(file) == ["Ada"]
        assert "1 voice(s)" in livesat("export-voices", copy, *options).out
        assert livesat("forget", "Ada", *options).code == 0
        assert names(file) == []
        assert livesat("import-voices", copy, *options).code == 0
        assert names(file) == ["Ada"]
        for other in {house.own, house.theirs, house.other} - {file}:
            assert not other.exists()


def test_a_configuration_without_voices_means_the_users_own(livesat, house):
    house.config.write_text("sources: {a: {kind: stdin}}\n")
    fill(house.own, "Anna")
    assert livesat("forget", "Anna").code == 0
    assert names(house.own) == []


def test_a_voice_is_heard_by_the_engine_of_the_daemon_that_will_look_for_it(
    livesat, house, heard, tmp_path
):
    clip = tmp_path / "clip.wav"
    clip.touch()
    write(house.config, house.theirs, "engine: {left_ms: 2000}\n")
    assert livesat("enroll", "Anna", clip).code == 0
    assert livesat("enroll", "Anna", clip, "--voices", house.other).code == 0
    assert heard[0].left_ms == 2000
    assert heard[1].left_ms != 2000


def test_a_configuration_that_is_wrong_is_said_and_no_voice_touched(livesat, house):
    fill(house.own, "Anna")
    house.config.write_text("voiceprint: typo.db\n")
    livesat("forget", "Anna").complains("config.yaml", "voiceprints", code=2)
    livesat("voices", "--config", house.elsewhere).complains("no such file", code=2)
    assert names(house.own) == ["Anna"]


def test_days_beyond_a_century_are_refused(livesat, house, tmp_path):
    clip = tmp_path / "clip.wav"
    clip.touch()
    livesat("enroll", "Anna", clip, "--days", 99_999_999_999).complains("--days", "36500", code=2)
