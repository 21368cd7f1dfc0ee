# SPDX-License-Identifier: Apache-2.0
"""Commands and keyword arguments of test_flags.py, right and wrong."""

from __future__ import annotations

from typing import Any

KCACHE = ["--kv-backend", "kcache"]
BAD = '{"coverage": 2}'
BAD_TEXT = "kcache_config.coverage=2: must be greater than 0 and at most 1"
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
    "unknown key": (
        [*KCACHE, "--kcache-config", '{"covrage": 0.9}'],
        "kcache_config.covrage=0.9: unknown key (did you mean 'coverage'?)",
    ),
    "wrong type": (
        [*KCACHE, "--kcache-config", '{"sink_tokens": "many"}'],
        "kcache_config.sink_tokens='many': must be an integer of at least 0",
    ),
    "out of range": ([*KCACHE, "--kcache-config", BAD], BAD_TEXT),
    "not JSON": (
        [*KCACHE, "--kcache-config", "coverage=0.9"],
        "kcache_config='coverage=0.9': not valid JSON",
    ),
    "dotted": (
        [*KCACHE, "--kcache-config.recent_tokens", "0"],
        "kcache_config.recent_tokens=0: must be an integer of at least 1",
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
    "unknown key": (
        {"kv_backend": "kcache", "kcache_config": {"covrage": 0.9}},
        "kcache_config.covrage=0.9: unknown key (did you mean 'coverage'?)",
    ),
    "wrong type": (
        {"kv_backend": "kcache", "kcache_config": {"top_n": 1.5}},
        "kcache_config.top_n=1.5: must be an integer of at least 1",
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
