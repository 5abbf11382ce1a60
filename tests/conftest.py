"""For every test."""

from hypothesis import settings

# A busy machine is no reason to fail.
settings.register_profile("livesat", deadline=None)
settings.load_profile("livesat")
