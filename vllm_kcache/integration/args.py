# SPDX-License-Identifier: Apache-2.0
"""`--kv-backend` and `--kcache-config`: on the command line, in `LLM(...)`, checked at start."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from vllm_kcache.config import KCacheConfig, KCacheConfigError
from vllm_kcache.integration import counters, refusals
from vllm_kcache.integration.layers import activate_backend
from vllm_kcache.integration.patches import PatchRecord, wrap
from vllm_kcache.integration.settings import KEY, note_engines_on_host

BACKENDS = ("default", "kcache")
WORKER_CPU = "vllm_kcache.integration.cpu_worker.KCacheCPUWorker"
WORKER_GPU = "vllm_kcache.integration.gpu_worker.KCacheGPUWorker"
# Read where they act, in kernels/. vLLM must know them: it warns of any other VLLM_ variable.
VARIABLES = ("VLLM_KCACHE_EXTENSION", "VLLM_KCACHE_SELF_CHECK")
# Of the parsed arguments: vLLM hands them to every API server process of a server.
_INSTANCE = "kcache_instance"

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
_PARSE_RECORD = PatchRecord(
    target="vllm.utils.argparse_utils.FlexibleArgumentParser.parse_args",
    why="A number of 5,000 digits or brackets nested 100,000 deep in JSON end in a traceback.",
    how="Where an argument names kcache, what reading them raises is argparse's error.",
    upstream="It catches errors of JSON's grammar only (0.32.0).",
    until="vLLM's parser reports every value that it cannot read.",
)


def install() -> None:
    """Wrap vLLM's engine arguments. Idempotent."""
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    wrap(FlexibleArgumentParser, "parse_args", _with_errors, _PARSE_RECORD)
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
    if not isinstance(additional, dict | None):
        raise KCacheConfigError(
            f"additional_config of type {type(additional).__name__}: kv_backend and kcache_config "
            "are stored in it, so it must be a dict."
        )
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
        if kv_backend == "default" and KEY in merged:
            raise KCacheConfigError(
                f"additional_config[{KEY!r}] is given but kv_backend is 'default': leave "
                f"{KEY!r} out of additional_config for vLLM's own cache, or say kcache."
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
            help="'kcache' keeps codes of K, or K, in GPU memory and the rest in host memory; "
            "'default' is vLLM's own.",
        )
        group.add_argument(
            "--kcache-config",
            default=None,
            help="Settings as JSON, e.g. '{\"coverage\": 0.95}'; or --kcache-config.coverage 0.95.",
        )
        return parser

    return add_cli_args


def _with_errors(original: Callable) -> Callable:
    def parse_args(self: Any, args: Any = None, namespace: Any = None) -> Any:
        try:
            return original(self, args, namespace)
        except (ValueError, RecursionError) as error:
            if not any("kcache" in str(word) for word in (sys.argv[1:] if args is None else args)):
                raise
            too_deep = isinstance(error, RecursionError)
            self.error("JSON nested too deep" if too_deep else str(error).splitlines()[0])

    return parse_args


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
            if not hasattr(args, _INSTANCE):
                setattr(args, _INSTANCE, counters.new_instance())
            engine_args.additional_config = marked = _FromCommandLine(additional)
            marked.instance = getattr(args, _INSTANCE)
        return engine_args

    return from_cli_args


class _FromCommandLine(dict):
    """`additional_config` of a command: its errors are for a user, not for a programmer.

    The mark is on the dict because `LLM.from_engine_args` makes new engine arguments out of the
    fields of the old ones.

    Attributes:
        instance: Name of the server, if the command starts one (see `counters.new_instance`).
    """

    instance: str | None = None


def _exit_with(error: Exception) -> NoReturn:
    """End a command the way argparse does: one message, exit code 2, no traceback."""
    print(f"vllm: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None


def _with_checks(original: Callable) -> Callable:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        _make_variables_known()
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
            vllm_config.instance_id = _instance_of(self)
            atexit.register(counters.remove_all, vllm_config.instance_id)
        except KCacheConfigError as error:
            if isinstance(additional, _FromCommandLine):
                _exit_with(error)
            raise
        return vllm_config

    return create_engine_config


def _make_variables_known() -> None:
    """Tell vLLM of the variables that are set. Every one that it knows goes into the key of its
    compilation cache, so those that are not set stay unknown.
    """
    from vllm import envs

    for name in VARIABLES:
        if name in os.environ:
            envs.environment_variables.setdefault(name, lambda name=name: os.environ.get(name))


def _instance_of(engine_args: Any) -> str:
    """The name by which a server's processes find each other's counters.

    Each of several API server processes makes its own configuration, out of the arguments that the
    first process read. Everywhere else one configuration is one engine.
    """
    given = getattr(engine_args.additional_config, "instance", None)
    if given is not None and engine_args._api_process_count > 1:
        return given
    return counters.new_instance()


def _choose_backend_and_worker(engine_args: Any) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    activate_backend()
    engine_args.attention_backend = AttentionBackendEnum.CUSTOM
    engine_args.worker_cls = WORKER_CPU if current_platform.is_cpu() else WORKER_GPU
