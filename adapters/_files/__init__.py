"""Adapters in files, as PEFT writes them."""
