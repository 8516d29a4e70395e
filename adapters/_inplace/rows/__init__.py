"""Rows of a batch with injected adapters of their own, through the functional routed call."""
