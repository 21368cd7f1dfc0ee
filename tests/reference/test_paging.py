# SPDX-License-Identifier: Apache-2.0
from hypothesis import given
from hypothesis import strategies as st

from vllm_kcache.reference import paging


@given(st.lists(st.integers(0, 40)), st.integers(1, 2 * paging.GROUP_ELEMENTS))
def test_groups_hold_each_request_once_and_are_bounded(sizes, element_cost):
    groups = list(paging.request_groups(sizes, element_cost))
    members = [request for first, last, _ in groups for request in range(first, last)]
    assert members == sorted(set(members))
    assert {request for request, size in enumerate(sizes) if size} <= set(members)
    for first, last, largest in groups:
        assert largest == max(sizes[first:last]) > 0
        bounded = (last - first) * largest * element_cost <= paging.GROUP_ELEMENTS
        assert bounded or last - first == 1
