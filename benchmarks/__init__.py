"""One question a file; `make bench` runs them."""

import os

# As the command does, and for the same reason: threads that spin for long lose their cores.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
