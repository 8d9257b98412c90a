"""Publish the results as web pages that need nothing but themselves.

``python asv_bench/publish.py`` does what ``asv publish`` does, whose pages take their libraries from other hosts, and
puts those libraries beside the pages. They come from packages of pip's, in the extra ``bench``; what no package has is
in ``plugins.js``.
"""

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
SITE = HERE / ".asv" / "html"
LIBRARIES = "libraries"

_FLOT = "js.jquery_flot", "js/jquery_flot/resources"
_BOOTSTRAP = "js.bootstrap", "js/bootstrap/resources"
_PACKAGED = {
    "jquery-3.3.1.min.js": ("js.jquery", "js/jquery/resources/jquery-3.3.1.min.js"),
    "bootstrap.min.js": (_BOOTSTRAP[0], f"{_BOOTSTRAP[1]}/js/bootstrap.min.js"),
    "bootstrap.min.css": (_BOOTSTRAP[0], f"{_BOOTSTRAP[1]}/css/bootstrap.min.css"),
    **{
        name: (_FLOT[0], f"{_FLOT[1]}/{name}")
        for name in (
            "jquery.flot.min.js",
            "jquery.flot.time.min.js",
            "jquery.flot.selection.min.js",
            "jquery.flot.categories.min.js",
        )
    },
}
"""By the name of the file that asv's pages ask for: where it is, in which distribution."""
_REPLACED = {"jquery.flot.orderBars.js", "stupidtable.min.js", "md5.min.js"}
"""What ``plugins.js`` does instead."""
_ELSEWHERE = re.compile(r'<(script|link)\b[^>]*?\b(src|href)="https?://[^"]*/([^"/]+)"[^>]*>(</script>)?')


def main(arguments: list[str]) -> int:
    """Publish to the folder that is given, by default asv's own, and return asv's exit code."""
    site = Path(*arguments).resolve() if arguments else SITE
    command = [sys.executable, "-m", "asv", "publish", "--no-pull", "--html-dir", str(site)]
    code = subprocess.run(command, cwd=HERE, check=False).returncode
    if code == 0:
        make_self_contained(site)
        print(f"{site} refers to no other host: python -m http.server --bind 127.0.0.1 --directory {site}")  # noqa: T201
    return code


def make_self_contained(site: Path) -> None:
    """Have pages that asv has published refer to files beside them, and put those there.

    Raises:
        ValueError: the pages ask for something that is not known here.
        importlib.metadata.PackageNotFoundError: a library is not installed.
    """
    libraries = site / LIBRARIES
    libraries.mkdir(exist_ok=True)
    shutil.copy(HERE / "plugins.js", libraries)
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        page.write_text(_ELSEWHERE.sub(lambda found: _local(found, libraries), text), encoding="utf-8")


def _local(found: re.Match[str], libraries: Path) -> str:
    tag, name = found[1], found[3]
    if name in _REPLACED:
        # The first of them is where the others' work is done too: all of them come after what they need.
        return f'<script src="{LIBRARIES}/plugins.js"></script>' if name == "jquery.flot.orderBars.js" else ""
    if name not in _PACKAGED:
        message = f"asv's pages ask for {name}, which this script does not know: they have changed."
        raise ValueError(message)
    distribution, path = _PACKAGED[name]
    shutil.copy(str(metadata.distribution(distribution).locate_file(path)), libraries / name)
    address = f"{LIBRARIES}/{name}"
    if tag == "link":
        return f'<link rel="stylesheet" href="{address}">'
    return f'<script src="{address}"></script>'


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
