"""What subscribers receive, and how."""
