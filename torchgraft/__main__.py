"""The command `torchgraft`, as `python -m torchgraft`."""

import sys

from torchgraft.adapters._command.main import main

if __name__ == "__main__":
    sys.exit(main())
