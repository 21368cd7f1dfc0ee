# SPDX-License-Identifier: Apache-2.0
"""Does the split cache pay, for one model, machine and load?"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vllm_kcache.config import KCacheConfig
from vllm_kcache.planner.cost import Hardware, SplitWork, StepCost, split_step, stock_step
from vllm_kcache.planner.memory import (
    Engine,
    Fit,
    cache_shape,
    fit_split,
    fit_stock,
    kv_heads_of_rank,
)
from vllm_kcache.planner.selection import HIT_RATES, interpolate, selected_tokens_of
from vllm_kcache.planner.shape import ModelShape, PlanError

SHORTEST_CONTEXT = 512
FP8_ITEMSIZE = 1


@dataclass(frozen=True)
class Load:
    """What the engine is to serve.

    Attributes:
        context: Tokens of each request.
        requests: Requests at once; None takes as many as fit.
        selected_tokens: Tokens a head that are attended; None estimates them from the settings.
        hit_rate: Share of the selected V blocks that the hot V cache holds, 0 to 1; None estimates
            it from the cache's size.
    """

    context: int
    requests: int | None = None
    selected_tokens: float | None = None
    hit_rate: float | None = None


@dataclass(frozen=True)
class Setup:
    """The model, the GPU, the engine arguments, and the settings of the split cache.

    Attributes:
        host_budget_bytes: Host memory for V, all ranks together.
    """

    shape: ModelShape
    hardware: Hardware
    engine: Engine
    config: KCacheConfig
    host_budget_bytes: float


@dataclass(frozen=True)
class Prediction:
    """One engine under the load.

    Attributes:
        engine: "stock", "stock fp8" or "kcache".
        fits: Requests of this context that fit.
        requests: Requests of the step.
        fit: Memory.
        cost: Where the time goes.
        step_ms: A decode step.
        tokens_per_second: Of the whole engine, decode only.
    """

    engine: str
    fits: int
    requests: int
    fit: Fit
    cost: StepCost
    step_ms: float
    tokens_per_second: float


@dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
        setup, load: The question.
        stock, stock_fp8, kcache: The engines.
        selected_tokens: Tokens a head assumed to be attended.
        hit_rate: Hit rate assumed.
        break_even_context: Least context from which the split cache decodes more tokens a second
            than the model's type in stock vLLM, each with all requests that fit (or those asked
            for); None where it never does.
        limited_by: What to change first to go faster.
        single_request_ratio: Tokens per second of one request alone, against stock.
        notes: What the prediction rests on that was neither given nor measured.
    """

    setup: Setup
    load: Load
    stock: Prediction
    stock_fp8: Prediction
    kcache: Prediction
    selected_tokens: float
    hit_rate: float
    break_even_context: int | None
    limited_by: str
    single_request_ratio: float
    notes: list[str] = field(default_factory=list)

    def speed_up(self, other: Prediction) -> float:
        """Tokens per second of the split cache against another engine's."""
        return self.kcache.tokens_per_second / other.tokens_per_second

    def to_json_dict(self) -> dict[str, Any]:
        """All of it, JSON-serialisable."""
        result = asdict(self)
        result["setup"]["config"] = self.setup.config.to_json_dict()
        result["speed_up_over_stock"] = self.speed_up(self.stock)
        result["speed_up_over_stock_fp8"] = self.speed_up(self.stock_fp8)
        return result


def make_plan(setup: Setup, load: Load) -> Plan:
    """Predict stock vLLM, stock vLLM with an fp8 cache, and the split cache.

    Raises:
        PlanError: The load does not fit or makes no sense; the message says which figure.
        KCacheConfigError: The settings do not fit the model.
    """
    _check(setup, load)
    shape, engine, memory = setup.shape, setup.engine, setup.hardware.gpu_memory_bytes
    stock = _predict(setup, load, "stock", fit_stock(shape, engine, memory))
    fp8_fit = fit_stock(shape, engine, memory, FP8_ITEMSIZE)
    split_fit = fit_split(shape, engine, memory, setup.host_budget_bytes, setup.config)
    kcache = _predict(setup, load, "kcache", split_fit)
    work = split_work(setup, load, split_fit, kcache.requests)
    alone = _cost(setup, load, "kcache", split_fit, 1).seconds
    return Plan(
        setup=setup,
        load=load,
        stock=stock,
        stock_fp8=_predict(setup, load, "stock fp8", fp8_fit),
        kcache=kcache,
        selected_tokens=work.selected_tokens,
        hit_rate=work.hit_rate,
        break_even_context=_break_even(setup, load, stock.fit, split_fit),
        limited_by=_limit(kcache),
        single_request_ratio=_cost(setup, load, "stock", stock.fit, 1).seconds / alone,
        notes=_notes(setup, load, kcache),
    )


def split_work(setup: Setup, load: Load, fit: Fit, requests: float) -> SplitWork:
    """What the settings select, and what the hot V cache holds of it."""
    shape, config = setup.shape, setup.config
    tokens = cache_shape(shape, setup.engine, config).block_tokens
    dense = len(config.resolved_dense_layers(shape.num_layers))
    selected = load.selected_tokens
    if selected is None:
        selected = selected_tokens_of(config.selection(tokens), tokens, load.context)
    selected = min(selected, load.context)
    hit_rate = load.hit_rate
    if hit_rate is None:
        row = kv_heads_of_rank(shape, setup.engine) * shape.head_size * shape.itemsize
        wanted = requests * selected * (shape.num_layers - dense) * row
        hit_rate = interpolate(HIT_RATES, fit.hot_cache_bytes / wanted)
    return SplitWork(selected, hit_rate, tokens, dense)


def _check(setup: Setup, load: Load) -> None:
    longest = setup.engine.max_model_len
    if not 1 <= load.context <= longest:
        raise PlanError(f"context={load.context}: must be 1 to max_model_len, which is {longest}")
    heads, ranks = setup.shape.num_query_heads, setup.engine.tensor_parallel_size
    kv_heads = setup.shape.num_kv_heads
    if heads % ranks:
        raise PlanError(f"tensor_parallel_size={ranks}: must divide the {heads} query heads")
    if max(kv_heads, ranks) % min(kv_heads, ranks):
        raise PlanError(
            f"tensor_parallel_size={ranks}: must divide the {kv_heads} KV heads, or be a multiple"
        )


def _cost(setup: Setup, load: Load, name: str, fit: Fit, requests: float) -> StepCost:
    """A step of the engine "stock", "stock fp8" or "kcache"."""
    step = (setup.shape, setup.hardware, setup.engine, requests, load.context)
    if name == "kcache":
        return split_step(*step, split_work(setup, load, fit, requests))
    return stock_step(*step, FP8_ITEMSIZE if name == "stock fp8" else None)


def _predict(setup: Setup, load: Load, name: str, fit: Fit) -> Prediction:
    block_size = setup.engine.block_size
    fits = int(min(fit.requests(load.context, block_size), setup.engine.max_num_seqs))
    if fits < 1:
        raise PlanError(
            f"{name}: not one request of {load.context} tokens fits; {fit.num_blocks} blocks of "
            f"{block_size} tokens, limited by {fit.limited_by}."
        )
    requests = min(fits, load.requests or fits)
    cost = _cost(setup, load, name, fit, requests)
    return Prediction(name, fits, requests, fit, cost, cost.seconds * 1e3, requests / cost.seconds)


def ratio_at(setup: Setup, load: Load, stock: Fit, split: Fit, context: int) -> float:
    """Tokens per second against stock at another context.

    Requests are not rounded, which would make a saw of the curve; at most max_num_seqs, or those
    asked for, count.
    """
    there = replace(load, context=context)
    most = min(setup.engine.max_num_seqs, load.requests or setup.engine.max_num_seqs)
    rates = []
    for name, fit in (("kcache", split), ("stock", stock)):
        requests = min(most, fit.requests(context, setup.engine.block_size))
        rates.append(requests / _cost(setup, there, name, fit, requests).seconds)
    return rates[0] / rates[1]


def _break_even(setup: Setup, load: Load, stock: Fit, split: Fit) -> int | None:
    """Scan contexts from the longest down in steps of 5%: the last that still pays."""
    page = setup.engine.block_size
    context, pays = setup.engine.max_model_len // page * page, None
    while context >= SHORTEST_CONTEXT and ratio_at(setup, load, stock, split, context) > 1:
        pays = context
        context = int(pays / 1.05) // page * page
    return pays


def _limit(split: Prediction) -> str:
    """The part in the way of a faster step, or the memory in the way of a larger one."""
    cost = split.cost
    if split.requests == split.fits and split.fit.limited_by == "host memory":
        return "host memory"
    parts = {
        "GPU memory bandwidth": cost.weights + cost.cache + cost.attend,
        "PCIe": cost.fetch + cost.fetch_hidden,
        "kernel launches": cost.launches + cost.fixed,
    }
    return max(parts, key=lambda name: parts[name])


def _notes(setup: Setup, load: Load, split: Prediction) -> list[str]:
    notes = []
    if setup.hardware.source != "measured":
        notes.append(f"{setup.hardware.name}: {setup.hardware.source}.")
    config = setup.config
    selects = (config.resolved_coverage, config.resolved_mass_threshold) != (None, None)
    if load.selected_tokens is None and selects:
        notes.append(
            "The tokens selected are an estimate from SmolLM2-135M; measure your model "
            "(vllm_kcache_selected_blocks) and give --selected-tokens."
        )
    if load.hit_rate is None:
        notes.append(
            "The hit rate is an estimate from two texts; measure (vllm_kcache_hot_cache_hits) and "
            "give --hit-rate."
        )
    if setup.engine.tensor_parallel_size > 1:
        notes.append("The cost of all-reduce is a guess; each rank is taken to have its own link.")
    if load.requests is not None and load.requests > split.fits:
        notes.append(f"{load.requests} requests were asked for, {split.fits} fit.")
    return notes
