# SPDX-License-Identifier: Apache-2.0
"""How many drafts are accepted: stock vLLM beside settings of the split cache, the same prompts.

    python -m benchmarks.accuracy.acceptance MODEL
    python -m benchmarks.accuracy.acceptance MODEL --settings '{}' '{"k_bits": 16}' --length 4096
    python -m benchmarks.accuracy.acceptance MODEL --settings '{"kv_cache_dtype": "fp8"}' \\
        '{"kv_cache_dtype": "auto", "dtype": "float32"}' '{}'

Prompts are passages of real text, half prose, half source code (texts.py); each engine goes on
greedily, drafts n-grams of what it has read and written, and verifies them. It does so twice:

- free: with its own text. One token that differs, and all that follows is another text, which may
  fall into a loop or not: of such a difference much is chance.
- along stock's text: a request is ended in the step in which it leaves stock's text, and goes on
  from there with stock's token. So every draft is made after a text that stock wrote, by vLLM's
  own proposer, and verified by the engine in a step like any other; what it keeps of the text in
  its cache, whole pages of it, is its own. Stock does this, too, and should find what it found.

A setting with `kv_cache_dtype` is stock vLLM with these arguments of `vllm.LLM`: with "auto" and
another dtype it tells what rounding alone does to either figure.

Each engine runs in a process of its own. Passages run in groups, and vLLM's own figures are taken
before and after each: engines are compared group by group. One row for each engine goes to
benchmarks/results/acceptance.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.settings import is_stock, parse_settings
from benchmarks.accuracy.sweep import ENVIRONMENT
from benchmarks.accuracy.texts import make_passages
from benchmarks.rows import RESULTS, ROOT, append, command, environment

COUNTERS = {
    "vllm:spec_decode_num_draft_tokens": "drafted",
    "vllm:spec_decode_num_accepted_tokens": "accepted",
}


class Follower:
    """Writes given texts again, greedily: where an engine leaves its text, the text's token stands.

    Args:
        engine: `vllm.LLMEngine`, in this process.
        page_tokens: tokens of a page of its prefix cache.
    """

    def __init__(self, engine: Any, page_tokens: int) -> None:
        self.engine = engine
        self.page_tokens = page_tokens

    def follow(self, prompts: list[list[int]], texts: list[list[int]]) -> dict[str, int]:
        """Until all texts are written.

        Args:
            prompts: token ids.
            texts: of each prompt, what follows it.

        Returns:
            `partings`: steps in which an engine left a text. `not_verified`: places after which
            no draft was verified, because the prompt's pass, which gives the first token of a
            request that goes on, did not give the text's.
        """
        at = [0] * len(prompts)
        counts = {"partings": 0, "not_verified": 0}
        asked: dict[str, int] = {}

        def ask(item: int) -> None:
            left = texts[item][at[item] :]
            if len(left) > 1:  # the first token comes from the prompt's pass, without a draft
                name = f"{item}-{at[item]}"
                asked[name] = item
                self._add(name, prompts[item] + texts[item][: at[item]], len(left))

        for item in range(len(prompts)):
            ask(item)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                item = asked[output.request_id]
                written, left = list(output.outputs[0].token_ids), texts[item][at[item] :]
                same = common(written, left)
                if same == len(written):
                    continue
                if not output.finished:
                    self.engine.abort_request([output.request_id])
                counts["partings" if same else "not_verified"] += 1
                at[item] += same or 1
                ask(item)
        return counts

    def _add(self, name: str, prompt: list[int], tokens: int) -> None:
        # With all but one token in the cache vLLM pads the pass to a step of drafts, and counts
        # the padding as drafts that were rejected: then nothing is read from the cache.
        padded = (len(prompt) - 1) % self.page_tokens == 0
        params = greedy(tokens, skip_reading_prefix_cache=padded)
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)


def common(text: list[int], other: list[int]) -> int:
    """Tokens until the first that differs, or until one of the texts ends."""
    length = min(len(text), len(other))
    return next((i for i in range(length) if text[i] != other[i]), length)


def greedy(tokens: int, **options: Any) -> Any:
    """Sampling parameters of so many greedy tokens."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, **options
    )


def run(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """One engine over all groups; in the process of that engine.

    Returns:
        Of each group its `kind` of text, the `texts` that it wrote, as ids, and the tokens
        `drafted` and `accepted`, `free` and `along` the texts of the specification, or its own
        where there are none; to the latter also what `Follower` counts.
    """
    from vllm import LLM

    llm = LLM(disable_log_stats=False, **spec["engine"])
    follower = Follower(llm.llm_engine, llm.llm_engine.vllm_config.cache_config.block_size)
    groups: list[dict[str, Any]] = []
    for number, group in enumerate(spec["groups"]):
        prompts = group["prompts"]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        before = drafts(llm)
        outputs = llm.generate(inputs, greedy(spec["tokens"]), use_tqdm=False)
        free = drafts(llm)
        texts = [list(output.outputs[0].token_ids) for output in outputs]
        counts = follower.follow(prompts, spec["texts"][number] if spec["texts"] else texts)
        after = drafts(llm)
        groups.append({
            "kind": group["kind"],
            "texts": texts,
            "free": {name: free[name] - before[name] for name in free},
            "along": {**{name: after[name] - free[name] for name in after}, **counts},
        })  # fmt: skip
    return groups


def drafts(llm: Any) -> dict[str, int]:
    """What vLLM counted until now: tokens `drafted` and `accepted`."""
    values = {metric.name: metric.value for metric in llm.get_metrics() if metric.name in COUNTERS}
    return {name: values.get(counter, 0) for counter, name in COUNTERS.items()}


def run_in_process(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """`run` in a fresh process.

    Raises:
        RuntimeError: the engine failed; the message ends with the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder) / "spec.json", Path(folder) / "groups.json"
        asked.write_text(json.dumps(spec))
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.accuracy.acceptance", str(asked), str(told)],
            cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the engine failed: {(done.stdout + done.stderr)[-3000:]}")
        return json.loads(told.read_text())


def share(counts: list[dict[str, int]]) -> float:
    """Accepted of drafted, all groups together. NaN where nothing was drafted."""
    drafted = sum(count["drafted"] for count in counts)
    return sum(count["accepted"] for count in counts) / drafted if drafted else float("nan")


def beside(ours: list[dict[str, int]], stock: list[dict[str, int]]) -> dict[str, Any]:
    """Two engines' counts, group by group.

    Returns:
        `acceptance`, `stock`'s, their `difference` and its `error`, the standard error over groups
        (leaving out one at a time). What ours counts besides is summed.
    """

    def difference(left_out: int | None = None) -> float:
        kept = [i for i in range(len(ours)) if i != left_out]
        return share([ours[i] for i in kept]) - share([stock[i] for i in kept])

    left = np.array([difference(i) for i in range(len(ours))])
    return {
        **{name: int(sum(c[name] for c in ours)) for name in ours[0] if name != "accepted"},
        "acceptance": share(ours),
        "stock": share(stock),
        "difference": difference(),
        "error": float(np.sqrt((len(left) - 1) * left.var())),
    }


def compared(ours: list[dict[str, Any]], stock: list[dict[str, Any]]) -> dict[str, Any]:
    """Acceptance of each kind of text and of all, beside stock's.

    Returns:
        By kind what `beside` gives of the free runs, the same `along` stock's text, and
        `same_texts`, the share of free texts that are stock's to the last token.
    """
    figures = {}
    for kind in ("all", *sorted({group["kind"] for group in ours})):
        kept = [i for i, group in enumerate(ours) if kind in ("all", group["kind"])]
        free, along = (
            beside([ours[i][way] for i in kept], [stock[i][way] for i in kept])
            for way in ("free", "along")
        )
        pairs = [
            (a, b) for i in kept for a, b in zip(ours[i]["texts"], stock[i]["texts"], strict=True)
        ]
        same = sum(a == b for a, b in pairs) / len(pairs)
        figures[kind] = {**free, "same_texts": same, "along": along}
    return figures


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; `settings` is a list of dicts."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.acceptance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder of a Hugging Face model")
    parser.add_argument(
        "--settings", nargs="+", metavar="JSON", help="kcache_config of each, or stock's arguments"
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens of each prompt")
    parser.add_argument("--items", type=int, default=128, help="passages, half prose, half code")
    parser.add_argument("--group", type=int, default=8, help="passages at once")
    parser.add_argument("--tokens", type=int, default=192, help="tokens that follow each prompt")
    parser.add_argument("--drafts", type=int, default=3, help="tokens drafted a step")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engine", type=json.loads, default={}, help="more of vllm.LLM, JSON")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    options.settings = parse_settings(options.settings) if options.settings else [{}]
    if options.items % (2 * options.group):
        parser.error(f"--items {options.items}: must be a multiple of {2 * options.group}, "
                     "for groups of one kind of text")  # fmt: skip
    return options


def groups_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The prompts of each group, all of one kind of text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    passages = make_passages(tokenizer, options.items, options.length, options.tokens)
    groups = []
    for kind in ("prose", "code"):
        prompts = [p.prompt(options.length) for p in passages if p.kind == kind]
        groups += [
            {"kind": kind, "prompts": prompts[i : i + options.group]}
            for i in range(0, len(prompts), options.group)
        ]
    return groups


def main() -> None:
    """Stock, then each setting; a row and a line for each."""
    options = parse()
    groups = groups_of(options)
    engine = {
        "model": str(options.model), "dtype": options.dtype, "seed": 0,
        "max_model_len": options.length + options.tokens + 8, "max_num_seqs": options.group,
        "enable_prefix_caching": True,
        "speculative_config": {
            "method": "ngram", "num_speculative_tokens": options.drafts, "prompt_lookup_max": 4,
        },
        **options.engine,
    }  # fmt: skip
    stock: list[dict[str, Any]] = []
    for setting in (None, *options.settings):
        own: dict[str, Any] = {}
        if setting is not None:
            own = (
                setting if is_stock(setting) else {"kv_backend": "kcache", "kcache_config": setting}
            )
        texts = [group["texts"] for group in stock]
        found = run_in_process({
            "engine": {**engine, **own}, "tokens": options.tokens, "groups": groups, "texts": texts,
        })  # fmt: skip
        stock = stock or found
        figures = compared(found, stock)
        row = {
            **environment(command()), "model": Path(options.model).name, "setting": setting,
            "length": options.length, "items": options.items, "tokens": options.tokens,
            "drafts": options.drafts, "dtype": options.dtype, "figures": figures,
        }  # fmt: skip
        append(options.results / "acceptance.jsonl", row)
        for line in lines(figures):
            print(f"{json.dumps(setting) if setting is not None else 'stock'}, {line}", flush=True)


def lines(figures: dict[str, Any]) -> list[str]:
    """For people: of each kind of text the free runs, and those along stock's text."""
    found = []
    for kind, free in figures.items():
        for way, figure in (("free", free), ("along stock's text", free["along"])):
            found.append(
                f"{kind}, {way}: {figure['acceptance']:.4f} of {figure['drafted']} drafts, "
                f"{figure['difference']:+.4f} +- {figure['error']:.4f} beside stock"
            )
        found[-2] += f", {free['same_texts']:.0%} of texts the same"
        found[-1] += f", left {free['along']['partings']} times"
    return found


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith("spec.json"):
        Path(sys.argv[2]).write_text(json.dumps(run(json.loads(Path(sys.argv[1]).read_text()))))
    else:
        main()
