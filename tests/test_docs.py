# SPDX-License-Identifier: Apache-2.0
"""The documentation against the code: settings, refusals, metrics, commands, links."""

from __future__ import annotations

import importlib.util
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_kcache.config import KCacheConfig
from vllm_kcache.integration import counters, refusals

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def cells_of(line: str) -> list[str]:
    """Cells of a row of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def settings_rows(page: Path) -> dict[str, list[str]]:
    """Rows of the table that begins with the column "key", by key."""
    lines = page.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| key |"))
    rows = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        cells = cells_of(line)
        rows[re.findall(r"`(\w+)`", cells[0])[0]] = cells
    return rows


@pytest.mark.parametrize(
    "page", [DOCS / "configuration.md", ROOT / "README.md"], ids=lambda p: p.name
)
def test_every_setting_has_a_row(page: Path) -> None:
    assert set(settings_rows(page)) == set(KCacheConfig.model_fields)


def test_every_default_is_named() -> None:
    for key, cells in settings_rows(DOCS / "configuration.md").items():
        default = json.dumps(KCacheConfig.model_fields[key].default)
        assert cells[1] == f"`{default}`", key


def test_every_refusal_is_named() -> None:
    """In the first column of a table of limits.md: the feature without its value."""
    text = (DOCS / "limits.md").read_text().splitlines()
    features = "\n".join(cells_of(line)[0] for line in text if line.startswith("|"))
    for refusal in refusals.REFUSALS:
        name = re.sub(r" \(.*\)|=?\{value\} ?", "", refusal.feature)
        assert name.lower() in features.lower(), f"limits.md does not name {name!r}"


def test_every_metric_is_named() -> None:
    text = (DOCS / "metrics.md").read_text()
    for name in (*counters.SCALARS, "mean_selected_blocks", "dropped_mass", "estimate_error"):
        assert f"`{name}`" in text, f"metrics.md does not name {name}"


def words_after(page: Path, command: str) -> set[str]:
    """What the page writes after a command, in code."""
    text = page.read_text()
    code = re.findall(r"`[^`\n]+`|^    .*$", text, flags=re.MULTILINE)
    code += re.findall(r"^```.*?^```", text, flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(rf"(?:^|[\s`]){command} ([\w./-]+)", "\n".join(code), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert words_after(page, "make") <= set(targets)
    for module in words_after(page, "python3? -m"):
        if module.startswith(("benchmarks.", "tests.")):
            assert importlib.util.find_spec(module), f"{page.name}: there is no {module}"
    for script in words_after(page, "python3?"):
        if script.endswith(".py"):
            assert (ROOT / script).is_file(), f"{page.name}: there is no {script}"


def without_code(text: str) -> str:
    """Markdown without fenced and indented blocks and code spans, which may look like links."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors_of(page: Path) -> set[str]:
    """Anchors of a page's headings, as Python-Markdown makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE):
        plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def links_of(page: Path) -> Iterator[str]:
    """Targets of the links and images of a page that lie in the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if not re.match(r"[a-z]+:", target):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links_of(page):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.is_file(), f"{page.name}: {target} does not exist"
        if page.parent == DOCS:
            # The site holds what lies in docs/ only.
            assert DOCS in file.resolve().parents, f"{page.name}: {target} lies outside docs/"
        if anchor:
            assert anchor in anchors_of(file), f"{page.name}: {target} has no such heading"


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"^ +- (?:.*: )?([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == [page.name for page in PAGES if page.parent == DOCS]
