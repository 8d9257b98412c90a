"""The documentation in a browser: it fits a screen and a phone, and its links and pictures are there."""

import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest
from browser import opened

pytestmark = [pytest.mark.slow, pytest.mark.processes]

for needed in ("sphinx", "furo", "myst_parser", "sphinx_design", "sphinx_copybutton", "matplotlib", "sklearn", "jax"):
    pytest.importorskip(needed)
pytest.importorskip("torch")

DOCS = Path(__file__).parents[1] / "docs"
SCREEN, PHONE = 1400, 400
MISFITS = """phone => {
    const wide = element => element.scrollWidth > element.clientWidth + 1;
    const found = wide(document.documentElement) ? ["the page"] : [];
    for (const element of document.querySelectorAll("article *")) {
        const drawing = phone && element.matches(".highlight-text pre");
        const overflow = getComputedStyle(element).overflowX;
        if (wide(element) && overflow != "visible" && !(drawing && overflow == "auto"))
            found.push(`${element.localName} "${element.textContent.trim().slice(0, 40)}"`);
    }
    return found;
}"""
"""JavaScript for what is cut off or has to be scrolled sideways, but for drawings made of characters on a phone."""
BROKEN_PICTURES = "() => [...document.images].filter(image => !image.naturalWidth).map(image => image.src)"
LINKS = "() => [...document.links].map(link => link.href)"
IDS = "() => [...document.querySelectorAll('[id]')].map(element => element.id)"


def faults_of(site):
    """Return what is wrong with the pages of a site, having opened them all; the address of each page comes first."""
    faults, ids, links = [], {}, set()
    with opened(site) as page:
        page.on("console", lambda message: message.type == "error" and faults.append(f"console: {message.text}"))
        for path in sorted(site.glob("*.html")):
            for width in (SCREEN, PHONE):
                page.set_viewport_size({"width": width, "height": 900})
                page.goto(path.name)
                misfits = page.evaluate(MISFITS, width == PHONE)
                faults += [f"{path.name} at {width} pixels: {misfit} does not fit" for misfit in misfits]
            faults += [f"{path.name}: no picture {source}" for source in page.evaluate(BROKEN_PICTURES)]
            ids[path.name] = set(page.evaluate(IDS))
            links |= {(path.name, link) for link in page.evaluate(LINKS)}
        home = urljoin(page.url, ".")
    for name, link in sorted(links):
        address, anchor = urldefrag(link)
        target = unquote(address.removeprefix(home))
        if address.startswith(home) and not ((site / target).exists() and (not anchor or anchor in ids[target])):
            faults.append(f"{name}: no {target}#{anchor}")
    return faults


def test_every_page_fits_and_every_link_leads_somewhere(tmp_path):
    # One test for all pages and widths, so that whoever runs tests in parallel builds the site once.
    site = tmp_path / "site"
    build = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "-d", tmp_path / "doctrees", DOCS, site]
    run = subprocess.run(build, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (site / "index.html").exists()
    assert faults_of(site) == []


PAGE = """<!DOCTYPE html><html><head><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
</head><body id="top"><article>
<p><a href="page.html#top">here</a> <a href="page.html#nowhere">no anchor</a> <a href="none.html">no page</a></p>
<div class="highlight-text"><pre style="overflow: auto; width: 350px">{drawing}</pre></div>
<pre style="overflow: auto; width: 350px">{code}</pre>
<img src="data:image/png;base64,AA==" alt="">
<div style="width: 600px">wide</div>
<script>console.error("oh")</script>
</article></body></html>"""


def test_a_page_with_every_fault_is_found_out(tmp_path):
    (tmp_path / "page.html").write_text(PAGE.format(drawing="-" * 80, code="=" * 80))
    code = f'pre "{"=" * 40}" does not fit'
    assert faults_of(tmp_path) == [
        "console: oh",
        f'page.html at 1400 pixels: pre "{"-" * 40}" does not fit',
        f"page.html at 1400 pixels: {code}",
        "console: oh",
        "page.html at 400 pixels: the page does not fit",
        f"page.html at 400 pixels: {code}",
        "page.html: no picture data:image/png;base64,AA==",
        "page.html: no none.html#",
        "page.html: no page.html#nowhere",
    ]
