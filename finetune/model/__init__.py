"""Models, their tokens, and the rows that they read."""
