"""examples/compare.py: models side by side, and what the tables say of them."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import nsm
from nsm.baselines import TransformerLM
from nsm.bundle import Bundle
from nsm.errors import OutputExistsError
from nsm.models import SimpleNSM, StepModel

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "compare.py"
WIDE, DEEP, ODD_WIDE, ODD_DEEP = (
    f"transformer d={shape}, {context}" for context in (512, 40) for shape in ("384 L=4", "256 L=10")
)
pytestmark = pytest.mark.slow
TARGET = "onnxruntime"


def _loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compare() -> Iterator[ModuleType]:
    yield _loaded()
    del sys.modules["compare"]


@pytest.fixture(scope="module")
def tiny() -> dict[str, StepModel]:
    torch.manual_seed(0)
    small = SimpleNSM(vocab_size=256, d_model=16, num_states=4, num_layers=1, num_heads=2, feed_forward=1.0)
    return {"nsm": small, "transformer": TransformerLM(256, 16, 1, 2, 64)}


@pytest.fixture(scope="module")
def made(compare: ModuleType, tiny: dict[str, StepModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle of each."""
    folder = tmp_path_factory.mktemp("compare")
    return {name: compare.make_bundle(model, TARGET, folder / f"{name}.nsm") for name, model in tiny.items()}


@pytest.fixture(scope="module")
def bundles(made: Mapping[str, Path]) -> dict[str, Path]:
    """The transformer under every name it is asked for by; two contexts that have a goal, two that have none."""
    return {"nsm": made["nsm"], **dict.fromkeys((ODD_WIDE, WIDE, ODD_DEEP, DEEP), made["transformer"])}


@pytest.fixture(scope="module")
def rows(compare: ModuleType, bundles: Mapping[str, Path]) -> list[Any]:
    return list(compare.rows_of(bundles, TARGET, 3, 2))


def test_bundles_are_checked_and_leave_no_checkpoint(made: Mapping[str, Path], tiny: dict[str, StepModel]) -> None:
    for name, path in made.items():
        manifest = Bundle(path).manifest
        assert manifest.model["class"] == type(tiny[name]).__name__
        assert [(a.target, a.parity.status) for a in manifest.artifacts] == [(TARGET, "passed")]
        assert not list(path.parent.glob("*.pt"))


def test_there_is_a_row_for_each_model(
    rows: list[Any], bundles: Mapping[str, Path], tiny: dict[str, StepModel]
) -> None:
    assert [row.name for row in rows] == list(bundles)
    assert [row.context for row in rows] == [None, 40, 512, 40, 512]
    for row in rows:
        model = tiny["nsm" if row.name == "nsm" else "transformer"]
        assert row.parameters == sum(p.numel() for p in model.parameters())
        assert row.state_bytes == model.spec(1).state_nbytes
        assert min(row.call_us, row.decode_us) > 0
        assert 20 < row.resident_mb < 250
        assert 0 < row.low <= row.ratio <= row.high
        assert row.decode_ratio > 0
    base = rows[0]
    assert (base.low, base.ratio, base.high, base.decode_ratio) == (1, 1, 1, 1)


def test_ratios_are_those_of_the_same_round(
    compare: ModuleType, bundles: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The machine is ten times as slow in the last round; the ratio of medians would be 2, 30 / 15.
    times = {name: np.array([[30.0, 30.0, 60.0, 600.0, 30.0], [8.0] * 5]) for name in bundles}
    times["nsm"] = np.array([[10.0, 15.0, 20.0, 200.0, 15.0], [4.0, 4.0, 4.0, 2.0, 2.0]])
    monkeypatch.setattr(compare, "measure", lambda *_: times)
    monkeypatch.setattr(compare, "memory_of", lambda *_: {"rss_mb": 50.0})
    row = compare.rows_of(bundles, TARGET, 5, 1)[1]
    assert (row.low, row.ratio, row.high) == (2.0, 3.0, 3.0)
    assert (row.call_us, row.decode_us, row.decode_ratio) == (30.0, 8.0, 2.0)


def test_sessions_take_turns(compare: ModuleType, made: Mapping[str, Path]) -> None:
    sessions = {name: nsm.open(path, target=TARGET) for name, path in made.items()}
    calls: list[str] = []
    for name, session in sessions.items():
        for entry in ("step", "decode"):
            real = getattr(session, entry)

            def watched(tokens: Any, label: str = f"{name}.{entry}", real: Any = real) -> Any:
                calls.append(label)
                return real(tokens)

            setattr(session, entry, watched)
    times = compare.measure(sessions, 2, 3)
    turn = [f"{name}.{entry}" for name in made for entry in ("step", "decode") for _ in range(3)]
    assert calls == turn * 3  # a warm-up and two rounds
    assert {name: value.shape for name, value in times.items()} == dict.fromkeys(made, (2, 2))
    assert all((value > 0).all() for value in times.values())
    for session in sessions.values():
        session.close()


def test_the_tables_name_all_models_and_the_goals(
    compare: ModuleType, rows: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    compare.show(rows, TARGET)
    lines = capsys.readouterr().out.splitlines()
    for row in rows:
        (line,) = [line.strip() for line in lines if line.strip().startswith(row.name)]
        assert f"{row.ratio:.2f}x" in line
        assert line.endswith(f" {row.resident_mb:.0f}")
    goals = {line.split()[0]: line.split() for line in lines if line.split()[:1] in (["512"], ["40"])}
    wide, deep = ({row.context: row for row in rows if part in row.name} for part in ("L=4", "L=10"))
    share = f"{1 - rows[0].state_bytes / rows[1].state_bytes:.1%}"
    assert goals["512"] == ["512", f"{wide[512].ratio:.2f}x", "1.15x", f"{deep[512].ratio:.2f}x", "1.5x", share]
    assert goals["40"] == ["40", f"{wide[40].ratio:.2f}x", "-", f"{deep[40].ratio:.2f}x", "-", share]


def test_the_plot_is_a_picture(compare: ModuleType, rows: list[Any], tmp_path: Path) -> None:
    compare.plot(rows, TARGET, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_script_writes_its_figures(
    compare: ModuleType, bundles: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    def models(contexts: tuple[int, ...]) -> dict[str, Path]:
        asked.append(contexts)
        return dict(bundles)

    streamed: list[tuple[Path, str, int]] = []

    def memory_of(bundle: Path, target: str, tokens: int) -> dict[str, float]:
        streamed.append((bundle, target, tokens))
        return {"rss_mb": 50.0, "range_mb": 0.1, "slope_mb": 0.0, "tokens": tokens, "seconds": 1.0}

    monkeypatch.setattr(compare, "models", models)
    monkeypatch.setattr(compare, "make_bundle", lambda bundle, _target, _directory: bundle)
    monkeypatch.setattr(compare, "memory_of", memory_of)
    options = ["--target", TARGET, "--contexts", "40,512", "--rounds", "1", "--calls", "1", "--tokens", "1600"]
    result = CliRunner().invoke(compare.main, [*options, "--output", str(tmp_path / "found")])
    assert result.exit_code == 0, (result.output, result.exception)
    assert asked == [(40, 512)]
    briefly = [(path, TARGET, 16 * compare.SETTLED) for path in bundles.values()]
    assert streamed == [*briefly, (bundles["nsm"], TARGET, 1600), (bundles[WIDE], TARGET, 32_000)]
    assert "nsm: 1,600 tokens in 1 s, 50.0 MB resident" in result.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["target"] == TARGET
    assert [(row["name"], row["resident_mb"]) for row in found["rows"]] == [(name, 50.0) for name in bundles]
    assert set(found["memory"]) == {"nsm", WIDE}
    assert (tmp_path / "found.png").is_file()


def test_memory_is_that_of_a_process_of_its_own(compare: ModuleType, made: Mapping[str, Path]) -> None:
    found = compare.memory_of(made["nsm"], TARGET, 16 * 1202)
    assert found["tokens"] == 16 * 1202
    assert found["seconds"] > 0
    # Python, numpy and a backend; torch alone would take more.
    assert 20 < found["rss_mb"] < 250
    assert found["range_mb"] >= 0
    assert math.isfinite(found["slope_mb"])


def test_a_short_stream_shows_its_memory_but_no_change_of_it(compare: ModuleType, made: Mapping[str, Path]) -> None:
    found = compare.stream(made["nsm"], TARGET, 160)
    assert found["rss_mb"] > 20
    assert math.isnan(found["range_mb"])
    assert math.isnan(found["slope_mb"])
    assert found["tokens"] == 160


def test_a_longer_context_shows_in_the_memory_of_a_process(compare: ModuleType, tmp_path: Path) -> None:
    """Keys and values of 16,384 tokens are 16.8 MB here, and are there twice: as at first, and as they are."""
    torch.manual_seed(0)
    sizes = {}
    for context in (64, 16_384):
        bundle = compare.make_bundle(TransformerLM(256, 128, 1, 2, context), TARGET, tmp_path / f"{context}.nsm")
        sizes[context] = compare.memory_of(bundle, TARGET, 16 * compare.SETTLED)["rss_mb"]
    assert sizes[16_384] - sizes[64] > 0.9 * 2 * 128 * 4 * 16_384 / 1e6


def test_streaming_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import compare; print(compare.stream.__name__)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True, check=False
    )
    assert result.stdout == "stream\n", result.stderr


def test_all_models_have_about_the_same_size(compare: ModuleType) -> None:
    with torch.device("meta"):
        models = compare.models((512,))
    assert next(iter(models)) == "nsm"
    assert WIDE in models
    assert DEEP in models
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert all(size == pytest.approx(sizes["nsm"], rel=0.15) for size in sizes.values()), sizes


def test_only_its_own_tables_and_pictures_are_replaced(compare: ModuleType, tmp_path: Path) -> None:
    output, picture = tmp_path / "table", tmp_path / "table.png"
    picture.write_bytes(b"a photograph")
    with pytest.raises(OutputExistsError, match=r"table\.png exists\. Move it away"):
        compare.check_output(output)
    output.with_suffix(".json").write_text('{"mine": 1}')
    with pytest.raises(OutputExistsError, match=r"table\.json exists and is not a table of this script"):
        compare.check_output(output)
    compare.write_facts(tmp_path / "other", TARGET, [], {})
    compare.check_output(tmp_path / "other")
