"""Tensors of a model: where their values rest, and the names they have within wrappers."""
