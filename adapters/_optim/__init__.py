"""Optimizers' rules for adapters: LoRA+ and LoRA-FA."""
