"""The command `torchgraft`: what is asked of adapters on disk, typed in a shell."""
