"""Routing: stacks of adapters over the rows of a batch."""
