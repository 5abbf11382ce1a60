"""Where audio comes from. A new source is one file and one member of the union below.

A `Source` is one stream; a `Listener` waits for callers, each of which is one.
"""

from typing import Annotated

from pydantic import Field

from stream.sources.file import FileSource
from stream.sources.media import MediaSource
from stream.sources.microphone import MicrophoneSource
from stream.sources.rtp import RtpSource
from stream.sources.stdin import StdinSource
from stream.sources.tcp import TcpSource
from stream.sources.wyoming_server import WyomingSource

AnySource = Annotated[
    FileSource
    | StdinSource
    | MicrophoneSource
    | TcpSource
    | MediaSource
    | RtpSource
    | WyomingSource,
    Field(discriminator="kind"),
]
"""Every source, told apart by ``kind``."""
