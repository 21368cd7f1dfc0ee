# SPDX-License-Identifier: Apache-2.0
"""How many drafts are accepted: stock vLLM beside settings of the split cache, the same prompts.

    python -m benchmarks.accuracy.acceptance MODEL
    python -m benchmarks.accuracy.acceptance MODEL --settings '{}' '{"k_bits": 16}' --length 4096

Prompts are passages of real text, half prose, half source code (texts.py); each engine goes on
greedily, drafts n-grams of what it has read and written, and verifies them. Each engine runs in a
process of its own. Passages run in groups, and vLLM's own figures are taken before and after each:
engines are compared group by group. A text that leaves stock's has other drafts, so a difference
says something only beside its standard error. One row for each engine goes to
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

DRAFTED = "vllm:spec_decode_num_draft_tokens"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"


def run(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """One engine over all groups; in the process of that engine.

    Returns:
        Of each group its `kind` of text, tokens `drafted` and `accepted`, and the texts, as ids.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(disable_log_stats=False, **spec["engine"])
    sampling = SamplingParams(
        temperature=0.0, max_tokens=spec["tokens"], ignore_eos=True, detokenize=False
    )
    groups, before = [], {DRAFTED: 0, ACCEPTED: 0}
    for group in spec["groups"]:
        prompts = [{"prompt_token_ids": prompt} for prompt in group["prompts"]]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        after = {m.name: m.value for m in llm.get_metrics() if m.name in before}
        groups.append(
            {
                "kind": group["kind"],
                "drafted": after[DRAFTED] - before[DRAFTED],
                "accepted": after[ACCEPTED] - before[ACCEPTED],
                "texts": [list(output.outputs[0].token_ids) for output in outputs],
            }
        )
        before = after
    return groups


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


def share(groups: list[dict[str, Any]]) -> float:
    """Accepted of drafted, all groups together. NaN where nothing was drafted."""
    drafted = sum(group["drafted"] for group in groups)
    return sum(group["accepted"] for group in groups) / drafted if drafted else float("nan")


def compared(ours: list[dict[str, Any]], stock: list[dict[str, Any]]) -> dict[str, Any]:
    """Acceptance of each kind of text and of all, beside stock's.

    Returns:
        By kind: `drafted`, `acceptance`, `stock`, their `difference` and its `error`, the standard
        error over groups (leaving out one at a time), and `same_texts`, the share of texts that
        are stock's to the last token.
    """

    def difference(kept: list[int]) -> float:
        return share([ours[i] for i in kept]) - share([stock[i] for i in kept])

    figures = {}
    for kind in ("all", *sorted({group["kind"] for group in ours})):
        kept = [i for i, group in enumerate(ours) if kind in ("all", group["kind"])]
        left = np.array([difference([j for j in kept if j != i]) for i in kept])
        pairs = [
            (a, b) for i in kept for a, b in zip(ours[i]["texts"], stock[i]["texts"], strict=True)
        ]
        figures[kind] = {
            "drafted": int(sum(ours[i]["drafted"] for i in kept)),
            "acceptance": share([ours[i] for i in kept]),
            "stock": share([stock[i] for i in kept]),
            "difference": difference(kept),
            "error": float(np.sqrt((len(left) - 1) * left.var())),
            "same_texts": sum(a == b for a, b in pairs) / len(pairs),
        }
    return figures


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; `settings` is a list of dicts."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.acceptance", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("model", help="folder of a Hugging Face model")
    parser.add_argument("--settings", nargs="+", metavar="JSON", help="kcache_config of each")
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
        # Reductions of the same shapes in both engines.
        "enable_prefix_caching": False,
        "speculative_config": {
            "method": "ngram", "num_speculative_tokens": options.drafts, "prompt_lookup_max": 4,
        },
        **options.engine,
    }  # fmt: skip
    stock = None
    for setting in (None, *options.settings):
        own = {}
        if setting is not None:
            own = (
                setting if is_stock(setting) else {"kv_backend": "kcache", "kcache_config": setting}
            )
        found = run_in_process(
            {"engine": {**engine, **own}, "tokens": options.tokens, "groups": groups}
        )
        stock = stock or found
        figures = compared(found, stock)
        row = {
            **environment(command()), "model": Path(options.model).name, "setting": setting,
            "length": options.length, "items": options.items, "tokens": options.tokens,
            "drafts": options.drafts, "dtype": options.dtype, "figures": figures,
        }  # fmt: skip
        append(options.results / "acceptance.jsonl", row)
        for kind, of_kind in figures.items():
            print(
                f"{json.dumps(setting) if setting is not None else 'stock'}, {kind}: "
                f"{of_kind['acceptance']:.4f} of {of_kind['drafted']} drafts, "
                f"{of_kind['difference']:+.4f} +- {of_kind['error']:.4f} beside stock, "
                f"{of_kind['same_texts']:.0%} of texts the same",
                flush=True,
            )


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith("spec.json"):
        Path(sys.argv[2]).write_text(json.dumps(run(json.loads(Path(sys.argv[1]).read_text()))))
    else:
        main()
