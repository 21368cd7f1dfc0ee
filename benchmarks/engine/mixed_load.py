# SPDX-License-Identifier: Apache-2.0
"""A server's mixed load for some minutes, every token compared with stock vLLM's.

    python -m benchmarks.engine.mixed_load --minutes 15

Short, long and prefix-sharing prompts of a fixed set arrive at random at an asynchronous engine
with everything selected, in float32, with few blocks (requests are preempted) and a small hot V
cache (slots are reused). Some ask for several completions, some are cancelled before their first
token or in mid-stream. What is delivered, of cancelled requests too, must be the beginning of what
stock vLLM said once, alone with the prompt set. In the end no block may be held, and every resident
copy of V must be what the host pool holds. With --drafts n-grams are drafted and verified all the
while.

Tie rule: sums of float32 in another order may turn two tokens around that are as good as equal. A
first difference is a tie, and counted, where stock itself puts the two less than TIE_NATS apart;
what follows it is not compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, ROOT, append, command, origin

MODEL = ROOT / "models/SmolLM2-135M-Instruct"
TIE_NATS = 1e-3
# A request that delivers nothing for so long hangs.
SILENT_SECONDS = 120
DRAIN_SECONDS = 30
PROBE = "benchmarks.replay.residency.ResidencyProbe"


@dataclass(frozen=True)
class Sizes:
    """How large the load is.

    Attributes:
        long_lines, shared_lines: Bible verses of a long prompt, and of a shared prefix.
        tokens: Most tokens of a completion.
        clients: Requests at once.
        engine: Arguments of both engines.
        blocks: Of the split cache; too few for all clients.
    """

    long_lines: int
    shared_lines: int
    tokens: int
    clients: int
    engine: dict[str, Any]
    blocks: int


ON_GPU = Sizes(
    long_lines=90,
    shared_lines=40,
    tokens=96,
    clients=48,
    engine={
        "max_model_len": 4096,
        "max_num_batched_tokens": 512,
        "block_size": 16,
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": 3 << 30,
        "enforce_eager": False,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    },
    blocks=420,
)
ON_CPU = Sizes(
    long_lines=16,
    shared_lines=8,
    tokens=24,
    clients=6,
    engine={
        "max_model_len": 1024,
        "max_num_batched_tokens": 128,
        "block_size": 32,
        "kv_cache_memory_bytes": 256 << 20,
        "enforce_eager": True,
    },
    blocks=36,
)


def prompt_set(sizes: Sizes) -> list[str]:
    """Short, middling, long, and families that share a beginning."""
    from tests.integration.engines import kjv

    short = [
        "The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at",
        "List three primary colours:", "The opposite of hot is", "2, 4, 6, 8,", "Dear Sir,",
    ]  # fmt: skip
    middling = [kjv(100 + 30 * i, 3 + i) for i in range(8)]
    long = [kjv(700 + 110 * i, sizes.long_lines) for i in range(3)]
    endings = ("", " And Jacob said", " In the beginning", " But the king", " Then came the people")
    families = [
        kjv(1300 + 100 * i, sizes.shared_lines) + ending for i in range(3) for ending in endings
    ]
    return short + middling + long + families


@dataclass
class Tally:
    """What has come out so far."""

    counts: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)

    def add(self, request: dict[str, Any], expected: dict[str, Any], delivered: list[int]) -> None:
        """Compare one delivered completion."""
        self.tokens += len(delivered)
        verdict, details = compare(expected, delivered)
        self.counts[verdict] += 1
        if verdict == "wrong":
            self.wrong.append({**request, **details})


def compare(expected: dict[str, Any], delivered: list[int]) -> tuple[str, dict[str, Any]]:
    """ "equal", "tie" or "wrong", and where it first differs.

    Args:
        expected: A row of tests/integration/generate.py, with log-probabilities.
        delivered: Token ids, at most as many as expected.
    """
    tokens, top = expected["tokens"][0], expected["top"][0]
    if len(delivered) > len(tokens):
        raise ValueError(f"{len(delivered)} tokens; at most {len(tokens)} were asked for")
    for at, (ours, theirs) in enumerate(zip(delivered, tokens, strict=False)):
        if ours != theirs:
            # A token that is not among stock's first few is no tie.
            gap = top[at][str(theirs)] - top[at].get(str(ours), float("-inf"))
            details = {"at": at, "ours": ours, "theirs": theirs, "gap_nats": gap}
            return ("tie" if abs(gap) < TIE_NATS else "wrong"), details
    return "equal", {}


class Load:
    """Clients of one engine, until time is up.

    Args:
        engine: vLLM's AsyncLLM.
        expected: Rows of stock vLLM, one for each prompt.
        alone: One completion a request. n > 1 takes top_k (see `stream`), and with that a step of
            vLLM 0.32 on a CPU in which nothing was drafted fails.
    """

    def __init__(
        self, engine: Any, prompts: list[str], expected: list[dict[str, Any]], sizes: Sizes,
        seed: int, alone: bool = False,
    ) -> None:  # fmt: skip
        self.engine = engine
        self.prompts = prompts
        self.expected = expected
        self.sizes = sizes
        self.alone = alone
        self.random = random.Random(seed)
        self.tally = Tally()
        self.started = 0

    async def run(self, seconds: float) -> None:
        """All clients, and a line of progress now and then."""
        end = time.monotonic() + seconds
        clients = [asyncio.create_task(self.client(end)) for _ in range(self.sizes.clients)]
        progress = asyncio.create_task(self.progress())
        try:
            await asyncio.gather(*clients)
        finally:
            progress.cancel()
            for client in clients:
                client.cancel()

    async def client(self, end: float) -> None:
        while time.monotonic() < end:
            if self.random.random() < 0.2:
                await asyncio.sleep(self.random.random() * 0.5)
            await self.request()

    async def request(self) -> None:
        """One request: most run to their end, some are cancelled."""
        number = self.random.randrange(len(self.prompts))
        asked = self.random.randint(1, self.sizes.tokens)
        several = self.random.choice((2, 3, 4)) if self.random.random() < 0.2 else 1
        if self.alone:
            several = 1
        fate = self.random.random()
        self.started += 1
        name = f"load-{self.started}"
        what = {"request": name, "prompt": number, "asked": asked, "n": several}
        if fate < 0.06:
            await self.cancel_in_time(name, number, asked, several)
            return
        most = self.random.randint(1, asked) if fate < 0.3 else None
        delivered = await self.stream(name, number, asked, several, most)
        if most is None:
            short = [len(tokens) for tokens in delivered.values() if len(tokens) != asked]
            if short or len(delivered) != several:
                self.tally.counts["wrong"] += 1
                self.tally.wrong.append({**what, "lengths": list(map(len, delivered.values()))})
        self.tally.counts["completed" if most is None else "cancelled in mid-stream"] += 1
        for tokens in delivered.values():
            self.tally.add(what, self.expected[number], tokens)

    async def stream(
        self, name: str, number: int, asked: int, several: int, most: int | None
    ) -> dict[int, list[int]]:
        """Tokens by completion; leaves once the first has `most`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # Greedy decoding takes n=1 only; the most likely token alone is the same for any n.
        how = {"temperature": 0.0} if several == 1 else {"temperature": 1.0, "top_k": 1}
        sampling = SamplingParams(
            max_tokens=asked, n=several, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA, **how,
        )  # fmt: skip
        delivered: dict[int, list[int]] = {}
        outputs = self.engine.generate(self.prompts[number], sampling, name)
        try:
            while True:
                try:
                    output = await asyncio.wait_for(anext(outputs), SILENT_SECONDS)
                except StopAsyncIteration:
                    return delivered
                for completion in output.outputs:
                    delivered.setdefault(completion.index, []).extend(completion.token_ids)
                if most is not None and max(map(len, delivered.values())) >= most:
                    return delivered
        finally:
            # Closing it early is how a server's client leaves: the engine aborts the request.
            await outputs.aclose()

    async def cancel_in_time(self, name: str, number: int, asked: int, several: int) -> None:
        """Leave after a random time, waiting in the queue or wherever that may be."""
        task = asyncio.create_task(self.stream(name, number, asked, several, None))
        await asyncio.wait([task], timeout=self.random.random() ** 2)
        task.cancel()
        try:
            await task
            self.tally.counts["completed before they were cancelled"] += 1
        except asyncio.CancelledError:
            self.tally.counts["cancelled at a random time"] += 1

    async def progress(self) -> None:
        while True:
            await asyncio.sleep(10)
            say(f"{dict(self.tally.counts)}, {self.tally.tokens} tokens, "
                f"{int(metric('vllm:num_preemptions'))} preemptions")  # fmt: skip


def metric(name: str) -> float:
    """Sum of one of vLLM's figures in this process."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    return sum(m.value for m in get_metrics_snapshot() if m.name == name and hasattr(m, "value"))


def say(text: str) -> None:
    print(text, flush=True)


async def drain(load: Load) -> float:
    """Usage of the blocks once nothing runs: 0, or what is still held after DRAIN_SECONDS."""
    deadline = time.monotonic() + DRAIN_SECONDS
    while True:
        # Figures come with steps: a short request makes some, and shows that the engine lives.
        await load.stream(f"drain-{time.monotonic_ns()}", 0, 2, 1, None)
        await asyncio.sleep(0.2)
        held = metric("vllm:kv_cache_usage_perc") + metric("vllm:num_requests_running")
        if not held or time.monotonic() > deadline:
            return held


async def run_load(options: argparse.Namespace, sizes: Sizes, expected: list[Any]) -> dict:
    """Start the split cache, load it, look at what is left."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    import vllm_kcache  # noqa: F401  (makes kv_backend known before the arguments are)
    from vllm_kcache.integration import counters

    arguments = AsyncEngineArgs(
        model=options.model, dtype="float32", seed=0, kv_backend="kcache",
        # Rows of the model's dtype: with those of int8 everything selected is not stock's answer.
        kcache_config={
            "top_n": "all", "hot_cache_gib": options.hot_cache_gib, "k_bits": options.k_bits,
            "host_dtype": "model",
        },
        num_gpu_blocks_override=options.blocks or sizes.blocks, worker_extension_cls=PROBE,
        **sizes.engine,
    )  # fmt: skip
    if options.drafts:
        arguments.speculative_config = {
            "method": "ngram", "num_speculative_tokens": options.drafts, "prompt_lookup_max": 3,
        }  # fmt: skip
    engine = AsyncLLM.from_engine_args(arguments)
    try:
        say(f"loading the engine for {options.minutes} minutes")
        load = Load(engine, prompt_set(sizes), expected, sizes, options.seed, bool(options.drafts))
        await load.run(options.minutes * 60)
        held = await drain(load)
        (copies,) = await engine.collective_rpc("kcache_compare_copies")
        (figures,) = await engine.collective_rpc("kcache_counters")
        return {
            "minutes": options.minutes, "requests": load.started, "counts": load.tally.counts,
            "tokens": load.tally.tokens, "wrong": load.tally.wrong, "held_in_the_end": held,
            "preemptions": int(metric("vllm:num_preemptions")), "copies": copies,
            "drafts": options.drafts, "drafted": int(metric("vllm:spec_decode_num_draft_tokens")),
            "accepted": int(metric("vllm:spec_decode_num_accepted_tokens")),
            "kcache_metrics": dict(zip(counters.SCALARS, figures, strict=False)),
        }  # fmt: skip
    finally:
        engine.shutdown()


def verdicts(result: dict[str, Any]) -> list[str]:
    """What is not as it must be; nothing when all is well."""
    figures, copies = result["kcache_metrics"], result["copies"]
    looked_up = figures["hot_cache_hits"] + figures["hot_cache_misses"]
    looked_up += figures["direct_host_reads"]
    checks = {
        f"{len(result['wrong'])} completions are not stock's": not result["wrong"],
        "no completion was compared": result["counts"]["equal"] > 0,
        "no request was cancelled": result["counts"]["cancelled in mid-stream"] > 0,
        f"blocks or requests are held: {result['held_in_the_end']}": not result["held_in_the_end"],
        "no request was preempted: fewer --blocks": result["preemptions"] > 0,
        "drafts were all accepted, all rejected, or not made": (
            not result["drafts"] or 0 < result["accepted"] < result["drafted"]
        ),
        f"{copies['stale']} resident copies are stale": not copies["stale"],
        f"the pool has {copies['pool_pages']} pages for {copies['k_pages']} K pages": (
            copies["pool_pages"] == copies["k_pages"]
        ),
        "more or fewer blocks were fetched than selected": (
            not copies["has_hot_cache"] or looked_up == figures["selected_blocks"]
        ),
    }
    return [text for text, holds in checks.items() if not holds]


def expected_of(options: argparse.Namespace, sizes: Sizes) -> list[dict[str, Any]]:
    """What stock vLLM says to each prompt; kept in the file of --expected, if named."""
    from tests.integration.engines import run_engine

    prompts = prompt_set(sizes)
    if options.expected and options.expected.exists():
        kept = json.loads(options.expected.read_text())
        if kept["prompts"] == prompts and kept["tokens"] == sizes.tokens:
            return kept["rows"]
        raise ValueError(f"{options.expected}: made for other prompts; remove it")
    say(f"stock vLLM completes {len(prompts)} prompts")
    sampling = {"max_tokens": sizes.tokens, "ignore_eos": True, "logprobs": 5}
    with tempfile.TemporaryDirectory() as folder:
        result = run_engine(
            Path(folder), [{"prompts": prompts, "sampling": sampling}],
            **{**sizes.engine, "model": options.model, "dtype": "float32"},
        )  # fmt: skip
    rows = result["batches"][0]
    if options.expected:
        kept = {"prompts": prompts, "tokens": sizes.tokens, "rows": rows}
        options.expected.write_text(json.dumps(kept))
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--minutes", type=float, default=0.5)
    parser.add_argument("--blocks", type=int, help="of the split cache")
    parser.add_argument("--hot-cache-gib", type=float, default=0.002)
    parser.add_argument("--k-bits", type=int, choices=(4, 16), default=16)
    parser.add_argument("--drafts", type=int, default=0, help="n-grams, so many tokens a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--expected", type=Path, help="keeps stock's texts between runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON line")
    return parser.parse_args(arguments)


def main() -> int:
    """Run it, append a row, say what is wrong."""
    import torch

    options = parse()
    for name, value in (
        ("HF_HUB_OFFLINE", "1"), ("VLLM_NO_USAGE_STATS", "1"), ("OMP_NUM_THREADS", "1"),
        ("VLLM_WORKER_MULTIPROC_METHOD", "spawn"),
    ):  # fmt: skip
        os.environ.setdefault(name, value)
    sizes = ON_GPU if torch.cuda.is_available() else ON_CPU
    result = asyncio.run(run_load(options, sizes, expected_of(options, sizes)))
    wrong = verdicts(result)
    row = {**origin("torch", "vllm"), "command": command(), **result}
    row |= {"wrong": result["wrong"][:5], "passed": not wrong}
    append(options.results / "mixed_load.jsonl", row)
    say(json.dumps(row, indent=1))
    for text in wrong:
        say(f"WRONG: {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
