"""What adapters have in a model beside their layers: biases, copies of modules, and rows of embeddings."""
