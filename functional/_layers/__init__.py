"""Layers: what stands at a site in a call, the base and the adapters around it."""
