# SPDX-License-Identifier: Apache-2.0
"""Everything that a start would refuse, found without starting: behind `vllm-kcache check`."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from vllm_kcache.cache.formats import RowFormat, code_bytes
from vllm_kcache.cache.host_memory import HostMemoryError, host_budget_bytes
from vllm_kcache.config import KCacheConfig, KCacheConfigError
from vllm_kcache.integration import args, features, refusals
from vllm_kcache.integration.plugin import register
from vllm_kcache.integration.settings import KEY
from vllm_kcache.memory import StepLimits, WindowPool
from vllm_kcache.planner.shape import ModelShape, PlanError, read_config, read_shape

GIB = 2**30


def problems(model: str, flags: list[str]) -> list[str]:
    """What `vllm serve MODEL --kv-backend kcache FLAGS` would refuse, ours and vLLM's.

    The configuration is made as for stock vLLM first, so that one refusal does not hide the next.

    Args:
        model: Folder or name, as for vLLM.
        flags: Engine flags of vLLM, `--kcache-config` among them.

    Raises:
        KCacheConfigError: The settings themselves are wrong.
        PlanError: A flag that vLLM does not know; a model that is not found, not readable or
            impossible.
    """
    register()
    parsed = _parse(model, flags)
    settings, additional = parsed.kcache_config, parsed.additional_config
    if isinstance(additional, dict) and KEY in additional:
        settings = args.merge_settings(additional, "kcache", settings)[KEY]
    config = KCacheConfig.from_user(settings)
    _check_model(parsed)
    found: list[str] = []
    try:
        engine_args = _stock_arguments(parsed)
        found += refusals.found_in_arguments(engine_args)
        _take_what_is_refused_out(engine_args)
        vllm_config = engine_args.create_engine_config()
    except Exception as error:
        # vLLM's own checks raise what they like; but OSError, and this message of its own, say that
        # it has not found the model, here or on the hub.
        text = _one_line(error)
        if isinstance(error, OSError) or "Invalid repository ID or local directory" in text:
            raise PlanError(f"{parsed.model}: {text}") from None
        return [*found, f"vLLM: {text}"]
    try:
        found += refusals.found(vllm_config, config)
        found += _host_memory(vllm_config, config)
    except (ValueError, TypeError, ArithmeticError) as error:
        # vLLM takes sizes that no model has, such as heads of no values.
        raise PlanError(f"{parsed.model}: no model has this configuration: {error}") from error
    return found


def _parse(model: str, flags: list[str]) -> argparse.Namespace:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise PlanError(message)

    parser = AsyncEngineArgs.add_cli_args(Parser(prog="vllm-kcache check", add_help=False))
    return parser.parse_args(["--model", model, *flags])


def _check_model(parsed: argparse.Namespace) -> None:
    """Raise PlanError unless there is a configuration to read, or a name to look for."""
    model = parsed.hf_config_path or parsed.model
    folder = Path(model)
    try:
        if folder.is_dir():
            # Mistral's own format has no config.json.
            if not (folder / "params.json").is_file():
                read_config(folder / "config.json")
        elif ":" not in model and not folder.is_file():
            validate_repo_id(model)
    except OSError as error:
        raise PlanError(f"{model}: {error.strerror}") from None
    except HFValidationError:
        raise PlanError(f"{model}: neither a folder nor a name on the Hugging Face hub") from None


def _stock_arguments(parsed: argparse.Namespace) -> Any:
    """Engine arguments without the split cache; the tokenizer's files are not needed."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    plain = argparse.Namespace(**vars(parsed))
    plain.kv_backend = plain.kcache_config = None
    plain.skip_tokenizer_init = True
    if isinstance(plain.additional_config, dict):
        others = plain.additional_config.items()
        plain.additional_config = {key: value for key, value in others if key != KEY}
    return AsyncEngineArgs.from_cli_args(plain)


def _take_what_is_refused_out(engine_args: Any) -> None:
    """Attention and worker of somebody else may not exist on this machine."""
    engine_args.attention_backend = None
    engine_args.attention_config.backend = None
    engine_args.attention_config.backend_per_kind = {}
    engine_args.worker_cls = "auto"


def _host_memory(vllm_config: Any, config: KCacheConfig) -> Iterator[str]:
    """The budget against what the host has, and --num-gpu-blocks-override against the budget."""
    parallel = vllm_config.parallel_config
    ranks = parallel.local_world_size * max(1, parallel.data_parallel_size_local)
    try:
        budget = host_budget_bytes(config.host_memory_gib, ranks)
    except (HostMemoryError, KCacheConfigError) as error:
        yield str(error)
        return
    blocks = vllm_config.cache_config.num_gpu_blocks_override
    # How many pages go with so many states, the worker says; `notes` says that.
    if blocks is not None and not vllm_config.model_config.is_hybrid:
        with contextlib.suppress(KCacheConfigError):  # among the refusals already
            rows, row_bytes = _page_sizes(vllm_config, config)
            pages = _pages_beside_windows(vllm_config, config, blocks)
            on_gpu = vllm_config.device_config.device_type != "cpu"
            yield from override_problems(blocks, pages, row_bytes, budget, rows if on_gpu else None)


def override_problems(
    blocks: int, pages: int, row_bytes: int, budget: int, table_rows: int | None
) -> Iterator[str]:
    """What a worker refuses of --num-gpu-blocks-override, as messages.

    Args:
        blocks: Its value.
        pages: Pages of split layers: as many, or those that go with so many of window layers.
        row_bytes: Host memory of the rows of one page.
        budget: Host memory that a rank may use.
        table_rows: V blocks of one page, over the layers of a rank; None without a hot cache.
    """
    if pages * row_bytes > budget:
        many = "that many blocks" if blocks == pages else f"{pages} pages beside them"
        yield (
            f"num_gpu_blocks_override={blocks}: the rows of {many} need "
            f"{pages * row_bytes / GIB:.2f} GiB of host memory, and this rank may use "
            f"{budget / GIB:.2f} GiB. Lower --num-gpu-blocks-override or raise "
            "kcache_config.host_memory_gib."
        )
    if table_rows is not None and pages * table_rows >= 2**31:
        # Pages grow with blocks in proportion.
        most = (2**31 - 1) // table_rows * blocks // pages
        yield (
            f"num_gpu_blocks_override={blocks}: these are {pages * table_rows} V blocks, and the "
            f"table of a rank numbers fewer than 2**31. Lower --num-gpu-blocks-override to {most}."
        )


def _pages_beside_windows(vllm_config: Any, config: KCacheConfig, blocks: int) -> int:
    """Pages that the worker makes beside so many blocks of window layers, if the model has any."""
    if not features.has_window_layers(vllm_config):
        return blocks
    model, tokens = vllm_config.model_config, vllm_config.cache_config.block_size
    windows = set(features.window_layers(vllm_config))
    layers = model.get_total_num_hidden_layers()
    dense = config.resolved_dense_layers(layers) - windows
    head_size, itemsize = model.get_head_size(), model.dtype.itemsize
    heads = model.get_num_kv_heads(vllm_config.parallel_config)
    both, codes = 2 * head_size * itemsize, config.resolved_k_bits == 4
    split = code_bytes(head_size) if codes else head_size * itemsize
    full_layers = layers - len(windows) - len(dense)
    pool = WindowPool.plan(
        [(features.window_size(vllm_config) + vllm_config.num_speculative_tokens, tokens)],
        block_bytes=len(windows) * heads * tokens * both,
        page_bytes=heads * tokens * (full_layers * split + len(dense) * both),
        page_tokens=tokens,
        limits=StepLimits(
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.scheduler_config.max_num_batched_tokens,
            model.max_model_len,
        ),
        steps_at_once=vllm_config.max_concurrent_batches,
    )
    return pool.pages_for(blocks)


def _page_sizes(vllm_config: Any, config: KCacheConfig) -> tuple[int, int]:
    """V blocks of one page and the bytes of their rows, over the split layers of the rank that has
    the most."""
    from vllm.distributed.utils import get_pp_indices

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    page_tokens, head_size = vllm_config.cache_config.block_size, model.get_head_size()
    layers, ranks = model.get_total_num_hidden_layers(), parallel.pipeline_parallel_size
    dense = config.resolved_dense_layers(layers) | set(features.window_layers(vllm_config))
    split = max(
        len(set(range(*get_pp_indices(layers, rank, ranks))) - dense) for rank in range(ranks)
    )
    tokens = config.resolved_v_block_tokens(head_size, model.dtype.itemsize, page_tokens)
    rows = split * model.get_num_kv_heads(parallel) * page_tokens // tokens
    host_dtype = config.resolved_host_dtype(model.dtype)
    row = RowFormat(tokens, head_size, model.dtype, config.resolved_k_bits, host_dtype)
    return rows, rows * row.bytes


def _one_line(error: Exception) -> str:
    """The message of an error; of pydantic's, without its heading and its dump of the input."""
    kept = []
    for line in str(error).splitlines():
        text = f" {line}".split(" [type=")[0].strip().removeprefix("Value error, ")
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
    config, found = KCacheConfig.from_user(settings), []
    if config.resolved_k_bits == 4:
        found.append(
            "k_bits 4: at start the model reads a short text of the package, to measure its K"
        )
    if parsed.num_gpu_blocks_override is not None and _keeps_states(parsed):
        found.append(
            f"num_gpu_blocks_override={parsed.num_gpu_blocks_override}: of this model these are "
            "states; the pages beside them, and whether the host holds their rows, are found at "
            "start and not checked here"
        )
    # vLLM knows more kinds of models, and where else they may be, than are planned here.
    with contextlib.suppress(PlanError):
        shape = read_shape(parsed.hf_config_path or parsed.model)
        if shape.window_layers:
            found.append(_note_of_windows(shape, config.resolved_k_bits))
    return found


def _keeps_states(parsed: argparse.Namespace) -> bool:
    """Whether some layers of the model keep a state, and others K and V."""
    # What vLLM refuses was said by `problems`.
    with contextlib.suppress(Exception):
        return _stock_arguments(parsed).create_model_config().is_hybrid
    return False


def _note_of_windows(shape: ModelShape, k_bits: int) -> str:
    """What window layers take, and what is gained in the others."""
    both = 2 * shape.num_kv_heads * shape.head_size * shape.itemsize
    pages = both // 2 if k_bits == 16 else shape.num_kv_heads * code_bytes(shape.head_size)
    full, window = shape.num_full_layers, shape.window_tokens(shape.window) * both
    return (
        f"{len(shape.window_layers)} of {shape.num_layers} layers have a window of {shape.window} "
        f"tokens and keep K and V in GPU memory, {window / 2**20:.0f} MiB a request; a token takes "
        f"{full * pages} bytes of the other {full} there, of stock vLLM {full * both}"
    )
