# SPDX-License-Identifier: Apache-2.0
"""The gate for prompts with images: where they are causal, text is stock vLLM's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engines import GATE, Runs, in_forks, spec_of, tokens_of
from tests.integration.tiny_models import (
    write_gemma3_images,
    write_idefics3,
    write_qwen2_5_vl,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ENGINE = {
    "max_model_len": 512, "max_num_batched_tokens": 256,
    "limit_mm_per_prompt": {"image": 1, "video": 0},
}  # fmt: skip
K_BITS = (16, 4)


def run_images(spec: dict[str, Any]) -> dict[str, Any]:
    """As generate.run, of batches of (tokens, seed of an image or None); one image a prompt."""
    import numpy as np
    from PIL import Image
    from vllm import LLM, SamplingParams

    import vllm_kcache

    llm = LLM(disable_log_stats=False, **spec["engine"])
    sampling = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    batches = []
    for batch in spec["batches"]:
        prompts = []
        for tokens, seed in batch:
            prompt: dict[str, Any] = {"prompt_token_ids": tokens}
            if seed is not None:
                pixels = np.random.default_rng(seed).integers(0, 256, (280, 560, 3), np.uint8)
                prompt["multi_modal_data"] = {"image": Image.fromarray(pixels)}
            prompts.append(prompt)
        batches.append(
            [
                {
                    "tokens": [list(output.outputs[0].token_ids)],
                    "cached_tokens": output.num_cached_tokens,
                    "prompt_tokens": len(output.prompt_token_ids),
                }
                for output in llm.generate(prompts, sampling, use_tqdm=False)
            ]
        )
    result: dict[str, Any] = {"batches": batches}
    if "kv_backend" in spec["engine"]:
        result["kcache_metrics"] = vllm_kcache.metrics(llm)
    return result


def specs_of(model: str, batches: list[Any], **engine: Any) -> dict[str, list[Any]]:
    """Calls of `run_images` for stock vLLM and for each k_bits."""
    given = {**ENGINE, "model": model, **engine}
    specs = {"stock": spec_of(batches, **given)}
    specs |= {str(k): spec_of(batches, {**GATE, "k_bits": k}, **given) for k in K_BITS}
    return {
        name: ["tests.integration.test_images:run_images", spec] for name, spec in specs.items()
    }


@pytest.mark.parametrize(
    ("write", "before", "placeholder", "image"),
    [
        pytest.param(write_idefics3, 220, [257], 67, id="idefics3"),
        pytest.param(write_qwen2_5_vl, 150, [259, 257, 260], 202, id="qwen2_5_vl"),
    ],
)
def test_text_is_that_of_stock(
    tmp_path: Path, write: Any, before: int, placeholder: list[int], image: int
) -> None:
    """The image begins in the first chunk of 256 and ends in the second."""
    if write is write_qwen2_5_vl:
        pytest.importorskip("torchvision", reason="Transformers' processors of it import that")
    generator = random.Random(0)
    first = generator.choices(range(256), k=before)
    prompt = [*first, *placeholder, *generator.choices(range(256), k=60)]
    longer = [*prompt, 7, 8, 9]
    batches = [[(prompt, 1), (first, None)], [(longer, 1)], [(longer, 2)]]
    runs = Runs(in_forks(tmp_path, specs_of(write(tmp_path / "model"), batches)))
    stock = runs["stock"]
    texts = [row["tokens"][0] for batch in stock["batches"] for row in batch]
    assert len(set(map(tuple, texts))) == len(texts), "an image or a prompt changes nothing"
    assert all(len(set(text)) > 4 for text in texts), "a text repeats itself"
    for k in map(str, K_BITS):
        split = runs[k]
        assert tokens_of(split) == tokens_of(stock)
        assert split["kcache_metrics"]["decode_layer_steps"] > 0
        whole, same, other = (batch[0] for batch in split["batches"])
        assert whole["prompt_tokens"] == before + image + 60
        assert same["cached_tokens"] > before + image
        assert 0 < other["cached_tokens"] <= before + 1  # what stands before the image


def test_gemma_3_with_images_is_refused_and_without_is_stock(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="vLLM's model of Gemma 3 imports its processors")
    model = write_gemma3_images(tmp_path / "model")
    tokens = random.Random(0).choices(range(3, 500), k=300)
    batches = [[(tokens, None)], [([*tokens, 7, 8, 9], None)]]
    plain = {"limit_mm_per_prompt": {}, "skip_tokenizer_init": True}
    calls = specs_of(model, batches, **plain, language_model_only=True)
    refused = specs_of(model, batches, **plain)
    calls |= {f"{k}, images": refused[str(k)] for k in K_BITS}
    runs = Runs(in_forks(tmp_path, calls))
    texts = [batch[0]["tokens"][0] for batch in runs["stock"]["batches"]]
    assert len(set(texts[0])) > 4
    for k in map(str, K_BITS):
        assert runs.outcomes[f"{k}, images"]["code"] != 0
        assert "bidirectional attention among the tokens of an image (" in runs.error_of(
            f"{k}, images"
        )
        assert tokens_of(runs[k]) == tokens_of(runs["stock"])
        assert runs[k]["batches"][1][0]["cached_tokens"] > 200
