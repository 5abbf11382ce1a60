"""Where audio comes from. A new source is one file and one member of the union below."""

from typing import Annotated

from pydantic import Field

from stream.sources.file import FileSource
from stream.sources.microphone import MicrophoneSource
from stream.sources.stdin import StdinSource

AnySource = Annotated[
    FileSource | StdinSource | MicrophoneSource,
    Field(discriminator="kind"),
]
"""Every source, told apart by ``kind``."""
