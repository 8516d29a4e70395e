"""What engines read of folders that `save_adapter(..., server=...)` wrote, each in its own way, in float64."""

import json
import math
import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from torchgraft.adapters import (
    IA3Config,
    LoraConfig,
    OFTConfig,
    check_servable,
    inject_adapter_in_model,
    load_adapter,
    save_adapter,
)
from torchgraft.functional import bind, merge

SERVERS = ("vllm", "sglang", "lorax", "llama.cpp")
PREFIX = "base_model.model."
QKV = ["q_proj", "k_proj", "v_proj"]
SHAPES = {
    "q_proj": (6, 8),
    "k_proj": (4, 8),
    "v_proj": (4, 8),
    "o_proj": (8, 6),
    "gate_proj": (12, 8),
    "up_proj": (12, 8),
}


def model(layers=2, dtype=torch.float64):
    torch.manual_seed(0)
    blocks = [{name: nn.Linear(i, o, bias=False) for name, (o, i) in SHAPES.items()} for _ in range(layers)]
    made = nn.ModuleDict({"embed_tokens": nn.Embedding(10, 8), "layers": nn.ModuleList(map(nn.ModuleDict, blocks))})
    return made.to(dtype)


def trained(base, config, **options):
    graft = bind(base, config, allow_unreached=True, **options)
    params = graft.init(torch.Generator().manual_seed(1), dtype=torch.float64)
    for leaves in params.values():
        for leaf in leaves.values():
            leaf.normal_(generator=torch.Generator().manual_seed(leaf.numel()))
    return graft, params


def wanted(graft, params):
    """The change of each weight, by module."""
    base, state = graft.model.state_dict(), merge(graft, params)
    changes = {key.removesuffix(".weight"): state[key] - base[key] for key in state}
    return {path: change for path, change in changes.items() if change.abs().max() > 0}


def pairs(folder):
    fields = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        path, kind = re.fullmatch(
            re.escape(PREFIX) + r"(.+)\.lora_(A|B|embedding_A|embedding_B)(?:\.weight)?", key
        ).groups()
        found.setdefault(path, {})[kind] = tensor.double()
    return fields, found


def product(leaves, scaling):
    if "embedding_A" in leaves:
        return scaling * (leaves["embedding_B"] @ leaves["embedding_A"]).T
    return scaling * leaves["B"] @ leaves["A"]


def by_vllm(fields, found, patterns=True):
    def matched(pattern, name, default):
        return next((one for key, one in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)

    changes = {}
    for path, leaves in found.items():
        rank = matched(fields["rank_pattern"] if patterns else {}, path, fields["r"])
        alpha = matched(fields["alpha_pattern"] if patterns else {}, path, fields["lora_alpha"])
        changes[path] = product(leaves, alpha / (math.sqrt(rank) if fields["use_rslora"] else rank))
    return changes


def by_sglang(fields, found):
    assert isinstance(fields["target_modules"], list)
    for path, leaves in found.items():
        name = path.rpartition(".")[2]
        for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            assert name not in group or all(path.replace(name, other) in found for other in group)
        assert next(iter(leaves.values())).shape[0] == fields["r"]
        assert name in {target.rpartition(".")[2] for target in fields["target_modules"]}
    return {path: product(leaves, fields["lora_alpha"] / fields["r"]) for path, leaves in found.items()}


def by_lorax(fields, found):
    r, changes = fields["r"], {}
    for name in dict.fromkeys(path.rpartition(".")[2] for path in found):
        layers = [path for path in found if path.endswith(f".{name}")]
        assert len(layers) == 2, "a name that some layer lacks is served in none"
        for path in layers:
            changes[path] = product(found[path], fields["lora_alpha"] / (math.sqrt(r) if fields["use_rslora"] else r))
        rank = found[path]["A"].shape[0]
        r = 8 if rank <= 8 else -(-rank // 16) * 16  # the padded rank, by which the next name is divided
    return changes


def by_llama_cpp(fields, found):
    ranks = {path: next(iter(leaves.values())).shape[0] for path, leaves in found.items()}
    return {path: product(leaves, fields["lora_alpha"] / ranks[path]) for path, leaves in found.items()}


READERS = {"vllm": by_vllm, "sglang": by_sglang, "lorax": by_lorax, "llama.cpp": by_llama_cpp}
CONFIGS = {
    "plain": LoraConfig(r=4, lora_alpha=9, target_modules=QKV),
    "rslora": LoraConfig(r=3, use_rslora=True, target_modules=QKV),
    "patterns": LoraConfig(
        r=4,
        rank_pattern={"layers.0.q_proj": 5, "o_proj": 2},
        alpha_pattern={"v_proj": 3},
        target_modules=[*QKV, "o_proj"],
    ),
    "some": LoraConfig(r=4, target_modules=r"layers\.1\.(v_proj|up_proj)"),
    "wide": LoraConfig(r=40, target_modules=["o_proj"]),
}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_an_engine_reads_the_change_of_each_weight(server, name, tmp_path):
    graft, params = trained(model(), CONFIGS[name])
    folder = save_adapter(graft, tmp_path, params=params, server=server)
    read = READERS[server](*pairs(folder))
    expected = wanted(graft, params)
    for path, change in read.items():
        torch.testing.assert_close(change, expected.pop(path, torch.zeros_like(change)), rtol=1e-12, atol=1e-12)
    assert not expected
    assert check_servable(folder, server)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_older_vllm_that_reads_no_patterns_reads_the_same(name, tmp_path):
    graft, params = trained(model(), CONFIGS[name])
    fields, found = pairs(save_adapter(graft, tmp_path, params=params, server="vllm"))
    for path, change in by_vllm(fields, found, patterns=False).items():
        torch.testing.assert_close(change, wanted(graft, params)[path])


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_folder_is_still_pefts_and_ours(server, name, tmp_path):
    graft, params = trained(model(dtype=torch.float32), CONFIGS[name])
    folder = save_adapter(graft, tmp_path, params=params, server=server)
    expected = merge(graft, params)
    ours = load_adapter(model(dtype=torch.float32), folder)
    theirs = peft.PeftModel.from_pretrained(model(dtype=torch.float32), str(folder)).merge_and_unload()
    for key, weight in theirs.state_dict().items():
        torch.testing.assert_close(weight, expected[key].float(), rtol=1e-4, atol=1e-4)
    again = save_adapter(ours, tmp_path / "again", server=server)
    assert sorted(pairs(again)[1]) == sorted(pairs(folder)[1])


def test_a_model_in_place_is_saved_alike(tmp_path):
    graft, params = trained(model(dtype=torch.float32), CONFIGS["patterns"])
    params = {path: {name: leaf.float() for name, leaf in leaves.items()} for path, leaves in params.items()}
    placed = inject_adapter_in_model(CONFIGS["patterns"], model(dtype=torch.float32), params=params)
    one = save_adapter(graft, tmp_path / "graft", params=params, server="sglang")
    other = save_adapter(placed, tmp_path / "model", server="sglang")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_embeddings_go_where_they_are_adapted(tmp_path):
    graft, params = trained(model(), LoraConfig(r=2, lora_alpha=3, target_modules=["embed_tokens", "o_proj"]))
    folder = save_adapter(graft, tmp_path, params=params, server="vllm")
    torch.testing.assert_close(by_vllm(*pairs(folder))["embed_tokens"], wanted(graft, params)["embed_tokens"])
    with pytest.raises(ValueError, match="'embed_tokens': an embedding, of which LoRAX adapts none"):
        save_adapter(graft, tmp_path / "lorax", params=params, server="lorax")


class Experts(nn.Module):
    def __init__(self, experts=3, hidden=8, inner=6):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, hidden, dtype=torch.float64))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner, dtype=torch.float64))


def experts(kind):
    base = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"experts": Experts()}) for _ in range(2)])})
    base.config = type("Config", (), {"model_type": kind})()
    config = LoraConfig(
        r=2, lora_alpha=3, rank_pattern={"gate_up_proj": 4}, target_parameters=["gate_up_proj", "down_proj"]
    )
    return trained(base, config)


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_stacked_experts_are_taken_apart(server, tmp_path):
    graft, params = experts("qwen3_moe")
    read = READERS[server](*pairs(save_adapter(graft, tmp_path, params=params, server=server)))
    assert len(read) == 2 * 3 * 3
    base, state = graft.model.state_dict(), merge(graft, params)
    for layer in range(2):
        at = f"layers.{layer}.experts"
        for expert in range(3):
            up, down = (
                state[f"{at}.{name}"][expert] - base[f"{at}.{name}"][expert] for name in ("gate_up_proj", "down_proj")
            )
            both = torch.cat([read[f"{at}.{expert}.{name}"] for name in ("gate_proj", "up_proj")])
            torch.testing.assert_close(both, up)
            torch.testing.assert_close(read[f"{at}.{expert}.down_proj"], down)


def test_vllm_reads_stacked_experts_of_some_models(tmp_path):
    graft, params = experts("gpt_oss")
    folder = save_adapter(graft, tmp_path, params=params, server="vllm")
    _, found = pairs(folder)
    assert set(found) == {f"layers.{i}.experts{end}" for i in range(2) for end in ("", ".base_layer")}
    base, state = graft.model.state_dict(), merge(graft, params)
    for name, place in (("gate_up_proj", "layers.0.experts.base_layer"), ("down_proj", "layers.0.experts")):
        a, b = found[place]["A"], found[place]["B"]  # as vllm/lora/model_manager.py has it
        a, b = a.reshape(3, -1, a.shape[-1]), b.reshape(b.shape[0], -1, 3).permute(2, 0, 1)
        key = f"layers.0.experts.{name}"
        torch.testing.assert_close(b @ a, state[key] - base[key])
    found = check_servable(folder, "vllm")
    assert found and "--max-lora-rank 8" in found.needs[0] and "--enable-mixed-moe-lora-format" in found.needs[1]
    assert "expert by expert" in check_servable(folder, "sglang").problems[0]


def one(**fields):
    config = LoraConfig(target_modules=["o_proj"], **fields)
    return bind(nn.ModuleDict({"o_proj": nn.Linear(4, 4)}), config, allow_unreached=True)


REFUSED = {
    "dora": (LoraConfig(use_dora=True, target_modules=["o_proj"]), ("use_dora", "to_lora(graft, params, rank=...)")),
    "oft": (OFTConfig(oft_block_size=2, target_modules=["o_proj"]), ("it is OFT", "to_lora(graft, params, rank=...)")),
    "ia3": (IA3Config(target_modules=["o_proj"], feedforward_modules=[]), ("it is IA3", "serves LoRA alone")),
    "saved": (
        LoraConfig(target_modules=["o_proj"], modules_to_save=["embed_tokens"]),
        ("modules_to_save is ['embed_tokens']", "target them with LoRA"),
    ),
    "pissa": (
        LoraConfig(r=2, init_lora_weights="pissa", target_modules=["o_proj"]),
        ("started as pissa", "plain=True"),
    ),
}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_engine_has_is_refused_before_anything_is_written(server, name, tmp_path):
    config, words = REFUSED[name]
    graft = bind(model(dtype=torch.float32), config, allow_unreached=True)
    with pytest.raises(ValueError, match="cannot serve this adapter") as caught:
        save_adapter(graft, tmp_path / "served", params=graft.init(), server=server)
    assert all(word in str(caught.value) for word in (*words, "nothing was written"))
    assert not (tmp_path / "served").exists()
    found = check_servable(save_adapter(graft, tmp_path / "plainly", params=graft.init()), server)
    assert not found and all(word in str(found) for word in words)


def test_pissa_is_served_as_a_plain_one(tmp_path):
    graft = bind(model(), LoraConfig(r=2, init_lora_weights="pissa", target_modules=["o_proj"]), allow_unreached=True)
    params = graft.init(dtype=torch.float64)
    params["layers.1.o_proj"]["lora_B"] += 1
    read = by_vllm(*pairs(save_adapter(graft, tmp_path, params=params, server="vllm", plain=True)))
    torch.testing.assert_close(read["layers.1.o_proj"], wanted(graft, params)["layers.1.o_proj"])


def test_biases_are_refused(tmp_path):
    graft = one(r=2, bias="all")
    with pytest.raises(ValueError, match="bias is 'all', and SGLang keeps the base's biases; train with bias='none'"):
        save_adapter(graft, tmp_path, params=graft.init(), server="sglang")


def test_ranks_above_the_most_are_refused(tmp_path):
    graft = one(r=600)
    with pytest.raises(ValueError, match=r"its rank is 600, and vLLM 0.32 takes at most 512; cut it: shrink\("):
        save_adapter(graft, tmp_path, params=graft.init(), server="vllm")


def test_convolutions_and_unknown_engines_are_refused(tmp_path):
    graft = bind(nn.Sequential(nn.Conv2d(3, 4, 3)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="0 is of kind 'conv2d'; LoRAX adapts linear layers; leave it out"):
        save_adapter(graft, tmp_path, params=graft.init(), server="lorax")
    with pytest.raises(ValueError, match=r"server is 'vlm', expected one of \['vllm', .*did you mean 'vllm'"):
        save_adapter(graft, tmp_path, params=graft.init(), server="vlm")
    folder = save_adapter(graft, tmp_path, params=graft.init())
    assert "expected two matrices" in check_servable(folder, "vllm").problems[0]


def changed(folder, change=lambda tensors: None, **fields):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))


def saved(folder, **fields):
    graft, params = trained(model(), LoraConfig(**{"r": 16, "target_modules": QKV, **fields}))
    return save_adapter(graft, folder, params=params)


OTHERS = {
    "patterns": (
        "sglang",
        {},
        {"alpha_pattern": {"q_proj": 3}},
        "it has alpha_pattern, and SGLang reads r and lora_alpha alone",
    ),
    "rslora": ("sglang", {}, {"use_rslora": True}, "it has use_rslora, and SGLang divides lora_alpha by r itself"),
    "rslora of llama.cpp": ("llama.cpp", {}, {"use_rslora": True}, "it has use_rslora, and llama.cpp divides"),
    "another rank": ("lorax", {}, {"r": 8}, "of another rank than the config's r, 8"),
    "a rank that is padded": (
        "lorax",
        {"r": 4},
        {},
        "its rank is 4, which LoRAX pads, and then scales by the padded rank",
    ),
    "an expression": ("sglang", {}, {"target_modules": ".*_proj"}, "target_modules is the expression '.*_proj'"),
    "projections": ("sglang", {"target_modules": ["q_proj", "up_proj"]}, {}, "has no factors for k_proj, v_proj"),
    "layers": ("lorax", {"target_modules": ["layers.1.q_proj"]}, {}, "adapted in some layers only"),
    "aLoRA": ("vllm", {}, {"alora_invocation_tokens": [1]}, "alora_invocation_tokens, which adapts only what follows"),
    "KaSA": ("vllm", {}, {"kasa_config": {"beta": 1}}, "kasa_config, which has singular values of its own"),
    "biases of B": ("vllm", {}, {"lora_bias": True}, "lora_bias, which has biases beside its factors"),
    "tokens": ("vllm", {}, {"trainable_token_indices": [1]}, "trainable_token_indices, rows of an embedding"),
    "LoftQ": ("vllm", {}, {"init_lora_weights": "loftq"}, "it started as LoftQ"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_an_engine_reads_otherwise_is_found_in_others_folders(name, tmp_path):
    server, made, fields, words = OTHERS[name]
    folder = saved(tmp_path, **made)
    changed(folder, **fields)
    found = check_servable(folder, server)
    assert not found and any(words in problem for problem in found.problems), found.problems
    assert words in str(found) and "does not serve" in str(found)


def test_vllm_takes_a_plain_folder_as_it_is_and_says_with_what(tmp_path):
    found = check_servable(saved(tmp_path, r=12, use_rslora=True, alpha_pattern={"q_proj": 3}), "vllm")
    assert found and found.needs == ("--enable-lora --max-lora-rank 16",)
    assert str(found) == f"vLLM 0.32 serves {tmp_path}\nwith --enable-lora --max-lora-rank 16"


def test_other_tensors_and_other_prefixes_are_found(tmp_path):
    def prefix(tensors):
        for key in list(tensors):
            tensors[key.removeprefix(PREFIX)] = tensors.pop(key)

    changed(saved(tmp_path), prefix)
    assert "no factor of LoRA under a key base_model.model.<module>" in check_servable(tmp_path, "lorax").problems[0]


def test_the_page_on_engines_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(block, "serving.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "has no factors for k_proj" in printed and "SGLang divides lora_alpha by r itself" in printed
