"""Head outputs of one stream become events, each track with its own explicit state."""
