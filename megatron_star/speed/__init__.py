"""What makes it fast, and can be taken away without changing an answer."""
