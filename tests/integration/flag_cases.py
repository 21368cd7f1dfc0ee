# SPDX-License-Identifier: Apache-2.0
"""Commands and keyword arguments of test_flags.py, right and wrong."""

from __future__ import annotations

from typing import Any

KCACHE = ["--kv-backend", "kcache"]
BAD = '{"coverage": 2}'
BAD_TEXT = "kcache_config.coverage=2: must be a number from 1e-9 to 1"
DEEP = "[" * 50_000 + "]" * 50_000
LONG = "9" * 5001
NOT_ENGINES = (["bench", "serve"], ["bench", "sweep", "serve"])

# Commands with engine arguments, by what they need beside them to parse.
WITH_ENGINE = {
    "serve": ["serve"],
    "bench latency": ["bench", "latency"],
    "bench throughput": ["bench", "throughput"],
    "bench startup": ["bench", "startup"],
    "bench mm-processor": ["bench", "mm-processor"],
    "run-batch": ["run-batch"],
    "preload": ["preload"],
    "launch render": ["launch", "render"],
    "snapshot create": ["snapshot", "create"],
}
BENCHMARKS = {
    "bench latency": ["bench", "latency"],
    "bench throughput": ["bench", "throughput", "--input-len", "8", "--output-len", "2"],
    "bench startup": ["bench", "startup"],
    "bench mm-processor": ["bench", "mm-processor"],
}

LATENCY = ["bench", "latency", "--skip-tokenizer-init"]
# Arguments after `vllm serve MODEL`, and the one line of the error.
WRONG = {
    "unknown backend": (
        ["--kv-backend", "kcahe"],
        "argument --kv-backend: invalid choice: 'kcahe' (choose from",
    ),
    "settings without the backend": (
        ["--kcache-config", "{}"],
        "add --kv-backend kcache, or leave kcache_config out.",
    ),
    "settings for the default backend": (
        ["--kv-backend", "default", "--kcache-config", "{}"],
        "kcache_config is given but kv_backend is 'default': add --kv-backend kcache",
    ),
    "additional_config for the default backend": (
        ["--kv-backend", "default", "--additional-config", '{"kcache": {}}'],
        "additional_config['kcache'] is given but kv_backend is 'default': leave",
    ),
    "a number above the bound": (
        [*KCACHE, "--kcache-config", '{"top_n": 2147483648}'],
        "kcache_config.top_n=2147483648: must be an integer from 1 to 16777216",
    ),
    "a number above the bound, dotted": (
        [*KCACHE, "--kcache-config.sink_tokens", "2147483648"],
        "kcache_config.sink_tokens=2147483648: must be an integer from 0 to 16777216",
    ),
    "1e300": (
        [*KCACHE, "--kcache-config.host_memory_gib", "1e300"],
        "kcache_config.host_memory_gib=1e+300: must be a number greater than 0 and at most 1048576",
    ),
    "a long number": (
        [*KCACHE, "--kcache-config", f'{{"top_n": {LONG}}}'],
        'kcache_config=\'{"top_n": 9999',
    ),
    "a long number, dotted": (
        [*KCACHE, "--kcache-config.top_n", LONG],
        "Exceeds the limit (4300 digits) for integer string conversion",
    ),
    "a long number, by additional_config": (
        ["--additional-config", f'{{"kcache": {{"top_n": {LONG}}}}}'],
        "argument --additional-config",
    ),
    "nested": ([*KCACHE, "--kcache-config", DEEP], "kcache_config='[[[["),
    "nested, dotted": ([*KCACHE, "--kcache-config.top_n", DEEP], "JSON nested too deep"),
    "nested, by additional_config": (
        ["--additional-config", f'{{"kcache": {DEEP}}}'],
        "JSON nested too deep",
    ),
    # vLLM looks at the variables first.
    "a variable of ours, validated": (
        [*KCACHE, "--block-size", "8", "--fail-on-environ-validation"],
        "--kv-backend kcache does not support block_size=8",
    ),
    "unknown key": (
        [*KCACHE, "--kcache-config", '{"covrage": 0.9}'],
        "kcache_config.covrage=0.9: unknown key (did you mean 'coverage'?)",
    ),
    "wrong type": (
        [*KCACHE, "--kcache-config", '{"sink_tokens": "many"}'],
        "kcache_config.sink_tokens='many': must be an integer from 0 to 16777216",
    ),
    "out of range": ([*KCACHE, "--kcache-config", BAD], BAD_TEXT),
    "not JSON": (
        [*KCACHE, "--kcache-config", "coverage=0.9"],
        "kcache_config='coverage=0.9': not valid JSON",
    ),
    "dotted": (
        [*KCACHE, "--kcache-config.recent_tokens", "0"],
        "kcache_config.recent_tokens=0: must be an integer from 1 to 16777216",
    ),
    "both ways": (
        [*KCACHE, "--kcache-config", "{}", "--additional-config", '{"kcache": {}}'],
        "kcache_config and additional_config['kcache'] are both given: keep one.",
    ),
    "by additional_config": (
        ["--additional-config", '{"kcache": {"coverage": 2}}'],
        BAD_TEXT,
    ),
    "an engine setting": (
        [*KCACHE, "--block-size", "8"],
        "--kv-backend kcache does not support block_size=8: a K page must be a multiple of 16",
    ),
    "an engine feature": (
        [*KCACHE, "--kv-offloading-size", "1"],
        "--kv-backend kcache does not support kv_offloading_size=1",
    ),
    "a setting that does not fit the model": (
        [*KCACHE, "--kcache-config", '{"dense_layers": 2}'],
        "kcache_config.dense_layers=2: must be at most 1",
    ),
}
# Keyword arguments in Python, and the error.
WRONG_IN_PYTHON: dict[str, tuple[dict[str, Any], str]] = {
    "unknown backend": (
        {"kv_backend": "kcahe"},
        "kv_backend='kcahe': must be one of 'default', 'kcache'.",
    ),
    "settings without the backend": (
        {"kcache_config": {}},
        "kcache_config is given but kv_backend is 'default'",
    ),
    "additional_config for the default backend": (
        {"kv_backend": "default", "additional_config": {"kcache": {}}},
        "additional_config['kcache'] is given but kv_backend is 'default': leave 'kcache' out of",
    ),
    "additional_config that is no dict": (
        {"kv_backend": "kcache", "additional_config": "kcache"},
        "additional_config of type str: kv_backend and kcache_config are stored in it",
    ),
    "a number above the bound": (
        {"kv_backend": "kcache", "kcache_config": {"recent_tokens": 2**31}},
        "kcache_config.recent_tokens=2147483648: must be an integer from 1 to 16777216",
    ),
    "unknown key": (
        {"kv_backend": "kcache", "kcache_config": {"covrage": 0.9}},
        "kcache_config.covrage=0.9: unknown key (did you mean 'coverage'?)",
    ),
    "wrong type": (
        {"kv_backend": "kcache", "kcache_config": {"top_n": 1.5}},
        "kcache_config.top_n=1.5: must be an integer from 1 to 16777216",
    ),
    "out of range": ({"kv_backend": "kcache", "kcache_config": {"coverage": 2}}, BAD_TEXT),
    "not an object": (
        {"kv_backend": "kcache", "kcache_config": [1]},
        "kcache_config=[1]: must be a JSON object (or a dict) of settings",
    ),
    "by additional_config": ({"additional_config": {"kcache": {"coverage": 2}}}, BAD_TEXT),
    "an engine setting": (
        {"kv_backend": "kcache", "block_size": 8},
        "--kv-backend kcache does not support block_size=8",
    ),
}
