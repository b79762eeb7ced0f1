from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from nsm.errors import InputError, OutputExistsError
from nsm.export.options import ExportOptions
from nsm.export.pipeline import export
from nsm.models.adaptive import AdaptiveNSM
from nsm.models.hybrid import HybridModel
from nsm.models.simple import SimpleNSM
from nsm.utils import AdvancedNSMVisualizer, panels
from nsm.utils.recorders import record_model
from tests.nsm.utils.traces import trace_of

ROOT = Path(__file__).resolve().parents[3]
CHUNK = 8
METHODS = ("plot_routing_patterns", "plot_routing_entropy", "plot_state_evolution", "plot_importance")


def ids(streams: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 20, (streams, length))


def heat_maps(figure: Figure) -> list[AxesImage]:
    return [image for axes in figure.axes for image in axes.images if image.get_gid() == "heat"]


def drawn_values(image: AxesImage) -> np.ndarray:
    """NaN where nothing is drawn."""
    return np.asarray(np.ma.filled(np.ma.asarray(image.get_array()), np.nan))


def titled(figure: Figure, start: str) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_title(loc="left").startswith(start)]


def inactive_cells(axes: Axes, columns: int, slots: int) -> np.ndarray:
    """Which cells [columns, S] lie under the boxes that mark inactive slots."""
    marked = np.zeros((columns, slots), bool)
    for collection in axes.collections:
        if collection.get_gid() == "inactive":
            assert collection.get_hatch()
            for path in collection.get_paths():
                corners = np.asarray(path.vertices)
                (left, top), (right, bottom) = corners.min(0), corners.max(0)
                marked[round(left + 0.5) : round(right + 0.5), round(top + 0.5) : round(bottom + 0.5)] = True
    return marked


@pytest.fixture(scope="module")
def adaptive() -> AdaptiveNSM:
    torch.manual_seed(0)
    return AdaptiveNSM(
        vocab_size=20,
        state_dim=16,
        max_states=12,
        initial_states=3,
        prune_threshold=0.33,
        num_heads=2,
        chunk_size=CHUNK,
        routing_heads=2,
    ).eval()


def test_the_documented_snippet(tmp_path: Path) -> None:
    from nsm import SimpleNSM
    from nsm.utils import AdvancedNSMVisualizer

    model = SimpleNSM(vocab_size=100, d_model=16, num_states=4, num_heads=2)
    ids = torch.randint(0, 100, (2, 40))
    v = AdvancedNSMVisualizer(model)
    v.plot_routing_patterns(ids, save_path=tmp_path / "routing.png")
    v.plot_state_evolution(ids, save_path=str(tmp_path / "states.svg"))
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "states.svg").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["routing.png", "states.svg"]


def test_heat_maps_show_the_routing_weights(model: SimpleNSM) -> None:
    tokens = ids(2, 20)
    layers = record_model(model, tokens, 1).layers
    figure = AdvancedNSMVisualizer(model).plot_routing_patterns(tokens, stream=1)
    for image, layer in zip(heat_maps(figure), layers, strict=True):
        np.testing.assert_array_equal(image.get_array(), layer.routing.mean(1).T)
    figure = AdvancedNSMVisualizer(model).plot_routing_patterns(tokens, stream=1, heads=True)
    shown = [image.get_array() for image in heat_maps(figure)]
    wanted = [layer.routing[:, head].T for layer in layers for head in range(layer.heads)]
    np.testing.assert_array_equal(shown, wanted)
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.images and axes.get_title(loc="left")]
    assert titles == ["layer 0, head 0", "layer 0, head 1", "layer 1, head 0", "layer 1, head 1"]
    assert len({(image.norm.vmin, image.norm.vmax) for image in heat_maps(figure)}) == 1


def test_inactive_slots_are_marked_when_they_are(adaptive: AdaptiveNSM) -> None:
    tokens = ids(1, 160)
    recording = record_model(adaptive, tokens)
    visualizer = AdvancedNSMVisualizer(adaptive)
    for layer, axes in zip(recording.layers, titled(visualizer.plot_routing_patterns(tokens), "layer"), strict=True):
        np.testing.assert_array_equal(inactive_cells(axes, 160, 12), ~layer.routable)
        assert not layer.routable.all()
    states = visualizer.plot_state_evolution(tokens)
    for layer in recording.layers:
        norm, change, active = titled(states, f"layer {layer.layer}")
        np.testing.assert_array_equal(inactive_cells(norm, 21, 12), ~layer.mask)
        np.testing.assert_array_equal(norm.images[0].get_array(), layer.norm.T)
        np.testing.assert_array_equal(np.asarray(change.images[0].get_array())[:, 1:], layer.change[1:].T)
        np.testing.assert_array_equal(active.lines[0].get_ydata(), layer.mask.sum(-1))


def test_importance_stands_beside_the_slots(adaptive: AdaptiveNSM) -> None:
    tokens = ids(1, 160)
    layers = record_model(adaptive, tokens).layers
    figure = AdvancedNSMVisualizer(adaptive).plot_routing_patterns(tokens)
    for layer, axes in zip(layers, [axes for axes in figure.axes if axes.get_title() == "importance"], strict=True):
        assert layer.importance is not None
        bars: list[Any] = list(axes.patches)
        np.testing.assert_allclose([bar.get_width() for bar in bars], layer.importance[-1])
        assert [bar.get_hatch() is None for bar in bars] == layer.mask[-1].tolist()
    figure = AdvancedNSMVisualizer(adaptive).plot_importance(tokens)
    for image, layer in zip(heat_maps(figure), layers, strict=True):
        assert layer.importance is not None
        np.testing.assert_array_equal(image.get_array(), layer.importance.T)
    assert len([line for axes in figure.axes for line in axes.lines if line.get_gid() == "threshold"]) == 2


def test_importance_that_does_not_change_is_shown_once(model: SimpleNSM) -> None:
    figure = AdvancedNSMVisualizer(model).plot_importance(ids(1, 20))
    assert not heat_maps(figure)
    assert [len(axes.patches) for axes in figure.axes] == [6, 6]
    assert "pruned below 0.1" in figure.axes[0].get_xlabel()


def test_entropy_lines_are_the_entropy(model: SimpleNSM) -> None:
    figure = AdvancedNSMVisualizer(model).plot_routing_entropy(ids(1, 20))
    for axes, layer in zip(figure.axes, record_model(model, ids(1, 20)).layers, strict=True):
        *heads, mean, bound = axes.lines
        np.testing.assert_array_equal([line.get_ydata() for line in heads], layer.entropy.T)
        np.testing.assert_allclose(np.asarray(mean.get_ydata()), layer.entropy.mean(1))
        np.testing.assert_allclose(np.asarray(bound.get_ydata()), np.log2(6))
        assert axes.get_ylabel() == "entropy (bits)"


def test_long_streams_go_on_in_rows_below(model: SimpleNSM) -> None:
    tokens = ids(1, 1000)
    figure = AdvancedNSMVisualizer(model).plot_routing_patterns(tokens)
    shown = [np.asarray(image.get_array()) for image in heat_maps(figure)]
    weights = [layer.routing.mean(1).T for layer in record_model(model, tokens).layers]
    assert len(shown) == 2 * 3
    np.testing.assert_array_equal(np.concatenate(shown[:3], 1), weights[0])
    assert max(part.shape[1] for part in shown) - min(part.shape[1] for part in shown) <= 2


def test_labels_are_written_below_their_tokens(model: SimpleNSM) -> None:
    labels = [f"w{index}" for index in range(30)]
    labels[:4] = ["\n", " the", "$x_1$", "a very long token\x00"]
    figure = AdvancedNSMVisualizer(model).plot_routing_patterns(ids(1, 30), labels=labels)
    figure.canvas.draw()  # "$x_1$" would be set as a formula
    ticks = titled(figure, "layer 0")[0].get_xticklabels()
    assert [tick.get_text() for tick in ticks][:4] == ["\u21b5", "\u2423the", "$x_1$", "a\u2423very\u2423long\u2026"]
    assert [tick.get_position()[0] for tick in ticks] == list(range(30))
    assert panels.shown("\x00") == "\\x00"
    with pytest.raises(InputError, match="labels names every token of the stream: 30; given 2"):
        AdvancedNSMVisualizer(model).plot_routing_entropy(ids(1, 30), labels=["a", "b"])


def test_columns_are_named_by_round_numbers_or_evenly() -> None:
    for numbers, wanted in (
        (np.arange(445, 600), ["450", "500", "550"]),
        (8 * np.arange(70), ["0", "200", "400"]),
        (np.arange(7, 64, 8), ["7", "23", "39", "55"]),
        (np.array([3]), ["3"]),
    ):
        axes = Figure().add_subplot()
        axes.set_xlim(-0.5, len(numbers) - 0.5)
        panels.number_axis(axes, numbers, 2.0)
        named = {round(tick.get_position()[0]): tick.get_text() for tick in axes.get_xticklabels()}
        assert list(named.values()) == wanted
        assert all(int(text) == numbers[column] for column, text in named.items())


def test_a_span_is_shown_alone(model: SimpleNSM) -> None:
    figure = AdvancedNSMVisualizer(model).plot_routing_patterns(ids(1, 40), span=(10, 26), labels=["x"] * 40)
    wanted = record_model(model, ids(1, 40)).layers[0].routing.mean(1)[10:26].T
    np.testing.assert_array_equal(heat_maps(figure)[0].get_array(), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_model_is_drawn(method: str, adaptive: AdaptiveNSM) -> None:
    hybrid = HybridModel(
        vocab_size=20, d_model=16, num_states=4, num_attention_layers=1, num_nsm_layers=1, num_heads=2, chunk_size=CHUNK
    )
    vectors = SimpleNSM(input_dim=5, state_dim=16, num_states=4, num_heads=2, chunk_size=CHUNK, hierarchy=(2,))
    for model, tokens in ((hybrid, ids(1, 20)), (adaptive, ids(1, 20)), (vectors, np.ones((20, 5), np.float32))):
        figure = getattr(AdvancedNSMVisualizer(model), method)(tokens)
        figure.canvas.draw()
        assert len(figure.axes) >= 1


@pytest.mark.parametrize("method", METHODS)
def test_a_trace_gives_the_picture_of_the_run(method: str, adaptive: AdaptiveNSM) -> None:
    tokens = ids(1, 64)
    trace = trace_of(adaptive, tokens.reshape(1, 8, CHUNK), list(range(8)), list(range(CHUNK)))
    drawn = getattr(AdvancedNSMVisualizer.from_trace(trace), method)()
    wanted = getattr(AdvancedNSMVisualizer(adaptive), method)(tokens)
    for found, image in zip(heat_maps(drawn), heat_maps(wanted), strict=True):
        np.testing.assert_allclose(drawn_values(found), drawn_values(image), atol=1e-5)


def test_a_trace_of_a_few_tokens_and_states_is_drawn(model: SimpleNSM) -> None:
    trace = trace_of(model, ids(1, 160).reshape(1, 20, CHUNK), [0, 1, 4, 19], [7])
    visualizer = AdvancedNSMVisualizer.from_trace(trace)
    figure = visualizer.plot_routing_patterns()
    assert drawn_values(heat_maps(figure)[0]).shape == (6, 20)
    assert [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()] == ["token, those recorded"] * 2
    assert not [axes for axes in figure.axes if axes.get_title() == "importance"]
    norm, change = titled(visualizer.plot_state_evolution(), "layer 0")
    assert drawn_values(norm.images[0]).shape == (6, 7)
    assert drawn_values(change.images[0]).shape == (6, 4)
    with pytest.raises(InputError, match="No importance was recorded"):
        visualizer.plot_importance()
    with pytest.raises(InputError, match="takes no tokens"):
        visualizer.plot_routing_patterns(ids(1, 9))


def test_what_cannot_be_drawn_is_refused(model: SimpleNSM) -> None:
    with pytest.raises(InputError, match=r"takes a model that routes.*given Linear"):
        AdvancedNSMVisualizer(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="nothing to show without tokens"):
        AdvancedNSMVisualizer(model).plot_routing_entropy()
    with pytest.raises(InputError, match=r"committed every 8 tokens.*5 tokens in all"):
        AdvancedNSMVisualizer(model).plot_state_evolution(ids(1, 5))


def test_a_picture_is_written_whole_or_not_at_all(
    model: SimpleNSM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visualizer = AdvancedNSMVisualizer(model)
    with pytest.raises(InputError, match=r"no ending that tells the format.*png"):
        visualizer.plot_routing_entropy(ids(1, 9), save_path=tmp_path / "picture.gif?")
    with pytest.raises(InputError, match=r"cannot be written.*Make the folder first"):
        visualizer.plot_routing_entropy(ids(1, 9), save_path=tmp_path / "missing" / "picture.png")
    visualizer.plot_routing_entropy(ids(1, 9), save_path=tmp_path / "picture.png")
    old = (tmp_path / "picture.png").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        visualizer.plot_routing_entropy(ids(1, 9), save_path=tmp_path / "picture.png")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("picture.png", old)]


@pytest.mark.parametrize("kind", ["png", "svg", "pdf", "ps", "eps", "jpg"])
def test_only_pictures_of_the_visualizer_are_replaced(model: SimpleNSM, tmp_path: Path, kind: str) -> None:
    visualizer, path = AdvancedNSMVisualizer(model), tmp_path / f"picture.{kind}"
    Figure().savefig(path)
    before = path.read_bytes()
    with pytest.raises(OutputExistsError, match="exists and is not a picture of nsm, so it is not replaced"):
        visualizer.plot_routing_entropy(ids(1, 9), save_path=path)
    assert path.read_bytes() == before
    path.unlink()
    visualizer.plot_routing_entropy(ids(1, 9), save_path=path)
    if kind == "jpg":  # which has no place for a name
        with pytest.raises(OutputExistsError):
            visualizer.plot_routing_entropy(ids(1, 9), save_path=path)
        return
    visualizer.plot_routing_entropy(ids(1, 20), save_path=path)


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def test_a_trace_is_drawn_without_torch_pyplot_or_a_display(model: SimpleNSM, tmp_path: Path) -> None:
    trace_of(model, ids(1, 32).reshape(1, 4, CHUNK), [0, 3], [3, 7]).save(tmp_path / "golden.npz")
    done = _python(f"""
import sys
sys.modules["torch"] = None
sys.modules["matplotlib.pyplot"] = None
from pathlib import Path
from nsm.trace import Trace
from nsm.utils import AdvancedNSMVisualizer
folder = Path({str(tmp_path)!r})
visualizer = AdvancedNSMVisualizer.from_trace(Trace.load(folder / "golden.npz"))
visualizer.plot_routing_patterns(save_path=folder / "routing.png")
visualizer.plot_routing_entropy(save_path=folder / "entropy.png")
visualizer.plot_state_evolution(save_path=folder / "states.png")
""")
    assert (done.returncode, done.stderr) == (0, "")
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in ("routing", "entropy", "states"))


def test_without_matplotlib_pictures_name_the_extra_and_all_else_works(model: SimpleNSM, tmp_path: Path) -> None:
    trace_of(model, ids(1, 16).reshape(1, 2, CHUNK), [0], [7]).save(tmp_path / "golden.npz")
    done = _python(f"""
import sys
sys.modules["matplotlib"] = None
from pathlib import Path
from nsm.errors import MissingDependencyError
from nsm.trace import Trace
from nsm.utils import AdvancedNSMVisualizer, PerformanceMonitor
PerformanceMonitor().get_stats()
try:
    AdvancedNSMVisualizer.from_trace(Trace.load(Path({str(tmp_path / "golden.npz")!r}))).plot_routing_patterns()
except MissingDependencyError as error:
    print(error)
""")
    assert done.stderr == ""
    assert done.stdout == (
        'Pictures need matplotlib, which is not installed. Install it with: pip install "nsm-toolkit[viz]"\n'
    )


def test_importing_the_tools_imports_neither_torch_nor_matplotlib() -> None:
    done = _python("import sys, nsm.utils; print(*{'torch', 'matplotlib'} & set(sys.modules))")
    assert (done.stdout, done.stderr) == ("\n", "")


@pytest.mark.slow
def test_the_example_draws_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "examples" / "visualize.py"),
        str(checkpoint),
        "--output",
        str(tmp_path / "p"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [
        "entropy.png",
        "heads.png",
        "routing.png",
        "states.png",
    ]
    done = subprocess.run([*command, "--stream", "8"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "has 8 golden sequences, counted from 0; given --stream 8" in done.stderr


@pytest.mark.slow
def test_the_example_draws_a_bundle_without_torch(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, ExportOptions(targets=["onnx"], output=tmp_path / "m.nsm", golden_steps=4, debug_outputs=True))
    script, arguments = str(ROOT / "examples" / "visualize.py"), [str(tmp_path / "m.nsm"), "--output", str(tmp_path)]
    done = _python(f"""
import runpy, sys
sys.modules["torch"] = None
sys.argv = [{script!r}, *{arguments!r}]
runpy.run_path({script!r}, run_name="__main__")
""")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split("/")[-1] for line in done.stdout.splitlines()] == [
        "routing.png",
        "heads.png",
        "entropy.png",
        "states.png",
    ]
