# SPDX-License-Identifier: Apache-2.0
"""Which rule of selection costs least at equal bytes? A study outside the engine: plain PyTorch.

    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python -m benchmarks.selection_study

runs every rule on every passage and appends a row for each to results/selection_study.jsonl (about
80 minutes on one core, most of it the passages themselves; `--cache` keeps those). `--only` runs
the rules whose label holds a word. `python -m benchmarks.selection_table` prints the rows as
tables. Method and findings: docs/selection.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.origin import command, commit, date
from benchmarks.selection_model import (
    CALIBRATION,
    PASSAGES,
    Prefix,
    StudyModel,
    attend_exactly,
    fit_head_weights,
)
from benchmarks.selection_rules import Rule, RuleAttention

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/selection_study.jsonl"
NUM_POSITIONS = 256
LONG_PASSAGES = ("isaiah", "jargon-c", "python-b")
LONGEST = 8000  # the model ends at 8192


@dataclass(frozen=True)
class Case:
    """One row: a rule at one length of context."""

    label: str
    rule: Rule
    context: int = 4096

    @property
    def passages(self) -> list[str]:
        return list(LONG_PASSAGES if self.context == LONGEST else PASSAGES)


def clipped(level: float, share: float = 0.5, **fields: Any) -> Rule:
    """The threshold rule, the largest mass of the group, with the clipped tail."""
    own: dict[str, Any] = {"stop": "threshold", "combine": "max", "level": level}
    own |= {"tail": "clip", "clip": share * level}
    return Rule(**(own | fields))


def cases() -> list[Case]:
    """All rows, the most wanted first."""
    rows = [Case("coverage, mean", Rule(level=level)) for level in (0.9, 0.95, 0.97)]
    rows += [Case("threshold, clip", clipped(level)) for level in THRESHOLDS]
    rows += [Case("coverage, max", Rule(level=level, combine="max")) for level in (0.8, 0.9)]
    rows += stop_cases() + tail_cases() + other_cases()
    return rows + length_cases() + block_16_cases()


THRESHOLDS = (5e-3, 3e-3, 2e-3, 1.5e-3, 1e-3)


def stop_cases() -> list[Case]:
    """Other ways to stop, each with a tail that was already there and with the clipped one."""
    rows = []
    for level in (3e-3, 1.5e-3):
        plain = clipped(level, tail="renormalize")
        rows.append(Case("threshold, renormalize", plain))
        rows.append(Case("threshold mean, clip", clipped(level, combine="mean", clip=1.5e-3)))
    rows.append(Case("threshold rms, clip", clipped(2e-3, combine="rms", clip=1.5e-3)))
    for level in (0.9, 0.95):
        rows.append(Case("coverage, clip", Rule(level=level, tail="clip", clip=1.5e-3)))
        rows.append(Case("coverage of |v|", Rule(level=level, value="norm")))
        rows.append(Case("coverage of |v - mean|", Rule(level=level, value="centred")))
        rows.append(Case("coverage, head weights", Rule(level=level, weights="head")))
    for level in (0.1, 0.05):
        rows.append(Case("dropped |v|", Rule(stop="dropped", level=level, value="norm")))
        rows.append(Case("dropped, weights", Rule(stop="dropped", level=level, weights="head")))
    for level in (3e-4, 1e-4):
        marginal = clipped(level, stop="marginal", clip=1.5e-3)
        rows.append(Case("marginal, clip", marginal))
    return rows


def tail_cases() -> list[Case]:
    """What to do with the dropped mass, at one threshold and at one coverage."""
    threshold, coverage = clipped(3e-3), Rule(level=0.9)
    rows = [
        Case(f"{name}, {tail}", replace(rule, tail=tail))
        for name, rule in (("threshold", threshold), ("coverage", coverage))
        for tail in ("spread", "request", "page")
    ]
    rows.append(Case("threshold, sqrt", replace(threshold, tail="sqrt")))
    rows.append(Case("threshold, request alone", replace(threshold, tail="request", beta=1.0)))
    rows.append(Case("coverage, beyond_sink", replace(coverage, tail="beyond_sink")))
    rows.append(Case("coverage, drop", replace(coverage, tail="drop")))
    rows += [Case(f"threshold, clip x{share}", clipped(3e-3, share)) for share in (1.0, 0.25)]
    return rows


def other_cases() -> list[Case]:
    """Additions to the threshold with the clipped tail."""
    rows = [
        Case("threshold, clip, dense 1", clipped(3e-3, dense_layers=1)),
        Case("threshold, clip, dense 1", clipped(2e-3, dense_layers=1)),
        Case("threshold, clip, floor .7", clipped(3e-3, floor=0.7)),
    ]
    rows += [
        Case(f"threshold, clip, {name} weights", clipped(3e-3, weights=name))
        for name in ("head", "layer")
    ]
    rows += [
        Case(f"threshold, clip, {name}", clipped(3e-3, value=name)) for name in ("norm", "centred")
    ]
    rows += [
        Case("threshold, clip, hold .2", clipped(5e-3, 0.2, hold=0.2)),
        Case("threshold, clip, hold .2", clipped(7e-3, 0.2, hold=0.2)),
        Case("threshold, clip, hold .5", clipped(3e-3, 0.5, hold=0.5)),
    ]
    return rows


def length_cases() -> list[Case]:
    """The present rule and the new one at other lengths."""
    rows = []
    for context in (2048, LONGEST):
        rows += [Case("coverage, mean", Rule(level=level), context) for level in (0.9, 0.95, 0.97)]
        rows += [Case("threshold, clip", clipped(level), context) for level in THRESHOLDS]
        rows.append(Case("threshold, clip, dense 1", clipped(3e-3, dense_layers=1), context))
        rows.append(Case("threshold, clip, floor .7", clipped(3e-3, floor=0.7), context))
        rows.append(Case("threshold, clip, hold .2", clipped(5e-3, 0.2, hold=0.2), context))
    return rows


def block_16_cases() -> list[Case]:
    """Blocks of 16 tokens: twice the mass, so twice the threshold chooses as many tokens."""
    rows = [Case("coverage, mean", Rule(level=c, block_tokens=16)) for c in (0.9, 0.95, 0.97)]
    rows.append(Case("coverage, max", Rule(level=0.9, combine="max", block_tokens=16)))
    rows += [
        Case("threshold, clip", clipped(level, 0.25, block_tokens=16))
        for level in (1e-2, 5e-3, 3e-3)
    ]
    return rows


class Study:
    """Runs cases and writes rows. Prefixes and full attention's answers are made once."""

    def __init__(self, model: StudyModel, cache: Path | None, results: Path) -> None:
        self.model = model
        self.cache = cache
        self.results = results
        self.answers: dict[tuple[str, int], torch.Tensor] = {}
        self.common = {
            "study": "selection",
            "device": "CPU, float32",
            "torch": torch.__version__,
            "commit": commit(),
            "command": command(),
            "date": date(),
        }

    def prefix(self, name: str, context: int) -> Prefix:
        path = self.cache / f"{name}-{context}-{NUM_POSITIONS}.pt" if self.cache else None
        if path is not None and path.exists():
            return torch.load(path, weights_only=False)
        made = self.model.make_prefix(name, context, NUM_POSITIONS)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(made, path)
        return made

    def head_weights(self) -> torch.Tensor:
        """Fitted on the calibration passages, which no figure is reported on."""
        path = self.cache / "head_weights.pt" if self.cache else None
        if path is not None and path.exists():
            return torch.load(path)
        weights = fit_head_weights(self.model, [self.prefix(name, 4096) for name in CALIBRATION])
        if path is not None:
            torch.save(weights, path)
        return weights

    def run(self, chosen: list[Case]) -> None:
        """Passage by passage, so that one passage is in memory at a time."""
        fitted = any(case.rule.weights != "none" for case in chosen)
        weights = self.head_weights() if fitted else None
        found: dict[Case, list[dict[str, Any]]] = {case: [] for case in chosen}
        for context in sorted({case.context for case in chosen}):
            of_context = [case for case in chosen if case.context == context]
            for name in of_context[0].passages:
                prefix = self.prefix(name, context)
                log_full = self.model.logits(prefix, attend_exactly).log_softmax(-1)
                for case in of_context:
                    found[case].append(self.measure(case, prefix, log_full, weights))
            for case in of_context:
                self.write(case, found[case])

    def measure(
        self, case: Case, prefix: Prefix, log_full: torch.Tensor, weights: torch.Tensor | None
    ) -> dict[str, Any]:
        """One rule on one passage: per-token KL, change of log-likelihood, bytes."""
        started = time.perf_counter()
        attention = RuleAttention(case.rule, weights)
        log_rule = self.model.logits(prefix, attention).log_softmax(-1)
        kl = (log_full.exp() * (log_full - log_rule)).sum(-1)
        following = prefix.tokens[-NUM_POSITIONS:, None]
        worse = log_full.gather(-1, following) - log_rule.gather(-1, following)
        layers = len(attention.tokens)
        seconds = time.perf_counter() - started
        print(f"  {prefix.name:<10} {case.label:<28} {kl.mean():.5f}  {seconds:.1f} s", flush=True)
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

    def write(self, case: Case, found: list[dict[str, Any]]) -> None:
        def mean_and_error(key: str) -> tuple[float, float]:
            values = torch.tensor([row[key] for row in found], dtype=torch.float64)
            error = values.std() / math.sqrt(len(values)) if len(values) > 1 else math.nan
            return values.mean().item(), float(error)

        worse, worse_error = mean_and_error("nats_worse")
        kl, kl_error = mean_and_error("kl")
        row = {
            "label": case.label,
            "context": case.context,
            "positions": NUM_POSITIONS,
            "tokens": mean_and_error("tokens")[0],
            "fetched_tokens": mean_and_error("fetched_tokens")[0],
            "dropped_mass": mean_and_error("dropped_mass")[0],
            "kl": kl,
            "kl_error": kl_error,
            "perplexity_percent": 100 * math.expm1(worse),
            "perplexity_error_percent": 100 * worse_error,
            "rule": asdict(case.rule),
            "passages": found,
        }
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with self.results.open("a") as file:
            file.write(json.dumps(self.common | row) + "\n")
        print(f"{case.label} {case.rule.level:g}: {row['tokens']:.0f} tokens, KL {kl:.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, help="folder that keeps prefixes, 190 MB each at 4K")
    parser.add_argument("--only", help="only the cases whose label holds this")
    parser.add_argument("--context", type=int, help="only the cases of this length")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    chosen = [
        case
        for case in cases()
        if (options.only or "") in case.label and options.context in (None, case.context)
    ]
    if not chosen:
        parser.error("no case is left")
    Study(StudyModel(options.model), options.cache, options.results).run(chosen)


if __name__ == "__main__":
    main()
