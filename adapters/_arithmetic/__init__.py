"""Arithmetic on adapters: sums, pruned and truncated ones, soups, angles and projections."""
