"""PEFT's names, for libraries that import `peft` by themselves."""
