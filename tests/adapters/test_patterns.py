"""Expressions of configs: the meaning of `re`, in bounded time."""

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from torchgraft.adapters import AdapterConfig, IA3Config, LoraConfig, inject_adapter_in_model
from torchgraft.adapters._config import patterns
from torchgraft.functional import bind

NAMES = (
    "",
    "model",
    "model.layers.0.self_attn.q_proj",
    "visual.blocks.3.attn.qkv",
    "model.text.layers.11.mlp.fc1",
    "a\n",
)
WRITTEN = (
    r".*\.(q|v)_proj",
    r"model\.layers\.\d+\.(self_attn|mlp)\.(q_proj|gate_proj)$",
    r"^(?!.*visual).*(?:q_proj|v_proj|fc1).*$",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|q_proj|fc1|fc2).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)\.(?:(?:k_proj|q_proj)))",
    r"(\w+\.?)+",
    r"(?i)MODEL(\..*)*",
    r"(?i:MODEL)\.(\w+\.)*[a-q]_PROJ|(?:(?-i:v)isual(\.\w+)*)",
    r"(\w+\.)*(?<=layers\.)\d+(?!\d)(\.\w+)+",
    r"(?s)(.+)+",
    r"(.+)+",
    r"(?m)(.|\n)*^$",
    r"(?:\bmodel\b\W?|\B\w|\.)*\Z",
)


@pytest.mark.parametrize("pattern", WRITTEN)
def test_expressions_as_people_write_them_mean_what_re_says(pattern):
    for name in NAMES:
        assert patterns.fullmatch(pattern, name) is (re.fullmatch(pattern, name) is not None), name
        assert patterns.match(pattern, name) is (re.match(pattern, name) is not None), name


def repeated(inner):
    times = st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{0,3}?"])
    return st.one_of(
        st.tuples(inner, times).map(lambda x: f"({x[0]}){x[1]}"),
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
        st.tuples(st.sampled_from(["(?=", "(?!", "(?i:", "(?:", "("]), inner).map("".join).map("{})".format),
        st.tuples(st.sampled_from(["(?<=a", "(?<!b", "(?<=[.b]"]), st.just("")).map("".join).map("{})".format),
    )


EXPRESSIONS = st.recursive(
    st.sampled_from(["a", "b", r"\.", ".", r"\w", "[^a]", "[a-b.]", r"\b", "^", "$", "A", ""]), repeated, max_leaves=8
)


@settings(max_examples=300, deadline=None)
@given(EXPRESSIONS, st.text("ab.A\n", max_size=7))
def test_all_ways_at_once_are_those_of_re(pattern, name):
    try:
        expected = re.fullmatch(pattern, name) is not None, re.match(pattern, name) is not None
    except re.error:
        assume(False)
    expression = patterns._Expression(pattern)
    if expression._compiled is not None:
        parsed = patterns._parser.parse(pattern)
        expression._step, expression._compiled = expression._sequence(parsed, parsed.state.flags), None
    assert (expression(name, True), expression(name, False)) == expected


WITHOUT_END = (
    r"(\w+\.?)+!", "(a|a)*b", "(.*)*x", "(a+)+$b", r"(\w*)*!", "(x+x+)+y", ".*.*.*.*.*.*.*!", "((a*)*)*b",
    "(a?){1000}b", "((_?a?){0,1000}){0,1000}!", "(?:a|_|\\w){60}!", "(?=(\\w+)+!).*", "(((ab?)*c?)*d?)*!",
)  # fmt: skip
LONG = "a_rather_long_name_of_a_module_in_a_model" * 3


@pytest.mark.parametrize("pattern", WITHOUT_END)
def test_matching_ends(pattern):
    """Followed one way after the other, each of these takes longer than anybody waits."""
    assert not patterns.fullmatch(pattern, LONG)
    assert not patterns.match(rf"(^|.*\.)({pattern})$", LONG)
    model = nn.ModuleDict({LONG: nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="matches no module"):
        bind(model, LoraConfig(target_modules=pattern))
    with pytest.raises(ValueError, match="matches no module"):
        inject_adapter_in_model(LoraConfig(target_modules=pattern), model)
    for fields in ({"exclude_modules": pattern}, {"rank_pattern": {pattern: 4}}, {"alpha_pattern": {pattern: 4}}):
        with pytest.warns((RuntimeWarning, UserWarning), match="none of the targe"):
            bind(model, LoraConfig(target_modules=[LONG], **fields))
    with pytest.warns(RuntimeWarning, match="match none"):
        bind(model, IA3Config(target_modules=[LONG], feedforward_modules=pattern))


@pytest.mark.parametrize("pattern", [r"(\w+)+\1!", r"(?P<x>a*)*(?P=x)b", r"(a)?(b*)*(?(1)c|d)"])
def test_what_depends_on_the_way_taken_is_refused_with_many_ways(pattern):
    for fields in ({"target_modules": pattern}, {"target_modules": ["a"], "exclude_modules": pattern}):
        field = list(fields)[-1]
        with pytest.raises(ValueError, match=f"LoraConfig: {field} has .* a backreference, a condition or an atomic"):
            LoraConfig(**fields)


def test_backreferences_with_few_ways_are_matched():
    assert patterns.fullmatch(r"(\w)\.\1_proj", "q.q_proj") and not patterns.fullmatch(r"(\w)\.\1_proj", "q.v_proj")


def test_layers_pattern_with_many_ways_is_refused():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(2, 2)})])})
    config = LoraConfig(target_modules=["q"], layers_to_transform=[0], layers_pattern=r"(\w+)+")
    with pytest.raises(ValueError, match=r"LoraConfig: layers_pattern has .*too many ways"):
        bind(model, config)
    few = LoraConfig(target_modules=["q"], layers_to_transform=[0], layers_pattern=r"lay\w+")
    assert list(bind(nn.ModuleDict({"m": model}), few).sites[""]) == ["m.layers.0.q"]


def test_steps_are_counted(monkeypatch):
    monkeypatch.setattr(patterns, "_STEPS", 0)
    with pytest.raises(ValueError, match=r"takes too long on 'a\.a\.a.*repeat less"):
        patterns.fullmatch(r"((((a?)*b?)*\.?)*c?)*!", "a." * 100)


def test_long_expressions_are_refused_unread():
    with pytest.raises(ValueError, match=r"target_modules has an expression of 2,000,000 characters, 'aaa.*at most"):
        LoraConfig(target_modules="a" * 2_000_000)


def test_deep_expressions_are_refused():
    with pytest.raises(ValueError, match="LoraConfig: exclude_modules has .*no regular expression"):
        LoraConfig(target_modules="a", exclude_modules="(" * 10_000 + "a" + ")" * 10_000)


def test_configs_of_files_are_held_to_it():
    with pytest.raises(ValueError, match="target_modules has"):
        AdapterConfig.from_dict({"peft_type": "LORA", "target_modules": r"(a*)*\1"})
