# SPDX-License-Identifier: Apache-2.0
"""Does the split cache pay, for one model, machine and load? The planner behind `vllm-kcache plan`.

What fits is plan_memory.py, how long a step takes plan_cost.py; here they meet. Nothing of vLLM is
imported and no GPU is needed. The model and its fit to measurements: docs/plan.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_kcache.config import KCacheConfig
from vllm_kcache.plan_cost import (
    Batch,
    Hardware,
    Kernels,
    SplitWork,
    StepCost,
    split_step,
    stock_step,
)
from vllm_kcache.plan_memory import Engine, Fit, fit_split, fit_stock, kv_heads_of_rank
from vllm_kcache.plan_selection import HIT_RATES, interpolate, selected_tokens_of
from vllm_kcache.plan_shape import ModelShape, PlanError

SHORTEST_CONTEXT = 512
FP8_ITEMSIZE = 1


@dataclass(frozen=True)
class Load:
    """What the engine is to serve.

    Attributes:
        context: Tokens of each request.
        requests: Requests at once; None takes as many as fit.
        selected_tokens: Tokens a head that are attended; None estimates them from the settings.
        hit_rate: Share of the selected V blocks that the hot V cache holds; None estimates it from
            the cache's size.
    """

    context: int
    requests: int | None = None
    selected_tokens: float | None = None
    hit_rate: float | None = None


@dataclass(frozen=True)
class Setup:
    """Everything a prediction is made from.

    Attributes:
        shape: The model.
        hardware: The GPU.
        engine: Engine arguments.
        config: Settings of the split cache.
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
        engine: "stock bf16", "stock fp8" or "kcache".
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
    stock = _stock(setup, load, None)
    stock_fp8 = _stock(setup, load, FP8_ITEMSIZE)
    fit = _fit_split(setup)
    split = _split(setup, load, fit)
    alone = Load(load.context, 1, load.selected_tokens, load.hit_rate)
    ratio = _stock(setup, alone, None).step_ms / _split(setup, alone, fit).step_ms
    work = split_work(setup, load, fit, split.requests)
    return Plan(
        setup=setup,
        load=load,
        stock=stock,
        stock_fp8=stock_fp8,
        kcache=split,
        selected_tokens=work.selected_tokens,
        hit_rate=work.hit_rate,
        break_even_context=_break_even(setup, load, fit),
        limited_by=_limit(split),
        single_request_ratio=ratio,
        notes=_notes(setup, load, split),
    )


def split_work(setup: Setup, load: Load, fit: Fit, requests: float) -> SplitWork:
    """What the settings select, and what the hot V cache holds of it."""
    shape, config = setup.shape, setup.config
    tokens = config.resolved_v_block_tokens(
        shape.head_size, shape.itemsize, setup.engine.block_size
    )
    dense = len(config.resolved_dense_layers(shape.num_layers))
    selected = load.selected_tokens
    if selected is None:
        selected = selected_tokens_of(config.selection(tokens), tokens, load.context)
    selected = min(selected, load.context)
    hit_rate = load.hit_rate
    if hit_rate is None:
        heads = kv_heads_of_rank(shape, setup.engine)
        row = heads * shape.head_size * shape.itemsize
        wanted = requests * selected * (shape.num_layers - dense) * row
        hit_rate = interpolate(HIT_RATES, fit.hot_cache_bytes / wanted)
    return SplitWork(selected, hit_rate, tokens, dense)


def _check(setup: Setup, load: Load) -> None:
    longest = setup.engine.max_model_len
    if not 1 <= load.context <= longest:
        raise PlanError(f"context={load.context}: must be 1 to max_model_len, which is {longest}")
    if load.requests is not None and load.requests < 1:
        raise PlanError(f"requests={load.requests}: must be at least 1")
    if load.selected_tokens is not None and load.selected_tokens <= 0:
        raise PlanError(f"selected_tokens={load.selected_tokens}: must be above 0")
    heads, ranks = setup.shape.num_query_heads, setup.engine.tensor_parallel_size
    if ranks < 1 or heads % ranks:
        raise PlanError(f"tensor_parallel_size={ranks}: must divide the {heads} query heads")


def _fit_split(setup: Setup) -> Fit:
    return fit_split(
        setup.shape,
        setup.engine,
        setup.hardware.gpu_memory_bytes,
        setup.host_budget_bytes,
        setup.config,
    )


def _requests(setup: Setup, load: Load, fit: Fit, name: str) -> tuple[int, int]:
    """Requests that fit, and requests of the step."""
    fits = min(fit.requests(load.context, setup.engine.block_size), setup.engine.max_num_seqs)
    if fits < 1:
        raise PlanError(
            f"{name}: not one request of {load.context} tokens fits; {fit.num_blocks} blocks of "
            f"{setup.engine.block_size} tokens, limited by {fit.limited_by}."
        )
    return fits, min(fits, load.requests or fits)


def _stock(setup: Setup, load: Load, kv_itemsize: int | None) -> Prediction:
    name = "stock fp8" if kv_itemsize else "stock"
    fit = fit_stock(setup.shape, setup.engine, setup.hardware.gpu_memory_bytes, kv_itemsize)
    fits, requests = _requests(setup, load, fit, name)
    batch = Batch(requests, load.context)
    cost = stock_step(setup.shape, setup.hardware, setup.engine, batch, kv_itemsize)
    return _prediction(name, fits, requests, fit, cost)


def _split(setup: Setup, load: Load, fit: Fit, kernels: Kernels | None = None) -> Prediction:
    fits, requests = _requests(setup, load, fit, "kcache")
    work = split_work(setup, load, fit, requests)
    batch = Batch(requests, load.context)
    cost = split_step(setup.shape, setup.hardware, setup.engine, batch, work, kernels)
    return _prediction("kcache", fits, requests, fit, cost)


def _prediction(name: str, fits: int, requests: int, fit: Fit, cost: StepCost) -> Prediction:
    return Prediction(
        engine=name,
        fits=fits,
        requests=requests,
        fit=fit,
        cost=cost,
        step_ms=cost.seconds * 1e3,
        tokens_per_second=requests / cost.seconds,
    )


def ratio_at(setup: Setup, load: Load, fit: Fit, context: int) -> float:
    """Tokens per second against stock at another context, without rounding requests.

    Whole requests would make a saw of the curve; at most max_num_seqs, and those asked for, count.
    """
    engine, shape, hardware = setup.engine, setup.shape, setup.hardware
    most = min(engine.max_num_seqs, load.requests or engine.max_num_seqs)
    stock_fit = fit_stock(shape, engine, hardware.gpu_memory_bytes)
    requests = min(most, stock_fit.requests_exactly(context, engine.block_size))
    stock = requests / stock_step(shape, hardware, engine, Batch(requests, context)).seconds
    requests = min(most, fit.requests_exactly(context, engine.block_size))
    work = split_work(
        setup,
        Load(context, None, load.selected_tokens, load.hit_rate),
        fit,
        requests,
    )
    cost = split_step(shape, hardware, engine, Batch(requests, context), work)
    return requests / cost.seconds / stock


def _break_even(setup: Setup, load: Load, fit: Fit) -> int | None:
    """Scan contexts from the longest down; the last that still pays, to within a page."""
    step = setup.engine.block_size
    longest = setup.engine.max_model_len // step * step
    if longest < SHORTEST_CONTEXT or ratio_at(setup, load, fit, longest) <= 1:
        return None
    pays = longest
    while pays > SHORTEST_CONTEXT:
        shorter = max(SHORTEST_CONTEXT, int(pays / 1.05) // step * step)
        if shorter == pays or ratio_at(setup, load, fit, shorter) <= 1:
            return pays
        pays = shorter
    return pays


def _limit(split: Prediction) -> str:
    """The part that is in the way of a faster step, or the memory in the way of a larger one."""
    cost = split.cost
    if split.requests == split.fits and split.fit.limited_by == "host memory":
        return "host memory"
    parts = {
        "GPU memory bandwidth": cost.weights + cost.cache + cost.attend,
        "PCIe": cost.fetch + cost.fetch_hidden,
        "kernel launches": cost.launches + cost.fixed,
    }
    # The fetch runs beside scoring: it limits only once it takes longer.
    if cost.fetch < 0.1 * cost.seconds:
        del parts["PCIe"]
    return max(parts, key=lambda name: parts[name])


def _notes(setup: Setup, load: Load, split: Prediction) -> list[str]:
    """What the prediction rests on that was not given or not measured."""
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
