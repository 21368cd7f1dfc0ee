# SPDX-License-Identifier: Apache-2.0
import json
import math

import pydantic
import pytest

from vllm_kcache.config import ACCEPTED_VALUES, KCacheConfig, KCacheConfigError
from vllm_kcache.types import Selection

KEYS = (
    "top_n, coverage, mass_threshold, v_block_tokens, sink_tokens, recent_tokens, dense_layers, "
    "tail, head_combine, host_memory_gib, hot_cache_gib, prefill"
)


def refusal(value) -> str:
    with pytest.raises(KCacheConfigError) as error:
        KCacheConfig.from_user(value)
    return str(error.value)


def test_defaults():
    config = KCacheConfig.from_user(None)
    assert config == KCacheConfig.from_user({}) == KCacheConfig.from_user("{}") == KCacheConfig()
    assert (config.resolved_top_n, config.resolved_coverage) == (None, None)
    assert config.resolved_mass_threshold == 0.002
    assert (config.sink_tokens, config.recent_tokens, config.dense_layers) == (8, 32, 0)
    assert (config.resolved_tail, config.selection(8).combine) == ("clip", "max")
    assert config.host_memory_gib == config.hot_cache_gib == config.prefill == "auto"


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
    assert config.selection(8) == Selection(None, None, 1, 32, "max", threshold)
    assert config.selection(8).clip == threshold / 2
    assert not config.selection(8).selects_everything
    assert config.resolved_tail == "clip"


def test_mass_threshold_with_a_cap_and_another_tail():
    config = KCacheConfig.from_user(
        {"mass_threshold": 0.002, "top_n": 64, "coverage": None, "tail": "drop"}
        | {"head_combine": "sum"}
    )
    assert config.selection(8) == Selection(64, None, 1, 32, "sum", 0.002)
    assert config.resolved_tail == "drop"


def test_settings_that_exclude_each_other():
    assert KCacheConfig.from_user({"tail": "clip"}).selection(8).clip == 0.001
    assert refusal({"tail": "clip", "top_n": 64}) == (
        "kcache_config.tail='clip': needs kcache_config.mass_threshold, which says where to clip"
    )
    assert refusal({"mass_threshold": 0.002, "coverage": 0.9}) == (
        "kcache_config.mass_threshold=0.002: not together with kcache_config.coverage=0.9; give "
        "one of them"
    )
    with pytest.raises(KCacheConfigError, match=r"needs kcache_config\.mass_threshold"):
        KCacheConfig(tail="clip", coverage=0.9).selection(8)


BAD_VALUES = {
    "top_n": [0, -1, 1.5, 64.0, True, "some", "64", [1], {}],
    "coverage": [0, 0.0, -0.5, 1.5, 2, math.nan, math.inf, True, "0.9", "high", []],
    "mass_threshold": [0, 0.0, -0.5, 1.5, 2, math.nan, True, "0.002", "all", []],
    "v_block_tokens": [0, -8, 3, 24, 64, 8.0, True, None, "8", "big"],
    "sink_tokens": [-1, 0.5, 8.0, False, None, "8", "auto"],
    "recent_tokens": [0, -1, 0.5, 32.0, True, None, "32"],
    "dense_layers": [-1, 1.0, True, None, "0", [-1], [0.0], ["0"], [True], {"0": 1}],
    "tail": ["none", "Renormalize", None, 0, True],
    "head_combine": ["mean", "SUM", None, 0, []],
    "host_memory_gib": [0, 0.0, -1, math.nan, math.inf, True, None, "4", "all"],
    "hot_cache_gib": [-0.1, -1, math.nan, math.inf, False, None, "4"],
    "prefill": ["cudnn", "", None, 1, True],
}


def test_every_key_has_bad_values_and_a_text_of_what_is_accepted():
    keys = set(KCacheConfig.model_fields)
    assert keys == set(BAD_VALUES) == set(ACCEPTED_VALUES) == set(KEYS.split(", "))


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in BAD_VALUES.items() for value in values]
)
def test_bad_values_name_key_value_and_what_is_accepted(key, value):
    expected = f"kcache_config.{key}={value!r}: must be {ACCEPTED_VALUES[key]}"
    assert refusal({"sink_tokens": 8, key: value}) == expected


def test_the_texts_of_what_is_accepted():
    assert [refusal({key: values[0]}) for key, values in BAD_VALUES.items()] == [
        'kcache_config.top_n=0: must be an integer of at least 1, "all" or null',
        'kcache_config.coverage=0: must be greater than 0 and at most 1, null or "auto"',
        'kcache_config.mass_threshold=0: must be greater than 0 and at most 1, null or "auto"',
        'kcache_config.v_block_tokens=0: must be 1, 2, 4, 8, 16, 32 or "auto"',
        "kcache_config.sink_tokens=-1: must be an integer of at least 0",
        "kcache_config.recent_tokens=0: must be an integer of at least 1",
        (
            "kcache_config.dense_layers=-1: must be an integer of at least 0 "
            "(count from the bottom) or a list of layer numbers"
        ),
        'kcache_config.tail=\'none\': must be "auto", "renormalize", "clip", "drop" or "mean"',
        'kcache_config.head_combine=\'mean\': must be "auto", "sum" or "max"',
        'kcache_config.host_memory_gib=0: must be a finite number greater than 0 or "auto"',
        'kcache_config.hot_cache_gib=-0.1: must be a finite number of at least 0 or "auto"',
        'kcache_config.prefill=\'cudnn\': must be "auto", "flash_attn", "xformers" or "torch"',
    ]


GOOD_VALUES = {
    "top_n": [1, 5000, "all", None],
    "coverage": [0.01, 0.95, 1.0, 1, None, "auto"],
    "mass_threshold": [0.002, 1.0, None, "auto"],
    "v_block_tokens": [1, 2, 4, 8, 16, 32, "auto"],
    "sink_tokens": [0, 8, 100],
    "recent_tokens": [1, 32, 100],
    "dense_layers": [0, 2, [], [0, 5]],
    "tail": ["auto", "renormalize", "drop", "mean"],
    "head_combine": ["auto", "sum", "max"],
    "host_memory_gib": [0.5, 4, "auto"],
    "hot_cache_gib": [0, 0.5, 4, "auto"],
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
        'kcache_config.top_n=0: must be an integer of at least 1, "all" or null; '
        'kcache_config.coverage=1.5: must be greater than 0 and at most 1, null or "auto"; '
        'kcache_config.tail=\'x\': must be "auto", "renormalize", "clip", "drop" or "mean"'
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
        (10**12, 30, "1000000000000: must be at most 29, since the model has 30 layers"),
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
