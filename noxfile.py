"""A developer's tasks, each in an environment of its own that is kept: ``nox -s quick``; ``nox --list`` names all."""

import nox

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["quick"]
nox.options.reuse_venv = "yes"

CONSTRAINTS = "-c", "constraints.txt"
PLUGIN = "./tests/plugin"
XDIST = "-n", "auto", "--dist", "worksteal"
EXTRAS = {
    "numpy": "dev",
    "numba": "dev,numba",
    "torch": "dev,torch,numba,onnx,triton",
    "jax": "dev,jax,flax",
    "cupy": "dev,nvrtc",
    "mlx": "dev,mlx",
    "strict": "dev",
}
"""The extras that each backend's tests need."""
NAMES = {"numpy": "numpy or mbn_cpu", "cupy": "cupy or cuda"}
"""The names by which pytest finds the tests of a backend that has no marker."""


@nox.session
def quick(session: nox.Session) -> None:
    """Run the tests that need NumPy alone and take a second at most, in less than a minute."""
    session.install("-e", ".[dev]")
    session.run("pytest", *XDIST, "-r", "fE", "-m", "not slow and not processes", "tests", *session.posargs)


@nox.session
def backend(session: nox.Session) -> None:
    """Run one backend's tests and the conformance suite on it: ``nox -s backend -- torch``, and options of pytest."""
    name, *options = session.posargs or [""]
    if name not in EXTRAS:
        session.error(f"give a backend: nox -s backend -- NAME, one of {', '.join(EXTRAS)}")
    session.install(*CONSTRAINTS, "-e", f".[{EXTRAS[name]}]")
    session.install(PLUGIN)
    chosen = ("-k", NAMES[name]) if name in NAMES else ("-m", name)
    session.run("pytest", *XDIST, "-r", "fE", *chosen, "tests", *options)


@nox.session
def all(session: nox.Session) -> None:  # noqa: A001 - it is what this session does
    """Run all tests, with all frameworks, as the README's second command does."""
    session.install(*CONSTRAINTS, "-e", ".[test]")
    session.install(PLUGIN)
    session.run("pytest", *XDIST, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types; mypy reads the frameworks' own types, so they are installed."""
    session.install(*CONSTRAINTS, "-e", ".[test]")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation in docs/_build; a warning is an error."""
    session.install(*CONSTRAINTS, "-e", ".[docs]")
    session.run("sphinx-build", "--quiet", "--fail-on-warning", "docs", *(session.posargs or ["docs/_build"]))


@nox.session
def bench(session: nox.Session) -> None:
    """Measure the working tree with asv, and print the results: ``nox -s bench -- --bench overhead``."""
    session.install(*CONSTRAINTS, "-e", ".[bench]")
    session.chdir("asv_bench")
    session.run("asv", "machine", "--yes")
    session.run("asv", "run", "--quick", "--show-stderr", "-E", "existing", *session.posargs)
