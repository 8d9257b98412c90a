"""Processes of torch.distributed for tests: ranks on the loopback interface, which carry out functions of a module.

The ranks are forks of one process that has imported Torch, so that a world of them starts in a fraction of a second.
Each stops by itself: at the end of the test's process, and where a function takes longer than its limit.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

LIMIT = 100.0
"""Seconds that a function may take in a rank; a rank that takes longer is ended."""
LONG = timedelta(seconds=60)
"""The timeout of collectives, except where a test needs a short one."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch_replica_steps"])


class Died(Exception):  # noqa: N818 - it is no error of a rank's function
    """The result of a rank that was killed, or ended at its limit."""


class World:
    """Ranks of torch.distributed: ``world.run(function, ...)`` calls a function in each."""

    def __init__(self, size: int, *, timeout: timedelta = LONG, tcp: bool = False) -> None:
        """Prepare a world of ``size`` ranks; with ``tcp`` rank 0 has the store, else a file is it."""
        self.size = size
        self._timeout, self._tcp = timeout, tcp
        self._ranks: list[Any] = []
        self._ends: list[Any] = []

    def __enter__(self) -> Self:
        self._folder = tempfile.mkdtemp()
        with _found_by_the_fork_server():
            self._start()
        return self

    def _start(self) -> None:
        store = Path(self._folder, "port" if self._tcp else "store")
        for rank in range(self.size):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=_serve, args=(rank, self.size, store, self._tcp, self._timeout, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._ranks.append(process)
            self._ends.append(ours)

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            end.close()
        for process in self._ranks:
            process.kill()
            process.join()
        shutil.rmtree(self._folder)

    def send(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> None:
        """Let each rank begin a function of a module; of each of ``arguments`` it gets its own."""
        for end, own in zip(self._ends, zip(*arguments, strict=True) if arguments else [()] * self.size, strict=True):
            with contextlib.suppress(BrokenPipeError):
                end.send((function, own))

    def outcomes(self) -> list[Any]:
        """Return the results of all ranks, or the errors that they raised."""
        results: list[Any] = []
        deadline = time.monotonic() + LIMIT + 10
        for end in self._ends:
            try:
                results.append(end.recv() if end.poll(max(0, deadline - time.monotonic())) else Died("no answer"))
            except (EOFError, ConnectionResetError):
                results.append(Died("the rank has ended"))
        return results

    def run(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """Return the results of a function in all ranks; raise the first error, if any."""
        results = self.attempt(function, *arguments)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def attempt(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """Return the results of a function in all ranks, or the errors that they raised."""
        self.send(function, *arguments)
        return self.outcomes()


@contextlib.contextmanager
def _found_by_the_fork_server() -> Iterator[None]:
    """Return a context in which a new process finds this folder: the server imports before it gets sys.path."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    yield
    del os.environ["PYTHONPATH"]
    if before is not None:
        os.environ["PYTHONPATH"] = before


def _serve(rank: int, size: int, store: Path, tcp: bool, timeout: timedelta, end: Any) -> None:
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if tcp:
        own = dist.TCPStore("127.0.0.1", _port(rank, store), size, is_master=rank == 0, wait_for_workers=False)
        if rank == 0:
            store.with_suffix(".new").write_text(str(own.port))
            store.with_suffix(".new").rename(store)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=timeout)
    else:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    while True:
        try:
            function, arguments = end.recv()
        except (EOFError, ConnectionResetError):
            os._exit(0)
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        try:
            result = function(*arguments)
        except BaseException as error:  # noqa: BLE001 - it is sent
            result = error
        faulthandler.cancel_dump_traceback_later()
        try:
            end.send(result)
        except Exception as error:  # noqa: BLE001 - the result cannot be pickled
            end.send(RuntimeError(f"{type(result).__name__}: {result} ({error})"))


def _port(rank: int, file: Path) -> int:
    """Return 0, any free port, for rank 0; for others that of rank 0."""
    while rank and not file.exists():
        time.sleep(0.01)
    return int(file.read_text()) if rank else 0
