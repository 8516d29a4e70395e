"""Injection in steps: an adapter is bound to a model, checked, placed and made active."""
