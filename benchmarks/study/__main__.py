# SPDX-License-Identifier: Apache-2.0
"""What does a rule of selection cost, and how many bytes? Outside the engine: plain PyTorch.

    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python -m benchmarks.study '{"level": 0.95}'
        '{"stop": "threshold", "combine": "max", "level": 0.002, "tail": "clip", "clip": 0.001}'

runs each rule (fields of `rules.Rule`) on every passage and appends a row for each to
results/selection_study.jsonl. Most of the time goes into the passages themselves. Method and
findings: docs/selection.md.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import RESULTS, ROOT, append, command, commit, date
from benchmarks.study.model import PASSAGES, Prefix, StudyModel, attend_exactly
from benchmarks.study.rules import Rule, RuleAttention

NUM_POSITIONS = 256


class Study:
    """Measures rules at one length of context.

    Args:
        model: whose attention goes by the rules.
        context: tokens of a passage.
    """

    def __init__(self, model: StudyModel, context: int) -> None:
        self.model = model
        self.context = context

    def run(self, rules: list[Rule], names: list[str]) -> list[list[dict[str, Any]]]:
        """Figures of each rule on each passage, one of which is in memory at a time."""
        found: list[list[dict[str, Any]]] = [[] for _ in rules]
        for name in names:
            prefix = self.model.make_prefix(name, self.context, NUM_POSITIONS)
            log_full = self.model.logits(prefix, attend_exactly).log_softmax(-1)
            for rule, passages in zip(rules, found, strict=True):
                passages.append(self.measure(rule, prefix, log_full))
                print(f"  {name:<10} {passages[-1]['kl']:.5f}  {rule}", flush=True)
        return found

    def measure(self, rule: Rule, prefix: Prefix, log_full: torch.Tensor) -> dict[str, Any]:
        """One rule on one passage: KL a token, change of log-likelihood, tokens."""
        attention = RuleAttention(rule)
        log_rule = self.model.logits(prefix, attention).log_softmax(-1)
        kl = (log_full.exp() * (log_full - log_rule)).sum(-1)
        following = prefix.tokens[-NUM_POSITIONS:, None]
        worse = log_full.gather(-1, following) - log_rule.gather(-1, following)
        layers = len(attention.tokens)
        return {
            "passage": prefix.name,
            "digest": prefix.digest,
            "kl": kl.mean().item(),
            "nats_worse": worse.mean().item(),
            "nats_full": -log_full.gather(-1, following).mean().item(),
            "tokens": sum(attention.tokens.values()) / layers,
            "fetched_tokens": sum(attention.fetched.values()) / layers,
            "dropped_mass": sum(attention.dropped.values()) / layers,
        }


def row_of(rule: Rule, context: int, passages: list[dict[str, Any]]) -> dict[str, Any]:
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


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("rules", nargs="+", type=json.loads, metavar="RULE", help="JSON object")
    parser.add_argument("--model", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--passages", nargs="+", choices=PASSAGES, default=list(PASSAGES))
    parser.add_argument("--label", default="", help="noted in the rows")
    parser.add_argument("--results", type=Path, default=RESULTS / "selection_study.jsonl")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    rules = [Rule(**fields) for fields in options.rules]
    common = {
        "study": "selection", "device": "CPU, float32", "torch": torch.__version__,
        "commit": commit(), "command": command(), "date": date(), "label": options.label,
    }  # fmt: skip
    study = Study(StudyModel(options.model), options.context)
    for rule, passages in zip(rules, study.run(rules, options.passages), strict=True):
        row = common | row_of(rule, options.context, passages)
        append(options.results, row)
        print(f"{row['tokens']:.0f} tokens a head, KL {row['kl']:.5f}  {rule}")


if __name__ == "__main__":
    main()
