"""Time of compiled models with the layers of mbn, and with those of torch."""

from typing import Any

from ._sources import needed

WIDTH = 256


class Perceptron:
    """Three times a linear layer, batch norm and ReLU, compiled by Inductor: forward, or a step of training."""

    params = (["mbn", "torch.nn"], ["eval", "train", "step"], [4096, 65536])
    param_names = ("layers", "mode", "batch")
    rounds = 1
    repeat = (3, 20, 0.5)
    warmup_time = 0.05

    def setup(self, layers: str, mode: str, batch: int) -> None:
        torch = needed("torch")
        torch.manual_seed(0)
        torch.compiler.reset()
        model = torch.nn.Sequential(*(module for _ in range(3) for module in _layers(torch))).train(mode != "eval")
        if layers == "mbn":
            import mbn

            mbn.replace_batchnorm(model)
        call, x = torch.compile(model, fullgraph=True), torch.randn(batch, WIDTH)
        parameters = list(model.parameters())

        def forward() -> None:
            with torch.no_grad():
                call(x)

        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            call(x).square().mean().backward()

        self._step = step if mode == "step" else forward
        self._step()

    def time_step(self, *_: object) -> None:
        self._step()


def _layers(torch: Any) -> tuple[Any, ...]:
    return torch.nn.Linear(WIDTH, WIDTH), torch.nn.BatchNorm1d(WIDTH), torch.nn.ReLU()
