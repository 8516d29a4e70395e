"""Bindings: configs meet a model."""
