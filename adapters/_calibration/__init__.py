"""Statistics of a model's inputs and gradients, and the initialisations that need them."""
