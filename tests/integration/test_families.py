# SPDX-License-Identifier: Apache-2.0
"""docs/models.md: what it says of each family is what a run of today says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration import families


def test_the_page_is_that_of_the_last_run() -> None:
    """Run `python -m tests.integration.families` where this fails."""
    results, page = families.read_results(), families.PAGE.read_text()
    keys = {name: row["key"] for name, row in results["families"].items()}
    assert keys == {name: family.key for name, family in families.FAMILIES.items()}
    assert page == families.with_tables(page, results)
    answers = [row[k] for row in results["families"].values() for k in families.K_BITS]
    assert answers.count(families.EQUAL) > len(answers) / 2


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_family(name: str, tmp_path: Path) -> None:
    assert families.run(name, tmp_path) == families.read_results()["families"][name]
