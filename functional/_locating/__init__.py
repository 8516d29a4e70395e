"""Locating: where the rows of a batch are inside a model, found out and proved."""
