"""The layer around an adapted module: what hangs in it, what it computes, and what is merged into it."""
