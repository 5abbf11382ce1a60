"""Live audio in, events out: the only package that knows both `model` and `sinks`."""
