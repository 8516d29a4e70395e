"""What adapters in a model hold, as state dicts, as trees, as a graft, and as a summary."""
