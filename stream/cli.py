"""The `livesat` command: a function a command, each as thin as its sentence.

Torch and the engine are imported inside the commands that need them, so that `livesat --help`
answers at once. Whatever goes wrong ends as one line on stderr: exit code 2 when the command or
its configuration was wrong, 1 when running it failed. `livesat --debug …` shows the traceback.
"""

import asyncio
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from stream.config import Config
    from stream.evaluate import EvalResult, Score
    from stream.screen import View

USAGE: Final = 2
FAILED: Final = 1
INTERRUPTED: Final = 130

CONFIG: Final = Path("config.yaml")
"""What a daemon reads unless it is told otherwise."""

app = typer.Typer(
    name="livesat",
    help="Who is speaking, which enrolled person that is, and what is said: live.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

# Options that several commands share.
Checkpoint = Annotated[
    list[str] | None,
    typer.Option(
        "--checkpoint",
        help="Folder or hub id; several times to merge heads. Default: the embedded one.",
        metavar="DIR_OR_ID",
    ),
]
Chunk = Annotated[
    int | None, typer.Option("--chunk", min=20, metavar="MS", help="New audio a step.")
]
Lookahead = Annotated[
    int | None,
    typer.Option("--lookahead", min=0, metavar="MS", help="Audio heard before a frame is decided."),
]
Left = Annotated[
    int | None, typer.Option("--left", min=20, metavar="MS", help="Past audio attended to.")
]
Compute = Annotated[
    str | None, typer.Option("--device", help="Where to compute: auto, cpu, cuda, cuda:1.")
]
Decoder = Annotated[
    str | None,
    typer.Option(
        "--decoder", help="Words: greedy, beam (needs livesat[lm]), auto: beam where it can be had."
    ),
]
ConfigPath = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Engine, tracks and log come from this file."),
]
Rttm = Annotated[Path | None, typer.Option("--rttm", metavar="FILE", help="Write the turns.")]
Jsonl = Annotated[
    Path | None, typer.Option("--jsonl", metavar="FILE", help="Write every event; - is stdout.")
]
Vtt = Annotated[Path | None, typer.Option("--vtt", metavar="FILE", help="Write WebVTT captions.")]
Srt = Annotated[Path | None, typer.Option("--srt", metavar="FILE", help="Write SubRip captions.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No lanes and no lines: a progress bar at most.")
]
Voices = Annotated[
    Path | None,
    typer.Option(
        "--voices",
        metavar="FILE",
        help="The enrolled voices; default: those of the configuration, then the user's own.",
    ),
]
VoicesConfig = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Its voiceprints are meant; default: config.yaml, as of livesat run, if there is one.",
    ),
]
Consent = Annotated[
    str | None,
    typer.Option(
        "--consent",
        metavar="TEXT",
        help="What the person agreed to; default: that whoever enrolls them says they did.",
    ),
]
Days = Annotated[
    int | None,
    typer.Option("--days", min=1, max=36_500, help="Erase the voice after this many days."),
]


class Usage(Exception):
    """The command or its configuration is wrong: what was given, what was expected."""


def _print_version(value: bool) -> None:
    if value:
        _version()
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    del version, debug  # `main` looks for --debug: it must count for errors in the arguments too
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(USAGE)


@app.command()
def annotate(
    audio: Annotated[
        str,
        typer.Argument(
            metavar="AUDIO", help="An audio file; - reads raw s16le 16 kHz mono from stdin."
        ),
    ],
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Pace a file as if it were live.")
    ] = False,
    rttm: Rttm = None,
    jsonl: Jsonl = None,
    vtt: Vtt = None,
    srt: Srt = None,
    quiet: Quiet = False,
    checkpoint: Checkpoint = None,
    chunk: Chunk = None,
    lookahead: Lookahead = None,
    left: Left = None,
    device: Compute = None,
    decoder: Decoder = None,
    config: ConfigPath = None,
    voices: Voices = None,
) -> None:
    """Stream an audio file, or stdin, through everything a live source goes through."""
    if audio == "-":
        name, source, duration_s = "stdin", {"kind": "stdin"}, None
    else:
        path = Path(audio)
        if not path.exists():
            raise Usage(f"{audio}: no such file")
        name, source = path.stem, {"kind": "file", "path": path, "realtime": realtime}
        duration_s = _duration(path)
    _stream(
        name,
        source,
        _outputs(rttm=rttm, jsonl=jsonl, vtt=vtt, srt=srt),
        _settings(config, checkpoint, chunk, lookahead, left, device, voices, decoder),
        quiet=quiet,
        duration_s=duration_s,
    )


@app.command()
def listen(
    microphone: Annotated[
        str | None,
        typer.Option("--microphone", "-m", help="Part of a name, or a number: livesat devices."),
    ] = None,
    rttm: Rttm = None,
    jsonl: Jsonl = None,
    vtt: Vtt = None,
    srt: Srt = None,
    quiet: Quiet = False,
    checkpoint: Checkpoint = None,
    chunk: Chunk = None,
    lookahead: Lookahead = None,
    left: Left = None,
    device: Compute = None,
    decoder: Decoder = None,
    config: ConfigPath = None,
    voices: Voices = None,
) -> None:
    """Listen to a microphone until Ctrl-C."""
    chosen: int | str | None = microphone
    if microphone is not None and microphone.isdecimal():
        chosen = int(microphone)
    _stream(
        "microphone",
        {"kind": "microphone", "device": chosen},
        _outputs(rttm=rttm, jsonl=jsonl, vtt=vtt, srt=srt),
        _settings(config, checkpoint, chunk, lookahead, left, device, voices, decoder),
        quiet=quiet,
        duration_s=None,
    )


@app.command()
def run(
    config: Annotated[
        Path, typer.Option("--config", metavar="FILE", help="Sources, sinks, engine, tracks.")
    ] = CONFIG,
) -> None:
    """Run as a daemon with the sources, sinks and server of a configuration file."""
    from functools import partial

    from stream.config import load
    from stream.daemon import run as serve
    from stream.pulse import few_arenas, keep_loaded, large_alone
    from stream.sources.source import Listener

    settings = load(config)
    few_arenas()
    # A daemon outlasts its brokers: what waits for one is kept and told, no reason to end.
    lasting = settings.server is not None or any(
        isinstance(source, Listener) or source.live for source in settings.sources.values()
    )
    if lasting:
        large_alone()
        # A core is left to the event loop, whose calls would wait for one. Read by torch.
        ours = getattr(os, "sched_getaffinity", None)  # a container may have fewer than there are
        cores = len(ours(0)) if ours else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(cores - 1, 1)))
    asyncio.run(
        serve(
            settings,
            fail_fast=not lasting,
            reload=partial(load, config),
            loaded=keep_loaded,
            apart=lasting,
        )
    )


@app.command()
def doctor(config: ConfigPath = None) -> None:
    """Look whether this machine can do the job, and say what to do if not."""
    from stream.config import load, parse
    from stream.doctor import Finding, examine

    if config is not None:
        settings = load(config)
    else:
        settings = parse({"sources": {"stdin": {"kind": "stdin"}}}, where="defaults")
    settings.log.model_copy(update={"level": "error"}).configure()
    marks = {"ok": ("✓", "green"), "note": ("–", "yellow"), "bad": ("✗", "red")}

    async def ask() -> list[Finding]:
        findings: list[Finding] = []
        async for finding in examine(settings):
            mark, colour = marks[finding.state]
            line = Text.assemble((f"{mark} ", colour), (f"{finding.subject:<16}", "bold"))
            line.append(finding.text)
            if finding.fix:
                line.append(f"  → {finding.fix}", "cyan")
            out.print(line)
            findings.append(finding)
        return findings

    if any(finding.state == "bad" for finding in asyncio.run(ask())):
        raise typer.Exit(FAILED)


configuration = typer.Typer(help="Check and show configuration files.", no_args_is_help=True)
app.add_typer(configuration, name="config")


@configuration.command("check")
def config_check(
    file: Annotated[Path, typer.Argument(metavar="FILE")] = CONFIG,
) -> None:
    """Read a configuration file and say what is wrong with it."""
    from stream.config import load

    settings = load(file)
    parts = [f"{len(settings.sources)} source(s)", f"{len(settings.sinks)} sink(s)"]
    if settings.server is not None:
        parts.append(f"a server on {settings.server.host}:{settings.server.port}")
    out.print(f"{file}: good: {', '.join(parts)}")


@configuration.command("show")
def config_show(
    file: Annotated[Path, typer.Argument(metavar="FILE")] = CONFIG,
) -> None:
    """Print a configuration with every default filled in; secrets stay hidden."""
    import yaml

    from stream.config import load
    from stream.log import without_credentials

    tree = load(file).model_dump(mode="json")
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    out.print(without_credentials(text), end="", markup=False)


@configuration.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of configuration files, for editors."""
    import json

    from stream.config import Config

    out.print(json.dumps(Config.model_json_schema(), indent=2), markup=False)


@app.command("name")
def name_speaker(
    label: Annotated[str, typer.Argument(metavar="LABEL", help='As "S2".')],
    name: Annotated[str, typer.Argument(metavar="NAME")],
    session: Annotated[
        str | None, typer.Option("--session", help="Its id; default: the only one that is open.")
    ] = None,
    enrol: Annotated[
        bool,
        typer.Option("--enroll", "--enrol", help="Recognise the voice from now on (with consent)."),
    ] = False,
    consent: Consent = None,
    days: Days = None,
    url: Annotated[
        str, typer.Option("--url", help="The daemon's server.")
    ] = "http://127.0.0.1:8080",
    token: Annotated[
        str | None, typer.Option("--token", envvar="LIVESAT_TOKEN", help="Its token.")
    ] = None,
) -> None:
    """Tell a running daemon who a live speaker is."""
    from stream.remote import Daemon

    if not enrol and (consent is not None or days is not None):
        raise Usage("--consent and --days are kept with a voice; expected --enroll with them")
    daemon = Daemon(url, token)
    chosen = session or daemon.only_session()
    daemon.name(chosen, label, name, enrol=enrol, consent=consent, days=days)
    out.print(f"{label} of session {chosen} is {name}" + (", and enrolled" if enrol else ""))


@app.command()
def devices() -> None:
    """List the microphones."""
    from stream.sources.microphone import list_devices

    found = list_devices()
    if not found:
        err.print("no device can record; a microphone is expected by livesat listen")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("number", "name", "channels", "Hz", ""):
        table.add_column(
            title, justify="right" if title in {"number", "channels", "Hz"} else "left"
        )
    for device in found:
        default = "default" if device.default else ""
        row = (device.index, device.name, device.channels, device.rate, default)
        table.add_row(*(Text(str(cell)) for cell in row))
    out.print(table)


@app.command("eval")
def evaluate(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Audio with RTTM of the same name, perhaps transcripts."
        ),
    ],
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="All numbers, per recording; - is stdout."),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline/--no-offline", help="Also hear each recording whole.")
    ] = True,
    latency: Annotated[
        str | None,
        typer.Option(
            "--latency",
            metavar="S[,S…]",
            help="Stream at each of these latencies (chunk + look-ahead), such as 0.32,0.64,1.28.",
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    chunk: Chunk = None,
    lookahead: Lookahead = None,
    left: Left = None,
    device: Compute = None,
    decoder: Decoder = None,
    config: ConfigPath = None,
) -> None:
    """Score recordings against their references, streaming and offline side by side."""
    from json import dumps

    from stream.evaluate import FileResult, evaluate_at
    from stream.evaluate import evaluate as score

    latencies_s = _latencies(latency)
    if latencies_s and (chunk is not None or lookahead is not None):
        raise Usage("--latency chooses chunk and look-ahead; give it, or --chunk and --lookahead")
    if json is not None and str(json) != "-":
        _writable("json", json)
    settings = _settings(config, checkpoint, chunk, lookahead, left, device, decoder=decoder)
    checked = _checked(settings)
    seen: list[str] = []

    def tell(result: FileResult, count: int) -> None:
        seen.append(result.name)
        if err.is_terminal:
            der = 100 * result.streaming.error.rate
            place = (len(seen) - 1) % count + 1
            err.print(f"{place}/{count} {result.name}: DER {der:.1f} %")

    if latencies_s:
        results = asyncio.run(
            evaluate_at(
                folder,
                checked.engine,
                latencies_s,
                checked.tracks,
                offline=offline,
                on_file=tell,
            )
        )
        text = dumps({"latencies": [result.to_dict() for result in results]}, indent=2)
    else:
        results = [
            asyncio.run(
                score(folder, checked.engine, checked.tracks, offline=offline, on_file=tell)
            )
        ]
        text = dumps(results[0].to_dict(), indent=2)
    if json is not None and str(json) == "-":
        typer.echo(text)
        return
    out.print(_score_table(results))
    if json is not None:
        json.write_text(text + "\n", encoding="utf-8")


@app.command()
def enroll(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The person's name.")],
    clips: Annotated[
        list[Path], typer.Argument(metavar="CLIP…", help="Recordings of this person alone.")
    ],
    consent: Consent = None,
    days: Days = None,
    voices: Voices = None,
    checkpoint: Checkpoint = None,
    device: Compute = None,
    config: ConfigPath = None,
) -> None:
    """Teach a voice: from now on its speaker is called by name."""
    from getpass import getuser

    from stream.enrolment import listen
    from stream.voiceprints import Voiceprints, expiry

    config = _daemons(config, voices)
    settings = _settings(config, checkpoint, None, None, None, device, voices)
    for clip in clips:
        if not clip.exists():
            raise Usage(f"{clip}: no such file")
    checked = _checked(settings)
    heard = asyncio.run(listen(checked.engine, clips))
    expires = expiry(days)
    with Voiceprints.open(_voices_path(checked.voiceprints)) as store:
        for recording in heard.recordings:
            store.add(
                name,
                recording.embedding,
                checkpoint=heard.checkpoint,
                evidence_s=recording.evidence_s,
                consent=consent or f"stated by {getuser()} at enrolment",
                expires=expires,
            )
        voice = store.get(name)
    out.print(f"{voice.name}: {voice.clips} clip(s), {voice.evidence_s:.1f} s of speech")


@app.command("voices")
def list_voices(voices: Voices = None, config: VoicesConfig = None) -> None:
    """List the enrolled people."""
    from stream.voiceprints import Voiceprints

    with Voiceprints.open(_voices_file(voices, config)) as store:
        people = store.voices()
    if not people:
        err.print("nobody is enrolled; livesat enroll NAME CLIP… does it")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("name", "clips", "speech", "since", "until", "consent"):
        table.add_column(title, justify="right" if title in {"clips", "speech"} else "left")
    for person in people:
        until = "" if person.expires is None else person.expires.date().isoformat()
        row = (person.name, person.clips, f"{person.evidence_s:.1f} s")
        more = (person.created.date().isoformat(), until, person.consent)
        table.add_row(*(Text(str(cell)) for cell in (*row, *more)))
    out.print(table)


@app.command("export-voices")
def export_voices(
    file: Annotated[Path, typer.Argument(metavar="FILE")],
    voices: Voices = None,
    config: VoicesConfig = None,
) -> None:
    """Write all enrolled voices to a JSON file: to another machine, or as a copy."""
    from stream.voiceprints import Voiceprints

    with Voiceprints.open(_voices_file(voices, config)) as store:
        count = store.export(file)
    out.print(f"{file}: {count} voice(s); they are personal data")


@app.command("import-voices")
def import_voices(
    file: Annotated[Path, typer.Argument(metavar="FILE")],
    voices: Voices = None,
    config: VoicesConfig = None,
) -> None:
    """Take in voices that export-voices wrote; a name that is here already is an error."""
    from stream.voiceprints import Voiceprints

    with Voiceprints.open(_voices_file(voices, config)) as store:
        names = store.take_in(file)
    out.print(f"{len(names)} voice(s): {', '.join(names)}")


@app.command()
def rename(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    new: Annotated[str, typer.Argument(metavar="NEW_NAME")],
    voices: Voices = None,
    config: VoicesConfig = None,
) -> None:
    """Give an enrolled person another name."""
    from stream.voiceprints import Voiceprints

    with Voiceprints.open(_voices_file(voices, config)) as store:
        out.print(f"{name} is now {store.rename(name, new).name}")


@app.command()
def forget(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    voices: Voices = None,
    config: VoicesConfig = None,
) -> None:
    """Erase an enrolled voice."""
    from stream.voiceprints import Voiceprints

    with Voiceprints.open(_voices_file(voices, config)) as store:
        gone = store.forget(name)
    out.print(f"{gone.name} is forgotten: {gone.clips} clip(s)")


@app.command()
def demo(
    realtime: Annotated[
        bool | None,
        typer.Option(
            "--realtime/--fast", help="As it was spoken, or at full speed; default: on a terminal."
        ),
    ] = None,
    quiet: Quiet = False,
    checkpoint: Checkpoint = None,
    chunk: Chunk = None,
    lookahead: Lookahead = None,
    left: Left = None,
    device: Compute = None,
    decoder: Decoder = None,
    config: ConfigPath = None,
) -> None:
    """Watch the demo conversation, then see how right it was."""
    settings = _settings(config, checkpoint, chunk, lookahead, left, device, decoder=decoder)
    with as_file(files("stream") / "demo") as folder, TemporaryDirectory() as scratch:
        audio = folder / "meeting.flac"
        heard = Path(scratch) / "meeting.rttm"
        paced = out.is_terminal if realtime is None else realtime
        duration_s = _duration(audio)
        assert duration_s is not None, "the demo conversation is a valid file"
        _stream(
            "meeting",
            {"kind": "file", "path": audio, "realtime": paced},
            {"rttm": {"kind": "rttm", "path": heard}},
            settings,
            quiet=quiet,
            duration_s=duration_s,
        )
        _print_score(folder / "meeting.rttm", heard, duration_s)


@app.command()
def version() -> None:
    """Print the versions that matter in a report."""
    _version()


def _stream(
    name: str,
    source: dict[str, Any],
    sinks: dict[str, dict[str, Any]],
    settings: dict[str, Any],
    *,
    quiet: bool,
    duration_s: float | None,
) -> None:
    """Run one source into the sinks, watched by whatever view suits where stdout goes."""
    from stream.config import parse
    from stream.daemon import run as serve

    taken = "stdout" in sinks
    live = out.is_terminal and not out.is_dumb_terminal
    if not (taken or quiet or live):
        sinks = {**sinks, "stdout": {"kind": "stdout"}}
    config = parse({**settings, "sources": {name: source}, "sinks": sinks}, where="livesat")
    with _view(live and not taken and not quiet, duration_s) as view:
        asyncio.run(serve(config, on_event=view.take))


def _view(live: bool, duration_s: float | None) -> "View":
    from stream.screen import Blind, Progress, Screen

    if live:
        return Screen(out, duration_s=duration_s)
    if err.is_terminal and not err.is_dumb_terminal and not out.is_terminal:
        return Progress(err, duration_s=duration_s)
    return Blind()


def _outputs(
    *, rttm: Path | None, jsonl: Path | None, vtt: Path | None, srt: Path | None
) -> dict[str, dict[str, Any]]:
    """File options → sinks; each file is written anew."""
    sinks: dict[str, dict[str, Any]] = {}
    for kind, path in (("rttm", rttm), ("jsonl", jsonl), ("vtt", vtt), ("srt", srt)):
        if path is None:
            continue
        if str(path) == "-":
            if kind != "jsonl":
                raise Usage(f"--{kind} -: expected a file; only --jsonl can go to stdout")
            sinks["stdout"] = {"kind": "stdout", "format": "json", "partials": True}
            continue
        _writable(kind, path)
        sinks[kind] = {"kind": kind, "path": path, "existing": "replace"}
    return sinks


def _writable(option: str, path: Path) -> None:
    """Looks where a file is to be written, before anything is computed for it.

    Raises:
        Usage: there is no such folder, or the file is one.
    """
    if not path.parent.is_dir():
        raise Usage(f"--{option} {path}: no such folder: {path.parent}")
    if path.is_dir():
        raise Usage(f"--{option} {path}: expected a file, got a folder")


def _checked(settings: dict[str, Any]) -> "Config":
    """Settings of a command that hears files; logging is as they say from here on."""
    from stream.config import parse

    # The configuration's own checks need a source; which one does not matter here.
    config = parse({**settings, "sources": {"files": {"kind": "stdin"}}}, where="livesat")
    config.log.configure()
    return config


def _settings(
    config: Path | None,
    checkpoint: list[str] | None,
    chunk: int | None,
    lookahead: int | None,
    left: int | None,
    device: str | None,
    voices: Path | None = None,
    decoder: str | None = None,
) -> dict[str, Any]:
    """The configuration without sources and sinks: the file's, over it the options."""
    from stream.config import load

    given = {
        "checkpoint": checkpoint or None,
        "chunk_ms": chunk,
        "lookahead_ms": lookahead,
        "left_ms": left,
        "device": device,
    }
    data: dict[str, Any] = {"log": {"level": "warning"}, "session": {"heartbeat_s": 1.0}}
    if config is not None:
        data = load(config).model_dump(exclude={"sources", "sinks"}, exclude_unset=True)
    chosen = {key: value for key, value in given.items() if value is not None}
    data = {**data, "engine": {**data.get("engine", {}), **chosen}}
    if decoder is not None:
        tracks = data.get("tracks", {})
        data["tracks"] = {**tracks, "words": {**tracks.get("words", {}), "decoder": decoder}}
    return data if voices is None else {**data, "voiceprints": voices}


def _daemons(config: Path | None, voices: Path | None) -> Path | None:
    """The configuration whose voices are meant: the one given, or else a daemon's own.

    Voices that go where no daemon looks would be of no use. With `voices` no one has to ask.
    """
    return config or (CONFIG if voices is None and CONFIG.is_file() else None)


def _voices_file(voices: Path | None, config: Path | None) -> Path:
    """The file of voices: the option's, the configuration's, the user's own."""
    from stream.config import load

    chosen = _daemons(config, voices)
    found = load(chosen).voiceprints if voices is None and chosen is not None else None
    return _voices_path(voices or found)


def _voices_path(given: Path | None) -> Path:
    from stream.voiceprints import default_path

    return given or default_path()


def _latencies(given: str | None) -> list[float]:
    """The option's seconds, in the order given."""
    try:
        return [] if given is None else [float(part) for part in given.split(",")]
    except ValueError:
        raise Usage(
            f"--latency {given}: expected seconds with commas between, such as 0.32,0.64,1.28"
        ) from None


def _score_table(results: "list[EvalResult]") -> Table:
    """Streaming, at each latency, and offline side by side."""
    from stream.score import percentile

    first = results[0]
    windows = [f"{result.chunk_ms} + {result.lookahead_ms} ms" for result in results]
    names = ["streaming"] if len(results) == 1 else [f"{r.latency_s:g} s" for r in results]
    scores = [(name, result.streaming) for name, result in zip(names, results, strict=True)]
    if first.offline is not None:
        scores.append(("offline", first.offline))
    title = (
        f"{first.streaming.recordings} recordings, {first.streaming.audio_s:.0f} s, "
        f"{', '.join(windows)}"
    )
    if first.decoder is not None:
        title += f", words: {first.decoder}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("")
    for name, _ in scores:
        table.add_column(name, justify="right")

    def row(name: str, value: "Callable[[Score], str]") -> None:
        table.add_row(name, *(value(score) for _, score in scores))

    def percent(rate: float) -> str:
        return "–" if math.isnan(rate) else f"{100 * rate:.1f} %"

    row("DER, overlap scored", lambda s: percent(s.error.rate))
    row("  missed", lambda s: percent(s.error.miss))
    row("  false alarm", lambda s: percent(s.error.false_alarm))
    row("  confusion", lambda s: percent(s.error.confusion))
    row("DER, ± 0.25 s forgiven", lambda s: percent(s.error_collar.rate))
    row("DER, labels as first said", lambda s: percent(s.error_live.rate))
    row("speakers found", lambda s: f"{s.speakers_found} of {s.speakers}")
    row("speaker count error", lambda s: str(s.count_error))
    row("label swaps", lambda s: str(s.swaps))
    if any(score.words is not None for _, score in scores):
        row("WER", lambda s: "–" if s.words is None else percent(s.words.rate))
        row("CER", lambda s: "–" if s.characters is None else percent(s.characters.rate))
    row("partial words later changed", lambda s: percent(s.flicker))
    for at in (50, 99):
        row(
            f"latency p{at}",
            lambda s, at=at: f"{percentile(s.latencies_ms, at):.0f} ms" if s.latencies_ms else "–",
        )
    row("real-time factor", lambda s: f"{s.realtime_factor:.3f}")
    return table


def _print_score(reference: Path, heard: Path, duration_s: float) -> None:
    """How right a diarization was, in a few lines."""
    from stream.score import diarization_error, read_rttm, speaker_count_error

    truth = next(iter(read_rttm(reference).values()))
    found = next(iter(read_rttm(heard).values()), [])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("", "DER", "missed", "false alarm", "confusion"):
        table.add_column(title, justify="right" if title else "left")
    for name, collar_s in (("to the millisecond", 0.0), ("± 0.25 s forgiven", 0.25)):
        error = diarization_error(truth, found, duration_s, collar_s=collar_s)
        parts = (error.rate, error.miss, error.false_alarm, error.confusion)
        table.add_row(name, *(f"{100 * part:.1f} %" for part in parts))
    out.print(table)
    people = len({span.speaker for span in truth})
    found_count = people + speaker_count_error(truth, found)
    out.print(f"Found {found_count} of {people} speakers. Overlapped speech is scored.")


def _duration(path: Path) -> float | None:
    """Seconds of an audio file, if its header says; the source will say what is wrong with it."""
    import soundfile

    try:
        return float(soundfile.info(path).duration)
    except (soundfile.LibsndfileError, OSError, TypeError, ValueError, ZeroDivisionError):
        return None


def _version() -> None:
    import platform
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    def of(name: str) -> str:
        try:
            return installed(name)
        except PackageNotFoundError:
            return "absent"

    out.print(f"livesat {of('livesat')}")
    out.print(f"python {platform.python_version()}, torch {of('torch')}, numpy {of('numpy')}")


def main() -> None:
    """Run the command; every failure is one line on stderr and an exit code."""
    # A stream computes for some milliseconds, twice a second. OpenMP's threads would spin in
    # between, and on a busy machine the one that lost its core to others' makes every step wait:
    # 30 times slower, measured. Sleeping at once costs a lone stream a fifth of its speed, so they
    # spin for some microseconds first. OpenMP reads this when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, asyncio.CancelledError):  # a second signal cancels
        code = INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last stop: a user gets a line, not a traceback
        from stream.log import complain

        if "--debug" in sys.argv[1:]:
            traceback.print_exc()
        code = FAILED
        for leaf in _leaves(error):
            lines, code = _explain(leaf)
            for line in lines:
                complain(line)
    _silence_broken_pipe()
    sys.exit(code if isinstance(code, int) else 0)


def _leaves(error: BaseException) -> Iterable[BaseException]:
    """A task group's failure → what failed in it, each sentence once."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    leaves: dict[str, BaseException] = {}
    for each in error.exceptions:
        for leaf in _leaves(each):
            leaves.setdefault(str(leaf), leaf)
    return leaves.values()


def _explain(error: BaseException) -> tuple[list[str], int]:
    """A failure → its lines, and the exit code."""
    format_message: Callable[[], str] | None = getattr(error, "format_message", None)
    if format_message is not None:  # the argument parser's
        text = format_message() or str(error)
        return [_one_line(text)], USAGE
    name = type(error).__name__
    if isinstance(error, Usage) or name == "ConfigError":
        return str(error).splitlines(), USAGE
    if isinstance(error, ImportError):
        return [_one_line(str(error))], FAILED
    ours = type(error).__module__.partition(".")[0] in {"stream", "model", "sinks"}
    if ours or isinstance(error, ValueError | OSError):
        return [_one_line(str(error) or name)], FAILED
    line = f"{name}: {error} (a fault of livesat itself; livesat --debug … shows where)"
    return [_one_line(line)], FAILED


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _silence_broken_pipe() -> None:
    """Let the interpreter's last flush succeed when the reader of stdout has gone."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
