"""The picture of times: a log scale, the copy as its baseline, and a title with shape and dtype."""

import pytest

from mbn.commands.bench.measurement import Measurement, Timed
from mbn.commands.bench.messages import Prepared
from mbn.commands.bench.workloads import Workload

figures = pytest.importorskip("matplotlib.figure")
plot = pytest.importorskip("mbn.commands.bench.plot")


@pytest.fixture
def panel():
    return figures.Figure().subplots()


def texts(panel):
    return [text.get_text() for text in panel.texts]


def test_bars_start_at_the_copy_on_a_log_scale(panel):
    plot.draw(panel, "Evaluation", {"numpy": 40.0, "torch.nn": 5.0}, {"numpy"}, 10.0)
    assert panel.get_xscale() == "log"
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in panel.patches]
    assert ends == [(10, 40), (10, 5)]
    assert texts(panel) == ["40  4\N{MULTIPLICATION SIGN}", "5  0.5\N{MULTIPLICATION SIGN}", "copy 10"]
    low, high = panel.get_xlim()
    assert low < 5
    assert high > 40
    assert panel.get_xlabel() == "times as long as the copy"


@pytest.mark.parametrize(("slowest", "named"), [(40.0, [1, 2, 5]), (4000.0, [1, 10, 100])])
def test_the_axis_names_multiples_of_the_copy(panel, slowest, named):
    plot.draw(panel, "Evaluation", {"numpy": slowest}, {"numpy"}, 10.0)
    ticks = [round(tick / 10, 6) for tick in panel.get_xticks()]
    assert [tick for tick in ticks if 1 <= tick <= named[-1]] == named
    assert panel.xaxis.get_major_formatter()(20.0) == "2\N{MULTIPLICATION SIGN}"


def test_without_a_copy_the_bars_are_in_ms_alone(panel):
    plot.draw(panel, "(4, 3)", {"cupy": 4.0, "torch": 2.0}, {"cupy", "torch"}, None)
    assert texts(panel) == ["4", "2"]
    assert [bar.get_x() for bar in panel.patches] == [1, 1]
    assert list(panel.get_xticks()) == []


def test_the_title_names_shape_and_dtype(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(plot.Figure, "suptitle", lambda _, title, **__: titles.append(" ".join(title.split())))
    timed = Timed(Prepared("1", "cpu", {}, {}), {"train": [1.0]})
    for workload in (Workload((4, 3), "float16"), Workload((4, 5, 3), axis=-1, masked=True)):
        plot.save(Measurement(workload, ("train",), {"numpy": timed}), tmp_path / "p.png")
    assert titles == [
        "mbn bench: x of (4, 3) float16",
        "mbn bench: x of (4, 5, 3) float32, axis -1, every third position masked",
    ]
