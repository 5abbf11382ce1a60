"""What the daemon's server serves: audio in, events out, the dashboard, health and metrics."""
