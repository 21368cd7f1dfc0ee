# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.conftest import assert_close
from tests.shapes import ODD_SHAPES, Shape, build_case
from vllm_kcache.reference.write import update_page_means, write_kv

WRITTEN = [shape for shape in ODD_SHAPES if sum(shape.seq_lens)]


def slots_of(case) -> torch.Tensor:
    """Slot of each token of each request, one request after the other."""
    page_tokens = case.shape.page_tokens
    slots = [
        int(case.block_table[request, token // page_tokens]) * page_tokens + token % page_tokens
        for request, tokens in enumerate(case.shape.seq_lens)
        for token in range(tokens)
    ]
    return torch.tensor(slots)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("shape", WRITTEN, ids=str)
def test_fills_the_pages_of_the_case_and_nothing_else(shape, strided):
    case = build_case(shape, strided=strided)
    k_pages = torch.full_like(case.k_pages, torch.nan)
    if strided:
        k_pages = torch.full((k_pages.shape[0], 2, *k_pages.shape[1:]), torch.nan)[:, 0]
    v_pool = torch.full_like(case.v_pool, torch.nan)
    write_kv(torch.cat(case.keys), torch.cat(case.values), slots_of(case), k_pages, v_pool)
    assert torch.equal(k_pages.nan_to_num(99.0), case.k_pages.nan_to_num(99.0))
    assert torch.equal(v_pool.nan_to_num(99.0), case.v_pool.nan_to_num(99.0))


@pytest.mark.parametrize("slot_dtype", [torch.int64, torch.int32])
def test_padding_is_not_stored_and_strided_tokens_are(slot_dtype):
    pages = torch.zeros(2, 2, 4, 3)
    v_pool = torch.zeros(2, 2, 4, 3)
    qkv = torch.randn(3, 6, 3)
    slots = torch.tensor([5, -1, 2], dtype=slot_dtype)
    write_kv(qkv[:, 2:4], qkv[:, 4:6], slots, pages, v_pool)
    assert torch.equal(pages[1, :, 1], qkv[0, 2:4])
    assert torch.equal(v_pool[0, :, 2], qkv[2, 4:6])
    assert int((pages != 0).sum()) == int((v_pool != 0).sum()) == 2 * 2 * 3


def test_nothing_to_write():
    pages, v_pool = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)
    empty = torch.zeros(0, 1, 2)
    write_kv(empty, empty, torch.zeros(0, dtype=torch.int64), pages, v_pool)
    update_page_means(v_pool, torch.full((3,), -1), means := torch.full((1, 1, 2), 7.0))
    assert not pages.any()
    assert bool((means == 7.0).all())


def test_no_hot_cache_on_the_cpu():
    pages = torch.zeros(1, 1, 4, 2)
    empty = torch.zeros(0, 1, 2)
    with pytest.raises(ValueError, match="hot_cache: the CPU has no hot V cache; accepted: None"):
        write_kv(empty, empty, torch.zeros(0, dtype=torch.int64), pages, pages, hot_cache=object())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", WRITTEN, ids=str)
def test_page_means_of_whole_prompts(shape, dtype):
    case = build_case(shape, dtype)
    means = torch.full_like(case.v_page_means, torch.nan)
    update_page_means(case.v_pool, slots_of(case), means)
    assert torch.equal(means.isnan(), case.v_page_means.isnan())
    assert_close(means.nan_to_num(0.0), case.v_page_means.nan_to_num(0.0))


def test_page_means_token_by_token_follow_the_filled_part():
    case = build_case(Shape((21,), 2, 1, 64, 16, 8))
    v_pool = torch.full_like(case.v_pool, torch.nan)
    means = torch.full_like(case.v_page_means, torch.nan)
    for token, slot in enumerate(slots_of(case)):
        page, offset = divmod(int(slot), 16)
        v_pool[page, :, offset] = case.values[0][token]
        update_page_means(v_pool, slot[None], means)
        assert_close(means[page], case.values[0][token - offset : token + 1].mean(0))


def test_page_means_of_a_reused_page_forget_the_tokens_before():
    v_pool = torch.randn(1, 2, 16, 8)
    means = torch.full((1, 2, 8), torch.nan)
    update_page_means(v_pool, torch.arange(3), means)
    assert_close(means[0], v_pool[0, :, :3].mean(1))
