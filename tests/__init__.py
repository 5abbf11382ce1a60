"""Tests of livesat, one folder a room."""

import os

# Before anything loads torch: OpenMP threads that spin between steps make a shared machine crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
