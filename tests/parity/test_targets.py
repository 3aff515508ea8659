"""The rules by which names are meant, against the functions by which peft decides."""

from types import SimpleNamespace

from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lora.config import LoRAConfig
from lora.targets import matches, pattern_value
from tests.parity.oracle import assert_same

WORDS = st.sampled_from(["query", "key", "output", "dense", "attention", "layer", "roberta", "xdense", "0", "1", "11"])
NAMES = st.lists(WORDS, min_size=1, max_size=7).map(".".join)
ENDS = st.lists(WORDS, min_size=1, max_size=3).map(".".join)
EXPRESSIONS = st.sampled_from(
    [r".*query", "query", r".*\.(query|key)", r".*layer\.1\..*", r"roberta.*output", r"layer\.\d+", "dense|.*key", ""]
)
LAYERS = st.none() | st.lists(st.sampled_from([0, 1, 11]), min_size=1, max_size=2)
LISTS = st.none() | st.lists(st.sampled_from(["layer", "roberta", "(x)?dense", "absent"]), max_size=2)


@settings(max_examples=500, deadline=None)
@given(
    name=NAMES,
    targets=st.lists(ENDS, min_size=1, max_size=3),
    layers=LAYERS,
    lists=LISTS,
    excluded=st.none() | EXPRESSIONS | st.lists(ENDS, max_size=2),
)
@example(name="roberta.key.0.layer.1.dense", targets=["dense"], layers=[1], lists=["layer"], excluded=None)
def test_ends_of_names_layer_numbers_and_exclusions(name, targets, layers, lists, excluded):
    fields = {"target_modules": targets, "layers_to_transform": layers, "exclude_modules": excluded}
    fields["layers_pattern"] = lists if layers else None
    ours = {field: tuple(value) if isinstance(value, list) else value for field, value in fields.items()}
    theirs = bool(check_target_module_exists(SimpleNamespace(**fields), name))
    assert_same(LoRAConfig(**ours).selects(name), theirs, name)


@settings(max_examples=300, deadline=None)
@given(name=NAMES, expression=EXPRESSIONS)
def test_regular_expressions(name, expression):
    theirs = SimpleNamespace(target_modules=expression, layers_to_transform=None, layers_pattern=None)
    assert_same(matches(expression, name), bool(check_target_module_exists(theirs, name)), name)


@settings(max_examples=300, deadline=None)
@given(name=NAMES, patterns=st.lists(ENDS | EXPRESSIONS, max_size=4, unique=True))
def test_rank_and_alpha_patterns(name, patterns):
    values = {pattern: number for number, pattern in enumerate(patterns)}
    assert_same(pattern_value(values, name, None), values.get(get_pattern_key(patterns, name)), name)
