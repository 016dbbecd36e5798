"""Training a method: its trainer, checks, callbacks and cost."""
