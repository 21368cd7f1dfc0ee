# SPDX-License-Identifier: Apache-2.0
"""Everything that a start would refuse, found without starting: behind `vllm-kcache check`."""

from __future__ import annotations

import argparse
from typing import Any

from vllm_kcache.cache.host_memory import HostMemoryError, host_budget_bytes
from vllm_kcache.config import KCacheConfig, KCacheConfigError
from vllm_kcache.integration import args, refusals
from vllm_kcache.integration.plugin import register
from vllm_kcache.integration.settings import KEY


def problems(model: str, flags: list[str]) -> list[str]:
    """What `vllm serve MODEL --kv-backend kcache FLAGS` would refuse, ours and vLLM's.

    The configuration is made as for stock vLLM first, so that one refusal does not hide the next.

    Args:
        model: Folder or name, as for vLLM.
        flags: Engine flags of vLLM, `--kcache-config` among them.

    Raises:
        KCacheConfigError: The settings themselves are wrong.
        SystemExit: A flag that vLLM does not know.
    """
    register()
    parsed = _parse(model, flags)
    settings = parsed.kcache_config
    if parsed.additional_config and KEY in parsed.additional_config:
        settings = args.merge_settings(parsed.additional_config, "kcache", settings)[KEY]
    config = KCacheConfig.from_user(settings)
    engine_args = _stock_arguments(parsed)
    found = list(refusals.found_in_arguments(engine_args))
    _take_what_is_refused_out(engine_args)
    try:
        vllm_config = engine_args.create_engine_config()
    except Exception as error:
        # vLLM's own checks raise what they like.
        return [*found, f"vLLM: {_one_line(error)}"]
    found += refusals.found(vllm_config, config)
    found += _host_memory(vllm_config, config)
    return found


def _parse(model: str, flags: list[str]) -> argparse.Namespace:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm-kcache check"))
    return parser.parse_args(["--model", model, *flags])


def _stock_arguments(parsed: argparse.Namespace) -> Any:
    """Engine arguments without the split cache; the tokenizer's files are not needed."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    plain = argparse.Namespace(**vars(parsed))
    plain.kv_backend = plain.kcache_config = None
    plain.skip_tokenizer_init = True
    others = dict(plain.additional_config or {})
    others.pop(KEY, None)
    plain.additional_config = others
    return AsyncEngineArgs.from_cli_args(plain)


def _take_what_is_refused_out(engine_args: Any) -> None:
    """Attention and worker of somebody else may not exist on this machine."""
    engine_args.attention_backend = None
    engine_args.attention_config.backend = None
    engine_args.attention_config.backend_per_kind = {}
    engine_args.worker_cls = "auto"


def _host_memory(vllm_config: Any, config: KCacheConfig) -> list[str]:
    parallel = vllm_config.parallel_config
    ranks = parallel.local_world_size * max(1, parallel.data_parallel_size_local)
    try:
        host_budget_bytes(config.host_memory_gib, ranks)
    except (HostMemoryError, KCacheConfigError) as error:
        return [str(error)]
    return []


def _one_line(error: Exception) -> str:
    """The message of an error; of pydantic's, without its heading and its dump of the input."""
    kept = []
    for line in str(error).splitlines():
        text = line.strip().split(" [type=")[0].removeprefix("Value error, ")
        if text and "validation error for" not in text and "errors.pydantic.dev" not in text:
            kept.append(text)
    return " ".join(kept) or type(error).__name__


def notes(model: str, flags: list[str]) -> list[str]:
    """What such a start would do that a user may want to know beforehand.

    Args:
        model, flags: As for `problems`, which has accepted them.
    """
    parsed = _parse(model, flags)
    settings, additional = parsed.kcache_config, parsed.additional_config
    if isinstance(additional, dict) and KEY in additional:
        settings = args.merge_settings(additional, "kcache", settings)[KEY]
    if KCacheConfig.from_user(settings).resolved_k_bits == 16:
        return []
    return ["k_bits 4: at start the model reads a short text of the package, to measure its K"]
