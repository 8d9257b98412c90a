"""Publish the history as web pages that need nothing but themselves.

``python asv_bench/publish.py`` does what ``asv publish`` does, whose pages take their libraries from other hosts, and
puts those libraries beside the pages: npm gets them, as ``package.json`` names them.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SITE = HERE / ".asv" / "html"
DOWNLOADED = HERE / ".asv" / "npm"
LIBRARIES = "libraries"

_FILES = {
    "jquery-3.3.1.min.js": "jquery/dist/jquery.min.js",
    **{
        f"jquery.flot{part}.min.js": f"jquery.flot/jquery.flot{part}.js"
        for part in ("", ".time", ".selection", ".categories")
    },
    "jquery.flot.orderBars.js": "flot-orderbars/js/jquery.flot.orderBars.js",
    "stupidtable.min.js": "stupid-table-plugin/stupidtable.min.js",
    "md5.min.js": "blueimp-md5/js/md5.min.js",
    "bootstrap.min.js": "bootstrap/dist/js/bootstrap.min.js",
    "bootstrap.min.css": "bootstrap/dist/css/bootstrap.min.css",
}
"""By the name of the file that asv's pages ask for: the file of npm's."""
_ELSEWHERE = re.compile(r'<(script|link)\b[^>]*?\b(src|href)="https?://[^"]*/([^"/]+)"[^>]*>(</script>)?')


def main(arguments: list[str]) -> int:
    """Publish to the folder that is given, by default asv's own, and return the exit code of asv or npm."""
    site = Path(*arguments).resolve() if arguments else SITE
    asv = [sys.executable, "-m", "asv", "--config", "asv.history.json", "publish", "--no-pull", "--html-dir", str(site)]
    DOWNLOADED.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "package.json", DOWNLOADED)
    npm = [shutil.which("npm") or "npm", "install", "--ignore-scripts", "--no-package-lock", "--prefer-offline"]
    npm += ["--no-audit", "--no-fund", "--prefix", str(DOWNLOADED)]
    for command in (npm, asv):
        code = subprocess.run(command, cwd=HERE, check=False).returncode
        if code:
            return code
    make_self_contained(site)
    print(f"{site} refers to no other host: python -m http.server --bind 127.0.0.1 --directory {site}")
    return 0


def make_self_contained(site: Path) -> None:
    """Have pages that asv has published refer to files beside them, and put those there.

    Raises:
        ValueError: the pages ask for something that is not known here.
    """
    libraries = site / LIBRARIES
    libraries.mkdir(exist_ok=True)
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        page.write_text(_ELSEWHERE.sub(lambda found: _local(found, libraries), text), encoding="utf-8")


def _local(found: re.Match[str], libraries: Path) -> str:
    tag, name = found[1], found[3]
    if name not in _FILES:
        raise ValueError(f"asv's pages ask for {name}, which this script does not know: they have changed.")
    shutil.copy(DOWNLOADED / "node_modules" / _FILES[name], libraries / name)
    address = f"{LIBRARIES}/{name}"
    return f'<link rel="stylesheet" href="{address}">' if tag == "link" else f'<script src="{address}"></script>'


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
