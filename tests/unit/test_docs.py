"""The documentation: links, cited sections, named modules and imports exist."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SOURCES = sorted((ROOT / "rayfed_lora").rglob("*.py"))
# `docs/method.md`, then maybe the titles of sections in it: `, "A"` or `, "A" and "B"`.
CITATION = re.compile(r'docs/(\w+\.md)((?:,? (?:and )?"[^"]+")*)')


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def titles(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's titles."""
    return {
        re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles(page)
    }


def citations(text: str) -> list[tuple[str, list[str]]]:
    """Return the pages that a source cites, and of each the titles."""
    return [
        (page, re.findall(r'"([^"]+)"', cited))
        for page, cited in CITATION.findall(" ".join(text.split()))
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_of_a_page_leads_to_a_file_and_a_title(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_citations_of_a_text_are_found() -> None:
    text = 'x (docs/method.md, "Stages" and\n"Resizing the rank"), docs/design.md.'
    assert citations(text) == [
        ("method.md", ["Stages", "Resizing the rank"]),
        ("design.md", []),
    ]


def test_every_section_that_a_source_cites_exists() -> None:
    found = [
        (source, page, cited) for source in SOURCES for page, cited in citations(source.read_text())
    ]
    assert {page for _, page, _ in found} >= {"method.md", "design.md"}
    for source, page, cited in found:
        missing = set(cited) - set(titles(ROOT / "docs" / page))
        assert not missing, f"{source.relative_to(ROOT)} cites {sorted(missing)} of docs/{page}"


def test_every_cited_page_is_named_by_its_path_in_the_project() -> None:
    bare = re.compile(r"(?<![\w/])(?:method|design|glossary|reference)\.md")
    assert [str(source) for source in SOURCES if bare.search(source.read_text())] == []


def test_every_module_that_the_glossary_names_exists() -> None:
    rows = re.findall(r"^\|.+\| ([^|]+) \|$", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert len(named) > 50
    for name in named:
        path, _, attribute = name.rpartition(".")
        if attribute[:1].isupper():
            source = (ROOT / "rayfed_lora" / f"{path.replace('.', '/')}.py").read_text()
            assert f"class {attribute}" in source, name
        else:
            place = ROOT / "rayfed_lora" / name.replace(".", "/")
            assert place.is_dir() or place.with_suffix(".py").exists(), name


def test_the_imports_of_python_examples_resolve() -> None:
    examples = [
        block
        for page in PAGES
        for block in re.findall(
            r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE
        )
    ]
    assert examples
    for node in (node for example in examples for node in ast.walk(ast.parse(example))):
        if isinstance(node, ast.ImportFrom):
            module = import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
