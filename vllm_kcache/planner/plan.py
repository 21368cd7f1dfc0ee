# SPDX-License-Identifier: Apache-2.0
"""Does the split cache pay, for one model, machine and load?"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from vllm_kcache.config import KCacheConfig
from vllm_kcache.planner.cost import Hardware, SplitWork, StepCost, split_step, stock_step
from vllm_kcache.planner.memory import (
    GIB,
    Engine,
    Fit,
    fit_split,
    fit_stock,
    gpu_memory,
    window_pool,
)
from vllm_kcache.planner.selection import HIT_RATES, interpolate, selected_tokens_of
from vllm_kcache.planner.shape import ModelShape, PlanError

SHORTEST_CONTEXT = 512
FP8_ITEMSIZE = 1
# Requests of this length are counted beside those of max_model_len, as the engine's log does.
SHORT_REQUEST = 4096
# More host memory than any machine can address.
ENDLESS_BYTES = 2.0**64


@dataclass(frozen=True)
class Load:
    """What the engine is to serve.

    Attributes:
        context: Tokens of each request.
        requests: Requests at once; None takes as many as fit.
        selected_tokens: Tokens a head that are attended; None estimates them from the settings.
        hit_rate: Share of the selected rows that the hot cache holds, 0 to 1; None estimates it
            from the cache's size.
    """

    context: int
    requests: int | None = None
    selected_tokens: float | None = None
    hit_rate: float | None = None


@dataclass(frozen=True)
class Setup:
    """The model, the GPU, the engine arguments, and the settings of the split cache.

    Attributes:
        host_budget_bytes: Host memory for rows, all ranks together.
    """

    shape: ModelShape
    hardware: Hardware
    engine: Engine
    config: KCacheConfig
    host_budget_bytes: float

    def with_k_bits(self, k_bits: int) -> Setup:
        """The same with pages of K (16) or of K codes (4)."""
        changes: dict[str, Any] = {"k_bits": k_bits}
        if k_bits == 16:
            # There rows hold V as the model has it.
            changes["host_dtype"] = "auto"
        return replace(self, config=self.config.model_copy(update=changes))


@dataclass(frozen=True)
class Prediction:
    """One engine under the load.

    Attributes:
        engine: "stock", "stock fp8", "kcache 16" or "kcache 4".
        fits: Requests of this context that fit, at most max_num_seqs.
        fits_longest: Requests of max_model_len that fit, as many as there may be.
        fits_short: Requests of 4096 tokens that fit, as many as there may be.
        requests: Requests of the step.
        fit: Memory.
        cost: Where the time goes.
        step_ms: A decode step.
        tokens_per_second: Of the whole engine, decode only.
    """

    engine: str
    fits: int
    fits_longest: float
    fits_short: float
    requests: int
    fit: Fit
    cost: StepCost
    step_ms: float
    tokens_per_second: float


@dataclass(frozen=True)
class SplitPrediction(Prediction):
    """One form of the split cache under the load.

    Attributes:
        selected_tokens: Tokens a head assumed to be attended.
        hit_rate: Hit rate assumed.
        speed_up_over_stock, speed_up_over_stock_fp8: Tokens per second against theirs.
        single_request_ratio: Tokens per second of one request alone, against stock.
        break_even_context: Least context from which it decodes more tokens a second than the
            model's type in stock vLLM, each with all requests that fit (or those asked for); None
            where it never does.
        limited_by: What to change first to go faster.
        remedies: Sentences: what is in the way of more requests, of a faster step where that is
            the link, and what would change it.
    """

    selected_tokens: float
    hit_rate: float
    speed_up_over_stock: float
    speed_up_over_stock_fp8: float
    single_request_ratio: float
    break_even_context: int | None
    limited_by: str
    remedies: list[str]


@dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
        setup, load: The question. Both forms of the split cache are planned, whatever k_bits says.
        stock, stock_fp8, kcache_16, kcache_4: The engines.
        notes: What the prediction rests on that was neither given nor measured.
    """

    setup: Setup
    load: Load
    stock: Prediction
    stock_fp8: Prediction
    kcache_16: SplitPrediction
    kcache_4: SplitPrediction
    notes: list[str] = field(default_factory=list)

    def to_json_dict(self) -> dict[str, Any]:
        """All of it, JSON-serialisable."""
        result = asdict(self)
        result["setup"]["config"] = self.setup.config.to_json_dict()
        return result


def make_plan(setup: Setup, load: Load) -> Plan:
    """Predict stock vLLM, stock vLLM with an fp8 cache, and the split cache in both forms.

    Raises:
        PlanError: The load does not fit or makes no sense; the message says which figure.
        KCacheConfigError: The settings do not fit the model.
    """
    _check(setup, load)
    shape, engine, memory = setup.shape, setup.engine, setup.hardware.gpu_memory_bytes
    stock = _predict(setup, load, "stock", fit_stock(shape, engine, memory))
    fp8_fit = fit_stock(shape, engine, memory, FP8_ITEMSIZE)
    stock_fp8 = _predict(setup, load, "stock fp8", fp8_fit)
    split = {
        k_bits: _predict_split(setup.with_k_bits(k_bits), load, stock, stock_fp8)
        for k_bits in (16, 4)
    }
    notes = _notes(setup, load, list(split.values()))
    return Plan(setup, load, stock, stock_fp8, split[16], split[4], notes)


def split_work(setup: Setup, load: Load, fit: Fit, requests: float) -> SplitWork:
    """What the settings select, and what the hot cache holds of it."""
    memory = gpu_memory(setup.shape, setup.engine, setup.config)
    cache, tokens = memory.shape, memory.shape.block_tokens
    selected = load.selected_tokens
    if selected is None:
        selected = selected_tokens_of(memory.selection, tokens, load.context)
    selected = min(selected, load.context)
    hit_rate = load.hit_rate
    if hit_rate is None:
        lists = requests * cache.num_layers * cache.num_kv_heads
        wanted = lists * selected / tokens * cache.row.bytes
        hit_rate = interpolate(HIT_RATES, fit.hot_cache_bytes / wanted)
    return SplitWork(selected, hit_rate, cache, memory.group_requests)


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
    """A step of one of the engines; of the split cache in the form of `setup`."""
    step = (setup.shape, setup.hardware, setup.engine, requests, load.context)
    if name.startswith("kcache"):
        return split_step(*step, split_work(setup, load, fit, requests))
    return stock_step(*step, FP8_ITEMSIZE if name == "stock fp8" else None)


def _predict(setup: Setup, load: Load, name: str, fit: Fit) -> Prediction:
    engine = setup.engine
    fits = int(min(fit.requests(load.context, engine.block_size), engine.max_num_seqs))
    if fits < 1:
        raise PlanError(
            f"{name}: not one request of {load.context} tokens fits; {fit.num_blocks} blocks of "
            f"{engine.block_size} tokens, limited by {fit.limited_by}."
        )
    requests = min(fits, load.requests or fits)
    cost = _cost(setup, load, name, fit, requests)
    return Prediction(
        engine=name,
        fits=fits,
        fits_longest=fit.requests(engine.max_model_len, engine.block_size),
        fits_short=fit.requests(SHORT_REQUEST, engine.block_size),
        requests=requests,
        fit=fit,
        cost=cost,
        step_ms=cost.seconds * 1e3,
        tokens_per_second=requests / cost.seconds,
    )


def _predict_split(
    setup: Setup, load: Load, stock: Prediction, stock_fp8: Prediction
) -> SplitPrediction:
    """The form of the split cache that `setup` says, against stock."""
    fit = _fit_split(setup, setup.host_budget_bytes)
    name = f"kcache {setup.config.resolved_k_bits}"
    plain = _predict(setup, load, name, fit)
    work = split_work(setup, load, fit, plain.requests)
    alone = _cost(setup, load, name, fit, 1).seconds
    return SplitPrediction(
        **{one.name: getattr(plain, one.name) for one in fields(plain)},
        selected_tokens=work.selected_tokens,
        hit_rate=work.hit_rate,
        speed_up_over_stock=plain.tokens_per_second / stock.tokens_per_second,
        speed_up_over_stock_fp8=plain.tokens_per_second / stock_fp8.tokens_per_second,
        single_request_ratio=_cost(setup, load, "stock", stock.fit, 1).seconds / alone,
        break_even_context=_break_even(setup, load, stock.fit, fit),
        limited_by=_limit(plain),
        remedies=_remedies(setup, load, plain),
    )


def _fit_split(setup: Setup, host_budget_bytes: float) -> Fit:
    gpu_memory = setup.hardware.gpu_memory_bytes
    return fit_split(setup.shape, setup.engine, gpu_memory, host_budget_bytes, setup.config)


def ratio_at(setup: Setup, load: Load, stock: Fit, split: Fit, context: int) -> float:
    """Tokens per second against stock at another context; the split cache in the form of `setup`.

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
    if split.requests == split.fits and split.fit.limited_by == "host memory":
        return "host memory"
    return _limit_of_step(split.cost)


def _limit_of_step(cost: StepCost) -> str:
    parts = {
        "GPU memory bandwidth": cost.weights + cost.cache + cost.attend,
        "PCIe": cost.fetch + cost.fetch_hidden,
        "kernel launches": cost.launches + cost.fixed,
    }
    return max(parts, key=lambda name: parts[name])


def _remedies(setup: Setup, load: Load, split: Prediction) -> list[str]:
    """What is in the way of more requests and, where it is the link, of a faster step."""
    fit, page_tokens = split.fit, setup.engine.block_size
    texts = [f"Requests are limited by {fit.limited_by}. {fit.remedy}"]
    if fit.limited_by == "host memory":
        free = _fit_split(setup, ENDLESS_BYTES)
        gib = free.host_bytes * setup.engine.tensor_parallel_size / GIB
        most = int(min(free.requests(load.context, page_tokens), setup.engine.max_num_seqs))
        texts[0] += (
            f" {gib:.0f} GiB would hold {most} of {load.context} tokens; then {free.limited_by} "
            "is the limit."
        )
    if _limit_of_step(split.cost) == "PCIe":
        texts.append(
            "A step waits for rows from the host. A larger hot cache (kcache_config.hot_cache_gib, "
            "fewer requests) or a selection of fewer tokens fetches less."
        )
    return texts


def _notes(setup: Setup, load: Load, splits: list[SplitPrediction]) -> list[str]:
    notes = []
    shape = setup.shape
    window = window_pool(shape, setup.engine, setup.config)
    if window is not None:
        gib = window.request_blocks * window.block_bytes / GIB
        have = (
            f"{len(shape.window_layers)} of {shape.num_layers} layers have a window of "
            f"{shape.window} tokens and keep K and V"
            if shape.window_layers
            else f"{len(shape.state_layers)} of {shape.num_layers} layers keep a state"
        )
        notes.append(
            f"{have} in GPU memory, {gib:.3f} GiB a request. Their "
            "share of the memory is fixed at start: a lower --max-num-seqs leaves more for pages, "
            "a lower --max-model-len more for these layers."
        )
    if setup.engine.num_speculative_tokens:
        notes.append(
            "Of drafts the memory of their tokens and states is counted, not that of a model that "
            "makes them; steps are those without drafts."
        )
    if setup.hardware.source != "measured":
        notes.append(f"{setup.hardware.name}: {setup.hardware.source}.")
    config = setup.config
    selects = config.has_mass_threshold or config.resolved_coverage is not None
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
    for split in splits:
        if load.requests is not None and load.requests > split.fits:
            asked = f"{load.requests} requests were asked for, {split.fits} fit"
            notes.append(f"{split.engine}: {asked}.")
    return notes
