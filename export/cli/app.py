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
    "For tensorrt: portable, current, or a compute capability such as sm86. For int8 on processors: cpu-dot, for those "
    "with VNNI (or dotprod on Arm) only, where int8 is more exact.  [default: any of the kind]"
)


class _NsmCommand(click.Command):
    """A command whose errors become one message on stderr and the error's exit code; SIGTERM ends it cleanly."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with ending_cleanly(), _shown_warnings():
                return super().invoke(ctx)
        except (NsmError, OSError) as error:
            if ctx.params.get("verbose"):
                traceback.print_exc()
            # An error of the operating system, such as a full disk, is a failed build.
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
    """The options that every command has."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else there.")
    @click.option("-v", "--verbose", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        kwargs.pop("verbose")  # read by _NsmCommand
        command(*args, **kwargs)

    return wrapper


def _low_precision(command: Callable[..., None]) -> Callable[..., None]:
    """The options that limit the cost of low precision."""
    share = click.option(
        "--max-fp32-share",
        type=float,
        default=0.3,
        show_default=True,
        metavar="X",
        help="Largest share of the weights that may stay in fp32 to meet the error budget.",
    )
    slower = click.option("--allow-slower", is_flag=True, help="Keep low precision that is not faster than fp32 here.")
    return share(slower(command))


def _precision(default: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The option that says in which precision an artifact is; `default` is the help for leaving it out."""
    text = f"Of the artifact: fp32, fp16, bf16, int8 or int8-weights.  [default: {default}]"
    return click.option("-p", "--precision", metavar="P", help=text)


_ONE = "fp32 where the target is there in it, or else its only one"

_PRECISIONS = click.option(
    "-p", "--precision", "precisions", multiple=True, metavar="P", help="Only in this precision. Repeatable."
)


def with_mobile(targets: tuple[str, ...]) -> tuple[str, ...]:
    """The targets of `--mobile`: onnxruntime in its .ort form as well."""
    from nsm.errors import InputError
    from nsm.runtimes import find_target

    if "onnxruntime" not in [find_target(name).name for name in targets]:
        raise InputError("--mobile belongs to --target onnxruntime. Give that too, or --target mobile alone.")
    return (*targets, "mobile")


def _say_if_replaced() -> None:
    """Tell a person whose current directory was in a bundle that another took its place."""
    try:
        Path.cwd()
    except FileNotFoundError:
        click.echo('The folder you are in was replaced. Go into the new one: cd "$PWD"', err=True)


_HELP = {"help_option_names": ["-h", "--help"]}


@click.group(cls=_NsmGroup, context_settings=_HELP)
@click.version_option(package_name="nsm-toolkit", prog_name="nsm")
def main() -> None:
    """Take a stateful sequence model from PyTorch to where it runs, with proof over a whole stream.

    \b
    nsm export model.pt --target openvino     build and verify an artifact
    nsm parity model.nsm                      verify it again, where it is deployed
    nsm bench model.nsm                       measure it
    nsm run model.nsm --data sequences.npy    use it
    """


@main.command(short_help="Build a verified bundle from a checkpoint.")
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
    help="fp32, fp16, bf16, int8 or int8-weights; see docs/precision.md.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The bundle to write.  [default: MODEL's name .nsm]"
)
@click.option(
    "--tokens-per-call",
    type=int,
    metavar="K",
    help="Tokens per call, a multiple of the model's chunk.  [default: one chunk]",
)
@click.option("--batch", type=int, default=1, show_default=True, metavar="B", help="Streams side by side (lanes).")
@click.option(
    "--opset",
    type=click.IntRange(18, 23),
    metavar="N",
    help="ONNX operator set.  [default: 20, or that of a foreign .onnx if it is newer]",
)
@click.option("--device", metavar="D", help=_DEVICE_HELP)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Sequences to check on: .npy, .npz or .txt.  [default: those in MODEL]",
)
@click.option("--num-samples", type=int, default=8, show_default=True, metavar="N", help="Streams to check on.")
@click.option(
    "--golden-steps", type=int, metavar="N", help="Calls per stream to check.  [default: 64; 200 in low precision]"
)
@click.option(
    "--state",
    "states",
    multiple=True,
    metavar="PAST=PRESENT[:INIT]",
    help="Of a foreign model: an input, the output that comes back as it, and a .npy it starts from. Repeatable: with "
    "one, name all.",
)
@click.option("--input", metavar="NAME", help="Of a foreign ONNX graph: the input that takes tokens.")
@click.option(
    "--no-state",
    "no_states",
    multiple=True,
    metavar="NAME",
    help="Of a foreign ONNX graph: an output that is no state, whatever it is called. Repeatable.",
)
@click.option(
    "--constant",
    "constants",
    multiple=True,
    metavar="NAME=VALUE",
    help="Of a foreign ONNX graph: an input that never changes. Repeatable.",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME=SIZES",
    help="Of a foreign ONNX graph: sizes of an input's open axes, say input=batch,576. Repeatable.",
)
@click.option(
    "--offline",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Of a foreign model: its .pt2 or .onnx over whole sequences [1, T, ...]; the step is compared with it.",
)
@click.option("--vocab-size", type=int, metavar="N", help="Of a foreign model over ids: how many there are.")
@click.option(
    "--capacity",
    type=int,
    metavar="N",
    help="Of a foreign model: tokens that a stream may have until its reset.  [default: found by experiment]",
)
@_low_precision
@click.option(
    "--debug-outputs",
    is_flag=True,
    help="Add outputs to look inside: routing.{layer} [B, K, heads, slots] and, where slots adapt, mask.{layer}.",
)
@click.option("--compact", is_flag=True, help="Remove slots that no calibration sequence uses, and report the savings.")
@click.option("--mobile", is_flag=True, help="With onnxruntime: build its .ort form as well, the target mobile.")
@click.option("--require-parity", is_flag=True, help="Fail (exit 5) if a target could not be checked on this machine.")
@click.option("--strict", is_flag=True, help="Of several targets, keep all or none.  [default: those that pass]")
@click.option("--dry-run", is_flag=True, help="Check the request, the model and the data; write nothing.")
@click.option("--force", is_flag=True, help="Replace the bundle if it exists.")
@_shared
def export(model: Path, as_json: bool, dry_run: bool, mobile: bool, **options: Any) -> None:
    """Build a verified bundle from MODEL: a .pt written by nsm.save, a .pt2 of torch.export, or an .onnx.

    The model is exported to ONNX, built for every target, and run there over whole streams next to the PyTorch
    reference. The bundle contains the targets whose errors are within the budget. The manifest lists the others with
    the reason, and the exit code is that of the first failure.

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
@click.option("--bisect", "bisected", is_flag=True, help="Name the operation or the state that is at fault.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page with the pictures to FILE.")
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
    """Replay the golden trace of BUNDLE on its targets and compare. Needs no torch.

    \b
    nsm parity model.nsm                              all targets that run here
    nsm parity model.nsm -t openvino --bisect         and which operation or state is at fault
    nsm parity model.nsm --html parity.html           and a page to look at

    --bisect steps the target from the reference's states. If that is over budget, it names the first operation whose
    output differs although its inputs agree. If only the free run is over budget, it names the state whose
    replacement by the reference's state helps most. It needs onnx and onnxruntime, and works for onnx,
    onnxruntime and openvino.

    Exits with 5 if a target is over budget, or if none could be compared.
    """
    from nsm.export.cli import parity as parity_command

    parity_command.parity(bundle, target, precision, steps, as_json, bisected, html)


@main.command(short_help="Measure a bundle, or all that can be made of a model.")
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
@click.option("--steps", type=int, metavar="N", help="Timed calls of each.  [default: 500; 2500 with --overhead]")
@click.option(
    "--threads",
    type=int,
    metavar="N",
    help="Threads of the backend and torch.  [default: one for a small model, else their own choice]",
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
    """Measure a step of BUNDLE on its targets, on its recorded inputs: latency, single tokens, memory.

    All that is measured takes turns, so that whatever else the machine does reaches all alike. A speed is the median
    over rounds of a ratio within the round, with its 95 % interval: where that holds 1, no difference was found.

    \b
    nsm bench model.nsm                                      its targets, side by side
    nsm bench model.nsm -t openvino --threads 1              one of them, on one core
    nsm bench small.nsm --against model.nsm                  two bundles, target by target
    nsm bench model.nsm --against eager --model model.pt     PyTorch; or compile, for torch.compile
    nsm bench --all model.pt                                 every target and precision, built and measured
    nsm bench model.nsm --overhead                           the time that a session adds to a call

    The table of --all shows the size, the speed relative to fp32 on the same target, and the error of each precision; a
    combination that cannot be built has the reason in its line. Give --steps 2000 for narrower intervals.
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
                "--all compares each precision with the target's fp32; --against and --model belong to measuring a "
                "bundle. Give one or the other."
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
    help="Threads of the backend.  [default: one for a small model, else its own choice]",
)
@_shared
def roofline(bundle: Path, target: str | None, precision: str | None, threads: int | None, as_json: bool) -> None:
    """Measure the peak of BUNDLE's target on large MatMuls, and the share of it that each entry reaches.

    The roofline of a graph is the sum over its operations of max(FLOPs / peak, bytes / bandwidth).
    """
    from nsm.export.cli.bench import roofline as roofline_command

    roofline_command(bundle, target, precision, threads, as_json)


@main.command(short_help="Build a target from a bundle's ONNX, without torch.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-t", "--target", required=True, metavar="T", help=_TARGET_HELP)
@click.option("--device", metavar="D", help=_DEVICE_HELP)
@click.option("-p", "--precision", default="fp32", show_default=True, metavar="P", help="As of nsm-export.")
@_low_precision
@click.option("--force", is_flag=True, help="Replace the artifact of that target and precision if there is one.")
@_shared
def build(
    bundle: Path,
    target: str,
    device: str | None,
    precision: str,
    max_fp32_share: float,
    allow_slower: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Build a target from the ONNX in BUNDLE, on the machine that will run it. Needs no torch.

    The artifact is checked on the golden trace and added to the bundle. A bundle holds one for each target and
    precision; with --force that one is replaced.

    \b
    nsm build model.nsm -t openvino -p int8       beside the one in fp32
    nsm run model.nsm -t openvino -p int8         and used
    """
    from nsm.export.cli.build import build as build_command
    from nsm.export.verify import Limits

    limits = Limits(max_fp32_share, allow_slower)
    build_command(settled(bundle), target, device, precision, limits, force, as_json)
    if not as_json:
        _say_if_replaced()


@main.command(short_help="Score a folder of long sequences.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The file of results, .jsonl.")
@click.option("-t", "--target", metavar="T", help=_TARGET_HELP + "  [default: the first that passed and runs here]")
@_precision(_ONE)
@click.option(
    "--workers", type=int, default=1, show_default=True, metavar="N", help="Processes, by Ray Data (extra ray)."
)
@click.option("--threads", type=int, default=1, show_default=True, metavar="N", help="Threads of each.")
@click.option("--force", is_flag=True, help="Start over, whatever the file of results has.")
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

    A model that predicts the next id gives nats a token and perplexity, any other its last answer and the means of its
    outputs. One line of JSON is appended per finished sequence, so the same command continues an
    interrupted run. Sequences that cannot be scored are listed at the end (exit code 2) and retried by the next run.

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
    """Show inputs, outputs, states, sizes, precision and provenance of BUNDLE, after verifying its files.

    For FILE.onnx: show inputs, outputs, likely states with the evidence, and the command that exports it.
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
    """Show the installed packages, the devices, and the command that installs each missing package."""
    from nsm.export.cli.doctor import doctor as doctor_command

    doctor_command(as_json)


@main.command(short_help="Feed sequences to a bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-t", "--target", metavar="T", help=_TARGET_HELP + "  [default: the first that passed and runs here]")
@_precision(_ONE)
@click.option(
    "--data", type=click.Path(path_type=Path), help="Sequences: .npy, .npz or .txt.  [default: the recorded ones]"
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the outputs to this .npz.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@click.option("--allow-failed", is_flag=True, help="Run an artifact that failed its parity check.")
@click.option("--prompt", metavar="TEXT", help="Generate: text that a model over bytes goes on with.")
@click.option("--tokens", type=int, default=200, show_default=True, metavar="N", help="Tokens to generate.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="0 takes the most likely token.")
@click.option("--top-k", type=int, metavar="K", help="Draw from the K most likely tokens.  [default: all]")
@click.option(
    "--top-p", type=float, default=1.0, show_default=True, metavar="P", help="Draw from the likeliest share P."
)
@click.option("--seed", type=int, metavar="N", help="The same seed draws the same tokens.")
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
    """Feed sequences to BUNDLE, each from the initial state, and write or summarize the outputs.

    With --prompt a model over bytes writes text instead, token by token:

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
            raise InputError(f"{options} belong to generating text. Give a --prompt to begin with, or leave them out.")
        run_command(bundle, target, precision, data, output, force, allow_failed, as_json)
        return
    if data is not None or output is not None:
        raise InputError(
            "--prompt generates text; --data and --output belong to feeding sequences. Give one or the other."
        )
    sampler = Sampler(temperature, top_k, top_p, seed)
    generate(bundle, target, precision, allow_failed, prompt, tokens, sampler, as_json)


def export_main() -> None:
    """Entry point of `nsm-export`: the command `nsm export` by itself."""
    export.context_settings = _HELP
    export.main(prog_name="nsm-export")
