"""Time of a step by backend, memory order, dtype and mask; ``asv continuous`` compares two commits by it."""

from mbn.commands.bench.workloads import MODES, Workload

from ._backends import NAMES, layer

INPUTS = {
    "(32, 64)": Workload((32, 64)),
    "(65536, 256)": Workload((65536, 256)),
    "(65536, 256) float16": Workload((65536, 256), dtype="float16"),
    "(65536, 256) transposed": Workload((65536, 256), transposed=True),
    "(65536, 256) masked": Workload((65536, 256), masked=True),
    "(4096, 64, 16) float64": Workload((4096, 64, 16), dtype="float64"),
    "(256, 1024, 128) channels last": Workload((256, 1024, 128), axis=-1),
}


class Step:
    """A step without compilation, in float32 unless the input says otherwise."""

    params = (NAMES, list(MODES), list(INPUTS))
    param_names = ("backend", "mode", "x")
    rounds = 1
    repeat = (3, 20, 0.5)
    warmup_time = 0.05

    def setup(self, name: str, mode: str, description: str) -> None:
        self._step = layer(name, INPUTS[description]).step(mode)
        self._step()

    def time_step(self, *_: str) -> None:
        self._step()
