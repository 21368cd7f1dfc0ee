# SPDX-License-Identifier: Apache-2.0
"""Record what a real model attends while it decodes real text, for benchmarks/replay/replay.py.

    python -m benchmarks.replay.record models/SmolLM2-135M-Instruct

Runs on the CPU. Each text is read to `--context` tokens; then the text itself is forced, one token
a step, through the decode path of the split cache with everything selected, that is under full
attention. Of each step, layer and KV head the softmax mass of every V block of 8 tokens is kept, as
selection sees it: exact scores, normalised for each query head. There are two recordings: of the
mean over the heads that share the KV head, which a coverage with `head_combine="sum"` goes by, and
of each query head, for a mass threshold.

What is lost: a mass is rounded to a twelfth of an octave (at most 3%), and one below 2^-21 is gone,
for query heads one below 2^-12; there the first block, which is always selected, gets what is
missing. Ranks stay, but masses that round to one code tie, and the lower block wins. The program
prints the length and repeats of the lists before and after.
"""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rows import ROOT
from vllm_kcache import split_cache
from vllm_kcache.reference.select import select_blocks
from vllm_kcache.types import HeadCombine, Selection

# For rules that combine query heads by their mean, and for rules that look at each.
RECORDINGS: dict[HeadCombine, Path] = {
    "sum": ROOT / "benchmarks/data/selection.npz",
    "max": ROOT / "benchmarks/data/selection_by_head.npz",
}
V_BLOCK_TOKENS = 8
# A code c of 1 to 255 is the mass 2^((c - 255) / OCTAVE_CODES); 0 is less than the least of these.
OCTAVE_CODES = 12
LARGEST_CODE = 255
# Of query heads, smaller masses are not kept: no threshold in question is as low.
LEAST_OF_HEAD = 2.0**-12
# "top_n all": what is recorded must not depend on a setting of the selection.
KCACHE_CONFIG = {"top_n": "all", "v_block_tokens": V_BLOCK_TOKENS}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def encode_mass(mass: torch.Tensor) -> torch.Tensor:
    """Codes (uint8) of masses in 0..1, any shape."""
    octaves = mass.double().clamp_min(1e-30).log2()
    return (LARGEST_CODE + OCTAVE_CODES * octaves).round().clamp(0, LARGEST_CODE).to(torch.uint8)


def decode_mass(codes: torch.Tensor) -> torch.Tensor:
    """Masses (float32) of codes; 0 for code 0."""
    octaves = (codes.float() - LARGEST_CODE) / OCTAVE_CODES
    return torch.where(codes > 0, octaves.exp2(), 0.0)


@dataclass(frozen=True)
class Recording:
    """The masses of one model's V blocks over consecutive decode steps.

    Attributes:
        codes: [texts, layers, Hkv * group, steps, P] uint8, host. See `decode_mass`; 0 past the
            length.
        seq_lens: [steps] int32, host. Tokens of each step, the current one included.
        texts: what was decoded, one name each.
        model: whose masses these are.
        v_block_tokens: T.
        group: query heads of a KV head that were recorded; 1 is their mean.
    """

    codes: torch.Tensor
    seq_lens: torch.Tensor
    texts: tuple[str, ...]
    model: str
    v_block_tokens: int
    group: int = 1

    @property
    def num_blocks(self) -> torch.Tensor:
        """[steps] int32: V blocks of each step."""
        return (self.seq_lens + self.v_block_tokens - 1) // self.v_block_tokens

    def check_context(self, tokens: int) -> None:
        """Raises ValueError: a request of so many tokens has no place for every recorded block."""
        if tokens < self.shortest_tokens:
            raise ValueError(
                f"replay needs requests of at least {self.shortest_tokens} tokens, as many as were "
                f"recorded; here {tokens}"
            )

    @property
    def shortest_tokens(self) -> int:
        """A request must be at least this long for every recorded block to have a place."""
        return int(self.seq_lens[-1]) + self.v_block_tokens

    def save(self, path: Path) -> None:
        """Write an .npz. Codes lie there as differences from the step before, which pack better."""
        codes = self.codes.numpy()
        differences = np.diff(codes, axis=3, prepend=np.zeros_like(codes[:, :, :, :1]))
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            path,
            # A block's steps side by side pack better still.
            differences=np.ascontiguousarray(differences.swapaxes(3, 4)),
            seq_lens=self.seq_lens.numpy(),
            texts=np.array(self.texts),
            model=np.array(self.model),
            v_block_tokens=np.array(self.v_block_tokens),
            group=np.array(self.group),
        )

    @classmethod
    def load(cls, path: Path = RECORDINGS["sum"]) -> Recording:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the parts of the file do not fit together.
        """
        with np.load(path) as file:
            # Contiguous: kernels index it flat.
            codes = np.ascontiguousarray(
                np.cumsum(file["differences"].swapaxes(3, 4), axis=3, dtype=np.uint8)
            )
            recording = cls(
                torch.from_numpy(codes),
                torch.from_numpy(file["seq_lens"]),
                tuple(map(str, file["texts"])),
                str(file["model"]),
                int(file["v_block_tokens"]),
                int(file["group"]) if "group" in file else 1,
            )
        texts, steps, blocks = (codes.shape[axis] for axis in (0, 3, 4))
        lengths = recording.seq_lens
        if (texts, steps) != (len(recording.texts), len(lengths)) or steps < 2:
            raise ValueError(
                f"{path}: codes {list(codes.shape)} beside {len(recording.texts)} texts and "
                f"{len(lengths)} steps; needs [texts, layers, heads, steps, blocks], steps >= 2"
            )
        if codes.shape[2] % recording.group:
            raise ValueError(f"{path}: {codes.shape[2]} heads are not groups of {recording.group}")
        if blocks != int(recording.num_blocks[-1]) or not bool((lengths.diff() == 1).all()):
            raise ValueError(
                f"{path}: {blocks} blocks for lengths {lengths[0]} to {lengths[-1]}; lengths must "
                f"grow by 1 and the last needs {int(recording.num_blocks[-1])} blocks"
            )
        return recording


# Statistics ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """Means over layers, KV heads and steps.

    Attributes:
        tokens: selected tokens of a list.
        in_previous, in_last_8: share of a list that was in that of the step before, or in one of
            the 8 before.
    """

    tokens: float
    in_previous: float
    in_last_8: float


def selected_blocks(
    masses: torch.Tensor,
    seq_lens: torch.Tensor,
    selection: Selection,
    v_block_tokens: int,
    group: int = 1,
) -> torch.Tensor:
    """Which blocks are selected: [lists, steps, P] bool, from masses [lists * group, steps, P]."""
    masses = masses.unflatten(0, (-1, group))
    num_lists, _, num_steps, num_blocks = masses.shape
    chosen = torch.zeros((num_lists, num_steps, num_blocks + 1), dtype=torch.bool)
    for step in range(num_steps):
        lse = masses[:, :, step].log()
        lengths = seq_lens[step].expand(num_lists).to(torch.int32)
        selected = select_blocks(lse, lengths, 1, v_block_tokens, selection)
        # Padding goes to a column that is cut off.
        blocks = selected.blocks[:, 0].long()
        chosen[:, step].scatter_(1, torch.where(blocks < 0, num_blocks, blocks), True)
    return chosen[..., :-1]


def statistics(chosen: torch.Tensor, v_block_tokens: int) -> Statistics:
    """Lengths and repeats of lists [lists, steps, P]; repeats from the ninth step on."""
    counts = chosen.sum(-1)
    shares = []
    for reach in (1, 8):
        seen = torch.zeros_like(chosen[:, 8:])
        for back in range(1, reach + 1):
            seen |= chosen[:, 8 - back : chosen.shape[1] - back]
        repeated = (chosen[:, 8:] & seen).sum(-1)
        shares.append(float((repeated / counts[:, 8:]).mean()))
    return Statistics(float(counts.float().mean()) * v_block_tokens, *shares)


def rules_of(combine: HeadCombine) -> dict[str, Selection]:
    """The rules whose lists are printed."""
    if combine == "max":
        return {f"threshold {m}": Selection(None, None, 1, 32, "max", m) for m in (0.002, 0.003)}
    return {f"coverage {c}": Selection(None, c, 1, 32, "sum") for c in (0.95, 0.97)}


def print_statistics(
    name: str, masses: torch.Tensor, seq_lens: torch.Tensor, combine: HeadCombine, group: int
) -> None:
    """One line for each rule: masses [layers, Hkv * group, steps, P] of one text."""
    for rule, selection in rules_of(combine).items():
        chosen = selected_blocks(masses.flatten(0, 1), seq_lens, selection, V_BLOCK_TOKENS, group)
        found = statistics(chosen, V_BLOCK_TOKENS)
        print(
            f"{name:24s} {rule:15s}: {found.tokens:6.1f} tokens a head, "
            f"{found.in_previous:.3f} in the step before, {found.in_last_8:.3f} in the last 8",
            flush=True,
        )


# Recording -----------------------------------------------------------------------------------


class ScoreRecorder:
    """Stands in for the `score_blocks` of the CPU engine and keeps the masses of what it returns.

    Args:
        score: the operation itself.
        num_kv_heads: KV heads that the query heads share.
    """

    def __init__(self, score: Callable[..., torch.Tensor], num_kv_heads: int) -> None:
        self.score = score
        self.num_kv_heads = num_kv_heads
        self.masses: list[torch.Tensor] = []
        self.seq_lens: list[int] = []

    def __call__(self, *arguments: Any, **named: Any) -> torch.Tensor:
        block_lse = self.score(*arguments, **named)
        query, _, _, seq_lens = arguments[:4]
        if query.shape[0] != 1:
            raise RuntimeError(f"{query.shape[0]} requests decode at once: expected 1")
        by_head = block_lse[0].float().softmax(-1).unflatten(0, (self.num_kv_heads, -1))
        self.masses.append(by_head)
        self.seq_lens.append(int(seq_lens[0]))
        return block_lse

    def take(self, num_layers: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Masses [layers, Hkv, G, steps, P], lengths [steps] of the calls so far; forget them."""
        num_steps, rest = divmod(len(self.masses), num_layers)
        lengths = torch.tensor(self.seq_lens, dtype=torch.int32).view(num_steps, -1)
        if rest or not bool((lengths == lengths[:, :1]).all()):
            raise RuntimeError(f"{len(self.masses)} scored layers are not steps of {num_layers}")
        most = self.masses[-1].shape[2]
        padded = [torch.nn.functional.pad(mass, (0, most - mass.shape[2])) for mass in self.masses]
        masses = torch.stack(padded).unflatten(0, (num_steps, num_layers)).permute(1, 2, 3, 0, 4)
        self.masses, self.seq_lens = [], []
        return masses, lengths[:, 0]


def without_small(masses: torch.Tensor) -> torch.Tensor:
    """Masses [..., P] of query heads, the small ones added to the first block's."""
    kept = torch.where(masses < LEAST_OF_HEAD, 0.0, masses)
    return torch.cat([1 - kept[..., 1:].sum(-1, keepdim=True), kept[..., 1:]], -1)


def real_texts() -> dict[str, str]:
    """Prose and program text: Genesis in the King James Bible, and Python's argparse module."""
    return {
        "king-james-bible": " ".join((ROOT / "tests/data/kjv.txt").read_text().splitlines()),
        "python-argparse": inspect.getsource(argparse),
    }


def record(model: str, context: int, steps: int) -> dict[HeadCombine, Recording]:
    """Decode `steps` tokens of each text behind `context` tokens of it, in this process."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(model)
    llm = LLM(
        model,
        dtype="float32",
        max_model_len=context + steps + 1,
        max_num_batched_tokens=1024,
        block_size=32,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_backend="kcache",
        kcache_config=KCACHE_CONFIG,
        logits_processors=["tests.integration.forcing:ForceTokens"],
    )
    (shape,) = llm.collective_rpc(lambda worker: worker.split_cache.shape)
    recorder = ScoreRecorder(split_cache.score_blocks, shape.num_kv_heads)
    split_cache.score_blocks = recorder  # type: ignore[assignment]  # looked up at each call
    texts = real_texts()
    codes: dict[HeadCombine, list[torch.Tensor]] = {"sum": [], "max": []}
    for name, text in texts.items():
        # The first token after the prompt comes from the prefill: one more than there are steps.
        enough = text[: 8 * (context + steps)]  # a token has some 4 characters
        tokens = tokenizer(enough).input_ids[: context + steps + 1]
        if len(tokens) <= context + steps:
            raise ValueError(f"{name}: {len(tokens)} tokens; needs {context + steps + 1}")
        sampling = SamplingParams(
            max_tokens=steps + 1,
            ignore_eos=True,
            temperature=0.0,
            extra_args={"forced_tokens": tokens[context:]},
        )
        (output,) = llm.generate({"prompt_token_ids": tokens[:context]}, sampling, use_tqdm=False)
        if list(output.outputs[0].token_ids) != tokens[context:]:
            raise RuntimeError(f"{name}: the engine did not decode the text")
        masses, seq_lens = recorder.take(shape.num_layers)
        if masses.shape[3] != steps:
            raise RuntimeError(f"{name}: {masses.shape[3]} steps were scored, not {steps}")
        for combine, exact, kept in (
            ("sum", masses.mean(2), masses.mean(2)),
            ("max", masses.flatten(1, 2), without_small(masses).flatten(1, 2)),
        ):
            group = exact.shape[1] // masses.shape[1]
            print_statistics(f"{name}, exact", exact, seq_lens, combine, group)
            codes[combine].append(encode_mass(kept))
            stored = decode_mass(codes[combine][-1])
            print_statistics(f"{name}, stored", stored, seq_lens, combine, group)
    split_cache.score_blocks = recorder.score  # type: ignore[assignment]
    about = (seq_lens, tuple(texts), Path(model).name, V_BLOCK_TOKENS)
    return {
        combine: Recording(torch.stack(parts), *about, parts[0].shape[1] // shape.num_kv_heads)
        for combine, parts in codes.items()
    }


def main() -> None:
    """Record, save, and say how large the file is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--context", type=int, default=4096, help="tokens before the first step")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=RECORDINGS["sum"].parent)
    options = parser.parse_args()
    if options.steps < 9:
        parser.error(f"--steps {options.steps}: needs at least 9, to tell what repeats")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for combine, recording in record(options.model, options.context, options.steps).items():
        path = options.folder / RECORDINGS[combine].name
        recording.save(path)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
