"""The base's tensors: sharded or offloaded, kept while others are merged into them, and known by their content."""
