"""Small models of one kind of layer, and the same adapter injected by PEFT and by torchgraft."""

import contextlib
import copy
import warnings

import peft
import torch
import transformers
from torch import nn

from torchgraft import adapters
from torchgraft.adapters._config.base import config_types

LINEAR = ("linear", "linear_without_bias", "transposed")
KINDS = (*LINEAR, "embedding", "conv1d", "conv2d", "conv3d")
X = {
    "embedding": lambda: torch.randint(0, 11, (2, 5)),
    "conv1d": lambda: torch.randn(2, 8, 5),
    "conv2d": lambda: torch.randn(2, 8, 5, 5),
    "conv3d": lambda: torch.randn(2, 8, 3, 3, 3),
}


class Net(nn.Module):
    """Two layers of a kind, and a head."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second = layer(kind, 8, 4), layer(kind, 4, 8)
        self.head = nn.Linear(8 if kind in LINEAR else 4, 3)
        self.kind = kind

    def forward(self, x):
        if self.kind == "embedding":
            return self.head(self.first(x)[..., :4] * self.second(x)[..., :4])
        y = self.second(torch.tanh(self.first(x)))
        return self.head(y if self.kind in LINEAR else y.flatten(2).mean(2)[:, :4])


def layer(kind, n_in, n_out):
    if kind == "transposed":
        return transformers.pytorch_utils.Conv1D(n_out, n_in)
    if kind == "embedding":
        return nn.Embedding(11, n_in)
    if kind.startswith("conv"):
        return getattr(nn, f"Conv{kind[4:]}")(n_in, n_out, 3, padding=1)
    return nn.Linear(n_in, n_out, bias=kind == "linear")


def net(kind="linear", dtype=torch.float64):
    torch.manual_seed(0)
    return Net(kind).to(dtype).eval()


def inputs(kind="linear", dtype=torch.float64):
    torch.manual_seed(1)
    x = X.get(kind, lambda: torch.randn(2, 3, 8))()
    return x if kind == "embedding" else x.to(dtype)


FIELDS = {"IA3": {"feedforward_modules": []}, "ADALORA": {"total_step": 9}}
SIZES = {
    "LORA": {"r": 3},
    "IA3": {},
    "ADALORA": {"init_r": 3},
    "ADAMSS": {"r": 3, "num_subspaces": 2},
    "LOHA": {"r": 4},  # PEFT rounds the factor alpha / r to float32
    "OFT": {"oft_block_size": 4},
    "VERA": {"r": 3},
    "BOFT": {"boft_block_size": 2},
    "BEFT": {},
    "C3A": {"block_size": 2},
    "DEFT": {"r": 3},
    "DELORA": {"r": 3},
    "SHIRA": {"r": 2, "random_seed": 3},
    "FOURIERFT": {"n_frequency": 20},
    "FROD": {"sparse_rate": 0.3},
    "GLORA": {"r": 3},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 3},
    "HRA": {"r": 4},
    "LOKR": {"r": 2, "alpha": 4},
    "MISS": {"r": 2},
    "OSF": {"effective_rank": 1},
    "PVERA": {"r": 3},
    "RANDLORA": {"r": 3, "randlora_alpha": 3},
    "ROAD": {"group_size": 2},
    "SUPERTUNING": {"sparsity": 0.5, "r": 2},
    "UNILORA": {"r": 2, "theta_d_length": 9},
    "WAVEFT": {"n_frequency": 20, "scaling": 1.0},
    "PEANUT": {"r": 3},
    "VBLORA": {"num_vectors": 6, "vector_length": 2, "r": 2},
}
APART = {"ARROW", "BOTTLENECK", "LILY", "LN_TUNING", "LOREFT", "LORA_XS", "POLY", "PSOFT", "TINYLORA"}
APART |= {"TRAINABLE_TOKENS"}
"""Methods whose fixed tensors are parameters in PEFT's layers, PSOFT, which PEFT has not in double precision,
Arrow, bottlenecks, LoReFT and LoRA-XS, which it has not as methods, LILY, whose router takes the mean over a batch
there, POLY, which cannot be called without tasks, and those without layers of their own; their own tests compare."""
EXACT = {"C3A": 1e-6, "DEFT": 1e-5, "FOURIERFT": 1e-5, "FROD": 1e-4}
"""How exact PEFT is where that is not double precision: spectra, DEFT's sums and FRoD's weights are in float32."""
OWN = (
    "adamss_",
    "lora_",
    "ia3_",
    "hada_",
    "oft_",
    "vera_lambda",
    "boft_",
    "beft_",
    "c3a_",
    "deft_",
    "delora_",
    "glora_",
    "peanut_",
    "shira_",
    "fourierft_",
    "frod_lambda",
    "gralora_",
    "hira_",
    "hra_",
    "lokr_",
    "miss_",
    "osf_",
    "pvera_lambda",
    "randlora_lambda",
    "randlora_gamma",
    "road_",
    "supertuning_",
    "tinylora_",
    "unilora_",
    "vblora_",
    "waveft_",
    "modules_to_save",
)


def configs(method, **fields):
    """The same config here and in PEFT."""
    fields = {"target_modules": ["first", "second"], **FIELDS.get(method, {}), **SIZES[method], **fields}
    name = config_types()[method].__name__
    return tuple(getattr(lib, name)(**copy.deepcopy(fields)) for lib in (adapters, peft))


def inject(model, method, name="default", **fields):
    return adapters.inject_adapter_in_model(configs(method, **fields)[0], model, name)


def inject_peft(model, method, name="default", **fields):
    """PEFT's injection; it has no low-level one for methods whose layers share something."""
    config = configs(method, **fields)[1]
    if method not in ("FROD", "PVERA", "RANDLORA", "UNILORA", "VBLORA", "VERA"):
        with quiet("Already found a `peft_config` attribute"):
            return peft.inject_adapter_in_model(config, model, name)
    wrapper = vars(model).get("wrapper")
    if wrapper is None:
        vars(model)["wrapper"] = peft.get_peft_model(model, config, name, autocast_adapter_dtype=False)
    else:
        wrapper.add_adapter(name, config, autocast_adapter_dtype=False)
        wrapper.set_adapter(name)
    return model


def peft_state(model, name="default"):
    """PEFT's state dict of an adapter, without the prefix that its wrapper adds."""
    state = peft.get_peft_model_state_dict(vars(model).get("wrapper", model), adapter_name=name)
    return {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}


def peft_load(model, state, name="default"):
    """PEFT's loading of such a state dict."""
    wrapper = vars(model).get("wrapper")
    if wrapper is not None:
        shared = ("base_model.vera_A", "base_model.vera_B")
        state = {key if key in shared else f"base_model.model.{key}": tensor for key, tensor in state.items()}
    return peft.set_peft_model_state_dict(wrapper or model, state, name)


def both(method, kind="linear", dtype=torch.float64, **fields):
    """Two models of equal weights, with an adapter from the same seed, by torchgraft and by PEFT."""
    model = net(kind, dtype)
    if kind == "transposed" and method != "OFT":
        fields["fan_in_fan_out"] = True
    pair = []
    for model, do in ((net(kind, dtype), inject), (net(kind, dtype), inject_peft)):
        torch.manual_seed(7)
        pair.append(do(model, method, **fields))
    pair[1].eval()
    return pair


def randomise(model, seed=3, scale=0.3):
    """Other numbers in every adapter parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if any(f".{prefix}" in f".{name}" for prefix in OWN):
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.copy_(scale * noise + (1 if "ia3" in name else 0))
    return model


def layers(model):
    """The tuner layers, of either library."""
    kinds = (adapters.BaseTunerLayer, peft.tuners.tuners_utils.BaseTunerLayer)
    return [module for module in model.modules() if isinstance(module, kinds)]


def parameters(model):
    """Parameters by name, but AdaLoRA's `ranknum`, which PEFT makes a frozen parameter and torchgraft a number."""
    return {name: p for name, p in model.named_parameters() if ".ranknum." not in name}


def trained(model):
    return {name: p.requires_grad for name, p in parameters(model).items()}


@contextlib.contextmanager
def quiet(*messages):
    """Without these warnings of PEFT."""
    with warnings.catch_warnings():
        for message in messages:
            warnings.filterwarnings("ignore", message)
        yield
