"""Skeletons: copies of a model's structure, through which adapters run."""
