"""Tests of livesat, one folder a room."""

import os

# Before anything loads torch: OpenMP threads that spin between steps make a shared machine crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Where two workers share the tests, and the machine's cores with them, each computes on one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
