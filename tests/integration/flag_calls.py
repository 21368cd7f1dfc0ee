# SPDX-License-Identifier: Apache-2.0
"""What test_flags.py does in Python, each function in a process of its own (forked.py).

None of them imports vllm_kcache before vLLM has been used: users need not either.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

PROMPT = list(range(3, 43))


def _engine(model: str, **arguments: Any) -> Any:
    from vllm import LLM

    return LLM(
        model,
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="float32",
        enforce_eager=True,
        **arguments,
    )


def _generate(llm: Any) -> int:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, detokenize=False)
    output = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    return len(output[0].outputs[0].token_ids)


def _backends(llm: Any) -> list[str]:
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention.attention import Attention

    layers = get_layers_from_vllm_config(llm.llm_engine.vllm_config, Attention)
    return [layer.get_attn_backend().get_name() for layer in layers.values()]


def _files_of(llm: Any) -> list[str]:
    """Files of counters of this engine; other tests' engines may run at the same time."""
    instance = llm.llm_engine.vllm_config.instance_id
    return sorted(map(str, Path("/dev/shm").glob(f"vllm_kcache.{instance}.*")))


def engine_arguments(model: str) -> dict[str, Any]:
    """Engine arguments without any flag of ours, and the configuration made of them."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parsed = parser.parse_args(["--model", model, "--skip-tokenizer-init"])
    shown = {}
    for name, made in (
        ("python", EngineArgs(model=model, skip_tokenizer_init=True)),
        ("command", EngineArgs.from_cli_args(parsed)),
    ):
        shown[name] = {field: repr(value) for field, value in vars(made).items()}
        vllm_config = made.create_engine_config()
        shown[name]["config"] = [
            repr(vllm_config.attention_config),
            repr(vllm_config.additional_config),
            vllm_config.parallel_config.worker_cls,
        ]
        shown[name]["fields"] = [field.name for field in dataclasses.fields(made)]
    return shown


def stock_engine(model: str) -> dict[str, Any]:
    """An engine without our flag."""
    from vllm.v1.attention.backends import registry

    llm = _engine(model)
    return {
        "tokens": _generate(llm),
        "backends": _backends(llm),
        "files": _files_of(llm),
        "custom": registry.AttentionBackendEnum.CUSTOM.is_overridden(),
        "worker": llm.llm_engine.vllm_config.parallel_config.worker_cls,
        "ours": sorted(name for name in sys.modules if name.startswith("vllm_kcache.reference")),
    }


def split_engine(model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """An engine with our backend, asked for by keyword or by additional_config."""
    llm = _engine(model, **arguments)
    result = {
        "tokens": _generate(llm),
        "backends": _backends(llm),
        "settings": llm.llm_engine.vllm_config.additional_config["kcache"],
        "files": len(_files_of(llm)),
    }
    import vllm_kcache

    result["decode_layer_steps"] = vllm_kcache.metrics(llm)["decode_layer_steps"]
    return result


def async_arguments(model: str) -> dict[str, Any]:
    """AsyncEngineArgs has an __init__ of its own."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    made = AsyncEngineArgs(
        model=model, skip_tokenizer_init=True, kv_backend="kcache", kcache_config='{"top_n": 64}'
    )
    return made.create_engine_config().additional_config["kcache"]


def error_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """The error that engine arguments raise."""
    from vllm.engine.arg_utils import EngineArgs

    try:
        EngineArgs(skip_tokenizer_init=True, **arguments).create_engine_config()
    except Exception as error:
        return {"type": f"{type(error).__module__}.{type(error).__name__}", "text": str(error)}
    return {"type": None, "text": None}


def variables_of_ours(model: str) -> dict[str, Any]:
    """What vLLM says of our environment variables, and of one that is only like them.

    They are set after the plugin was loaded: a notebook may do so.
    """
    import os

    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import interface

    said: list[str] = []
    interface.logger.warning = lambda text, *values: said.append(text % values)
    result: dict[str, Any] = {}
    for name, backend in (
        ("VLLM_KCACHE_EXTENSION", None),
        ("VLLM_KCACHE_SELF_CHECK", "kcache"),
        ("VLLM_KCACHE_MISSPELT", "kcache"),
    ):
        os.environ[name] = "0"
        for is_error in (False, True):
            said.clear()
            arguments = EngineArgs(
                model=model,
                skip_tokenizer_init=True,
                kv_backend=backend,
                fail_on_environ_validation=is_error,
            )
            try:
                arguments.create_engine_config()
            except ValueError as error:
                said.append(str(error))
            result[f"{name} {is_error}"] = [text for text in said if name in text]
    return result


def names_of_servers(model: str) -> dict[str, list[str]]:
    """Names by which counters are found, in the processes of servers that are made here."""
    import pickle

    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def arguments() -> Any:
        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        return parser.parse_args(
            ["--model", model, "--skip-tokenizer-init", "--kv-backend", "kcache"]
        )

    def name(parsed: Any, processes: int, rank: int) -> str:
        made = AsyncEngineArgs.from_cli_args(parsed)
        made._api_process_count, made._api_process_rank = processes, rank
        return made.create_engine_config().instance_id

    def server(processes: int) -> list[str]:
        """As vLLM does: the first process, then the others with its arguments."""
        parsed = arguments()
        names = [name(parsed, processes, -1)]
        sent = pickle.dumps(parsed)
        return [*names, *(name(pickle.loads(sent), processes, rank) for rank in range(processes))]

    # Of two servers, this is the same, or ends in the same name.
    import os

    os.environ["PROMETHEUS_MULTIPROC_DIR"] = "/tmp/a/prometheus"
    first = server(2)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = "/tmp/b/prometheus"
    second = server(2)
    del os.environ["PROMETHEUS_MULTIPROC_DIR"]
    parsed = arguments()
    python = EngineArgs(model=model, skip_tokenizer_init=True, kv_backend="kcache")
    return {
        "first": first,
        "second": second,
        "of one command": [name(parsed, 1, 0) for _ in range(2)],
        "in python": [python.create_engine_config().instance_id for _ in range(2)],
    }


def one_stock_layer(model: str) -> dict[str, Any]:
    """Start an engine with our backend in which one layer was given vLLM's own attention."""
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    original = Attention.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if ".1." in kwargs["prefix"]:
            kwargs["attn_backend"] = CPUAttentionBackend
        original(self, *args, **kwargs)

    Attention.__init__ = __init__
    try:
        _engine(model, kv_backend="kcache")
    except RuntimeError as error:
        return {"type": type(error).__name__, "text": str(error)}
    return {"type": None, "text": None}
