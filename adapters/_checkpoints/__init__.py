"""Whole models on disk: adapters merged into their shards, tensor by tensor."""
