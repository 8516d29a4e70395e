"""What several methods share: products of thin matrices, leaves that are modules, scaling factors."""
