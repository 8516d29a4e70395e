"""The page of each method: made from data, with three lines that run."""

import re
import warnings

import links
import method_pages
import pytest
import reference_pages
import torch
from torch import nn

from torchgraft import adapters

CONFIGS = method_pages.configs()
WIDTH = 256


class Anything(nn.Module):
    """A module under each name that the configs of examples have as a target, one after the other."""

    def __init__(self, targets):
        super().__init__()
        self.names = targets
        for name in targets:
            *parents, last = name.split(".")
            place = self
            for parent in parents:
                place = getattr(place, parent, None) or place.add_module(parent, nn.Module()) or getattr(place, parent)
            place.add_module(last, self.layer(last))

    @staticmethod
    def layer(name):
        if name.startswith("embed"):
            return nn.Embedding(10, WIDTH)
        return nn.LayerNorm(WIDTH) if "norm" in name else nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for name in self.names:
            x = self.get_submodule(name)(x)
        return x


def run(code):
    targets = re.search(r"target_modules=\[(.*?)\]", code)[1].replace('"', "").split(", ")
    model = Anything(targets)
    x = torch.arange(6).view(2, 3) if targets[0].startswith("embed") else torch.randn(2, 3, WIDTH)
    namespace = {"model": model, "x": x}
    exec(code, namespace)
    return model(x), namespace


@pytest.mark.parametrize(("path", "config"), CONFIGS.items(), ids=str)
def test_the_three_lines_run(path, config):
    code = method_pages.code(config)
    assert len(code.partition("\n\n")[2].splitlines()) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, namespace = run(code)
    assert (
        namespace["y"].shape == plain.shape
        and namespace["y"].isfinite().all()
        and (namespace.keys() & {"params", "tasks"})
    )
    assert code in method_pages.page(path, config)


def test_each_config_of_the_library_has_a_page():
    names = {name for name, one in vars(adapters).items() if isinstance(one, type) and hasattr(one, "method")}
    assert {config.__name__ for config in CONFIGS.values()} == names


@pytest.mark.parametrize(("path", "config"), CONFIGS.items(), ids=str)
def test_a_page_has_what_the_tables_say_and_links_that_lead_somewhere(path, config):
    page = method_pages.page(path, config)
    assert page.startswith(f"# {method_pages.title(config)}\n") and f"::: torchgraft.adapters.{config.__name__}" in page
    rows = [row for row in links.ROOT.joinpath(method_pages.METHODS).read_text().splitlines() if config.__name__ in row]
    papers = [
        paper
        for row in rows
        if row.startswith(f"| `{config.__name__}`")
        for paper in re.findall(r"\]\((https.*?)\)", row)
    ]
    assert all(paper in page for paper in papers)
    for target in links.targets(page):
        found, _ = links.resolved(target, path)
        assert (links.ROOT / found).exists() or found in CONFIGS, target


def test_advice_and_differences_of_a_method_are_those_that_name_it():
    page = method_pages.page("docs/methods/hira.md", adapters.HiraConfig)
    assert "**A change of high rank from few numbers?**" in page and "**Images?**" not in page
    assert "test_ranks_by_pattern_count_and_are_found_from_tensors" in page and "test_two_of_pefts_wavelets" not in page


def test_a_config_without_an_example_says_what_to_write():
    class BareConfig:
        """Nothing."""

    with pytest.raises(ValueError, match=r"BareConfig: its docstring has no example; begin one with `>>> BareConfig"):
        method_pages.code(BareConfig)


def test_every_public_name_is_in_the_reference():
    text = "".join(text for _, text in reference_pages.pages().values())
    names = {f"torchgraft.adapters.{name}" for name in adapters.__all__ if name != "__version__"}
    names -= {f"torchgraft.adapters.{config.__name__}" for config in CONFIGS.values()}
    names |= {f"torchgraft.functional.{name}" for _, name in reference_pages.exported("functional")}
    assert not [name for name in names if f"::: {name}\n" not in text]


def test_a_page_has_what_its_method_reached_on_one_task():
    page = method_pages.page("docs/methods/lora.md", adapters.LoraConfig)
    assert "## On one task" in page and re.search(r"\| \d+ of 38 \| 16,384 \| 0.004 \| 1.00 \|", page)
