"""AdaLoRA: LoRA as a singular value decomposition, and how its budget of ranks is spent."""
