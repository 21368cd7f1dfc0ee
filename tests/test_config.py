# SPDX-License-Identifier: Apache-2.0
import json
import math

import pydantic
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st

from vllm_kcache.config import ACCEPTED_VALUES, KCacheConfig, KCacheConfigError
from vllm_kcache.types import Selection

KEYS = (
    "top_n, coverage, mass_threshold, threshold_length, k_bits, host_dtype, v_block_tokens, "
    "sink_tokens, recent_tokens, dense_layers, tail, head_combine, host_memory_gib, "
    "hot_cache_gib, prefill"
)


def refusal(value) -> str:
    with pytest.raises(KCacheConfigError) as error:
        KCacheConfig.from_user(value)
    return str(error.value)


def test_defaults():
    config = KCacheConfig.from_user(None)
    assert config == KCacheConfig.from_user({}) == KCacheConfig.from_user("{}") == KCacheConfig()
    assert (config.resolved_top_n, config.resolved_coverage) == (None, None)
    assert config.selection(8).mass_threshold == 0.002
    assert config.selection(8).threshold_length == 8192
    assert (config.sink_tokens, config.recent_tokens, config.dense_layers) == (8, 32, 0)
    assert (config.resolved_tail, config.selection(8).combine) == ("clip", "max")
    assert config.host_memory_gib == config.hot_cache_gib == config.prefill == "auto"


@pytest.mark.parametrize(("tokens", "threshold"), [(4, 0.001), (8, 0.002), (16, 0.004)])
def test_the_default_threshold_is_in_proportion_to_the_block(tokens, threshold):
    assert KCacheConfig().selection(tokens).mass_threshold == threshold
    assert KCacheConfig.from_user({"mass_threshold": 0.002}).selection(tokens).clip == 0.001


@pytest.mark.parametrize(
    ("given", "top_n", "coverage"),
    [
        ({"mass_threshold": None}, None, None),
        ({"top_n": "all"}, None, None),
        ({"top_n": 64}, 64, None),
        ({"coverage": 0.9}, None, 0.9),
        ({"coverage": 1}, None, 1.0),
        ({"top_n": "all", "coverage": 0.9}, None, 0.9),
        ({"top_n": 64, "coverage": 0.9}, 64, 0.9),
        ({"coverage": None}, None, None),
        ({"top_n": "all", "coverage": None}, None, None),
        ({"top_n": 64, "coverage": None}, 64, None),
        ({"top_n": "all", "coverage": "auto"}, None, None),
        ({"coverage": "auto", "mass_threshold": None}, None, None),
    ],
    ids=str,
)
def test_top_n_and_coverage_together(given, top_n, coverage):
    config = KCacheConfig.from_user(given)
    assert (config.resolved_top_n, config.resolved_coverage) == (top_n, coverage)
    selection = config.selection(8)
    assert selection == Selection(top_n, coverage, 1, 32, "sum")
    assert selection.selects_everything == (top_n is None and coverage is None)


@pytest.mark.parametrize(
    ("given", "threshold"),
    [
        ({}, 0.002),
        ({"top_n": None, "coverage": "auto", "mass_threshold": "auto"}, 0.002),
        ({"mass_threshold": 0.01}, 0.01),
        ({"mass_threshold": 0.01, "coverage": None}, 0.01),
        ({"mass_threshold": 0.01, "top_n": "all"}, 0.01),
    ],
    ids=str,
)
def test_mass_threshold_brings_its_own_tail_and_combination(given, threshold):
    config = KCacheConfig.from_user(given)
    assert config.selection(8) == Selection(None, None, 1, 32, "max", threshold, 8192)
    assert config.selection(8).clip == threshold / 2
    assert not config.selection(8).selects_everything
    assert config.resolved_tail == "clip"


def test_mass_threshold_with_a_cap_and_another_tail():
    config = KCacheConfig.from_user(
        {"mass_threshold": 0.002, "top_n": 64, "coverage": None, "tail": "renormalize"}
        | {"head_combine": "sum"}
    )
    assert config.selection(8) == Selection(64, None, 1, 32, "sum", 0.002, 8192)
    assert config.resolved_tail == "renormalize"


def test_settings_that_exclude_each_other():
    assert KCacheConfig.from_user({"tail": "clip"}).selection(8).clip == 0.001
    assert refusal({"tail": "clip", "top_n": 64}) == (
        "kcache_config.tail='clip': needs kcache_config.mass_threshold, which says where to clip"
    )
    for given in (4096, None):
        config = KCacheConfig.from_user({"threshold_length": given})
        assert config.selection(8).threshold_length == given
    assert refusal({"threshold_length": 4096, "top_n": 64}) == (
        "kcache_config.threshold_length=4096: needs kcache_config.mass_threshold, which falls "
        "beyond so many tokens"
    )
    assert refusal({"mass_threshold": 0.002, "coverage": 0.9}) == (
        "kcache_config.mass_threshold=0.002: not together with kcache_config.coverage=0.9; give "
        "one of them"
    )
    with pytest.raises(KCacheConfigError, match=r"needs kcache_config\.mass_threshold"):
        KCacheConfig(tail="clip", coverage=0.9).selection(8)


@pytest.mark.parametrize(
    ("given", "bits", "two_bytes", "four_bytes"),
    [
        ({}, 4, "int8", "model"),
        ({"k_bits": 16}, 16, "model", "model"),
        ({"k_bits": 4}, 4, "int8", "model"),
        ({"k_bits": 4, "host_dtype": "model"}, 4, "model", "model"),
        ({"k_bits": 4, "host_dtype": "int8"}, 4, "int8", "int8"),
        ({"k_bits": "auto", "host_dtype": "auto"}, 4, "int8", "model"),
    ],
    ids=str,
)
def test_bits_of_k_and_what_rows_hold(given, bits, two_bytes, four_bytes):
    config = KCacheConfig.from_user(given)
    assert config.resolved_k_bits == bits
    for dtype in (torch.float16, torch.bfloat16):
        assert config.resolved_host_dtype(dtype) == two_bytes
    assert config.resolved_host_dtype(torch.float32) == four_bytes


def test_int8_rows_need_codes():
    assert KCacheConfig.from_user({"host_dtype": "int8"}).resolved_k_bits == 4
    assert refusal({"host_dtype": "int8", "k_bits": 16}) == (
        "kcache_config.host_dtype='int8': needs kcache_config.k_bits=4; with 16 the host holds V "
        "as the model has it"
    )


# fmt: off
BAD_VALUES = {
    "top_n": [0, -1, 1.5, 64.0, True, "some", "64", [1], {}, 2**24 + 1, 2**31, 10**400],
    "coverage": [
        0, 0.0, -0.5, 1.5, 2, 5e-324, math.nan, math.inf, True, "0.9", "high", [], 10**400
    ],
    "mass_threshold": [0, 0.0, -0.5, 1.5, 2, 5e-324, math.nan, True, "0.002", "all", [], 1e300],
    "threshold_length": [0, -1, 4096.0, True, "4096", "all", [], 2**24 + 1, 10**400],
    "k_bits": [0, 2, 8, 4.0, 16.0, True, None, "4", "16", "all", [4], 10**400],
    "host_dtype": ["fp8", "INT8", "bfloat16", None, 8, True],
    "v_block_tokens": [0, -8, 3, 24, 64, 8.0, True, None, "8", "big", 2**31, 10**400],
    "sink_tokens": [-1, 0.5, 8.0, False, None, "8", "auto", 2**24 + 1, 2**31, 10**400],
    "recent_tokens": [0, -1, 0.5, 32.0, True, None, "32", 2**24 + 1, 2**31, 10**400],
    "dense_layers": [
        -1, 1.0, True, None, "0", [-1], [0.0], ["0"], [True], {"0": 1}, 2**31, [2**31], [[]]
    ],
    "tail": ["none", "Renormalize", "drop", "mean", None, 0, True],
    "head_combine": ["mean", "SUM", None, 0, []],
    "host_memory_gib": [
        0, 0.0, -1, math.nan, math.inf, True, None, "4", "all", 2**20 + 1, 1e300, 10**400
    ],
    "hot_cache_gib": [-0.1, -1, math.nan, math.inf, False, None, "4", 2**20 + 1, 1e300, 10**400],
    "prefill": ["cudnn", "", None, 1, True],
}
# fmt: on


def test_every_key_has_bad_values_and_a_text_of_what_is_accepted():
    keys = set(KCacheConfig.model_fields)
    assert keys == set(BAD_VALUES) == set(ACCEPTED_VALUES) == set(KEYS.split(", "))


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in BAD_VALUES.items() for value in values]
)
def test_bad_values_name_key_value_and_what_is_accepted(key, value):
    given = repr(value)
    shown = given if len(given) <= 200 else given[:200] + "..."
    expected = f"kcache_config.{key}={shown}: must be {ACCEPTED_VALUES[key]}"
    assert refusal({"sink_tokens": 8, key: value}) == expected


def test_the_texts_of_what_is_accepted():
    assert [refusal({key: values[0]}) for key, values in BAD_VALUES.items()] == [
        'kcache_config.top_n=0: must be an integer from 1 to 16777216, "all" or null',
        'kcache_config.coverage=0: must be a number from 1e-9 to 1, null or "auto"',
        'kcache_config.mass_threshold=0: must be a number from 1e-9 to 1, null or "auto"',
        'kcache_config.threshold_length=0: must be an integer from 1 to 16777216, null or "auto"',
        'kcache_config.k_bits=0: must be 4, 16 or "auto"',
        'kcache_config.host_dtype=\'fp8\': must be "auto", "model" or "int8"',
        'kcache_config.v_block_tokens=0: must be 1, 2, 4, 8, 16, 32 or "auto"',
        "kcache_config.sink_tokens=-1: must be an integer from 0 to 16777216",
        "kcache_config.recent_tokens=0: must be an integer from 1 to 16777216",
        (
            "kcache_config.dense_layers=-1: must be an integer from 0 to 16777216 "
            "(count from the bottom) or a list of layer numbers"
        ),
        'kcache_config.tail=\'none\': must be "auto", "renormalize" or "clip"',
        'kcache_config.head_combine=\'mean\': must be "auto", "sum" or "max"',
        (
            "kcache_config.host_memory_gib=0: must be a number greater than 0 and at most 1048576, "
            'or "auto"'
        ),
        'kcache_config.hot_cache_gib=-0.1: must be a number from 0 to 1048576, or "auto"',
        'kcache_config.prefill=\'cudnn\': must be "auto", "flash_attn", "xformers" or "torch"',
    ]


GOOD_VALUES = {
    "top_n": [1, 5000, 2**24, "all", None],
    "coverage": [1e-9, 0.01, 0.95, 1.0, 1, None, "auto"],
    "mass_threshold": [1e-9, 0.002, 1.0, None, "auto"],
    "threshold_length": [1, 4096, 2**24, None, "auto"],
    "k_bits": [4, 16, "auto"],
    "host_dtype": ["auto", "model"],
    "v_block_tokens": [1, 2, 4, 8, 16, 32, "auto"],
    "sink_tokens": [0, 8, 100, 2**24],
    "recent_tokens": [1, 32, 100, 2**24],
    "dense_layers": [0, 2, [], [0, 5], 2**24],
    "tail": ["auto", "renormalize", "clip"],
    "head_combine": ["auto", "sum", "max"],
    "host_memory_gib": [0.5, 4, 2**20, "auto"],
    "hot_cache_gib": [0, 0.5, 4, 2**20, "auto"],
    "prefill": ["auto", "flash_attn", "xformers", "torch"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in GOOD_VALUES.items() for value in values]
)
def test_good_values_survive_json(key, value):
    config = KCacheConfig.from_user({key: value})
    assert config.to_json_dict() == {key: value}
    text = json.dumps(config.to_json_dict())
    again = KCacheConfig.from_user(text)
    assert again == config
    assert hash(again) == hash(config)
    assert KCacheConfig.from_user(again) is again


def test_only_what_was_given_is_passed_on():
    assert KCacheConfig.from_user(None).to_json_dict() == {}
    given = {"top_n": "all", "sink_tokens": 8}
    assert KCacheConfig.from_user(given).to_json_dict() == given


def test_frozen():
    config = KCacheConfig()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.top_n = 3


def test_several_bad_values_make_one_message():
    message = refusal({"coverage": 1.5, "tail": "x", "top_n": 0})
    assert message == (
        'kcache_config.top_n=0: must be an integer from 1 to 16777216, "all" or null; '
        'kcache_config.coverage=1.5: must be a number from 1e-9 to 1, null or "auto"; '
        'kcache_config.tail=\'x\': must be "auto", "renormalize" or "clip"'
    )


@pytest.mark.parametrize(
    ("key", "hint"),
    [("topn", " (did you mean 'top_n'?)"), ("Coverage", " (did you mean 'coverage'?)"), ("x", "")],
)
def test_unknown_keys(key, hint):
    expected = f"kcache_config.{key}=1: unknown key{hint}; accepted keys: {KEYS}"
    assert refusal({key: 1}) == expected


def test_not_json():
    message = refusal("{top_n: 3}")
    assert message.startswith("kcache_config='{top_n: 3}': not valid JSON (Expecting property name")


@pytest.mark.parametrize(
    ("value", "beginning"),
    [
        ('{"top_n": ' + "9" * 5001 + "}", 'kcache_config=\'{"top_n": 999'),
        ("[" * 100_000, "kcache_config='[[[["),
        ('{"top_n": ' + "[" * 100_000, 'kcache_config=\'{"top_n": [[[['),
        ({"top_n": 10**5001}, "kcache_config.top_n=<int>: must be an integer from 1"),
        ({"coverage": 10**5001}, "kcache_config.coverage=<int>: must be a number from 1e-9"),
        ({"dense_layers": [10**5001]}, "kcache_config.dense_layers=<list>: must be an integer"),
        ({10**5001: 1}, "kcache_config.<int>=1: unknown key"),
        ({"x" * 100_000: 1}, "kcache_config.xxxx"),
        ({"a\nb": "c\nd"}, "kcache_config.'a\\nb'='c\\nd': unknown key"),
    ],
    ids=range(9),
)
def test_what_python_cannot_read_or_write_is_one_short_line(value, beginning):
    message = refusal(value)
    assert message.startswith(beginning)
    assert len(message) < 600
    assert "\n" not in message


NUMBERS = st.one_of(
    st.integers(),
    st.integers(2**24 - 2, 2**24 + 2),
    st.integers(10**4299, 10**4301),
    st.floats(),
    st.floats(0, 1),
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.text(),
    st.sampled_from(["auto", "all", "renormalize", "clip", "sum", "max", "torch"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
SETTINGS = st.dictionaries(st.sampled_from(KEYS.split(", ")), VALUES | NUMBERS, max_size=4)


def accepted_or_refused(value):
    """What must hold for anything that a user gives."""
    refused = None
    try:
        config = KCacheConfig.from_user(value)
        again = KCacheConfig.from_user(json.dumps(config.to_json_dict()))
        assert again == config
        config.resolved_dense_layers(30)
        selection = config.selection(8)
    except KCacheConfigError as error:
        refused = str(error)
    if refused is not None:
        assert "\n" not in refused
        return
    # The numbers that kernels and pools compute with.
    for count in (selection.top_n or 0, selection.recent_tokens, selection.most_forced_blocks(8)):
        assert 0 <= count < 2**31 // 32
    for share in (selection.coverage, selection.mass_threshold, selection.clip):
        assert share is None or 1e-30 < share <= 1
    for gib in (config.host_memory_gib, config.hot_cache_gib):
        assert gib == "auto" or 0 <= int(gib * 2**30) < 2**63


@drawn(SETTINGS | VALUES | st.dictionaries(st.text() | st.integers(), VALUES, max_size=3))
def test_anything_in_python_is_accepted_or_refused(value):
    accepted_or_refused(value)


@drawn(SETTINGS)
def test_any_json_is_accepted_or_refused(value):
    try:
        text = json.dumps(value)
    except ValueError:
        # More digits than Python writes: what a user may type all the same.
        text = '{"top_n": ' + "1" * 4301 + "}"
    accepted_or_refused(text)


@drawn(st.text() | st.text(alphabet='{}[]":,0123456789.eE-+ \\ntruefals'))
def test_any_text_is_accepted_or_refused(text):
    accepted_or_refused(text)


@pytest.mark.parametrize("value", ["3", "[]", "null", '"all"', 3, [("top_n", 3)]])
def test_not_an_object(value):
    expected = f"kcache_config={value!r}: must be a JSON object (or a dict) of settings; "
    assert refusal(value) == f"{expected}accepted keys: {KEYS}"


@pytest.mark.parametrize(
    ("head_size", "itemsize", "page_tokens", "tokens"),
    [
        (128, 2, 16, 8),
        (128, 4, 16, 8),
        (128, 1, 16, 8),
        (64, 2, 128, 8),
        (64, 4, 128, 8),
        (80, 2, 16, 8),
        (96, 2, 32, 8),
        (256, 2, 16, 4),
        (512, 2, 16, 4),
        (32, 2, 128, 8),
        (16, 2, 128, 8),
        (32, 2, 16, 8),
        (64, 2, 24, 8),
        (64, 2, 10, 2),
        (64, 2, 1, 1),
    ],
)
def test_v_block_tokens_auto(head_size, itemsize, page_tokens, tokens):
    assert KCacheConfig().resolved_v_block_tokens(head_size, itemsize, page_tokens) == tokens


def test_v_block_tokens_given():
    config = KCacheConfig(v_block_tokens=4)
    assert config.resolved_v_block_tokens(64, 2, 16) == 4
    with pytest.raises(KCacheConfigError) as error:
        KCacheConfig(v_block_tokens=32).resolved_v_block_tokens(64, 2, 48)
    assert str(error.value) == (
        "kcache_config.v_block_tokens=32: must divide the KV block size of 48 tokens; "
        "accepted here: 1, 2, 4, 8, 16"
    )


@pytest.mark.parametrize("name", ["head_size", "itemsize", "page_tokens"])
def test_sizes_of_the_model(name):
    sizes = {"head_size": 64, "itemsize": 2, "page_tokens": 16, name: 0}
    with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"):
        KCacheConfig().resolved_v_block_tokens(**sizes)


@pytest.mark.parametrize(
    ("sink_tokens", "v_block_tokens", "sink_blocks"),
    [(0, 8, 0), (1, 8, 1), (8, 8, 1), (9, 8, 2), (8, 16, 1), (8, 1, 8)],
)
def test_sink_rounds_up_to_v_blocks(sink_tokens, v_block_tokens, sink_blocks):
    config = KCacheConfig(sink_tokens=sink_tokens)
    assert config.selection(v_block_tokens).sink_blocks == sink_blocks


@pytest.mark.parametrize(
    ("recent_tokens", "v_block_tokens"),
    [(recent, block) for recent in (1, 2, 7, 8, 9, 31, 32, 33) for block in (1, 4, 8, 16, 32)],
)
def test_most_recent_blocks_is_the_most_that_any_length_needs(recent_tokens, v_block_tokens):
    selection = KCacheConfig(recent_tokens=recent_tokens).selection(v_block_tokens)
    overlapped = [
        len({token // v_block_tokens for token in range(seq_len - recent_tokens, seq_len)})
        for seq_len in range(recent_tokens, recent_tokens + 3 * v_block_tokens)
    ]
    assert selection.most_recent_blocks(v_block_tokens) == max(overlapped)


def test_top_n_below_what_is_forced_in():
    assert KCacheConfig(top_n=6).selection(8).top_n == 6
    with pytest.raises(KCacheConfigError) as error:
        KCacheConfig(top_n=5).selection(8)
    assert str(error.value) == (
        "kcache_config.top_n=5: must be at least 6, since sink_tokens=8 and recent_tokens=32 "
        "always keep up to 1 + 5 V blocks of 8 tokens"
    )


@pytest.mark.parametrize(
    ("dense_layers", "layers"),
    [(0, set()), (2, {0, 1}), (29, set(range(29))), ([], set()), ([0, 29, 0], {0, 29})],
)
def test_dense_layers(dense_layers, layers):
    config = KCacheConfig.from_user({"dense_layers": dense_layers})
    assert config.resolved_dense_layers(30) == frozenset(layers)


@pytest.mark.parametrize(
    ("dense_layers", "num_layers", "message"),
    [
        (30, 30, "30: must be at most 29, since the model has 30 layers"),
        (2**24, 30, "16777216: must be at most 29, since the model has 30 layers"),
        (
            [2, 30],
            30,
            "[2, 30]: must be layer numbers from 0 to 29, and not all of them, since the",
        ),
        ([1, 0], 2, "[1, 0]: must be layer numbers from 0 to 1, and not all of them, since the"),
    ],
)
def test_dense_layers_the_model_does_not_have(dense_layers, num_layers, message):
    config = KCacheConfig.from_user({"dense_layers": dense_layers})
    with pytest.raises(KCacheConfigError) as error:
        config.resolved_dense_layers(num_layers)
    assert str(error.value).startswith(f"kcache_config.dense_layers={message}")
    assert str(error.value).endswith("layers and at least one must be split")
