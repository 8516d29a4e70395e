"""`import peft` fails, as where it is not installed."""

import sys
from importlib.machinery import PathFinder


class WithoutPeft(PathFinder):
    """What finds modules and distributions, other than PEFT's."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "peft" else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        return (one for one in super().find_distributions(*args, **kwargs) if one.metadata["Name"] != "peft")


def hide_peft():
    """Make `import peft` fail, as where it is not installed."""
    sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutPeft
    try:
        import peft
    except ModuleNotFoundError:
        return
    raise AssertionError(f"{peft} was found")
