"""Folders, headers and JSON on a disk, read and written without knowing what an adapter is."""
