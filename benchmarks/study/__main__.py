# SPDX-License-Identifier: Apache-2.0
"""What does a rule of selection cost, and how many bytes? Outside the engine: plain transformers.

    HF_HUB_OFFLINE=1 python -m benchmarks.study --contexts 2048 4096 8000 --device cuda
    HF_HUB_OFFLINE=1 python -m benchmarks.study --model models/gemma-3-270m
        --contexts 4096 16384 32768 --passages isaiah jargon-c python-b --device cuda
    HF_HUB_OFFLINE=1 python -m benchmarks.study '{"level": 0.95}' '{"kv_cache_dtype": "fp8"}'
        '{"stop": "threshold", "combine": "max", "level": 0.002, "tail": "clip", "clip": 0.001}'
    python -m benchmarks.study --table

runs each rule (fields of `rules.Rule`, or of `rules.Stock`) on every passage of every context; with
no rule, those of `rules.compared`. A row for each rule and context goes to
results/selection_study.jsonl, and the table of the file's last commit is printed at the end;
--table prints it alone. Method and findings: docs/selection.md.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import RESULTS, ROOT, Row, append, command, commit, date, load
from benchmarks.study.model import PASSAGES, Prefix, StudyModel, attend_exactly
from benchmarks.study.rules import Rule, RuleAttention, Stock, compared
from benchmarks.study.table import table

NUM_POSITIONS = 256
# From this context on unless others are asked for.
LONG_CONTEXT = 8000
LONG_PASSAGES = ("isaiah", "jargon-c", "python-b")


class Study:
    """Measures rules at one length of context.

    Args:
        model: whose attention goes by the rules.
        context: tokens of a passage.
    """

    def __init__(self, model: StudyModel, context: int) -> None:
        self.model = model
        self.context = context

    def run(self, rules: list[Rule | Stock], names: list[str]) -> list[list[dict[str, Any]]]:
        """Figures of each rule on each passage, one of which is in memory at a time."""
        found: list[list[dict[str, Any]]] = [[] for _ in rules]
        for name in names:
            tokens = self.model.read_passage(name, self.context + 1)
            prefix = self.model.make_prefix(name, tokens, NUM_POSITIONS)
            log_full = self.model.logits(prefix, attend_exactly).log_softmax(-1)
            for rule, passages in zip(rules, found, strict=True):
                passages.append(self.measure(rule, prefix, log_full))
                kl, selected = passages[-1]["kl"], passages[-1]["tokens"]
                print(f"  {name:<10} {kl:.5f} {selected:6.0f}  {rule}", flush=True)
        return found

    def measure(self, rule: Rule | Stock, prefix: Prefix, log_full: torch.Tensor) -> dict[str, Any]:
        """One rule on one passage: KL a token, change of log-likelihood, tokens."""
        if isinstance(rule, Stock):
            logits = self.model.logits(prefix, attend_exactly, rule.store)
            seen = prefix.context - (prefix.num_positions - 1) / 2
            selection = {"tokens": seen, "fetched_tokens": 0.0, "dropped_mass": 0.0}
        else:
            attention = RuleAttention(rule, self.model.k_stats if rule.k_bits == 4 else ())
            logits = self.model.logits(prefix, attention)
            layers = len(attention.tokens)
            selection = {
                "tokens": sum(attention.tokens.values()) / layers,
                "fetched_tokens": sum(attention.fetched.values()) / layers,
                "dropped_mass": sum(attention.dropped.values()) / layers,
            }
        log_rule = logits.log_softmax(-1)
        kl = (log_full.exp() * (log_full - log_rule)).sum(-1)
        following = prefix.tokens[-prefix.num_positions :, None].to(log_full.device)
        worse = log_full.gather(-1, following) - log_rule.gather(-1, following)
        return {
            "passage": prefix.name,
            "digest": prefix.digest,
            "kl": kl.mean().item(),
            "nats_worse": worse.mean().item(),
            "nats_full": -log_full.gather(-1, following).mean().item(),
            **selection,
        }


def row_of(rule: Rule | Stock, context: int, passages: list[dict[str, Any]]) -> Row:
    """Means over the passages; errors are standard errors of them, NaN with one passage."""

    def mean_and_error(key: str) -> tuple[float, float]:
        values = torch.tensor([row[key] for row in passages], dtype=torch.float64)
        error = values.std() / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return values.mean().item(), float(error)

    worse, worse_error = mean_and_error("nats_worse")
    kl, kl_error = mean_and_error("kl")
    return {
        "context": context,
        "positions": NUM_POSITIONS,
        **{n: mean_and_error(n)[0] for n in ("tokens", "fetched_tokens", "dropped_mass")},
        "kl": kl,
        "kl_error": kl_error,
        "perplexity_percent": 100 * math.expm1(worse),
        "perplexity_error_percent": 100 * worse_error,
        "rule": asdict(rule),
        "passages": passages,
    }


def rule_of(text: str) -> Rule | Stock:
    """A rule of the command line, a JSON object."""
    fields = json.loads(text)
    return Stock(**fields) if "kv_cache_dtype" in fields else Rule(**fields)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rules", nargs="*", type=rule_of, metavar="RULE", help="JSON object")
    parser.add_argument("--model", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096])
    parser.add_argument(
        "--passages", nargs="+", choices=PASSAGES,
        help=f"(all below {LONG_CONTEXT} tokens, else {', '.join(LONG_PASSAGES)})",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--label", default="", help="noted in the rows")
    parser.add_argument("--results", type=Path, default=RESULTS / "selection_study.jsonl")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.table:
        measure(options)
    print(table(load(options.results)))


def measure(options: argparse.Namespace) -> None:
    """Run what the command line asks for and append its rows."""
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    model = StudyModel.load(options.model, options.device)
    on_gpu = model.device.type == "cuda"
    common = {
        "study": "selection", "model": options.model.name,
        "device": f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, float32",
        "torch": torch.__version__, "commit": commit(), "command": command(), "date": date(),
        "label": options.label,
    }  # fmt: skip
    rules = options.rules or compared()
    for context in options.contexts:
        print(f"{options.model.name}, {context} tokens", flush=True)
        names = options.passages or list(LONG_PASSAGES if context >= LONG_CONTEXT else PASSAGES)
        found = Study(model, context).run(rules, names)
        for rule, passages in zip(rules, found, strict=True):
            append(options.results, common | row_of(rule, context, passages))


if __name__ == "__main__":
    main()
