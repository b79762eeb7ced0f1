"""The command line: `nsm export` (also `nsm-export`), `parity`, `bench`, `build`, `inspect`, `doctor`, `run`.

Torch is imported by `export` alone, so the other commands work on a machine that has numpy and one backend.
"""

from __future__ import annotations

import contextlib
import functools
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from nsm.errors import BuildError, NsmError, UncheckedWarning
from nsm.export.cli.signals import ending_cleanly
from nsm.files import settled

_TARGET_HELP = "onnx, onnxruntime (ort), openvino (ov), tensorrt (trt), onnxruntime-cuda (cuda), mobile, web or triton."
_DEVICE_HELP = (
    "Hardware to build for. tensorrt: portable, current, or a compute capability such as sm86. int8 on CPUs: cpu-dot, "
    "only CPUs with VNNI (dotprod on Arm), where int8 is more accurate.  [default: any device of the target]"
)


class _NsmCommand(click.Command):
    """Print an error as one message on stderr, exit with its code; clean up on SIGTERM."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with ending_cleanly(), _shown_warnings():
                return super().invoke(ctx)
        except (NsmError, OSError) as error:
            if ctx.params.get("verbose"):
                traceback.print_exc()
            # OSErrors, such as a full disk, have no exit code: they count as a failed build.
            code = error.exit_code if isinstance(error, NsmError) else BuildError.exit_code
            click.echo(f"Error: {error}", err=True)
            ctx.exit(code)


@contextlib.contextmanager
def _shown_warnings() -> Iterator[None]:
    """Print warnings of nsm as one line on stderr, without the source line."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def one_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, UncheckedWarning):
                click.echo(f"Warning: {message}", err=True)
            else:
                show(message, category, *place, **more)

        warnings.showwarning = one_line
        warnings.simplefilter("always", UncheckedWarning)
        yield


class _NsmGroup(click.Group):
    command_class = _NsmCommand


def _shared(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every command has."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else there.")
    @click.option("-v", "--verbose", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        kwargs.pop("verbose")  # read by _NsmCommand
        command(*args, **kwargs)

    return wrapper


def _low_precision(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of the acceptance check."""
    share = click.option(
        "--max-fp32-share",
        type=float,
        default=0.3,
        show_default=True,
        metavar="X",
        help="Largest share of the weights that the acceptance check may keep in fp32 to meet the error budget.",
    )
    slower = click.option(
        "--allow-slower", is_flag=True, help="Accept low precision that is not faster than fp32 on this machine."
    )
    budget = click.option(
        "--budget",
        "budgets",
        multiple=True,
        metavar="NAME=VALUE",
        help="Accept errors of an output or state up to VALUE, relative, or up to abs:VALUE. The bundle records "
        "it, and nsm parity shows it. Repeatable.",
    )
    return share(slower(budget(command)))


def _precision(default: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the option for the precision of an artifact; `default` is the help text for its default."""
    text = f"Precision of the artifact: fp32, fp16, bf16, int8 or int8-weights.  [default: {default}]"
    return click.option("-p", "--precision", metavar="P", help=text)


_ONE = "fp32 if the bundle has it for this target, otherwise the target's only precision"

_PRECISIONS = click.option(
    "-p", "--precision", "precisions", multiple=True, metavar="P", help="Only artifacts of this precision. Repeatable."
)


def with_mobile(targets: tuple[str, ...]) -> tuple[str, ...]:
    """Return the targets plus `mobile`, which converts the onnxruntime graphs to .ort files."""
    from nsm.errors import InputError
    from nsm.runtimes import find_target

    if "onnxruntime" not in [find_target(name).name for name in targets]:
        raise InputError("--mobile requires --target onnxruntime. Add it, or give --target mobile alone.")
    return (*targets, "mobile")


def _say_if_replaced() -> None:
    """Print a hint if the current directory was inside a bundle that has been replaced."""
    try:
        Path.cwd()
    except FileNotFoundError:
        click.echo('Your current directory was replaced. Enter the new one: cd "$PWD"', err=True)


_HELP = {"help_option_names": ["-h", "--help"]}


@click.group(cls=_NsmGroup, context_settings=_HELP)
@click.version_option(package_name="nsm-toolkit", prog_name="nsm")
def main() -> None:
    """Export stateful sequence models from PyTorch, and verify them over whole streams.

    \b
    nsm export model.pt --target openvino     build an artifact and verify it
    nsm parity model.nsm                      verify it again on the deployment machine
    nsm bench model.nsm                       measure latency, throughput and memory
    nsm run model.nsm --data sequences.npy    run it on sequences
    """


@main.command(short_help="Build a verified bundle from a model.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-t", "--target", "targets", multiple=True, required=True, metavar="T", help=_TARGET_HELP + " Repeatable."
)
@click.option(
    "-p",
    "--precision",
    default="fp32",
    show_default=True,
    metavar="P",
    help="Precision to build: fp32, fp16, bf16, int8 or int8-weights; see docs/precision.md.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Bundle to write.  [default: the name of MODEL with .nsm]"
)
@click.option(
    "--tokens-per-call",
    type=int,
    metavar="K",
    help="Tokens per call, a multiple of the model's chunk.  [default: one chunk]",
)
@click.option(
    "--batch", type=int, default=1, show_default=True, metavar="B", help="Lanes: streams that one call processes."
)
@click.option(
    "--opset",
    type=click.IntRange(18, 23),
    metavar="N",
    help="ONNX operator set.  [default: 20, or the operator set of a foreign .onnx if newer]",
)
@click.option("--device", metavar="D", help=_DEVICE_HELP)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Sequences for the parity check: .npy, .npz or .txt.  [default: the sequences in MODEL]",
)
@click.option("--num-samples", type=int, default=8, show_default=True, metavar="N", help="Streams in the parity check.")
@click.option(
    "--golden-steps",
    type=int,
    metavar="N",
    help="Calls per stream in the parity check.  [default: 64; 200 in low precision]",
)
@click.option(
    "--state",
    "states",
    multiple=True,
    metavar="PAST=PRESENT[:INIT]",
    help="Foreign model: a state as its input, its output, and optionally a .npy file with its initial value. "
    "Repeatable; if given, name all states.",
)
@click.option("--input", metavar="NAME", help="Foreign .onnx: the input that takes the tokens.")
@click.option(
    "--no-state",
    "no_states",
    multiple=True,
    metavar="NAME",
    help="Foreign .onnx: an output that is not a state, although its name suggests one. Repeatable.",
)
@click.option(
    "--constant",
    "constants",
    multiple=True,
    metavar="NAME=VALUE",
    help="Foreign .onnx: an input with a fixed value, for example sr=16000. Repeatable.",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME=SIZES",
    help="Foreign .onnx: the sizes of an input's dynamic axes, for example input=batch,576. Repeatable.",
)
@click.option(
    "--offline",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Foreign model: its .pt2 or .onnx over whole sequences [1, T, ...], to compare the step with.",
)
@click.option("--vocab-size", type=int, metavar="N", help="Foreign model over ids: the number of ids.")
@click.option(
    "--capacity",
    type=int,
    metavar="N",
    help="Foreign model: the most tokens of a stream before a reset.  [default: found by experiment]",
)
@_low_precision
@click.option(
    "--debug-outputs",
    is_flag=True,
    help="Add outputs for debugging: routing.{layer} [B, K, heads, slots] and, for adaptive slots, mask.{layer}.",
)
@click.option("--compact", is_flag=True, help="Remove slots that no calibration sequence uses, and report the savings.")
@click.option("--mobile", is_flag=True, help="With onnxruntime: build the target mobile (.ort files) as well.")
@click.option("--require-parity", is_flag=True, help="Fail (exit 5) if a target cannot be checked on this machine.")
@click.option(
    "--strict", is_flag=True, help="With several targets: write all or none.  [default: the targets that pass]"
)
@click.option("--dry-run", is_flag=True, help="Check the request, the model and the data; write nothing.")
@click.option("--force", is_flag=True, help="Replace the bundle if it exists.")
@_shared
def export(model: Path, as_json: bool, dry_run: bool, mobile: bool, **options: Any) -> None:
    """Build a verified bundle from MODEL: a .pt written by nsm.save, a .pt2 of torch.export, or an .onnx.

    The command exports the model to ONNX, builds each target, and compares each target with the PyTorch reference
    over whole streams. The bundle contains the targets whose errors are within the budget. The manifest lists the
    other targets with the reason; the exit code is that of the first failure.

    \b
    nsm-export model.pt --target openvino
    nsm-export model.pt -t onnxruntime -t openvino -t tensorrt --device sm86 -o model.nsm
    nsm-export vad.onnx -t openvino --constant sr=16000 --shape input=batch,576 --data frames.npy

    Exit codes: 0 good, 2 usage, 3 missing or unsupported, 4 build failed, 5 parity failed (the bundle is kept as
    NAME.nsm.failed), 6 damaged bundle, 7 not faster than fp32.
    """
    from nsm.export.cli import export as export_command

    if mobile:
        options["targets"] = with_mobile(options["targets"])
    command = shlex.join(["nsm-export", *sys.argv[2 if sys.argv[1:2] == ["export"] else 1 :]])
    export_command.export(model, as_json, dry_run, {**options, "command": command})
    if not as_json:
        _say_if_replaced()


@main.command(short_help="Verify a bundle again by replaying its golden trace.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-t", "--target", metavar="T", help=_TARGET_HELP + "  [default: all in the bundle]")
@_precision("all in the bundle")
@click.option("--steps", type=int, metavar="N", help="Compare only the first N steps.  [default: all recorded]")
@click.option("--bisect", "bisected", is_flag=True, help="Find the operation or state that causes the error.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a report with plots to FILE.")
@_shared
def parity(
    bundle: Path,
    target: str | None,
    precision: str | None,
    steps: int | None,
    bisected: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """Replay the golden trace of BUNDLE on its targets and compare with the reference. Does not need torch.

    \b
    nsm parity model.nsm                              all targets that run here
    nsm parity model.nsm -t openvino --bisect         find the operation or state that causes the error
    nsm parity model.nsm --html parity.html           write a report with plots

    --bisect runs each step from the reference's states. If the one-step error is over budget, it reports the first
    operation whose output differs although its inputs agree. If only the free-run error is over budget, it reports
    the state that reduces the error most when it is replaced by the reference's. --bisect needs onnx and onnxruntime,
    and works for onnx, onnxruntime and openvino.

    Exits with 5 if a target is over budget, or if no target could be compared.
    """
    from nsm.export.cli import parity as parity_command

    parity_command.parity(bundle, target, precision, steps, as_json, bisected, html)


@main.command(short_help="Measure a bundle, or every target and precision of a model.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-t",
    "--target",
    "--targets",
    "targets",
    multiple=True,
    metavar="T",
    help=_TARGET_HELP + " Repeatable.  [default: all that run here]",
)
@_PRECISIONS
@click.option(
    "--against", metavar="OTHER", help="Compare with another bundle, or with PyTorch: BUNDLE2, eager or compile."
)
@click.option(
    "--model", type=click.Path(path_type=Path), help="The checkpoint of the bundle, for --against eager or compile."
)
@click.option("--all", "everything", is_flag=True, help="Build and measure every target and precision of MODEL.pt.")
@click.option(
    "--overhead", "wrapper", is_flag=True, help="Measure the time that a session adds to a call of the backend."
)
@click.option("--steps", type=int, metavar="N", help="Timed calls per artifact.  [default: 500; 2500 with --overhead]")
@click.option(
    "--threads",
    type=int,
    metavar="N",
    help="Threads of the backend and torch.  [default: 1 for a small model, otherwise the library's default]",
)
@_shared
def bench(
    bundle: Path,
    targets: tuple[str, ...],
    precisions: tuple[str, ...],
    against: str | None,
    model: Path | None,
    everything: bool,
    wrapper: bool,
    steps: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure latency, single-token latency and memory of BUNDLE's targets on the recorded inputs.

    The targets are measured in turns within each round, so that other load on the machine affects all of them alike.
    A speed is the median over rounds of the ratio within a round, with its 95 % interval. An interval that contains 1
    means: no difference found.

    \b
    nsm bench model.nsm                                      all targets of a bundle
    nsm bench model.nsm -t openvino --threads 1              one target, on one core
    nsm bench small.nsm --against model.nsm                  two bundles, target by target
    nsm bench model.nsm --against eager --model model.pt     against PyTorch; or compile, for torch.compile
    nsm bench --all model.pt                                 build and measure every target and precision
    nsm bench model.nsm --overhead                           the time that a session adds to a call

    The table of --all shows the size, the speed relative to fp32 on the same target, and the error of each precision.
    If a combination cannot be built, its row gives the reason. Give --steps 2000 for narrower intervals.
    """
    from nsm.errors import InputError

    if wrapper:
        if everything or against is not None or model is not None:
            raise InputError("--overhead measures a bundle by itself. Leave out --all, --against and --model.")
        from nsm.export.cli.bench import measure_overhead

        measure_overhead(bundle, targets, precisions, steps, threads, as_json)
        return
    steps = 500 if steps is None else steps
    if everything:
        if against is not None or model is not None:
            raise InputError(
                "--all compares each precision with the target's fp32; --against and --model compare a bundle. Give "
                "one or the other."
            )
        from nsm.export.cli.bench import bench_all

        bench_all(bundle, targets, precisions, steps, threads, as_json)
        return
    from nsm.export.cli.bench import bench_bundle

    bench_bundle(bundle, targets, precisions, steps, threads, against, model, as_json)


@main.command(short_help="Compare a step with the roofline of this machine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-t", "--target", metavar="T", help=_TARGET_HELP + "  [default: the first that passed and runs here]")
@_precision(_ONE)
@click.option(
    "--threads",
    type=int,
    metavar="N",
    help="Threads of the backend.  [default: 1 for a small model, otherwise the backend's default]",
)
@_shared
def roofline(bundle: Path, target: str | None, precision: str | None, threads: int | None, as_json: bool) -> None:
    """Measure how close each entry of BUNDLE comes to the roofline of its target on this machine.

    The roofline of a graph is the sum over its operations of max(FLOPs / peak, bytes / bandwidth). The command
    measures the peak and the bandwidth on large MatMuls of the same target.
    """
    from nsm.export.cli.bench import roofline as roofline_command

    roofline_command(bundle, target, precision, threads, as_json)


@main.command(short_help="Build a target from a bundle's ONNX, without torch.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-t", "--target", required=True, metavar="T", help=_TARGET_HELP)
@click.option("--device", metavar="D", help=_DEVICE_HELP)
@click.option(
    "-p",
    "--precision",
    default="fp32",
    show_default=True,
    metavar="P",
    help="Precision to build: fp32, fp16, bf16, int8 or int8-weights.",
)
@_low_precision
@click.option("--force", is_flag=True, help="Replace an existing artifact of this target and precision.")
@_shared
def build(
    bundle: Path,
    target: str,
    device: str | None,
    precision: str,
    max_fp32_share: float,
    allow_slower: bool,
    budgets: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Build a target from the ONNX graphs in BUNDLE, on the machine that will run it. Does not need torch.

    The command checks the artifact on the golden trace and adds it to the bundle. A bundle holds one artifact per
    target and precision; --force replaces an existing one.

    \b
    nsm build model.nsm -t openvino -p int8       add int8 beside fp32
    nsm run model.nsm -t openvino -p int8         run it
    """
    from nsm.export.cli.build import build as build_command
    from nsm.export.verify import Limits
    from nsm.runtimes.parity import parse_budgets

    limits = Limits(max_fp32_share, allow_slower, parse_budgets(budgets))
    build_command(settled(bundle), target, device, precision, limits, force, as_json)
    if not as_json:
        _say_if_replaced()


@main.command(short_help="Score a folder of long sequences.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File for the scores, .jsonl.")
@click.option("-t", "--target", metavar="T", help=_TARGET_HELP + "  [default: the first that passed and runs here]")
@_precision(_ONE)
@click.option(
    "--workers", type=int, default=1, show_default=True, metavar="N", help="Processes; more than 1 needs the extra ray."
)
@click.option("--threads", type=int, default=1, show_default=True, metavar="N", help="Threads per process.")
@click.option("--force", is_flag=True, help="Start over: discard the scores in the output file.")
@_shared
def score(
    bundle: Path,
    folder: Path,
    output: Path,
    target: str | None,
    precision: str | None,
    workers: int,
    threads: int,
    force: bool,
    as_json: bool,
) -> None:
    """Score every sequence in FOLDER (.npy, .npz, .txt) with BUNDLE, each from a fresh state.

    For a model that predicts the next id, the score is nats per token and perplexity; for any other model, the last
    output and the mean of each output. The command appends one line of JSON per finished sequence, so the same command
    continues an interrupted run. Sequences that cannot be scored are listed at the end (exit code 2); the next run
    tries them again.

    \b
    nsm score language.nsm texts/ -o scores.jsonl
    nsm score language.nsm texts/ -o scores.jsonl --workers 8
    """
    from nsm.export.cli.run import score_folder

    score_folder(bundle, folder, output, target, precision, workers, threads, force, as_json)


@main.command(short_help="Show the contents of a bundle, or the states of an ONNX file.")
@click.argument("path", metavar="BUNDLE|FILE.onnx", type=click.Path(path_type=Path))
@click.option(
    "-t", "--target", "targets", multiple=True, metavar="T", help="Only artifacts of this target. Repeatable."
)
@_PRECISIONS
@_shared
def inspect(path: Path, targets: tuple[str, ...], precisions: tuple[str, ...], as_json: bool) -> None:
    """Verify the files of BUNDLE, and show its inputs, outputs, states, sizes, precision and provenance.

    For FILE.onnx: show inputs, outputs, likely states with the evidence, and the command that exports the file.
    """
    if path.suffix.lower() == ".onnx":
        if targets or precisions:
            raise click.UsageError("--target and --precision choose artifacts of a bundle; an .onnx file has none.")
        from nsm.export.analysis import inspect_onnx

        inspect_onnx(path, as_json)
        return
    from nsm.export.cli.inspect import inspect as inspect_command

    inspect_command(path, targets, precisions, as_json)


@main.command(short_help="Show installed and missing packages and devices.")
@_shared
def doctor(as_json: bool) -> None:
    """Show the installed packages, the available devices, and how to install each missing package."""
    from nsm.export.cli.doctor import doctor as doctor_command

    doctor_command(as_json)


@main.command(short_help="Run a bundle on sequences, or generate text.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-t", "--target", metavar="T", help=_TARGET_HELP + "  [default: the first that passed and runs here]")
@_precision(_ONE)
@click.option(
    "--data", type=click.Path(path_type=Path), help="Sequences: .npy, .npz or .txt.  [default: the golden trace]"
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the outputs to this .npz.")
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
@click.option("--allow-failed", is_flag=True, help="Run an artifact that failed its parity check.")
@click.option("--prompt", metavar="TEXT", help="Generate text after this prompt, with a model over bytes.")
@click.option("--tokens", type=int, default=200, show_default=True, metavar="N", help="Tokens to generate.")
@click.option(
    "--temperature",
    type=float,
    default=1.0,
    show_default=True,
    help="Sampling temperature; 0 takes the most likely token.",
)
@click.option("--top-k", type=int, metavar="K", help="Sample from the K most likely tokens.  [default: all]")
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    metavar="P",
    help="Sample from the most likely tokens of total probability P.",
)
@click.option("--seed", type=int, metavar="N", help="Random seed; the same seed generates the same tokens.")
@_shared
def run(
    bundle: Path,
    target: str | None,
    precision: str | None,
    data: Path | None,
    output: Path | None,
    force: bool,
    allow_failed: bool,
    prompt: str | None,
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int | None,
    as_json: bool,
) -> None:
    """Run BUNDLE on sequences, each from the initial state, and write or summarize the outputs.

    With --prompt, generate text with a model over bytes instead, token by token:

    \b
    nsm run language.nsm --prompt "ROMEO:" --tokens 300 --temperature 0.8 --seed 1
    """
    from nsm.errors import InputError
    from nsm.export.cli.run import generate
    from nsm.export.cli.run import run as run_command
    from nsm.runtimes.generate import Sampler

    if prompt is None:
        context = click.get_current_context()
        names = ("tokens", "temperature", "top_k", "top_p", "seed")
        given = [name for name in names if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise InputError(f"{options} require --prompt. Give --prompt to generate text, or leave them out.")
        run_command(bundle, target, precision, data, output, force, allow_failed, as_json)
        return
    if data is not None or output is not None:
        raise InputError(
            "--prompt generates text; --data and --output run the model on sequences. Give one or the other."
        )
    sampler = Sampler(temperature, top_k, top_p, seed)
    generate(bundle, target, precision, allow_failed, prompt, tokens, sampler, as_json)


def export_main() -> None:
    """Run `nsm export` as the command `nsm-export`."""
    export.context_settings = _HELP
    export.main(prog_name="nsm-export")
