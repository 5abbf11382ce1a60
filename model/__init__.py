"""The UniSpeech-SAT family in torch: the published classes, and the streaming encoder."""
