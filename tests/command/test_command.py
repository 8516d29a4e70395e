"""The command `torchgraft` as it is typed: what it prints, what it writes, what it returns."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from torchgraft.adapters import IA3Config, LoraConfig, combine, load_adapter, save_adapter
from torchgraft.adapters._command.main import main
from torchgraft.functional import __version__, bind, merge


def model():
    torch.manual_seed(0)
    sizes = {"q_proj": 6, "v_proj": 4}
    blocks = [{name: nn.Linear(8, size, bias=False) for name, size in sizes.items()} for _ in range(2)]
    return nn.ModuleDict({"layers": nn.ModuleList(map(nn.ModuleDict, blocks))})


CONFIG = LoraConfig(r=2, lora_alpha=6, rank_pattern={"v_proj": 3}, target_modules=["q_proj", "v_proj"])


def made(config=CONFIG, seed=0):
    graft = bind(model(), config, allow_unreached=True)
    generator = torch.Generator().manual_seed(seed)
    params = graft.init(generator)
    for leaves in params.values():
        for leaf in leaves.values():
            leaf.normal_(generator=generator)
    return graft, params


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model and adapters, in which the command is called."""
    monkeypatch.chdir(tmp_path)
    for name, config, seed in (
        ("poems", CONFIG, 0),
        ("code", CONFIG, 1),
        ("ia3", IA3Config(target_modules=["q_proj"], feedforward_modules=[]), 0),
    ):
        graft, params = made(config, seed)
        save_adapter(graft, name, params=params)
    os.mkdir("model")
    save_file(model().state_dict(), "model/model.safetensors", {"format": "pt"})
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path


def typed(line, cwd, code=0):
    """Call the command in a process of its own; return what it prints."""
    run = subprocess.run([sys.executable, "-m", "torchgraft", *line.split()], cwd=cwd, capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr
    return run.stdout if code < 2 else run.stderr


def called(line, capsys, code=0):
    """Call the command in this process, which is faster."""
    assert main(line.split()) == code
    printed = capsys.readouterr()
    return printed.out if code < 2 else printed.err


@pytest.mark.slow
def test_a_walk_as_it_is_typed(here):
    assert typed("--version", here) == f"torchgraft {__version__}\n"
    assert "method   LORA" in typed("inspect poems", here)
    assert typed("check poems --for lorax", here, code=1).startswith(
        "LoRAX does not serve poems\n- it has rank_pattern"
    )
    assert typed("convert poems served --for lorax", here, code=0) == "served\n"
    assert "LoRAX serves served" in typed("check served --for lorax", here)
    assert typed("merge model poems merged", here) == "merged\n"
    assert typed("merge model poems merged", here, code=2) == (
        "torchgraft: error: merged: is there already; give another directory, or delete it first\n"
    )
    assert "usage: torchgraft" in typed("polish poems", here, code=2)


def test_inspect_shows_modules_ranks_and_norms(here, capsys):
    text = called("inspect poems", capsys)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith(("module  ", "layers."))}
    assert rows["module"] == ["rank", "scaling", "size", "norm"]
    graft, params = made()
    state, base = {key: one.detach() for key, one in merge(graft, params).items()}, graft.model.state_dict()
    for key, weight in base.items():
        norm = float((state[key] - weight).double().norm())
        rank = {"q_proj": "2", "v_proj": "3"}[key.split(".")[2]]
        scaling = {"2": "3", "3": "2"}[rank]
        assert rows[key.removesuffix(".weight")] == [rank, scaling, f"{weight.shape[0]}x8", f"{norm:.4g}"]


def test_inspect_prints_json(here, capsys):
    found = json.loads(called("inspect poems --json", capsys))
    assert found["method"] == "LORA" and found["ranks"] == [2, 3] and found["odd"] == []
    assert found["modules"][0].keys() == {"module", "rank", "scaling", "size", "norm"}
    assert found["config"]["lora_alpha"] == 6
    assert json.loads(called("inspect ia3 --json", capsys))["modules"] == []


def test_inspect_draws_a_picture(here, capsys):
    pytest.importorskip("matplotlib")
    called("inspect poems --picture norms.png", capsys)
    assert (here / "norms.png").read_bytes().startswith(b"\x89PNG")
    assert "norms.png: is there already" in called("inspect poems --picture norms.png", capsys, code=2)
    assert "tells no norms without a model" in called("inspect ia3 --picture other.png", capsys, code=2)
    assert not (here / "other.png").exists()


def test_diff_tells_fields_and_modules(here, capsys):
    assert called("diff poems poems", capsys) == "4 of 4 modules are equal\n"
    found = json.loads(called("diff poems code --json", capsys, code=1))
    graft, first = made()
    changes = [{k: x.detach() for k, x in merge(graft, params).items()} for params in (first, made(seed=1)[1])]
    for row in found["modules"]:
        key = f"{row['module']}.weight"
        assert row["difference"] == pytest.approx(float((changes[0][key] - changes[1][key]).norm()), rel=1e-4)
    assert found["fields"] == {} and found["same"] is False
    text = called("diff poems ia3", capsys, code=1)
    assert "peft_type: 'LORA' in poems, 'IA3' in ia3" in text and "0 of 4 modules are equal" in text


def test_diff_of_adapters_without_factors_is_that_of_leaves(here, capsys):
    graft, params = made(IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    params["layers.0.q_proj"]["ia3_l"][0] += 0.5
    save_adapter(graft, "other", params=params)
    found = json.loads(called("diff ia3 other --json", capsys, code=1))
    assert [row["difference"] for row in found["modules"]] == pytest.approx([0.5, 0.0])


def test_check_returns_one_where_the_answer_is_no(here, capsys):
    assert called("check poems --for vllm", capsys) == "vLLM 0.32 serves poems\nwith --enable-lora --max-lora-rank 8\n"
    found = json.loads(called("check ia3 --for vllm --json", capsys, code=1))
    assert found["problems"] == [
        "it is IA3, and vLLM 0.32 serves LoRA alone; make it a plain LoRA first: to_lora(graft, params, rank=...)"
    ]


def test_convert_for_an_engine_is_what_save_adapter_writes(here, capsys):
    graft, params = made()
    for server in ("vllm", "lorax", "llama.cpp"):
        called(f"convert poems {server} --for {server}", capsys)
        save_adapter(graft, f"{server}-saved", params=params, server=server)
        first, second = (load_file(f"{name}/adapter_model.safetensors") for name in (server, f"{server}-saved"))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert "vLLM 0.32 cannot serve this adapter, and nothing was written: it is IA3" in called(
        "convert ia3 x --for vllm", capsys, code=2
    )
    assert not (here / "x").exists()


def test_convert_for_an_engine_says_what_only_a_model_tells(here, capsys):
    said = called("convert poems x --for sglang", capsys, code=2)
    assert "has no factors for k_proj" in said and "save_adapter(..., server='sglang'), which adds zeros" in said
    assert len(said.splitlines()) == 1


def test_combine_is_the_function(here, capsys):
    called("combine poems code --out both --weights 0.7 -0.2", capsys)
    (graft, first), (_, second) = made(), made(seed=1)
    config, params = combine([(graft.configs[""], first), (graft.configs[""], second)], [0.7, -0.2])
    both = bind(model(), config, allow_unreached=True)
    loaded = load_adapter(both, "both")
    for path, leaves in params.items():
        assert all(torch.equal(loaded[path][name], leaf) for name, leaf in leaves.items())
    called("combine poems code --out cut --how svd --rank 1", capsys)
    assert json.loads(called("inspect cut --json", capsys))["ranks"] == [1]
    called("combine poems code --out pruned --how dare_ties_svd --density 0.5 --rank 2 --seed 1", capsys)
    assert "expected one for each of the 2 adapters" in called("combine poems code --out x --weights 1", capsys, code=2)
    assert "both: is there already" in called("combine poems code --out both", capsys, code=2)


def test_merge_writes_what_merge_gives(here, capsys):
    called("merge model poems merged --quiet", capsys)
    expected = merge(*made())
    found = load_file("merged/model.safetensors")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert sorted(os.listdir("merged")) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_errors_are_one_line_that_says_what_to_do(here, capsys):
    cases = {
        "inspect nowhere": "nowhere: no such directory; nothing is downloaded here, fetch it first",
        "inspect model": "model: ",
        "merge model nowhere out": "nowhere: no such directory",
        "merge nowhere poems out": "nowhere: no such file or directory; nothing is downloaded here, fetch it first",
        "combine poems nowhere --out x": "nowhere: no such directory",
    }
    for line, words in cases.items():
        said = called(line, capsys, code=2)
        assert said.startswith(f"torchgraft: error: {words}") and len(said.splitlines()) == 1
    (here / "poems" / "adapter_model.safetensors").unlink()
    (here / "poems" / "adapter_model.bin").write_bytes(b"\x80")
    assert "there is only adapter_model.bin, a pickle, which is never read here" in called(
        "inspect poems", capsys, code=2
    )
    assert not (here / "out").exists() and not (here / "x").exists()


def test_a_directory_of_a_module_trained_as_a_whole_needs_a_model(here, capsys):
    graft, params = made(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["v_proj"]))
    save_adapter(graft, "saved", params=params)
    said = called("combine saved saved --out x", capsys, code=2)
    assert "'base_model.model.layers.0.v_proj.weight'" in said and "load it there" in said
    called("merge model saved merged", capsys)
    assert torch.equal(
        load_file("merged/model.safetensors")["layers.1.v_proj.weight"], params["layers.1.v_proj"]["weight"]
    )


def test_stopping_says_what_happens(here, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("torchgraft.adapters._command.making.merge_files", stop)
    assert main(["merge", "model", "poems", "merged"]) == 130
    assert "a merge goes on where it was when the command is repeated" in capsys.readouterr().err


def test_convert_goes_to_other_programs_and_back(here, capsys):
    _, params = made()
    called("convert poems poems.safetensors --to kohya --prefix lora_te", capsys)
    assert "lora_te_layers_0_q_proj.alpha" in load_file("poems.safetensors")
    called("convert poems.safetensors back --to peft --model model", capsys)
    found = json.loads(called("diff poems back --json", capsys, code=1))
    assert [row["difference"] for row in found["modules"]] == pytest.approx([0.0] * len(params), abs=1e-5)
    assert "ends in .safetensors" in called("convert poems other --to diffusers", capsys, code=2)
    assert "nothing to convert to; give --for ENGINE, --to FORM or --rank R" in called(
        "convert poems x", capsys, code=2
    )


def test_convert_cuts_the_rank_and_says_what_that_costs(here, capsys):
    assert main(["convert", "poems", "cut", "--rank", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "cut\n" and "together" in printed.err
    assert json.loads(called("inspect cut --json", capsys))["ranks"] == [1]


def test_extract_is_what_merge_put_in(here, capsys):
    called("merge model poems merged --quiet", capsys)
    assert main(["extract", "model", "merged", "again", "--rank", "3"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "again\n" and "together" in printed.err
    found = json.loads(called("diff poems again --json", capsys, code=1))
    assert [row["cosine"] for row in found["modules"]] == pytest.approx([1.0] * 4)
    assert [row["difference"] for row in found["modules"]] == pytest.approx([0.0] * 4, abs=1e-4)
