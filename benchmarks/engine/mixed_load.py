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

Each check is said as soon as it is known, and the row is written before the engine is shut down; an
engine that then ends badly adds a row that has not passed. SIGTERM and SIGINT end a run with what
was counted so far, which is no verdict, and no row. Stock's texts take minutes: a file of
--expected keeps them for the next run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, ROOT, append, command, device, origin

MODEL = ROOT / "models/SmolLM2-135M-Instruct"
TIE_NATS = 1e-3
# A request that delivers nothing for so long hangs.
SILENT_SECONDS = 120
PROGRESS_SECONDS = 10
DRAIN_SECONDS = 30
# The engine is killed when it has not ended by itself for so long.
END_SECONDS = 60
# From the end of the load to the verdict: the least, and a drain to its deadline.
CHECK_SECONDS = (2, DRAIN_SECONDS + 15)
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
        stock_seconds, start_seconds: What stock's texts and the start of the engine took, least
            and most (H200, up to three runs side by side; two cores).
    """

    long_lines: int
    shared_lines: int
    tokens: int
    clients: int
    engine: dict[str, Any]
    blocks: int
    stock_seconds: tuple[int, int]
    start_seconds: tuple[int, int]


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
    stock_seconds=(120, 300),
    start_seconds=(40, 120),
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
    stock_seconds=(20, 90),
    start_seconds=(15, 60),
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


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGINT came; asyncio and subprocess end what they wait for as at Ctrl-C."""


class Report:
    """Says how far a run is, with the seconds since its start.

    Attributes:
        waiting_for: What the run does now.
        tally: What has come out so far.
        wrong: Checks that do not hold.
        verdict: Whether the row is written.
    """

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.waiting_for = ""
        self.tally = Tally()
        self.wrong: list[str] = []
        self.verdict = False

    def say(self, text: str) -> None:
        # Past Python's buffers: a signal's handler may come while they are written.
        line = f"[{time.monotonic() - self.begin:5.0f} s] {text}\n"
        os.write(sys.stdout.fileno(), line.encode())

    def wait_for(self, what: str) -> None:
        """Say what is done from now on."""
        self.waiting_for = what
        self.say(f"waiting for {what}")

    def check(self, checks: dict[str, bool]) -> None:
        """Say each check, by its text, and keep those that do not hold."""
        for text, holds in checks.items():
            self.say(f"{'ok' if holds else 'WRONG'}: {text}")
            if not holds:
                self.wrong.append(text)

    def counted(self) -> str:
        """The counts so far."""
        return f"{dict(self.tally.counts)}, {self.tally.tokens} tokens"

    def end_at_signals(self) -> None:
        """From now on SIGTERM and SIGINT end the run: `Stopped`."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)

    def stop(self, number: int, frame: Any) -> None:
        """Handler of a signal. Later ones are ignored: timeout(1) sends each twice."""
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        which = f"{signal.Signals(number).name} while waiting for {self.waiting_for}"
        if self.verdict:
            self.say(f"{which}: the row stands, how the engine ends was not seen")
        else:
            self.say(f"{which}: {self.counted()}, {len(self.tally.wrong)} wrong")
            self.say("stopped early: not a verdict")
        raise Stopped(number)


class Load:
    """Clients of one engine, until time is up.

    When it is, requests that run are cancelled once they deliver something.

    Args:
        engine: vLLM's AsyncLLM.
        expected: Rows of stock vLLM, one for each prompt.
        alone: One completion a request. n > 1 takes top_k (see `stream`), and with that a step of
            vLLM 0.32 on a CPU in which nothing was drafted fails.
    """

    def __init__(
        self, engine: Any, prompts: list[str], expected: list[dict[str, Any]], sizes: Sizes,
        seed: int, report: Report, alone: bool = False,
    ) -> None:  # fmt: skip
        self.engine = engine
        self.prompts = prompts
        self.expected = expected
        self.sizes = sizes
        self.alone = alone
        self.random = random.Random(seed)
        self.report = report
        self.tally = report.tally
        self.started = 0
        self.end = float("inf")

    async def run(self, seconds: float) -> None:
        """All clients, and a line of progress now and then."""
        self.end = time.monotonic() + seconds
        clients = [asyncio.create_task(self.client()) for _ in range(self.sizes.clients)]
        progress = asyncio.create_task(self.progress(clients))
        try:
            await asyncio.gather(*clients)
            self.end = float("inf")
        finally:
            progress.cancel()
            for client in clients:
                client.cancel()

    @property
    def over(self) -> bool:
        """Whether time is up."""
        return time.monotonic() >= self.end

    async def client(self) -> None:
        while not self.over:
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
        most, patience, end = None, float("inf"), "cancelled in mid-stream"
        if fate < 0.06:
            patience, end = self.random.random() ** 2, "cancelled at a random time"
        elif fate < 0.3:
            most = self.random.randint(1, asked)
        delivered, left = await self.stream(name, number, asked, several, most, patience)
        known = len(self.tally.wrong)
        if not left:
            short = [len(tokens) for tokens in delivered.values() if len(tokens) != asked]
            if short or len(delivered) != several:
                self.tally.counts["wrong"] += 1
                self.tally.wrong.append({**what, "lengths": list(map(len, delivered.values()))})
        self.tally.counts[end if left else "completed"] += 1
        for tokens in delivered.values():
            self.tally.add(what, self.expected[number], tokens)
        for wrong in self.tally.wrong[known:]:
            self.report.say(f"WRONG: {wrong}")

    async def stream(
        self, name: str, number: int, asked: int, several: int,
        most: int | None = None, patience: float = float("inf"),
    ) -> tuple[dict[int, list[int]], bool]:  # fmt: skip
        """Tokens by completion, and whether it left before all had come: once the first has
        `most`, after `patience` seconds wherever it is then, in the queue too, or when time is up.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # Greedy decoding takes n=1 only; the most likely token alone is the same for any n.
        how = {"temperature": 0.0} if several == 1 else {"temperature": 1.0, "top_k": 1}
        sampling = SamplingParams(
            max_tokens=asked, n=several, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA, **how,
        )  # fmt: skip
        delivered: dict[int, list[int]] = {}
        leave_at = time.monotonic() + patience
        outputs = self.engine.generate(self.prompts[number], sampling, name)
        try:
            while True:
                left = leave_at - time.monotonic()
                try:
                    output = await asyncio.wait_for(anext(outputs), min(SILENT_SECONDS, left))
                except StopAsyncIteration:
                    return delivered, False
                except asyncio.TimeoutError:
                    if left > SILENT_SECONDS:
                        raise
                    return delivered, True
                # wait_for may hand over what came as its time ended: that counts, and it leaves.
                for completion in output.outputs:
                    delivered.setdefault(completion.index, []).extend(completion.token_ids)
                if output.finished:
                    continue
                if self.over or (most and max(map(len, delivered.values())) >= most):
                    return delivered, True
        finally:
            # Closing it early is how a server's client leaves: the engine aborts the request.
            await outputs.aclose()

    async def progress(self, clients: list[asyncio.Task]) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            left = self.end - time.monotonic()
            running = sum(not client.done() for client in clients)
            what = f"{left:.0f} s of load left" if left > 0 else f"{running} clients still to leave"
            preemptions = int(metric("vllm:num_preemptions"))
            self.report.say(f"{what}: {self.report.counted()}, {preemptions} preemptions")


def metric(name: str) -> float:
    """Sum of one of vLLM's figures in this process."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    return sum(m.value for m in get_metrics_snapshot() if m.name == name and hasattr(m, "value"))


async def drain(load: Load) -> float:
    """Usage of the blocks once nothing runs: 0, or what is still held after DRAIN_SECONDS."""
    deadline = time.monotonic() + DRAIN_SECONDS
    while True:
        # Figures come with steps: a short request makes some, and shows that the engine lives.
        await load.stream(f"drain-{time.monotonic_ns()}", 0, 2, 1)
        await asyncio.sleep(0.2)
        held = metric("vllm:kv_cache_usage_perc") + metric("vllm:num_requests_running")
        if not held or time.monotonic() > deadline:
            return held


def start_engine(options: argparse.Namespace, sizes: Sizes) -> Any:
    """vLLM's AsyncLLM with the split cache."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    import vllm_kcache  # noqa: F401  (makes kv_backend known before the arguments are)

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
    return AsyncLLM.from_engine_args(arguments)


async def run_load(
    options: argparse.Namespace, sizes: Sizes, expected: list[Any], report: Report
) -> None:
    """Start the split cache, load it, check what came out and what is left, write the row."""
    report.wait_for(f"the engine's start ({seconds(sizes.start_seconds)})")
    engine = start_engine(options, sizes)
    results = options.results / "mixed_load.jsonl"
    try:
        row: dict[str, Any] = {**origin("torch", "vllm"), "command": command()}
        row |= await loaded(engine, options, sizes, expected, report)
        row |= {"wrong": row["wrong"][:5], "passed": not report.wrong}
        append(results, row)
        report.verdict = True
        report.say(json.dumps(row))
        report.say(f"{'WRONG' if report.wrong else 'passed'}; the row is in {results}")
        report.wait_for("the engine's end")
    except Exception as error:
        report.say(f"FAILED while waiting for {report.waiting_for}: {error!r}")
        report.say(f"{report.counted()}: not a verdict")
        raise
    finally:
        badly = end_of(engine)
    report.check({f"the engine ended well{badly}": not badly})
    if badly:
        append(results, {**row, "passed": False, "engine_ended": badly})
        report.say("WRONG: another row says so; the row before it does not stand")


async def loaded(
    engine: Any, options: argparse.Namespace, sizes: Sizes, expected: list[Any], report: Report
) -> dict[str, Any]:
    """The load and all checks of it: a row's figures."""
    from vllm_kcache.integration import counters

    prompts, minutes = prompt_set(sizes), options.minutes
    load = Load(engine, prompts, expected, sizes, options.seed, report, bool(options.drafts))
    report.wait_for(f"{minutes} minutes of load; then last checks ({seconds(CHECK_SECONDS)})")
    await load.run(minutes * 60)
    tally = report.tally
    result: dict[str, Any] = {
        "minutes": minutes, "requests": load.started, "counts": tally.counts,
        "tokens": tally.tokens, "wrong": tally.wrong,
        "preemptions": int(metric("vllm:num_preemptions")), "drafts": options.drafts,
        "drafted": int(metric("vllm:spec_decode_num_draft_tokens")),
        "accepted": int(metric("vllm:spec_decode_num_accepted_tokens")),
    }  # fmt: skip
    report.check(checks_of_load(result))
    report.wait_for(f"all blocks to be free (at most {DRAIN_SECONDS} s)")
    held = result["held_in_the_end"] = await drain(load)
    report.check({f"blocks or requests that are still held: {held}": not held})
    report.wait_for("the comparison of resident copies with the host pool")
    (copies,) = await engine.collective_rpc("kcache_compare_copies")
    (figures,) = await engine.collective_rpc("kcache_counters")
    result["copies"] = copies
    result["kcache_metrics"] = dict(zip(counters.SCALARS, figures, strict=False))
    report.check(checks_of_cache(copies, result["kcache_metrics"]))
    return result


def end_of(engine: Any) -> str:
    """Shut the engine down; what went wrong at that, or nothing."""
    processes = multiprocessing.active_children()
    try:
        engine.shutdown(timeout=END_SECONDS)
    except Exception as error:
        return f": shutdown raised {error!r}"
    for process in processes:
        process.join(1)
    codes = {process.name: process.exitcode for process in processes}
    return f": its processes ended with {codes}" if any(codes.values()) else ""


def checks_of_load(result: dict[str, Any]) -> dict[str, bool]:
    """What must hold of what was delivered, and whether it does."""
    counts, wrong = result["counts"], len(result["wrong"])
    cancelled, drafts = counts["cancelled in mid-stream"], result["drafts"]
    checks = {
        f"completions equal to stock's: {counts['equal']}": counts["equal"] > 0,
        f"completions that are not: {wrong}": not wrong,
        f"requests cancelled in mid-stream: {cancelled}": cancelled > 0,
        f"preemptions (fewer --blocks make more): {result['preemptions']}": (
            result["preemptions"] > 0
        ),
    }
    if drafts:
        made, accepted = result["drafted"], result["accepted"]
        some = 0 < accepted < made
        checks[f"drafts accepted, some and not all: {accepted} of {made}"] = some
    return checks


def checks_of_cache(copies: dict[str, Any], figures: dict[str, float]) -> dict[str, bool]:
    """What must hold of the split cache once nothing runs, and whether it does."""
    checks = {
        f"pages of the host pool for K pages: {copies['pool_pages']} for {copies['k_pages']}": (
            copies["pool_pages"] == copies["k_pages"]
        )
    }
    if copies["has_hot_cache"]:
        stale, selected = copies["stale"], figures["selected_blocks"]
        names = ("hot_cache_hits", "hot_cache_misses", "direct_host_reads")
        looked_up = sum(figures[name] for name in names)
        checks[f"resident copies that are stale: {stale} of {copies['resident']}"] = not stale
        checks[f"V blocks looked up for those selected: {looked_up:.0f} for {selected:.0f}"] = (
            looked_up == selected
        )
    return checks


def expected_of(options: argparse.Namespace, sizes: Sizes, report: Report) -> list[dict[str, Any]]:
    """What stock vLLM says to each prompt; kept in the file of --expected, if named.

    Kept texts are taken only where all that decides them is the same: prompts, model, arguments,
    packages, environment, processor (tests/integration/stock_results.py) and GPU.
    """
    from tests.integration import stock_results
    from tests.integration.engines import run_engine, spec_of

    prompts = prompt_set(sizes)
    sampling = {"max_tokens": sizes.tokens, "ignore_eos": True, "logprobs": 5}
    batches = [{"prompts": prompts, "sampling": sampling}]
    engine = {**sizes.engine, "model": options.model, "dtype": "float32"}
    key = f"{device()} {stock_results.key_of(spec_of(batches, **engine))}"
    if options.expected and options.expected.exists():
        kept = json.loads(options.expected.read_text())
        if kept.get("key") == key:
            report.say(f"stock's texts are those of {options.expected}")
            return kept["rows"]
        report.say(f"{options.expected} is not of this model, set of prompts, vLLM and machine")
    report.wait_for(f"stock vLLM's {len(prompts)} texts ({seconds(sizes.stock_seconds)})")
    with tempfile.TemporaryDirectory() as folder:
        rows = run_engine(Path(folder), batches, **engine)["batches"][0]
    if options.expected:
        # Whole or not at all: runs side by side may share it.
        whole = options.expected.with_name(f"{options.expected.name}.{os.getpid()}")
        whole.write_text(json.dumps({"key": key, "rows": rows}))
        whole.replace(options.expected)
        report.say(f"stock's texts are kept in {options.expected}")
    return rows


def seconds(bounds: tuple[int, int]) -> str:
    """A time as it was measured before."""
    return f"{bounds[0]} to {bounds[1]} s"


def estimate(minutes: float, sizes: Sizes) -> str:
    """What a run takes in all."""
    parts = (sizes.stock_seconds, sizes.start_seconds, CHECK_SECONDS)
    least, most = (minutes + sum(part[i] for part in parts) / 60 for i in range(2))
    return (
        f"{minutes} minutes of load; the verdict after {least:.1f} to {most:.1f} minutes, with "
        f"stock's texts at hand {seconds(sizes.stock_seconds)} earlier"
    )


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


def main(arguments: list[str] | None = None) -> int:
    """Run it; the exit code."""
    import torch

    options = parse(arguments)
    for name, value in (
        ("HF_HUB_OFFLINE", "1"), ("VLLM_NO_USAGE_STATS", "1"), ("OMP_NUM_THREADS", "1"),
        ("VLLM_WORKER_MULTIPROC_METHOD", "spawn"),
    ):  # fmt: skip
        os.environ.setdefault(name, value)
    sizes = ON_GPU if torch.cuda.is_available() else ON_CPU
    report = Report()
    report.say(estimate(options.minutes, sizes))
    report.end_at_signals()
    try:
        expected = expected_of(options, sizes, report)
        asyncio.run(run_load(options, sizes, expected, report))
    except Stopped as stopped:
        return 128 + stopped.args[0]
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
