"""Whatever goes wrong while an adapter is written, the directory holds the old one or the new one."""

import builtins
import os
import stat
import subprocess
import sys
import threading

import pytest
import safetensors.torch
import torch
from torch import nn

from torchgraft.adapters import LoraConfig, load_adapter, load_config, save_adapter, save_config
from torchgraft.functional import bind

FILES = {"adapter_config.json", "adapter_model.safetensors"}


def version(alpha):
    """A graft and a tree whose scaling factor and numbers tell which version they are."""
    graft = bind(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"]))
    params = {"0": {"lora_A": torch.full((2, 4), float(alpha)), "lora_B": torch.ones(4, 2)}}
    return graft, params


def save(folder, alpha):
    graft, params = version(alpha)
    save_adapter(graft, folder, params=params)


def read(folder):
    """The version in a directory, once both files are seen to be of the same."""
    model = load_adapter(nn.Sequential(nn.Linear(4, 4)), folder)
    alpha = model.peft_config["default"].lora_alpha
    assert model[0].lora_A["default"].weight.eq(alpha).all(), "the config and the weights are of two versions"
    assert load_config(folder).lora_alpha == alpha
    return alpha


class Failing:
    """Functions that work until their n-th call, of all together."""

    def __init__(self, monkeypatch, at, *, forever):
        self.calls, self.at, self.forever = 0, at, forever
        for owner, name in ((os, "replace"), (os, "fsync"), (safetensors.torch, "save"), (builtins, "open")):
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, function):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.at or (self.forever and self.calls > self.at):
                raise OSError(f"no {function.__name__} today")
            return function(*args, **kwargs)

        return call


STEPS = 11
REPLACED = 9
"""The first step after the weights were replaced."""


def test_the_number_of_steps(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        failing = Failing(patch, 0, forever=False)
        save(tmp_path, 1)
    assert failing.calls == STEPS


@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("at", range(1, STEPS + 1))
@pytest.mark.parametrize("fresh", [False, True])
def test_a_write_that_fails_leaves_the_old_pair_or_the_new_one(fresh, at, forever, tmp_path, monkeypatch):
    if not fresh:
        save(tmp_path, 1)
    with monkeypatch.context() as patch:
        Failing(patch, at, forever=forever)
        with pytest.raises(OSError, match="today"):
            save(tmp_path, 2)
    names = set(os.listdir(tmp_path))
    assert not [name for name in names if name.endswith(".tmp")]
    if fresh and at < REPLACED:
        assert not names
        with pytest.raises(FileNotFoundError, match="holds no adapter"):
            read(tmp_path)
    else:
        assert read(tmp_path) == (1 if at < REPLACED else 2)
        assert names == FILES or at == REPLACED + 1 or (at == REPLACED and forever)
    save(tmp_path, 3)
    assert read(tmp_path) == 3
    assert set(os.listdir(tmp_path)) == FILES


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, *range(7, STEPS + 1)])
def test_a_process_that_is_killed_leaves_the_old_pair_or_the_new_one(at, tmp_path):
    save(tmp_path, 1)
    program = f"""
import os, sys, builtins, importlib, torch, safetensors.torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
test = importlib.import_module("test_files_atomic")
calls = 0
def wrap(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == {at}:
            os._exit(3)
        return function(*args, **kwargs)
    return call
graft, params = test.version(2)
for owner, name in ((os, "replace"), (os, "fsync"), (safetensors.torch, "save"), (builtins, "open")):
    setattr(owner, name, wrap(getattr(owner, name)))
test.save_adapter(graft, {str(tmp_path)!r}, params=params)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 3
    assert read(tmp_path) == (1 if at < REPLACED else 2)
    save(tmp_path, 3)
    assert read(tmp_path) == 3


def test_a_config_saved_after_a_crash_counts(tmp_path, monkeypatch):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        Failing(patch, 9, forever=True)
        with pytest.raises(OSError, match="today"):
            save(tmp_path, 2)
    assert read(tmp_path) == 2
    save_config(LoraConfig(r=2, lora_alpha=5, target_modules=["0"]), tmp_path)
    assert load_config(tmp_path).lora_alpha == 5
    assert set(os.listdir(tmp_path)) == FILES


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_directory_in_the_place_of_a_file_is_an_error_that_names_it(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=f"{name}: is a directory, expected a file or nothing"):
        save(tmp_path, 1)
    assert os.listdir(tmp_path) == [name]


def test_links_are_replaced_and_not_written_through(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in FILES:
        (folder / name).symlink_to(outside)
    save(folder, 1)
    assert read(folder) == 1 and outside.read_text() == "mine"


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_files_have_the_users_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in FILES} == {0o640}


@pytest.mark.slow
def test_readers_and_writers_at_the_same_time_see_whole_pairs(tmp_path):
    save(tmp_path, 1)
    stop, failures, seen = threading.Event(), [], set()

    def guarded(work):
        def run():
            try:
                while not stop.is_set():
                    work()
            except BaseException as error:
                failures.append(error)
                stop.set()

        return run

    versions = iter(range(2, 10**6))
    threads = [threading.Thread(target=guarded(lambda: save(tmp_path, next(versions)))) for _ in range(2)]
    threads += [threading.Thread(target=guarded(lambda: seen.add(read_pair(tmp_path)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    stop.wait(2)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert len(seen) > 2
    assert set(os.listdir(tmp_path)) == FILES


def read_pair(folder):
    model = load_adapter(nn.Sequential(nn.Linear(4, 4)), folder)
    alpha = model.peft_config["default"].lora_alpha
    assert model[0].lora_A["default"].weight.eq(alpha).all(), "the config and the weights are of two versions"
    return alpha
