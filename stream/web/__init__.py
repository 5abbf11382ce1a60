"""What the server serves: audio in, and whatever pages and feeds are mounted beside it."""
