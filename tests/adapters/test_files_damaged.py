"""Files that are damaged or hostile: each is an error that names the file and the key, and the model is what it was."""

import copy
import json
import os
import shutil
import struct
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from torchgraft.adapters import (
    AdaLoraConfig,
    AdapterConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    inject_adapter_in_model,
    load_adapter,
    load_config,
    save_adapter,
)
from torchgraft.adapters._files.disk import headers
from torchgraft.functional import bind

BOTH = {"target_modules": ["first", "second"]}
CONFIGS = {
    "lora": LoraConfig(r=2, **BOTH, modules_to_save=["head"]),
    "ia3": IA3Config(feedforward_modules=["second"], **BOTH),
    "adalora": AdaLoraConfig(init_r=2, target_r=1, rank_pattern={"first.lora_E": [True, False]}, **BOTH),
    "oft": OFTConfig(oft_block_size=2, **BOTH),
    "vera": VeraConfig(r=3, **BOTH),
}
CLEAN = (FileNotFoundError, IsADirectoryError, KeyError, NotADirectoryError, RuntimeError, TypeError, ValueError)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
A = "base_model.model.first.lora_A.weight"
HEAD = "base_model.model.head.bias"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()))


def state(model):
    """All that loading could change."""
    tensors = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    return tensors, flags, modules, vars(model).get("peft_config")


def same(a, b):
    return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(
        a[0][key][0] == b[0][key][0] and torch.equal(a[0][key][1], b[0][key][1]) for key in a[0]
    )  # fmt: skip


def saved(folder, name="lora"):
    torch.manual_seed(0)
    model = inject_adapter_in_model(copy.deepcopy(CONFIGS[name]), Model())
    save_adapter(model, folder)
    return folder


def rewrite(folder, change):
    """Let `change` edit the header, and put it back before the same data."""
    file = folder / WEIGHTS
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    made = change(header) or header
    text = made if isinstance(made, bytes) else json.dumps(made).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def fields(folder, **changes):
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def tensors(folder, change):
    loaded = load_file(folder / WEIGHTS)
    change(loaded)
    save_file(loaded, folder / WEIGHTS)


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def cut(size):
    return lambda folder: os.truncate(folder / WEIGHTS, size)


def shorten(folder, count):
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - count)


def text(content):
    return write(CONFIG, content.encode())


HUGE = "9" * 5000
WRONG = {
    # files that are missing or are something else
    "no config": (lambda f: (f / CONFIG).unlink(), FileNotFoundError, f"{CONFIG}: is missing"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, f"{WEIGHTS}: is missing$"),
    "a pickle": (
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
        FileNotFoundError,
        "is missing; there is only adapter_model.bin, a pickle, which is never read here for it can run code. This",
    ),
    "nothing": (
        lambda f: [(f / name).unlink() for name in (CONFIG, WEIGHTS)],
        FileNotFoundError,
        f"holds no adapter, expected {CONFIG} and {WEIGHTS}",
    ),
    "in a subfolder": (
        lambda f: [(f / "style").mkdir(), *((f / name).rename(f / "style" / name) for name in (CONFIG, WEIGHTS))],
        FileNotFoundError,
        r"there are adapters in its subdirectories \['style'\], give one of these as adapter_name",
    ),
    "a directory": (
        lambda f: [(f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()],
        ValueError,
        f"{WEIGHTS}: is no regular file",
    ),
    "a pipe": (lambda f: [(f / CONFIG).unlink(), os.mkfifo(f / CONFIG)], ValueError, f"{CONFIG}: is no regular file"),
    "a link out": (
        lambda f: [(f / WEIGHTS).rename(f.parent / "elsewhere"), (f / WEIGHTS).symlink_to(f.parent / "elsewhere")],
        ValueError,
        f"{WEIGHTS}: leads out of the directory .*, to .*elsewhere; put the file itself there",
    ),
    "a broken link": (
        lambda f: [(f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to(f / "nowhere")],
        FileNotFoundError,
        f"{WEIGHTS}: is missing",
    ),
    # the safetensors format
    "empty": (cut(0), ValueError, f"{WEIGHTS}: is no safetensors file, or cut off: it has 0 bytes"),
    "cut in the length": (cut(5), ValueError, "it has 5 bytes"),
    "cut in the header": (cut(100), ValueError, r"it has 100 bytes, and it would need a header of \d+ bytes"),
    "cut in the data": (lambda f: shorten(f, 1), ValueError, "cut off: its header speaks of 200 bytes .* and 199 are"),
    "longer": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"x"),
        ValueError,
        "its header speaks of 200 bytes of tensors, and 201 are there",
    ),
    "absurd header": (
        write(WEIGHTS, b"\xff" * 7 + b"\x7f{}"),
        ValueError,
        r"would need a header of 9223372036854775807 bytes \(the most is 33554432\)",
    ),
    "a zip": (write(WEIGHTS, b"PK\x03\x04" + bytes(99)), ValueError, "it looks like a file of torch.save"),
    "git lfs": (write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), ValueError, "run `git lfs pull`"),
    "header no JSON": (lambda f: rewrite(f, lambda h: b"{x"), ValueError, r"\(header\): is no valid JSON: Expecting"),
    "header no UTF-8": (lambda f: rewrite(f, lambda h: b'{"\xff"}'), ValueError, r"\(header\): .* byte 2 is not UTF-8"),
    "header a list": (lambda f: rewrite(f, lambda h: b"[]"), ValueError, "holds a JSON list, expected an object"),
    "header twice": (
        lambda f: rewrite(f, lambda h: b'{"a": 1, "a": 2}'),
        ValueError,
        "the key 'a' is given twice in one object",
    ),
    "header deep": (
        lambda f: rewrite(f, lambda h: b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}"),
        ValueError,
        "is nested too deeply",
    ),
    "metadata": (lambda f: rewrite(f, lambda h: {**h, "__metadata__": {"a": 1}}), ValueError, "__metadata__ is"),
    "no offsets": (lambda f: rewrite(f, lambda h: h[A].pop("shape") and None), ValueError, f"'{A}' is described by"),
    "dtype": (lambda f: rewrite(f, lambda h: h[A].update(dtype="F31")), ValueError, f"'{A}' has dtype 'F31', expected"),
    "shape of floats": (
        lambda f: rewrite(f, lambda h: h[A].update(shape=[2.0, 4])),
        ValueError,
        rf"'{A}' has shape \[2.0, 4\], expected a list of sizes",
    ),
    "shape negative": (lambda f: rewrite(f, lambda h: h[A].update(shape=[-2, -4])), ValueError, f"'{A}' has shape"),
    "shape absurd": (
        lambda f: rewrite(f, lambda h: h[A].update(shape=[0, 2**59, 2**59], data_offsets=[0, 0])),
        ValueError,
        f"'{A}' has shape",
    ),
    "offsets": (lambda f: rewrite(f, lambda h: h[A].update(data_offsets=[8, 4])), ValueError, "has data_offsets"),
    "bytes": (
        lambda f: rewrite(f, lambda h: h[A].update(shape=[2, 5])),
        ValueError,
        rf"'{A}' of shape \(2, 5\) and dtype F32 needs 40 bytes, and its data_offsets .* hold 32",
    ),
    "overlap": (
        lambda f: rewrite(f, lambda h: h[A].update(data_offsets=[4, 36])),
        ValueError,
        r"starts at \d+, expected \d+, where the tensor before it ends",
    ),
    # tensors and keys
    "missing": (lambda f: tensors(f, lambda t: t.pop(A)), KeyError, f"{WEIGHTS}: lacks '{A}', which the config asks"),
    "missing head": (lambda f: tensors(f, lambda t: t.pop(HEAD)), KeyError, f"lacks '{HEAD}'"),
    "extra": (
        lambda f: tensors(f, lambda t: t.update({"base_model.model.third.lora_A.weight": torch.ones(1)})),
        KeyError,
        "has 'base_model.model.third.lora_A.weight', which is neither a tensor of this LORA adapter nor of the model",
    ),
    "twice": (
        lambda f: tensors(f, lambda t: t.update({"first.lora_A.weight": torch.ones(2, 4)})),
        KeyError,
        "which mean the same",
    ),
    "another shape": (
        lambda f: tensors(f, lambda t: t.update({A: torch.ones(3, 4)})),
        ValueError,
        rf"'{A}' has shape \(3, 4\), expected \(2, 4\) by the model and the config",
    ),
    "another rank": (lambda f: fields(f, r=3), ValueError, r"has shape \(2, 4\), expected \(3, 4\)"),
    "integers": (
        lambda f: tensors(f, lambda t: t.update({A: torch.ones(2, 4, dtype=torch.int64)})),
        ValueError,
        f"'{A}' has dtype torch.int64, expected a floating-point dtype",
    ),
    "base": (
        lambda f: tensors(f, lambda t: t.update({"base_model.model.first.base_layer.bias": torch.ones(6)})),
        ValueError,
        "differs from 'first.bias' of the model, which no adapter may replace",
    ),
    "no tensors": (lambda f: save_file({}, f / WEIGHTS), KeyError, "has no tensor of LORA, the method of the config"),
    # the config
    "no JSON": (text("{"), ValueError, f"{CONFIG}: is no valid JSON"),
    "a list": (text("[1]"), ValueError, f"{CONFIG}: holds a JSON list, expected an object"),
    "no type": (text("{}"), ValueError, "has no peft_type, expected the config of an adapter"),
    "unknown type": (lambda f: fields(f, peft_type="X"), ValueError, r"peft_type is 'X', expected one of \['ADALORA'"),
    "type a list": (lambda f: fields(f, peft_type=[]), ValueError, r"peft_type is \[\], expected one of"),
    "key twice": (text('{"peft_type": "LORA", "r": 1, "r": 2}'), ValueError, f"{CONFIG}: the key 'r' is given twice"),
    "NaN": (text('{"peft_type": "LORA", "lora_alpha": NaN}'), ValueError, f"{CONFIG}: the number 'NaN' is not finite"),
    "infinite": (text('{"lora_alpha": 1e999}'), ValueError, f"{CONFIG}: the number '1e999' is not finite"),
    "huge integer": (text('{"r": ' + HUGE + "}"), ValueError, f"{CONFIG}: the number '9999.*9999' is too large"),
    "large integer": (lambda f: fields(f, r=10**17), ValueError, "expected .100000000000000000, 4"),
    "r a string": (lambda f: fields(f, r="8"), ValueError, f"{CONFIG}: LoraConfig: r is '8', expected int"),
    "r true": (lambda f: fields(f, r=True), ValueError, "LoraConfig: r is True, expected int"),
    "r null": (lambda f: fields(f, r=None), ValueError, "LoraConfig: r is None, expected int"),
    "targets": (
        lambda f: fields(f, target_modules={"a": 1}),
        ValueError,
        r"LoraConfig: target_modules is {'a': 1}, expected list\[str\]",
    ),
    "alpha": (lambda f: fields(f, lora_alpha=[1]), ValueError, r"lora_alpha is \[1\], expected float"),
    "pattern": (lambda f: fields(f, rank_pattern={"a": "8"}), ValueError, r"rank_pattern is {'a': '8'}, expected"),
    "regex": (
        lambda f: fields(f, target_modules="first|("),
        ValueError,
        r"LoraConfig: target_modules has 'first\|\(', which is no regular expression: missing \)",
    ),
    "regex of ranks": (lambda f: fields(f, rank_pattern={"[": 8}), ValueError, r"rank_pattern has '\[', which is no"),
    "regex flags": (lambda f: fields(f, alpha_pattern={"(?i)x": 8}), ValueError, "alpha_pattern has .*global flags"),
    "regex number": (lambda f: fields(f, exclude_modules="x{99999999999999}"), ValueError, "exclude_modules has"),
    "regex of layers": (lambda f: fields(f, layers_pattern=["h("]), ValueError, r"layers_pattern has 'h\('"),
    "regex of saved": (lambda f: fields(f, modules_to_save=["*"]), ValueError, r"modules_to_save has '\*', which"),
    "no target": (lambda f: fields(f, target_modules=["x"]), ValueError, f"{CONFIG}: .*matches no module"),
    "unsupported": (lambda f: fields(f, use_qalora=True), ValueError, "use_qalora is True, which is not supported"),
    "bias": (lambda f: fields(f, bias="most"), ValueError, "bias is 'most', expected 'none', 'all' or 'lora_only'"),
    "other model": (lambda f: fields(f, modules_to_save=["x"]), ValueError, "modules_to_save has 'x', which is no"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_damage_is_an_error_with_words_and_changes_nothing(name, tmp_path):
    damage, kind, message = WRONG[name]
    folder = saved(tmp_path / "adapter")
    damage(folder)
    model = inject_adapter_in_model(IA3Config(target_modules=["second"]), Model(), "other")
    before = state(model)
    with pytest.raises(kind, match=message) as caught:
        load_adapter(model, folder)
    assert str(folder) in str(caught.value)
    assert same(before, state(model))
    graft = bind(Model(), LoraConfig(r=2, **BOTH))
    with pytest.raises((FileNotFoundError, KeyError, ValueError), match=str(folder)):
        load_adapter(graft, folder)


def test_the_larger_config_of_vera_is_refused_before_it_takes_memory(tmp_path):
    folder = saved(tmp_path, "vera")
    fields(folder, r=10**15)
    for target in (Model(), bind(Model(), CONFIGS["vera"])):
        with pytest.raises(ValueError, match="VeraConfig: r is 1000000000000000, and vera_lambda_d of first has shape"):
            load_adapter(target, folder)
    tensors(folder, lambda t: [t.pop(key) for key in list(t) if "lambda_d" in key])
    with pytest.raises(ValueError, match="there is no vera_lambda_d to hold r=1000000000000000 against"):
        load_adapter(Model(), folder)


@pytest.mark.filterwarnings("ignore:OFTConfig. oft_block_size is 100000000000000000 at first:UserWarning")
@pytest.mark.filterwarnings("ignore:OFTConfig. oft_block_size is 100000000000000000 at second:UserWarning")
@pytest.mark.parametrize(("name", "field"), [("adalora", "init_r"), ("oft", "oft_block_size")])
def test_other_numbers_without_measure_take_no_time(name, field, tmp_path):
    folder = saved(tmp_path, name)
    fields(folder, **{field: 10**17})
    with pytest.raises(ValueError, match="expected"):
        load_adapter(Model(), folder)


def test_shared_matrices_that_the_config_promises_have_to_be_there(tmp_path):
    folder = saved(tmp_path, "vera")
    tensors(folder, lambda t: [t.pop(key) for key in ("base_model.vera_A", "base_model.vera_B")])
    with pytest.raises(KeyError, match="lacks 'base_model.vera_A', 'base_model.vera_B', which the config asks for"):
        load_adapter(Model(), folder)


def test_values_that_are_not_finite_are_refused_on_request(tmp_path):
    folder = saved(tmp_path)
    tensors(folder, lambda t: t[A].fill_(float("nan")))
    model = Model()
    before = state(model)
    with pytest.raises(ValueError, match=f"{WEIGHTS}: '{A}' has values that are NaN or infinite"):
        load_adapter(model, folder, check_finite=True)
    assert same(before, state(model))
    assert load_adapter(model, folder).first.lora_A["default"].weight.isnan().all()


def test_names_that_are_taken_or_lead_elsewhere(tmp_path):
    folder = saved(tmp_path / "a")
    model = load_adapter(Model(), folder)
    before = state(model)
    with pytest.raises(ValueError, match=r"the model has an adapter 'default' already \(it has \['default'\]\)"):
        load_adapter(model, folder)
    for name in ("..", "../a", "/etc", "a/b", "a\\b", "", "nul\0"):
        with pytest.raises(ValueError, match="expected a name without slashes"):
            load_adapter(model, folder, name)
    with pytest.raises(ValueError, match="expected a name without dots"):
        load_adapter(model, folder, "a.b")
    with pytest.raises(FileNotFoundError, match=r"no such directory; nothing is downloaded here, .*snapshot_download"):
        load_adapter(model, "somebody/adapter")
    (folder / "style").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ValueError, match="style: leads out of the directory"):
        load_adapter(model, folder, "style")
    with pytest.raises(ValueError, match="style: leads out of the directory"):
        save_adapter(inject_adapter_in_model(LoraConfig(**BOTH), Model(), "style"), folder, "style")
    with pytest.raises(ValueError, match="leads out of the directory"):
        load_config(folder, "../..")
    assert same(before, state(model))
    with pytest.raises(NotADirectoryError, match="is a file, expected a directory"):
        save_adapter(model, folder / CONFIG)


def test_links_within_the_directory_and_into_the_store_of_hugging_faces_cache_are_followed(tmp_path):
    folder = saved(tmp_path / "models--a--b" / "snapshots" / "0123")
    store = tmp_path / "models--a--b" / "blobs"
    store.mkdir()
    for index, name in enumerate((CONFIG, WEIGHTS)):
        (folder / name).rename(store / str(index))
        (folder / name).symlink_to(Path("..") / ".." / "blobs" / str(index))
    assert load_adapter(Model(), folder).first.active_adapters == ["default"]
    inside = saved(tmp_path / "inside")
    (inside / WEIGHTS).rename(inside / "real")
    (inside / WEIGHTS).symlink_to("real")
    assert load_adapter(Model(), inside).first.active_adapters == ["default"]


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(Path())
    load_adapter(Model(), "")
    load_adapter(Model(), ".")
    fields(Path(), r="8")
    with pytest.raises(ValueError, match=f"^{CONFIG}: LoraConfig: r is '8'"):
        load_adapter(Model(), ".")


# -- damage by chance ----------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def edited(draw, value):
    """A JSON value with one part of it replaced, removed or added."""
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 9)):
        keys = sorted(value) if isinstance(value, dict) else range(len(value))
        key = draw(st.sampled_from(keys))
        made = copy.copy(value)
        if draw(st.integers(0, 5)) == 0:
            del made[key]
        else:
            made[key] = draw(edited(value[key]))
        return made
    return draw(JSON)


@st.composite
def flipped(draw, data):
    """Bytes with some changed, cut out or put in."""
    made = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(made)))
        how = draw(st.sampled_from(("flip", "cut", "insert", "remove")))
        if how == "cut":
            del made[at:]
        elif how == "insert":
            made[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif how == "remove":
            del made[at : at + draw(st.integers(1, 9))]
        elif at < len(made):
            made[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(made)


@st.composite
def mutations(draw, config, weights):
    """The bytes of both files, one of them damaged."""
    length = struct.unpack("<Q", weights[:8])[0]
    how = draw(st.sampled_from(("config bytes", "config", "weights bytes", "header bytes", "header")))
    if how == "config bytes":
        return draw(flipped(config)), weights
    if how == "config":
        return json.dumps(draw(edited(json.loads(config)))).encode(), weights
    if how == "weights bytes":
        return config, draw(flipped(weights))
    header = weights[8 : 8 + length]
    made = draw(flipped(header)) if how == "header bytes" else json.dumps(draw(edited(json.loads(header)))).encode()
    return config, struct.pack("<Q", len(made)) + made + weights[8 + length :]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    made = {}
    for name in CONFIGS:
        folder = saved(tmp_path_factory.mktemp("adapter"), name)
        made[name] = (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damage_by_chance_is_a_clean_error_or_an_equal_result(name, originals, data):
    config, weights = data.draw(mutations(*originals[name]))
    model = Model()
    graft = bind(model, without_head(CONFIGS[name]))
    before = state(model)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(folder) / CONFIG).write_bytes(config)
        (Path(folder) / WEIGHTS).write_bytes(weights)
        if (params := attempt(graft, folder)) is not None:
            given = {key.removeprefix("base_model.model."): t for key, t in load_file(Path(folder) / WEIGHTS).items()}
            for path, leaves in params.items():
                for leaf, tensor in leaves.items():
                    key = f"{path}.{graft.configs[''].form.key(leaf)}"
                    assert torch.equal(tensor, given[key].float()) or tensor.isnan().any()
            graft(params, torch.ones(1, 4))
        assert same(before, state(model))
        if attempt(model, folder) is None:
            assert same(before, state(model))
        else:
            model(torch.ones(1, 4))


def attempt(target, folder):
    """What is loaded, or `None` after an error as there may be."""
    try:
        return load_adapter(target, folder)
    except CLEAN as error:
        text = str(error)
    assert folder in text, text
    return None


def without_head(config):
    config = copy.deepcopy(config)
    config.modules_to_save = None
    return config


def test_a_file_that_changes_between_header_and_data_is_refused(tmp_path, monkeypatch):
    save_adapter(inject_adapter_in_model(LoraConfig(r=999, **BOTH), Model()), tmp_path)
    read = headers.Weights.read

    def shortened(weights):
        shorten(tmp_path, 9999)
        return read(weights)

    monkeypatch.setattr(headers.Weights, "read", shortened)
    with pytest.raises(ValueError, match=f"{WEIGHTS}: changed while it was read"):
        load_adapter(Model(), tmp_path)


def test_configs_alone_name_their_file(tmp_path):
    folder = saved(tmp_path / "a")
    text('{"peft_type": "LORA", "r": "8"}')(folder)
    with pytest.raises(ValueError, match=f"{folder}.*{CONFIG}: LoraConfig: r is '8', expected int"):
        AdapterConfig.from_pretrained(folder)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=f"{folder}: no such directory"):
        AdapterConfig.from_pretrained(folder)
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=f"{CONFIG}: is missing"):
        AdapterConfig.from_pretrained(folder)
