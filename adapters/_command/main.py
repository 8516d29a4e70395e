"""The arguments of the command `torchgraft`, and what it returns to the shell.

It returns 0, or 1 where the answer is no (`check`, `diff`), or 2 for an error, whose one line says what to do.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from torchgraft.functional import __version__

from .._arithmetic.mixing import HOW
from .._conversion.formats import FORMS
from .._files.servers.check import check_servable
from .._files.servers.engines import SERVERS
from . import inspecting, making
from .output import as_json, one_line

_STOPPED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code.

    Args:
        arguments: What was typed; by default the process's own arguments.
    """
    given = vars(_parser().parse_args(arguments))
    run = given.pop("run")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"torchgraft: warning: {message}", file=sys.stderr)
            code: int = run(**given)
            return code
    except KeyboardInterrupt:
        print("torchgraft: stopped; a merge goes on where it was when the command is repeated", file=sys.stderr)
        return _STOPPED
    except BrokenPipeError:
        return 0
    except (ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"torchgraft: error: {one_line(error)}", file=sys.stderr)
        return 2


def check(path: str, server: str, json: bool = False) -> int:
    """Print whether an engine serves an adapter right; 1 if it does not."""
    found = check_servable(path, server)
    names = ("server", "problems", "needs")
    print(as_json({"path": str(found.path), **{name: getattr(found, name) for name in names}}) if json else found)
    return 0 if found else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchgraft",
        description="Adapters on disk: looked at, checked, merged, added, converted. Nothing is unpickled or fetched.",
        epilog="Exit codes: 0; 1 where the answer is no; 2 for an error.",
    )
    parser.add_argument("--version", action="version", version=f"torchgraft {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_looking(commands)
    _add_making(commands)
    return parser


def _add_looking(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    one = commands.add_parser("inspect", help="what an adapter is, its modules, ranks, norms, sizes, and what is odd")
    one.add_argument("path", help="the directory of an adapter")
    one.add_argument("--json", action="store_true", help="print JSON")
    one.add_argument("--picture", metavar="FILE", help="draw the norms by layer into a new file, such as norms.png")
    one.set_defaults(run=inspecting.inspect)

    one = commands.add_parser("diff", help="where two adapters differ; exits with 1 if they do")
    one.add_argument("first", help="the directory of an adapter")
    one.add_argument("second", help="that of another")
    one.add_argument("--json", action="store_true", help="print JSON")
    one.set_defaults(run=inspecting.diff)

    one = commands.add_parser("check", help="whether an engine serves an adapter right; exits with 1 if not")
    one.add_argument("path", help="the directory of an adapter")
    one.add_argument("--for", dest="server", required=True, choices=SERVERS, help="the engine")
    one.add_argument("--json", action="store_true", help="print JSON")
    one.set_defaults(run=check)


def _add_making(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    one = commands.add_parser(
        "merge",
        help="an adapter merged into a model's files, of any size",
        description="Tensor by tensor, in bounded memory. Stopped or killed, it goes on when it is called again.",
    )
    one.add_argument("base", help="the directory of a model: safetensors, config, tokenizer")
    one.add_argument("adapter", help="the directory of an adapter")
    one.add_argument("out", help="the directory to write, which is not there yet")
    one.add_argument("--quiet", action="store_true", help="no bar")
    one.set_defaults(run=making.merge)

    one = commands.add_parser("combine", help="the weighted sum of adapters, as one")
    one.add_argument("adapters", nargs="+", help="directories of adapters")
    one.add_argument("--out", required=True, help="the directory to write, which is not there yet")
    one.add_argument("--weights", nargs="+", type=float, help="a number for each; by default one over their count")
    one.add_argument("--how", choices=HOW, default="cat", help="by default 'cat', the sum itself")
    one.add_argument("--rank", type=int, help="the rank to cut to, for 'svd' and '..._svd'")
    one.add_argument("--density", type=float, help="the share of entries that pruning keeps")
    one.add_argument("--seed", type=int, help="the seed of DARE")
    one.set_defaults(run=making.combine)

    one = commands.add_parser("convert", help="an adapter in another form")
    one.add_argument("path", help="the directory of an adapter, or a safetensors file of diffusers' or kohya's")
    one.add_argument("out", help="the directory to write, or file.safetensors, which is not there yet")
    one.add_argument("--for", dest="server", choices=SERVERS, help="the engine that is to serve it")
    one.add_argument("--to", dest="form", choices=FORMS, help="the program's form")
    one.add_argument("--rank", type=int, help="the rank to cut to, with the error that this makes")
    one.add_argument("--prefix", help="what stands before names: the part of a pipeline, an adapter's name")
    one.add_argument("--model", metavar="DIR", help="the model, for names that kohya's and SDXL's keys need")
    one.set_defaults(run=making.convert)

    one = commands.add_parser("extract", help="the LoRA of what fine-tuning changed")
    one.add_argument("base", help="the directory of the model before")
    one.add_argument("tuned", help="that of the model after")
    one.add_argument("out", help="the directory to write, which is not there yet")
    one.add_argument("--rank", type=int, help="the rank; by default all that is more than rounding")
    one.add_argument("--energy", type=float, help="in its place the share of each module's energy to keep")
    one.add_argument("--rest", choices=("refuse", "save", "leave"), default="refuse", help="of what LoRA is not for")
    one.add_argument("--quiet", action="store_true", help="no bar")
    one.set_defaults(run=making.extract)


if __name__ == "__main__":
    sys.exit(main())
