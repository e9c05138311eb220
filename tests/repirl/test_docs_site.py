"""The site of docs/: it builds strictly, and a page loads nothing from elsewhere."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from shared import ROOT

if importlib.util.find_spec("material") is None:
    pytest.skip("mkdocs is not installed; make docs", allow_module_level=True)

LOADED = re.compile(r'<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)="([^"]+)"')


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built without any network: warnings, of links above all, are errors."""
    folder = tmp_path_factory.mktemp("site")
    # Whoever asks a proxy that is not there gets an error, not a page.
    environment = os.environ | {
        "NO_MKDOCS_2_WARNING": "1",
        **dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9"),
    }
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_pages_from_outside_docs_are_part_of_it(site):
    for page in ("index", "kernels/index", "bench/index", "bench/results/cpu/study", "CONTRIBUTING", "readme"):
        assert (site / f"{page}.html").is_file(), page
    assert (site / "examples" / "tour.sh").is_file()


def test_no_page_loads_anything_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        for target in LOADED.findall(page.read_text(encoding="utf-8")):
            assert not target.startswith(("http:", "https:", "//")), (page, target)


def test_a_link_that_leads_nowhere_is_an_error(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A page\n\n[nowhere](nothing.md)\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: one\nplugins: []\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert built.returncode != 0
    assert "nothing.md" in built.stderr
