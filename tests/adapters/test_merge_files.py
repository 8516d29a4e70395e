"""Adapters merged into files: the tensors of `merge`, for all methods and kinds of layers; killed, and gone on with."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import torchgraft.adapters as adapters
from torchgraft.adapters import LoraConfig, merge_files, save_adapter
from torchgraft.adapters._checkpoints import merge as merging
from torchgraft.functional import bind, merge

conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D


def model(dtype=torch.float32):
    torch.manual_seed(0)
    block = {
        "q": nn.Linear(8, 6),
        "k": nn.Linear(8, 6, bias=False),
        "square": nn.Linear(8, 8),
        "c_attn": conv1d(12, 8),
        "conv": nn.Conv2d(4, 6, 3),
    }
    layers = nn.ModuleList([nn.ModuleDict(block)])
    parts = {"embed_tokens": nn.Embedding(10, 8), "layers": layers, "norm": nn.LayerNorm(8), "score": nn.Linear(8, 2)}
    made = nn.ModuleDict(parts).to(dtype)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def write(made, folder, shards=1, **config):
    """Write a model as transformers does."""
    folder.mkdir()
    state = {key: tensor.contiguous() for key, tensor in made.state_dict().items()}
    names = (
        [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
    )
    where = {key: names[i % shards] for i, key in enumerate(state)}
    for name in names:
        save_file({key: state[key] for key in state if where[key] == name}, folder / name, {"format": "pt"})
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    return folder


def trained(made, config):
    graft = bind(made, config, allow_unreached=True)
    params = graft.init(torch.Generator().manual_seed(1))
    for leaves in params.values():
        for leaf in leaves.values():
            if leaf.is_floating_point():
                leaf.add_(0.1 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(leaf.numel())))
    return graft, params


def check(made, config, tmp_path, exact=True, shards=1):
    graft, params = trained(made, config)
    base, adapter = write(made, tmp_path / "base", shards), save_adapter(graft, tmp_path / "adapter", params=params)
    out = merge_files(base, adapter, tmp_path / "out")
    found = {}
    for file in out.glob("*.safetensors"):
        found |= load_file(file)
    expected = merge(graft, params)
    assert found.keys() == expected.keys()
    changed = 0
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        if exact:
            assert torch.equal(found[key], tensor), key
        torch.testing.assert_close(found[key], tensor)
        changed += not torch.equal(tensor, made.state_dict()[key])
    assert changed
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    return out


LINEAR = ["q", "k", "square"]
METHODS = {
    "lora": LoraConfig(r=2, rank_pattern={"k": 3}, target_modules=LINEAR),
    "rslora": LoraConfig(r=2, use_rslora=True, target_modules=LINEAR),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=LINEAR),
    "bias of B": LoraConfig(r=2, lora_bias=True, target_modules=["q"]),
    "biases": LoraConfig(r=2, bias="all", target_modules=LINEAR),
    "head": LoraConfig(r=2, modules_to_save=["score"], target_modules=LINEAR),
    "tokens": LoraConfig(r=2, trainable_token_indices={"embed_tokens": [3, 1]}, target_modules=LINEAR),
    "embedding": LoraConfig(r=2, target_modules=["embed_tokens", "q"]),
    "Conv1D": LoraConfig(r=2, target_modules=["c_attn"]),
    "convolution": LoraConfig(r=2, target_modules=["conv"]),
    "all-linear": LoraConfig(r=2, target_modules="all-linear", exclude_modules=["c_attn"]),
    "expression": LoraConfig(r=2, target_modules=r".*\.(q|k)"),
    "parameter": LoraConfig(r=2, target_modules=[], target_parameters=["q.weight"]),
    "ia3": adapters.IA3Config(target_modules=LINEAR, feedforward_modules=["k"]),
    "adalora": adapters.AdaLoraConfig(init_r=3, target_modules=LINEAR),
    "loha": adapters.LoHaConfig(r=2, target_modules=LINEAR),
    "lokr": adapters.LoKrConfig(r=2, target_modules=LINEAR),
    "oft": adapters.OFTConfig(oft_block_size=2, target_modules=LINEAR),
    "vera": adapters.VeraConfig(r=4, target_modules=LINEAR),
    "vblora": adapters.VBLoRAConfig(r=2, num_vectors=8, vector_length=2, topk=2, target_modules=LINEAR),
    "hira": adapters.HiraConfig(r=2, target_modules=LINEAR),
    "delora": adapters.DeloraConfig(r=2, target_modules=LINEAR),
    "c3a": adapters.C3AConfig(block_size=2, target_modules=LINEAR),
    "miss": adapters.MissConfig(r=2, target_modules=LINEAR),
    "shira": adapters.ShiraConfig(r=2, target_modules=LINEAR),
    "gralora": adapters.GraloraConfig(r=2, gralora_k=2, target_modules=LINEAR),
    "tinylora": adapters.TinyLoraConfig(target_modules=LINEAR),
}


@pytest.mark.parametrize("name", METHODS)
def test_files_have_what_merge_gives(name, tmp_path):
    check(model(), METHODS[name], tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_tensors_keep_the_dtype_of_the_base_and_are_rounded_once(dtype, tmp_path):
    check(model(dtype), METHODS["lora"], tmp_path)


def test_shards_index_config_and_tokenizer_go_through(tmp_path):
    out = check(model(), METHODS["biases"], tmp_path, shards=3)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(os.listdir(out)) == ["config.json", *names, "model.safetensors.index.json", "tokenizer.json"]
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    for name in names:  # headers are the base's, byte for byte
        size = int.from_bytes((out / name).read_bytes()[:8], "little")
        assert (out / name).read_bytes()[: 8 + size] == (tmp_path / "base" / name).read_bytes()[: 8 + size]


IN_PARTS = ("lora", "dora", "embedding", "Conv1D", "tokens", "oft", "biases")


@pytest.mark.parametrize("name", IN_PARTS)
def test_large_weights_are_merged_in_parts(name, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "_MOST", 70)
    check(model(), METHODS[name], tmp_path, exact=False)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(5, 8, 6))
        self.down = nn.Parameter(torch.randn(5, 6, 4))


@pytest.mark.parametrize("most", [2**20, 200])
def test_stacked_experts_are_merged_some_at_a_time(most, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "_MOST", most)
    made = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"experts": Experts()}) for _ in range(2)])})
    config = LoraConfig(r=2, rank_pattern={"up": 3}, target_parameters=["experts.up", "experts.down"])
    check(made, config, tmp_path, exact=most > 200)


def saved(tmp_path, config=METHODS["lora"], made=None, **written):
    made = model() if made is None else made
    graft, params = trained(made, config)
    adapter = save_adapter(graft, tmp_path / "adapter", params=params)
    return write(made, tmp_path / "base", **written), adapter


def test_what_is_there_already_is_left(tmp_path):
    base, adapter = saved(tmp_path)
    merge_files(base, adapter, tmp_path / "out")
    with pytest.raises(FileExistsError, match="out: is there already; give another directory, or delete it first"):
        merge_files(base, adapter, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert (merge_files(base, adapter, tmp_path / "empty") / "config.json").exists()


def break_at(monkeypatch, calls):
    """Have the disk fail at the n-th part of a merged tensor."""
    whole = merging.write_shard

    def failing(source, specs, file, changed, merged, report):
        def some(name):
            nonlocal calls
            calls -= 1
            if calls < 0:
                raise OSError("the disk is full")
            yield from merged(name)

        whole(source, specs, file, changed, some, report)

    monkeypatch.setattr(merging, "write_shard", failing)


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_merge_that_was_stopped_goes_on(calls, tmp_path, monkeypatch):
    monkeypatch.setattr("torchgraft.adapters._checkpoints.shard._NOTED", 1)
    base, adapter = saved(tmp_path, shards=2)
    whole = merge_files(base, adapter, tmp_path / "whole")
    with monkeypatch.context() as patch:
        break_at(patch, calls)
        with pytest.raises(OSError, match="the disk is full"):
            merge_files(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    told = []
    out = merge_files(base, adapter, tmp_path / "out", report=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert sorted(os.listdir(out)) == sorted(os.listdir(whole))
    for name in os.listdir(whole):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_merge_of_other_files_does_not_go_on(tmp_path, monkeypatch):
    base, adapter = saved(tmp_path)
    with monkeypatch.context() as patch:
        break_at(patch, 1)
        with pytest.raises(OSError, match="full"):
            merge_files(base, adapter, tmp_path / "out")
    graft, params = trained(model(), METHODS["rslora"])
    save_adapter(graft, adapter, params=params)
    with pytest.raises(FileExistsError, match=r"\.out\.merging: is left of another merge into .*out; delete it"):
        merge_files(base, adapter, tmp_path / "out")


def test_two_merges_into_one_directory_do_not_meet(tmp_path, monkeypatch):
    base, adapter = saved(tmp_path)

    def other(*_):
        with pytest.raises(BlockingIOError, match=r"\.out\.merging: another process is writing there; wait for it"):
            merge_files(base, adapter, tmp_path / "out")
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "write_shard", other)
    with pytest.raises(KeyboardInterrupt):
        merge_files(base, adapter, tmp_path / "out")


def test_errors_come_before_anything_is_written(tmp_path):
    base, adapter = saved(tmp_path)
    tensors = load_file(base / "model.safetensors")
    cases = {
        "has no tensor 'layers.0.q.weight'; did you mean": {
            k: v for k, v in tensors.items() if k != "layers.0.q.weight"
        },
        "is of dtype torch.int8, quantised": tensors | {"layers.0.q.weight": torch.zeros(6, 8, dtype=torch.int8)},
        "expected .* by the model and the config": tensors | {"layers.0.q.weight": torch.zeros(7, 8)},
    }
    for words, changed in cases.items():
        save_file(changed, base / "model.safetensors")
        with pytest.raises((KeyError, ValueError), match=words):
            merge_files(base, adapter, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_folders_without_safetensors_say_so(tmp_path):
    base, adapter = saved(tmp_path)
    (base / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no safetensors files of a model; pickles are never read here"):
        merge_files(base, adapter, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such file or directory; nothing is downloaded here"):
        merge_files(tmp_path / "nowhere", adapter, tmp_path / "out")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(
        FileNotFoundError, match=r"one.safetensors: is missing, a shard that model.safetensors.index.json names"
    ):
        merge_files(base, adapter, tmp_path / "out")


def test_a_square_weight_among_layers_of_both_orientations_is_refused(tmp_path):
    base, adapter = saved(tmp_path, LoraConfig(r=2, target_modules=["q", "square", "c_attn"]))
    with pytest.raises(
        ValueError, match="layers.0.square: its weight is square, .*orientation is not told; load the mod"
    ):
        merge_files(base, adapter, tmp_path / "out")


def test_a_square_weight_is_stored_as_the_others_are(tmp_path):
    made = nn.ModuleDict({"c_attn": conv1d(12, 8), "c_proj": conv1d(8, 8)})
    check(made, LoraConfig(r=2, target_modules=["c_attn", "c_proj"]), tmp_path)


def test_adapters_that_no_file_expresses_are_refused(tmp_path):
    base, adapter = saved(tmp_path, LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q"]))
    with pytest.raises(ValueError, match=r"init_lora_weights is 'pissa'.*save_adapter\(..., plain=True\)"):
        merge_files(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("tied", [{}, {"tie_word_embeddings": False}])
def test_an_embedding_that_is_the_output_too_is_refused(tied, tmp_path):
    base, adapter = saved(tmp_path, METHODS["embedding"], architectures=["LlamaForCausalLM"], **tied)
    if tied:
        merge_files(base, adapter, tmp_path / "out")
        return
    with pytest.raises(ValueError, match="'embed_tokens.weight': is tied to the model's output, .*untie the two"):
        merge_files(base, adapter, tmp_path / "out")


def test_a_trained_embedding_that_is_the_output_too_is_refused(tmp_path):
    config = LoraConfig(r=2, modules_to_save=["embed_tokens"], target_modules=["q"])
    base, adapter = saved(tmp_path, config, architectures=["LlamaForCausalLM"])
    with pytest.raises(ValueError, match="'embed_tokens.weight': is tied to the model's output"):
        merge_files(base, adapter, tmp_path / "out")


def test_embeddings_of_the_base_in_an_adapters_file_change_nothing(tmp_path):
    base, adapter = saved(tmp_path, architectures=["LlamaForCausalLM"])
    file, own = adapter / "adapter_model.safetensors", model().state_dict()["embed_tokens.weight"]
    save_file(load_file(file) | {"base_model.model.embed_tokens.weight": own}, file)
    out = merge_files(base, adapter, tmp_path / "out")
    assert torch.equal(load_file(out / "model.safetensors")["embed_tokens.weight"], own)


def test_tensors_that_the_config_speaks_of_have_to_be_there(tmp_path):
    base, adapter = saved(tmp_path, METHODS["head"])
    file = adapter / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "score" not in key}, file)
    with pytest.raises(KeyError, match="has no tensors of 'score', which the config has in modules_to_save"):
        merge_files(base, adapter, tmp_path / "out")


PROGRAM = """
import re, sys
from pathlib import Path
from torchgraft.adapters import merge_files
def most():  # of this process alone: what getrusage says begins with the parent's
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
before = most()
merge_files(*sys.argv[1:4], report=lambda done, total: print(done, total, flush=True))
print("peak", before, most())
"""


@pytest.mark.full
def test_a_merge_that_was_killed_goes_on_in_bounded_memory(tmp_path):
    wide, count = 1024, 96
    made = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.Linear(wide, wide, bias=False, dtype=torch.bfloat16) for _ in range(count)])}
    )
    names = [f"layers.{i}" for i in range(count)]
    base, adapter = saved(tmp_path, LoraConfig(r=8, target_modules=names), made)
    size = (base / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", PROGRAM, str(base), str(adapter), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if int(line.split()[0]) > size // 2:
                os.kill(run.pid, signal.SIGKILL)
                break
    assert run.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    before, peak = map(int, done[-1].split()[1:])
    assert (peak - before) * 1024 < size / 2, "of a model of 200 MB"
    whole = merge_files(base, adapter, tmp_path / "whole")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
