"""LoRA, with DoRA, and LoRA on bare parameters."""
