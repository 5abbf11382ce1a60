"""Head outputs of one stream become events, each track with its own explicit state."""

from stream.tracks.frames import Frames, Vocabulary
from stream.tracks.language import LanguageModel, open_language_model
from stream.tracks.pipeline import Tracks
from stream.tracks.settings import TracksSettings
from stream.tracks.voices import Gallery

__all__ = [
    "Frames",
    "Gallery",
    "LanguageModel",
    "Tracks",
    "TracksSettings",
    "Vocabulary",
    "open_language_model",
]
