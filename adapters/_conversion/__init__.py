"""Conversion: from any method to LoRA, from a fine-tuned model to LoRA, between ranks, layouts and formats of files."""
