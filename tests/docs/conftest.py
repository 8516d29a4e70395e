"""The modules that make the site are importable here, as they are for the build."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "docs" / "_make"))
