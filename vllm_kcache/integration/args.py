# SPDX-License-Identifier: Apache-2.0
"""`--kv-backend` and `--kcache-config`: on the command line, in `LLM(...)`, checked at start."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from vllm_kcache.config import KCacheConfig, KCacheConfigError
from vllm_kcache.integration import counters, refusals
from vllm_kcache.integration.patches import PatchRecord, wrap
from vllm_kcache.integration.plugin import activate_backend
from vllm_kcache.integration.settings import KEY, note_engines_on_host

BACKENDS = ("default", "kcache")
WORKER_CPU = "vllm_kcache.integration.cpu_worker.KCacheCPUWorker"
WORKER_GPU = "vllm_kcache.integration.gpu_worker.KCacheGPUWorker"

_UPSTREAM = "vLLM offers plugins no way to add engine arguments."
_UNTIL = "vLLM lets a plugin register engine arguments."
_RECORDS = {
    name: PatchRecord(f"vllm.engine.arg_utils.{name}", why, how, _UPSTREAM, _UNTIL)
    for name, why, how in (
        (
            "EngineArgs.add_cli_args",
            "serve and bench have no --kv-backend flag.",
            "Adds an argument group of two flags.",
        ),
        (
            "EngineArgs.__init__",
            "LLM(kv_backend=...) is a TypeError.",
            "Takes the two keywords and stores them in additional_config.",
        ),
        (
            "AsyncEngineArgs.__init__",
            "It is generated apart from EngineArgs.__init__.",
            "Takes the two keywords and stores them in additional_config.",
        ),
        (
            "EngineArgs.from_cli_args",
            "It copies dataclass fields only.",
            "Stores the two flags in additional_config.",
        ),
        (
            "EngineArgs.create_engine_config",
            "Bad settings must stop the start, not the first request.",
            "Checks settings and model, picks backend and worker, when the plugin is asked for.",
        ),
    )
}


def install() -> None:
    """Wrap vLLM's engine arguments. Idempotent."""
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    wrap(EngineArgs, "add_cli_args", _with_flags, _RECORDS["EngineArgs.add_cli_args"])
    wrap(EngineArgs, "__init__", _with_keywords, _RECORDS["EngineArgs.__init__"])
    wrap(AsyncEngineArgs, "__init__", _with_keywords, _RECORDS["AsyncEngineArgs.__init__"])
    wrap(EngineArgs, "from_cli_args", _with_parsed_flags, _RECORDS["EngineArgs.from_cli_args"])
    wrap(
        EngineArgs,
        "create_engine_config",
        _with_checks,
        _RECORDS["EngineArgs.create_engine_config"],
    )


def merge_settings(additional: dict | None, kv_backend: str | None, kcache_config: Any) -> dict:
    """`additional_config` with the plugin's settings in it.

    Args:
        additional: What the user gave as additional_config.
        kv_backend: "default", "kcache" or None (not given).
        kcache_config: Settings as a dict, a JSON string or None.

    Raises:
        KCacheConfigError: An unknown backend, settings without the backend, or bad settings.
    """
    merged = dict(additional or {})
    if kv_backend not in (None, *BACKENDS):
        raise KCacheConfigError(
            f"kv_backend={kv_backend!r}: must be one of {', '.join(map(repr, BACKENDS))}."
        )
    if kv_backend != "kcache":
        if kcache_config is not None:
            raise KCacheConfigError(
                f"kcache_config is given but kv_backend is {kv_backend or 'default'!r}: "
                "add --kv-backend kcache, or leave kcache_config out."
            )
        return merged
    if KEY in merged and kcache_config is not None:
        raise KCacheConfigError(
            f"kcache_config and additional_config[{KEY!r}] are both given: keep one."
        )
    given = kcache_config if kcache_config is not None else merged.get(KEY)
    merged[KEY] = KCacheConfig.from_user(given).to_json_dict()
    return merged


def _with_flags(original: Callable) -> Callable:
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = original(parser, *args, **kwargs)
        if "--kv-backend" in getattr(parser, "_option_string_actions", {}):
            return parser
        group = parser.add_argument_group(
            title="KCache", description="V of the KV cache in host memory (vllm-kcache)."
        )
        group.add_argument(
            "--kv-backend",
            choices=BACKENDS,
            default=None,
            help="'kcache' keeps K in GPU memory and V in host memory; 'default' is vLLM's own.",
        )
        group.add_argument(
            "--kcache-config",
            default=None,
            help="Settings as JSON, e.g. '{\"coverage\": 0.95}'; or --kcache-config.coverage 0.95.",
        )
        return parser

    return add_cli_args


def _with_keywords(original: Callable) -> Callable:
    def __init__(
        self: Any,
        *args: Any,
        kv_backend: str | None = None,
        kcache_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if kv_backend is not None or kcache_config is not None:
            kwargs["additional_config"] = merge_settings(
                kwargs.get("additional_config"), kv_backend, kcache_config
            )
        original(self, *args, **kwargs)

    return __init__


def _with_parsed_flags(original: Callable) -> Callable:
    def from_cli_args(cls: Any, args: Any) -> Any:
        engine_args = original(cls, args)
        kv_backend = getattr(args, "kv_backend", None)
        kcache_config = getattr(args, "kcache_config", None)
        additional = engine_args.additional_config
        if kv_backend is not None or kcache_config is not None:
            try:
                additional = merge_settings(additional, kv_backend, kcache_config)
            except KCacheConfigError as error:
                _exit_with(error)
        if isinstance(additional, dict) and KEY in additional:
            engine_args.additional_config = _FromCommandLine(additional)
        return engine_args

    return from_cli_args


class _FromCommandLine(dict):
    """`additional_config` of a command: its errors are for a user, not for a programmer.

    The mark is on the dict because `LLM.from_engine_args` makes new engine arguments out of the
    fields of the old ones.
    """


def _exit_with(error: Exception) -> NoReturn:
    """End a command the way argparse does: one message, exit code 2, no traceback."""
    print(f"vllm: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None


def _with_checks(original: Callable) -> Callable:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        additional = self.additional_config
        if not isinstance(additional, dict) or KEY not in additional:
            return original(self, *args, **kwargs)
        try:
            config = KCacheConfig.from_user(additional[KEY])
            refusals.check_engine_args(self)
            _choose_backend_and_worker(self)
            vllm_config = original(self, *args, **kwargs)
            refusals.check(vllm_config, config)
            note_engines_on_host(vllm_config)
            atexit.register(counters.remove_all, counters.instance_of(vllm_config))
        except KCacheConfigError as error:
            if isinstance(additional, _FromCommandLine):
                _exit_with(error)
            raise
        return vllm_config

    return create_engine_config


def _choose_backend_and_worker(engine_args: Any) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    activate_backend()
    engine_args.attention_backend = AttentionBackendEnum.CUSTOM
    engine_args.worker_cls = WORKER_CPU if current_platform.is_cpu() else WORKER_GPU
