# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.reference.coded import slots_of
from tests.shapes import ODD_SHAPES, build_case
from vllm_kcache.reference.write import write_kv

WRITTEN = [shape for shape in ODD_SHAPES if sum(shape.seq_lens)]


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
    assert not pages.any()
