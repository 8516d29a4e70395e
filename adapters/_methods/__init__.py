"""Adapter methods: one file each, and a folder for those that need several."""
