"""What all configs share: fields, the modules and tensors that they mean, and PEFT's names for them."""
