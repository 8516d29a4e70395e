"""The changelog, the citation and the hooks before a commit say what is so."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

import torchgraft.adapters
import torchgraft.functional

ROOT = Path(__file__).parents[1]
VERSION = torchgraft.functional.__version__
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def loaded(name):
    return yaml.safe_load((ROOT / name).read_text())


def test_the_changelog_begins_with_the_version():
    versions = re.findall(r"^## \[(.+?)\] - (.+)$", CHANGELOG, flags=re.M)
    assert versions[0][0] == VERSION
    assert len(dict(versions)) == len(versions) == CHANGELOG.count("\n## ")
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d|Unreleased", date) for _, date in versions)
    headings = set(re.findall(r"^### (.+)$", CHANGELOG, flags=re.M))
    assert headings <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_changelog_names_what_is_there():
    public = vars(torchgraft.functional) | vars(torchgraft.adapters) | {"vmap": torch.func.vmap}
    named = re.findall(r"`(.+?)`", CHANGELOG)
    for name in named:
        first, *attributes = name.split(".")
        thing = public[first]
        assert all(hasattr(thing, attribute) for attribute in attributes), name
    methods = {name for name, config in vars(torchgraft.adapters).items() if hasattr(config, "method")}
    assert methods <= set(named)


def test_the_citation_is_that_of_the_project():
    citation = loaded("CITATION.cff")
    assert citation == {
        "cff-version": "1.2.0",
        "message": f"If you use {PROJECT['name']}, please cite it as below.",
        "type": "software",
        "title": PROJECT["name"],
        "abstract": PROJECT["description"],
        "authors": [{"name": "The torchgraft authors"}],
        "version": VERSION,
        "license": PROJECT["license"],
    }


def arguments(command):
    """The arguments of a command, those of a shell's with its patterns expanded."""
    parts = shlex.split(command)
    if parts[:2] != ["sh", "-c"]:
        return parts
    expanded = []
    for part in shlex.split(parts[2]):
        expanded += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(part)) if "*" in part else [part]
    return expanded


@pytest.mark.parametrize("hook", loaded(".pre-commit-config.yaml")["repos"][0]["hooks"], ids=lambda hook: hook["id"])
def test_a_hook_takes_all_files_and_fetches_nothing(hook):
    assert hook.keys() == {"id", "name", "entry", "language", "pass_filenames"}
    assert hook["language"] == "system"
    assert hook["pass_filenames"] is False


def test_the_hooks_are_the_commands_of_make_lint():
    (repo,) = loaded(".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"
    command = ["make", "--dry-run", "--no-print-directory", "--old-file=.venv/.test", "lint"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lint = [shlex.split(line) for line in printed.splitlines() if line.startswith(".venv/bin/")]
    assert [arguments(hook["entry"]) for hook in repo["hooks"]] == lint
    assert {Path(tool).name for tool, *_ in lint} == {"ruff", "mypy"}
