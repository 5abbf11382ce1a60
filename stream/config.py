"""The configuration file: frozen models, and one clear line for whatever is wrong in it."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Self, Union, cast, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from sinks import AnySink, MqttSettings, SinkSettings
from stream.fanout import FanoutSettings
from stream.inference import EngineSettings
from stream.log import LogSettings, without_credentials
from stream.server import ServerSettings
from stream.sources import AnySource
from stream.sources.apart import Multichannel, stream_name
from stream.sources.source import Listener
from stream.tracks.settings import TracksSettings

Name = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f/]{1,128}$")]
"""Name of a stream or sink: it appears in events, topics and file names."""


class ConfigError(Exception):
    """The configuration cannot be used: file, key, what was given and what was expected."""


class SessionSettings(BaseModel):
    """What every session does, whatever its source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    heartbeat_s: float = Field(
        default=5.0, ge=0, le=3600, description="Audio between heartbeats; 0 for none."
    )
    fill_ms: int = Field(
        default=500,
        ge=20,
        le=10_000,
        description="A hole up to this long is filled with silence; a longer one ends the segment.",
    )
    state: Path | None = Field(
        default=None,
        description="File that keeps open sessions, so that a daemon started again goes on with "
        "them; null keeps none. It holds voices: only its owner can read it.",
    )
    save_s: float = Field(
        default=10.0,
        gt=0,
        description="How often an open session is saved: several megabytes a stream.",
    )
    resume_s: float = Field(
        default=60.0,
        ge=0,
        description="How long a session waits for its caller, or a restarted daemon, to go on; "
        "0 ends it at once.",
    )


class Config(BaseModel):
    """All of `config.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: EngineSettings = EngineSettings()
    sources: dict[Name, AnySource] = Field(
        default_factory=dict[Name, AnySource], description="Streams by name."
    )
    server: ServerSettings | None = Field(
        default=None, description="The daemon's own server: audio in, events out, a dashboard."
    )
    sinks: dict[Name, AnySink] = Field(
        default_factory=dict[Name, AnySink], description="Where events go, by name."
    )
    tracks: TracksSettings = Field(
        default=TracksSettings(),
        description="Thresholds that differ from those measured for the checkpoint.",
    )
    session: SessionSettings = SessionSettings()
    fanout: FanoutSettings = FanoutSettings()
    voiceprints: Path | None = Field(
        default=None, description="Database of enrolled voices; null is the user's own."
    )
    log: LogSettings = LogSettings()

    @field_validator("sinks")
    @classmethod
    def _own_streams_stay(
        cls, sinks: dict[str, SinkSettings], info: ValidationInfo
    ) -> dict[str, SinkSettings]:
        """A broker keeps the state of our own streams, which return under the same name."""
        own: list[str] = []
        for name, source in info.data.get("sources", {}).items():
            if isinstance(source, Multichannel) and source.apart is not None:
                own += (stream_name(name, channel) for channel in range(source.apart))
            elif not isinstance(source, Listener):
                own.append(name)
        return {
            name: sink.model_copy(update={"keep": tuple(sorted({*sink.keep, *own}))})
            if isinstance(sink, MqttSettings)
            else sink
            for name, sink in sinks.items()
        }

    @model_validator(mode="after")
    def _something_to_hear(self) -> Self:
        if not self.sources and self.server is None:
            raise ValueError("expected sources, a server, or both: there is nothing to listen to")
        return self


def load(path: Path) -> Config:
    """Read a configuration file.

    ``${NAME}`` in a string is the environment variable of that name; ``$${`` is a plain ``${``.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or has a key that is unknown, missing or
            wrong. The message has a line for each, ``file: key.path: given, expected``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; expected a configuration in YAML") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason})") from error
    try:
        data = yaml.load(text, _Loader)  # a subclass of the safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{where}: not valid YAML: {problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        given = "an empty file" if data is None else type(data).__name__
        raise ConfigError(f"{path}: expected keys {_names(Config)}, got {given}")
    return parse(_expand(data, (), str(path)), where=str(path))


def parse(data: Mapping[str, Any], *, where: str) -> Config:
    """The same from nested mappings, without variables; ``where`` is the file in messages.

    Raises:
        ConfigError: as `load`.
    """
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        lines = [f"{where}: {without_credentials(_explain(each))}" for each in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


class _Loader(yaml.SafeLoader):
    """Safe, and a key given twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key: Any = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """What PyYAML takes for a date or a number, and is none, is said with its place."""
        try:
            return super().construct_object(node, deep=deep)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(
                None, None, f"{error}; a text needs quotes", node.start_mark
            ) from error


_VARIABLE: Final = re.compile(r"\$(\$(?=\{)|\{(?P<name>[^}]*)\})")
_HUSH: Final = re.compile(r"password|secret|token|header|credential|bearer")


def _expand(value: Any, key: tuple[str, ...], where: str) -> Any:
    if isinstance(value, dict):
        mapping = cast("dict[Any, Any]", value)
        return {k: _expand(v, (*key, str(k)), where) for k, v in mapping.items()}
    if isinstance(value, list):
        items = cast("list[Any]", value)
        return [_expand(v, (*key, str(i)), where) for i, v in enumerate(items)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name is None:
            return "$"
        if name not in os.environ:
            raise ConfigError(
                f"{where}: {'.'.join(key)}: got ${{{name}}}, "
                "expected that environment variable to be set"
            )
        return os.environ[name]

    return _VARIABLE.sub(replace, value)


def _explain(error: ErrorDetails) -> str:
    """One error of pydantic's → ``key.path: given, expected``."""
    keys, model = _locate(error["loc"])
    key = ".".join(keys) or "all of it"
    given = _given(keys, error["input"])
    kind = error["type"]
    if kind == "extra_forbidden":
        known = _fields(model)
        close = difflib.get_close_matches(keys[-1], known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"{key}: unknown key{hint}, expected one of {', '.join(known)}"
    if kind == "missing":
        return f"{key}: missing; expected {_described(model, keys[-1])}"
    context = error.get("ctx", {})
    if kind == "union_tag_invalid":
        tags = str(context.get("expected_tags", "")).replace("'", "")
        tag = str(context.get("tag", ""))
        close = difflib.get_close_matches(tag, tags.split(", "), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"{key}.kind: got {tag!r}{hint}, expected one of {tags}"
    if kind == "union_tag_not_found":
        return f"{key}.kind: missing; expected the kind of source or sink"
    if kind == "literal_error":
        return f"{key}: got {given}, expected {context.get('expected')}"
    if kind == "string_pattern_mismatch" and error["loc"][-1] == "[key]":
        return f"{key}: expected a name without '/' and control characters, up to 128 long"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ").strip()
    message = message.replace("should be", "expected", 1).replace("should", "expected to", 1)
    return f"{key}: {message}" if "got " in message else f"{key}: got {given}, {message}"


def _locate(loc: Sequence[int | str]) -> tuple[list[str], Any]:
    """A location of pydantic's → the keys as written in the file, and the model of the last one.

    Pydantic's location also holds the tag of a union's member, and its validators; the file none.
    """
    keys: list[str] = []
    model: Any = Config  # the annotation that the path has led to
    parent: Any = Config
    for part in loc:
        if part == "[key]" or (isinstance(part, str) and part.startswith("function-")):
            continue
        members = _members(model)
        if len(members) > 1 and isinstance(part, str) and (member := _tagged(members, part)):
            model = member
            continue
        parent = model
        keys.append(str(part))
        model = _child(model, part)
    return keys, parent


def _child(annotation: Any, part: int | str) -> Any:
    model = _model(annotation)
    if model is not None and part in model.model_fields:
        return _whole(model.model_fields[str(part)].annotation)
    origin = get_origin(annotation)
    if origin is dict:
        return get_args(annotation)[1]
    if origin in (list, tuple):
        return get_args(annotation)[0]
    return None


def _whole(annotation: Any) -> Any:
    """Without ``None`` beside it."""
    members = [each for each in _members(annotation) if each is not type(None)]
    return members[0] if len(members) == 1 else annotation


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        return [inner for each in get_args(annotation) for inner in _members(each)]
    return [annotation]


def _model(annotation: Any) -> type[BaseModel] | None:
    members = _members(annotation)
    one = members[0] if len(members) == 1 else None
    return one if isinstance(one, type) and issubclass(one, BaseModel) else None


def _tagged(members: Sequence[Any], tag: str) -> type[BaseModel] | None:
    for member in members:
        model = _model(member)
        field = model.model_fields.get("kind") if model is not None else None
        if field is not None and field.default == tag:
            return model
    return None


def _fields(annotation: Any) -> list[str]:
    model = _model(annotation)
    return sorted(model.model_fields) if model is not None else []


def _names(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


def _described(annotation: Any, name: str) -> str:
    model = _model(annotation)
    field = model.model_fields.get(name) if model is not None else None
    if field is None:
        return "a value"
    return (field.description or f"a {getattr(field.annotation, '__name__', 'value')}").rstrip(".")


def _given(keys: Sequence[str], value: Any) -> str:
    """A value as an error shows it, if it may be shown: errors end up in logs."""
    if any(_HUSH.search(key) for key in keys):
        return "a value that is not shown"
    if isinstance(value, Mapping):
        names = cast("Mapping[Any, Any]", value)
        text = "{" + ", ".join(f"{name}: …" for name in names) + "}"
    else:
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
