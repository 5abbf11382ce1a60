import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from sinks import KINDS, MqttSettings, SinkSettings
from stream.config import Config, ConfigError, load, parse
from stream.log import LogSettings
from stream.server import ServerSettings
from stream.sources import AnySource, FileSource, StdinSource

ROOT = Path(__file__).parents[2]

GOOD = """
engine: {chunk_ms: 400, lookahead_ms: 200}
sources:
  meeting: {kind: file, path: a.wav, realtime: true}
  pipe: {kind: stdin}
sinks:
  out: {kind: stdout}
tracks:
  turns: {onset: 0.6}
"""


def written(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def message(tmp_path, text):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    return str(caught.value).replace(str(path), "FILE")


def test_a_good_file_becomes_frozen_models(tmp_path):
    config = load(written(tmp_path, GOOD))
    assert config.engine.chunk_ms == 400
    assert isinstance(config.sources["meeting"], FileSource)
    assert isinstance(config.sources["pipe"], StdinSource)
    assert config.tracks.turns.onset == 0.6
    assert config.tracks.model_fields_set == {"turns"}
    with pytest.raises(ValueError, match="frozen"):
        config.engine.chunk_ms = 1  # type: ignore[misc]


SOURCES = "sources: {a: {kind: stdin}}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            SOURCES + "engin: {}\n",
            "FILE: engin: unknown key (did you mean 'engine'?), expected one of engine, fanout, "
            "log, server, session, sinks, sources, tracks, voiceprints",
        ),
        (
            SOURCES + "engine: {chunk: 500}\n",
            "FILE: engine.chunk: unknown key (did you mean 'chunk_ms'?), expected one of "
            "batch_wait_ms, checkpoint, chunk_ms, device, left_ms, lookahead_ms, max_batch, slots, "
            "threads",
        ),
        (
            SOURCES + "engine: {chunk_ms: half}\n",
            "FILE: engine.chunk_ms: got 'half', expected a valid integer, unable to parse string "
            "as an integer",
        ),
        (
            SOURCES + "engine: {chunk_ms: 510}\n",
            "FILE: engine.chunk_ms: expected a multiple of 20 ms, got 510",
        ),
        (
            SOURCES + "engine: {slots: 0}\n",
            "FILE: engine.slots: got 0, expected greater than or equal to 1",
        ),
        (
            SOURCES + "engine: {device: tpu}\n",
            "FILE: engine.device: expected auto, cpu, cuda or cuda:N, got 'tpu'",
        ),
        (
            "engine: {}\n",
            "FILE: all of it: got {engine: …}, expected sources, a server, or both",
        ),
        (
            "sources: {a: {kind: fiel, path: x}}\n",
            "FILE: sources.a.kind: got 'fiel' (did you mean 'file'?), expected one of file, stdin, "
            "microphone",
        ),
        (
            "sources: {a: {path: x}}\n",
            "FILE: sources.a.kind: missing; expected the kind of source or sink",
        ),
        (
            "sources: {a: {kind: file, paht: x}}\n",
            "FILE: sources.a.path: missing; expected WAV, FLAC, OGG, MP3, … whatever libsndfile "
            "reads\n"
            "FILE: sources.a.paht: unknown key (did you mean 'path'?), expected one of "
            "apart, block_ms, channel, kind, path, realtime",
        ),
        (
            "sources: {a/b: {kind: stdin}}\n",
            "FILE: sources.a/b: expected a name without '/' and control characters, up to 128 long",
        ),
        (
            SOURCES + "log: {level: loud}\n",
            "FILE: log.level: got 'loud', expected 'debug', 'info', 'warning' or 'error'",
        ),
        (
            SOURCES + "tracks: {turns: {onset: 0.2}}\n",
            "FILE: tracks.turns: expected offset ≤ its onset, got 0.4 > 0.2",
        ),
        (
            SOURCES + "sinks: {m: {kind: mqtt, hosst: x}}\n",
            "FILE: sinks.m.hosst: unknown key (did you mean 'host'?), expected one of ",
        ),
        (
            SOURCES + "sinks: {m: {kind: mqqt}}\n",
            "FILE: sinks.m: expected a kind of sink among jsonl, kafka, mqtt, nats, redis, rttm, "
            "seglst, srt, stdout, vtt, webhook, got 'mqqt'",
        ),
        ("", "FILE: expected keys engine, sources, server, sinks, tracks, session, fanout, "),
        ("- a\n", "got list"),
        ("a: [\n", "FILE:2:1: not valid YAML: while parsing a flow node expected the node content"),
        (
            SOURCES + SOURCES,
            "FILE:2:1: not valid YAML: key 'sources' is given twice",
        ),
        (
            SOURCES + "server: {token: 2024-13-45}\n",
            "FILE:2:17: not valid YAML: month must be in 1..12; a text needs quotes",
        ),
        (
            SOURCES + "engine: {threads: 0x_}\n",
            "FILE:2:19: not valid YAML: invalid literal for int() with base 16: ''; "
            "a text needs quotes",
        ),
        (
            SOURCES + "engine: {device: '${NO_SUCH_VARIABLE}'}\n",
            "FILE: engine.device: got ${NO_SUCH_VARIABLE}, expected that environment variable to "
            "be set",
        ),
    ],
)
def test_whatever_is_wrong_is_one_clear_line(tmp_path, text, expected):
    assert expected in message(tmp_path, text)


def test_every_error_is_told_at_once(tmp_path):
    text = "sources: {a: {kind: stdin, rat: 1}}\nengine: {chunk_ms: 1, devise: cpu}\n"
    lines = message(tmp_path, text).splitlines()
    assert len(lines) == 3


def test_a_missing_file_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load(tmp_path / "none.yaml")


def test_a_file_that_is_no_text_is_one_clear_line(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load(tmp_path / "a.yaml")


def test_secrets_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("BROKER_PASSWORD", "se${cret}")
    text = SOURCES + "sinks: {m: {kind: mqtt, username: me, password: '${BROKER_PASSWORD}'}}\n"
    mqtt = load(written(tmp_path, text)).sinks["m"]
    assert isinstance(mqtt, MqttSettings)
    secret = mqtt.password
    assert (secret.get_secret_value() if hasattr(secret, "get_secret_value") else secret) == (
        "se${cret}"
    )
    text = SOURCES + "engine: {checkpoint: ['a$${b}']}\n"
    assert load(written(tmp_path, text)).engine.checkpoint == ("a${b}",)


@pytest.mark.parametrize(
    "sink",
    [
        "kind: webhook, url: 'https://u:hunter2@h/x', secret: hunter2, batch: 0",
        "kind: webhook, url: 'ftp://u:hunter2@h/x'",
        "kind: mqtt, password: 72727272, username: 3",
        "kind: nats, servers: 'nats://u:hunter2@h'",
        "url: 'https://u:hunter2@h/x', secret: hunter2",
    ],
)
def test_an_error_tells_no_secret(tmp_path, sink):
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, f"{SOURCES}sinks: {{x: {{{sink}}}}}\n"))
    assert "hunter2" not in str(caught.value)
    assert "72727272" not in str(caught.value)


def test_a_configuration_from_flags_names_where_it_came_from():
    with pytest.raises(ConfigError, match=r"livesat: engine\.chunk_ms"):
        parse({"sources": {"a": {"kind": "stdin"}}, "engine": {"chunk_ms": 1}}, where="livesat")


def test_a_models_dump_is_a_configuration(tmp_path):
    config = load(written(tmp_path, GOOD))
    assert Config.model_validate(config.model_dump(exclude_unset=True)) == config


def test_a_broker_keeps_the_state_of_our_own_streams():
    sources = {
        "desk": {"kind": "microphone"},
        "mixer": {"kind": "rtp", "port": 5004, "channels": 2, "apart": 2},
        "door": {"kind": "tcp", "port": 7000},
    }
    sinks = {"bus": {"kind": "mqtt", "keep": ["kitchen"]}, "out": {"kind": "stdout"}}
    bus = parse({"sources": sources, "sinks": sinks}, where="test").sinks["bus"]
    assert isinstance(bus, MqttSettings)
    assert bus.keep == ("desk", "kitchen", "mixer-1", "mixer-2")
    assert bus.identifier() == bus.model_copy(update={"keep": ()}).identifier()


def test_the_tour_in_the_repository_is_valid():
    config = load(ROOT / "config.yaml")
    assert {source.kind for source in config.sources.values()} == {"file"}
    assert {sink.kind for sink in config.sinks.values()} == {"stdout", "jsonl"}


def uncommented(monkeypatch):
    """The tour with all that is commented in it."""
    text = (ROOT / "config.yaml").read_text()
    for variable in re.findall(r"\$\{(LIVESAT_\w+)\}", text):
        monkeypatch.setenv(variable, "a-secret-that-is-long-enough")
    return re.sub(r"^( *)# ( *[a-z]\w*:(?: .*)?)$", r"\1\2", text, flags=re.MULTILINE)


ELSEWHERE = {"password_env"}
"""Keys that exclude another one, whose comment names them."""

SECRET = {"username", "user", "password", "secret", "bearer"}
"""Keys whose value in the tour is an example."""


def test_the_tour_shows_every_key_there_is(tmp_path, monkeypatch):
    config = load(written(tmp_path, uncommented(monkeypatch)))
    shown = {type(each): each.model_fields_set for each in config.sources.values()}
    shown |= {type(each): each.model_fields_set for each in config.sinks.values()}
    sources, sinks = get_args(get_args(AnySource)[0]), set(KINDS.values())
    assert set(shown) == {*sources, *sinks}
    of_every_sink = set(SinkSettings.model_fields)
    missing = {
        kind.__name__: absent
        for kind, keys in shown.items()
        if (absent := {*kind.model_fields} - keys - ELSEWHERE - of_every_sink)
    }
    assert missing == {}
    assert any(shown[kind] >= of_every_sink for kind in sinks)
    assert set(Config.model_fields) == config.model_fields_set
    tracks = {name: getattr(config.tracks, name) for name in type(config.tracks).model_fields}
    sections = {name: getattr(config, name) for name in Config.model_fields} | tracks
    for name, section in sections.items():
        if isinstance(section, BaseModel):
            assert section.model_fields_set == {*type(section).model_fields}, name


def test_the_tour_shows_the_defaults(tmp_path, monkeypatch):
    config = load(written(tmp_path, uncommented(monkeypatch)))
    assert config.server is not None
    assert config.server.model_copy(update={"token": None}) == ServerSettings()
    assert config.log.model_copy(update={"level": "info"}) == LogSettings()
    for name in ("engine", "session", "fanout", "tracks"):
        assert getattr(config, name) == Config.model_fields[name].default, name
    different = {
        (each.kind, key)
        for each in (*config.sources.values(), *config.sinks.values())
        for key, field in type(each).model_fields.items()
        if not field.is_required() and key not in SECRET
        if getattr(each, key) != field.get_default(call_default_factory=True)
    }
    assert different == {
        ("file", "apart"),
        ("av", "apart"),
        ("av", "options"),
        ("microphone", "apart"),
        ("rtp", "apart"),
        ("rtp", "channels"),
        ("rtp", "rate"),
        ("jsonl", "existing"),
        ("mqtt", "keep"),  # what `sources` adds
        ("mqtt", "node"),
        ("mqtt", "tls"),
        ("nats", "node"),
    }


def test_torch_is_not_imported_before_it_is_needed():
    code = "import sys, stream.daemon, stream.engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
