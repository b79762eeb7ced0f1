"""Streams that go far, or to the end of a table: exported, and beside a loop that uses nothing of ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nsm
from nsm.baselines import TransformerLM
from nsm.bundle import Bundle
from nsm.errors import ConfigError, StreamError, UnsupportedError
from nsm.export.analysis.roofline import calls_of
from nsm.export.verify.another_target import add_target
from nsm.export.verify.capacity import declared_counters, with_assumed_limit
from nsm.manifest import Artifact
from nsm.results import ParityResult
from nsm.runtimes.bench.session_overhead import overhead
from nsm.runtimes.session.session import Session
from nsm.runtimes.targets import TARGETS, Target
from nsm.staging import write_manifest
from tests.export.helpers import invoke, refused, succeeded, the_json

TARGETS_HERE = ["onnxruntime", "openvino"]
WIDTH = 4


class Count(nn.Module):
    """A phase from a counter of samples, 441 a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, n: Tensor, h: Tensor) -> Any:
        phase = (n % 1000).float() / 1000
        h = torch.tanh(self.l(x) + 0.5 * h + phase[:, None])
        return h, n + 441, h


class Clock(Count):
    """The same counter, also as a number: it cannot be kept small."""

    def forward(self, x: Tensor, n: Tensor, h: Tensor) -> Any:
        y, after, h = super().forward(x, n, h)
        return y + torch.log1p(n.float())[:, None], after, h


class Ring(nn.Module):
    """A delay line, read three frames back."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, n: Tensor, ring: Tensor) -> Any:
        place = torch.div(n, 441, rounding_mode="floor") % 16
        ring = ring.scatter(1, place[:, None, None].expand(-1, 1, WIDTH), x[:, None])
        read = ring.gather(1, ((place + 13) % 16)[:, None, None].expand(-1, 1, WIDTH))
        return self.l(read[:, 0]), n + 441, ring


class Log(nn.Module):
    """Keeps what it was given, each at its place."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, table: Tensor, position: Tensor) -> Any:
        table = table.index_copy(1, position, self.l(x)[:, None])
        return table.sum(1), table, position + 1


class Placed(nn.Module):
    """A row of a table for each position; behind the last the last one, as the model wants it."""

    def __init__(self, rows: int = 40) -> None:
        super().__init__()
        self.rows = rows
        self.e = nn.Embedding(rows, WIDTH)

    def forward(self, x: Tensor, position: Tensor) -> Any:
        return x + self.e(position.clamp(max=self.rows - 1)), position + 1


class Attention(nn.Module):
    """One head over a cache of keys and values that is written at a position, with a causal mask; ids in."""

    def __init__(self, rows: int = 48) -> None:
        super().__init__()
        self.rows = rows
        self.e, self.p = nn.Embedding(256, 8), nn.Embedding(rows, 8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 256)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Any:
        places = position[:, None] + torch.arange(x.shape[1])
        q, k, v = self.qkv(self.e(x) + self.p(places)).chunk(3, -1)
        index = places[:, :, None].expand(-1, -1, 8)
        keys, values = keys.scatter(1, index, k), values.scatter(1, index, v)
        scores = q @ keys.transpose(1, 2) / 8**0.5
        scores = scores.masked_fill(torch.arange(self.rows)[None, None] > places[:, :, None], -1e9)
        return self.out(scores.softmax(-1) @ values), keys, values, position + x.shape[1]


def zero(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


COUNTER = zero(1, dtype=torch.int64)
STARTS: dict[type[nn.Module], list[Tensor]] = {
    Count: [COUNTER, zero(1, WIDTH)],
    Clock: [COUNTER, zero(1, WIDTH)],
    Ring: [COUNTER, zero(1, 16, WIDTH)],
    Log: [zero(1, 100, WIDTH), COUNTER],
    Placed: [COUNTER],
    Attention: [zero(1, 48, 8), zero(1, 48, 8), COUNTER],
}


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def stepped(kind: type[nn.Module], **options: Any) -> nsm.models.base.StepModel:
    states: list[Any] = list(STARTS[kind])
    if kind is Log:  # one position for all rows of the table
        states[1] = nsm.Carried("position", COUNTER, None)
    tokens: dict[str, Any] = {"token_shape": (WIDTH,)}
    if kind is Attention:
        tokens = {"vocab_size": 256, "timed": True, "chunk_size": 4}
    return nsm.as_step(made(kind), states, **tokens, **options)


class Bundles(dict[type[nn.Module], Bundle]):
    """A bundle for each of the modules, exported when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, kind: type[nn.Module]) -> Bundle:
        path = self._folder / f"{kind.__name__}.nsm"
        self[kind] = nsm.export_model(stepped(kind), TARGETS_HERE, path, golden_steps=64)
        return self[kind]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    return Bundles(tmp_path_factory.mktemp("capacity"))


def frames(count: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


@torch.no_grad()
def loop(kind: type[nn.Module], x: np.ndarray, starts: list[Tensor] | None = None) -> np.ndarray:
    """Frame by frame through the module itself."""
    module, states, outputs = made(kind), list(STARTS[kind] if starts is None else starts), []
    for frame in torch.from_numpy(x):
        y, *states = module(frame[None], *states)
        outputs.append(y)
    return torch.cat(outputs).numpy()


def put(session: Session, **values: Any) -> None:
    """Fresh states, with some of them set."""
    session.reset()
    state = session.read_state()
    session.load_state({**state, **{name: np.broadcast_to(v, state[name].shape) for name, v in values.items()}})


# -- counters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Count, Ring])
@pytest.mark.parametrize("target", TARGETS_HERE)
def test_a_counter_that_is_used_in_remainders_runs_for_ever(
    kind: type[nn.Module], target: str, bundles: Bundles
) -> None:
    manifest = bundles[kind].manifest
    assert manifest.spec.capacity is None
    assert [item.limit for item in manifest.artifacts] == [None, None]
    base, period = manifest.spec.states[0].wrap
    x = frames(40)
    with nsm.open(bundles[kind], target) as session:
        # Around where it is wrapped, past what float32 and int32 hold, and months out.
        for n in (base + period - 441 * 7, 2**24 + 3, 2**31 - 441 * 5, 441 * 10**10 + 440):
            put(session, state_0=n)
            wanted = loop(kind, x, [torch.full((1,), n), STARTS[kind][1]])
            np.testing.assert_allclose(session.run(x)["outputs"], wanted, rtol=1e-4, atol=1e-5, err_msg=str(n))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Count, Ring])
@pytest.mark.parametrize("target", TARGETS_HERE)
def test_twenty_thousand_frames_are_what_the_module_gives(kind: type[nn.Module], target: str, bundles: Bundles) -> None:
    x = frames(20_000)
    with nsm.open(bundles[kind], target) as session:
        np.testing.assert_allclose(session.run(x)["outputs"], loop(kind, x), rtol=1e-4, atol=1e-5)


def test_a_counter_that_a_target_rounds_is_its_limit(bundles: Bundles) -> None:
    bundle = bundles[Clock]
    portable, vino = bundle.manifest.artifacts
    assert (bundle.manifest.spec.capacity, portable.limit) == (None, None)
    assert vino.limit is not None
    assert 2**24 // 441 - 16 < vino.limit <= 2**24 // 441 + 1
    assert any("is off by" in note for note in vino.notes)
    first = (vino.limit - 20) * 441
    x = frames(20)
    wanted = loop(Clock, x, [torch.full((1,), first), STARTS[Clock][1]])
    with nsm.open(bundle, "openvino") as session:
        put(session, state_0=first)
        np.testing.assert_allclose(session.run(x)["outputs"], wanted, rtol=1e-4, atol=1e-4)
        with pytest.raises(StreamError, match=rf"at most {vino.limit:,} tokens .* reset\(0\)"):
            session.run(x[:1])
        session.reset()
        session.run(x)
    with nsm.open(bundle, "onnxruntime") as session:
        assert session.tokens_left is None
        put(session, state_0=first + 441 * 100)
        wanted = loop(Clock, x, [torch.full((1,), first + 441 * 100), STARTS[Clock][1]])
        np.testing.assert_allclose(session.run(x)["outputs"], wanted, rtol=1e-4, atol=1e-4)


def test_a_snapshot_goes_from_a_target_without_the_limit_to_one_with_it(
    bundles: Bundles,
) -> None:
    with nsm.open(bundles[Clock], "onnxruntime") as session, nsm.open(bundles[Clock], "openvino") as limited:
        session.run(frames(7))
        limited.restore(session.snapshot())
        assert limited.tokens_left is not None
        assert limited.spec.capacity is not None
        assert limited.tokens_left.tolist() == [limited.spec.capacity - 7]


def test_a_snapshot_of_the_module_goes_on_where_the_counter_is_kept_small(
    bundles: Bundles,
) -> None:
    x = frames(30)
    with nsm.reference(stepped(Count)) as reference, nsm.open(bundles[Count], "openvino") as session:
        put(reference, state_0=2**40)
        session.restore(reference.snapshot())
        assert session.read_state()["state_0"][0] < 2**23
        np.testing.assert_allclose(session.run(x)["outputs"], reference.run(x)["outputs"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS_HERE)
def test_a_position_that_the_model_clamps_has_no_end_before_the_target_has(target: str, bundles: Bundles) -> None:
    assert bundles[Placed].manifest.spec.capacity is None
    x = frames(100)
    with nsm.open(bundles[Placed], target) as session:
        np.testing.assert_allclose(session.run(x)["outputs"], loop(Placed, x), rtol=1e-5, atol=1e-6)
        for n in (2**24 + 1, 2**31 - 50, 2**40):
            put(session, state_0=n)
            wanted = loop(Placed, x, [torch.full((1,), n)])
            np.testing.assert_allclose(session.run(x)["outputs"], wanted, rtol=1e-5, atol=1e-6)


def test_our_own_models_have_no_end(exported: Path, tmp_path: Path) -> None:
    counting = TransformerLM(20, 16, 1, 2, context=12, chunk_size=4).eval()
    ring = nsm.export_model(counting, TARGETS_HERE, tmp_path / "m.nsm", golden_steps=12)
    for bundle in (Bundle(exported), ring):
        assert bundle.manifest.spec.capacity is None
        assert all(item.limit is None for item in bundle.manifest.artifacts)
        with nsm.open(bundle, "openvino") as session:
            assert session.tokens_left is None


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS_HERE)
def test_a_table_ends_with_an_error_that_names_the_capacity(target: str, bundles: Bundles) -> None:
    assert bundles[Log].manifest.spec.capacity == 100
    x = frames(101)
    with nsm.open(bundles[Log], target) as session:
        np.testing.assert_allclose(session.run(x[:100])["outputs"], loop(Log, x[:100]), rtol=1e-4, atol=1e-4)
        state = session.read_state()
        with pytest.raises(StreamError, match=r"at most 100 tokens .* Lanes \[0\] have had \[100\] .* reset\(0\)"):
            session.step(x[100:].reshape(1, 1, WIDTH))
        for name, value in session.read_state().items():
            np.testing.assert_array_equal(value, state[name])
        session.reset()
        np.testing.assert_allclose(session.run(x[:9])["outputs"], loop(Log, x[:9]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS_HERE)
def test_a_cache_is_right_up_to_its_last_row(target: str, bundles: Bundles) -> None:
    assert bundles[Attention].manifest.spec.capacity == 48
    ids = np.random.default_rng(3).integers(0, 256, 48)
    with torch.no_grad():
        wanted = made(Attention)(torch.from_numpy(ids[None]), *STARTS[Attention])[0][0].numpy()
    with nsm.open(bundles[Attention], target) as session:
        given = np.concatenate([session.run(part)["outputs"] for part in np.split(ids, [5, 6, 33, 47])])
        np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-5)
        with pytest.raises(StreamError, match="at most 48 tokens"):
            session.run(ids[:1])


def test_the_overhead_needs_room_for_a_few_calls(tmp_path: Path) -> None:
    bundle = nsm.export_model(stepped(Log, capacity=6), "openvino", tmp_path / "log.nsm")
    with (
        nsm.open(bundle) as session,
        pytest.raises(UnsupportedError, match="more than 6 calls in a row; the model takes 6"),
    ):
        overhead(session, session.runtime, frames(4).reshape(4, 1, 1, WIDTH))


def test_who_serves_a_table_is_told_where_it_ends(tmp_path: Path) -> None:
    bundle = nsm.export_model(stepped(Log), "triton", tmp_path / "log.nsm")
    assert any("end each sequence after at most 100 tokens" in note for note in bundle.manifest.artifacts[0].notes)


class Short(Placed):
    """A table of a few rows, and nothing that stays behind its end."""

    def __init__(self) -> None:
        super().__init__(5)

    def forward(self, x: Tensor, position: Tensor) -> Any:
        return x + self.e(position), position + 1


def test_a_table_of_a_few_rows_ends_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nsm.as_step(Short(), [COUNTER], token_shape=(WIDTH,))
    bundle = nsm.export_model(model, TARGETS_HERE, tmp_path / "short.nsm")
    assert bundle.manifest.spec.capacity == 5
    assert bundle.trace().steps == 5
    assert [item.limit for item in bundle.manifest.artifacts] == [None, None]
    assert add_target(bundle.path, "openvino", force=True).limit is None


def test_golden_streams_end_with_the_capacity(bundles: Bundles) -> None:
    assert bundles[Attention].trace().steps == 12
    assert bundles[Log].trace().steps == 64
    assert bundles[Log].manifest.artifacts[0].parity.steps == 64


def test_a_declared_capacity_is_kept_and_held_against_the_model(tmp_path: Path) -> None:
    bundle = nsm.export_model(stepped(Log, capacity=30), "openvino", tmp_path / "log.nsm")
    assert bundle.manifest.spec.capacity == 30
    assert bundle.trace().steps == 30
    with nsm.open(bundle) as session, pytest.raises(StreamError, match="at most 30 tokens"):
        session.run(frames(31))
    with pytest.raises(
        ConfigError, match=r"declared capacity is 101 tokens, but the model fails after 100.*Declare 100"
    ):
        nsm.export_model(stepped(Log, capacity=101), "openvino", tmp_path / "more.nsm")
    with pytest.raises(ConfigError, match="capacity is at least 1 token; given 0"):
        stepped(Log, capacity=0)


def test_a_call_of_more_tokens_than_the_cache_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"(?s)fails in a call of 64 tokens.*out of range.*--tokens-per-call 1"):
        nsm.export_model(stepped(Attention), "onnxruntime", tmp_path / "m.nsm", tokens_per_call=64)


class Sometimes(Log):
    """Writes and moves on only where the frame is loud: nothing that the first calls show."""

    def forward(self, x: Tensor, table: Tensor, position: Tensor) -> Any:
        loud = x.mean(1) > 100
        table = table.scatter(1, position[:, None, None].expand(-1, 1, WIDTH), self.l(x)[:, None])
        return table.sum(1), table, position + loud.long()


def test_a_write_at_a_position_without_a_known_end_needs_a_capacity(tmp_path: Path) -> None:
    states = [zero(1, 100, WIDTH), COUNTER]
    torch.manual_seed(0)
    module = Sometimes()
    with pytest.raises(UnsupportedError, match=r"writes into a state at the position in the state state_1"):
        nsm.export_model(nsm.as_step(module, states, token_shape=(WIDTH,)), "openvino", tmp_path / "m.nsm")
    model = nsm.as_step(module, states, token_shape=(WIDTH,), capacity=100)
    bundle = nsm.export_model(model, TARGETS_HERE, tmp_path / "m.nsm", golden_steps=20)
    assert bundle.manifest.spec.capacity == 100
    with nsm.open(bundle, "openvino") as session:
        session.run(frames(100))
        with pytest.raises(StreamError, match="at most 100 tokens"):
            session.run(frames(1))


# -- the commands ------------------------------------------------------------------------------------------------------


def test_a_text_ends_with_the_cache(bundles: Bundles) -> None:
    path = bundles[Attention].path
    for target in TARGETS_HERE:
        result = invoke("run", path, "-t", target, "--prompt", "ab", "--tokens", "46", "--json")
        assert len(the_json(result)["text"].encode()) >= 46
        refused(
            invoke("run", path, "-t", target, "--prompt", "ab", "--tokens", "400", "--json"), 2, "at most 48 tokens"
        )


def test_commands_stay_within_the_capacity(bundles: Bundles, tmp_path: Path) -> None:
    path = bundles[Attention].path
    for command in (
        ("parity", path),
        ("bench", path, "-t", "openvino", "--steps", "60"),
        ("bench", path, "-t", "onnxruntime", "--steps", "500", "--overhead"),
        ("run", path, "-t", "openvino"),
    ):
        succeeded(invoke(*command))
    text = succeeded(invoke("inspect", path))
    assert "capacity: 48 tokens of a stream, then reset its lane" in text
    assert "limit: " not in text
    limit = bundles[Clock].manifest.artifacts[1].limit
    assert f"limit: {limit:,} tokens of a stream on openvino" in succeeded(invoke("inspect", bundles[Clock].path))
    (tmp_path / "texts").mkdir()
    np.save(tmp_path / "texts" / "short.npy", np.arange(40))
    np.save(tmp_path / "texts" / "long.npy", np.arange(60))
    message = refused(
        invoke("score", path, tmp_path / "texts", "-t", "openvino", "-o", tmp_path / "log.jsonl", "--json"), 2, "1 of 2"
    )
    assert "at most 48 tokens" in message
    with nsm.open(path, "openvino") as session:
        for call in calls_of(session).values():  # of the roofline
            session.reset()
            for _ in range(60):
                call()


@pytest.mark.filterwarnings("ignore")  # what torch says of its own deprecated parts
def test_a_foreign_file_is_exported_with_its_capacity(tmp_path: Path) -> None:
    inputs = (zero(1, WIDTH), zero(1, 100, WIDTH), COUNTER)
    program = torch.export.export(made(Log), inputs)
    torch.export.save(program, tmp_path / "log.pt2")
    outputs = list(program.graph_signature.user_outputs)
    states = [f"--state=table={outputs[1]}", f"--state=position={outputs[2]}"]
    base: list[str | Path] = ["export", tmp_path / "log.pt2", "-t", "openvino", *states]
    result = invoke(*base, "-o", tmp_path / "a.nsm", "--golden-steps", "300")
    assert "capacity: 100 tokens of a stream, then reset its lane" in succeeded(result)
    assert "Checked 100 calls per stream instead of 300" in " ".join(result.stderr.split())
    assert Bundle(tmp_path / "a.nsm").manifest.spec.capacity == 100
    succeeded(invoke(*base, "-o", tmp_path / "b.nsm", "--capacity", "20"))
    assert Bundle(tmp_path / "b.nsm").manifest.spec.capacity == 20
    onnx = tmp_path / "log.onnx"
    torch.onnx.export(
        made(Log),
        inputs,
        str(onnx),
        dynamo=True,
        input_names=["x", "table", "position"],
        output_names=["y", "table_out", "position_out"],
    )
    named: list[str | Path] = ["--state=table=table_out", "--state=position=position_out"]
    for options, capacity in (([], 100), (["--capacity", "20"], 20)):
        succeeded(invoke("export", onnx, "-t", "openvino", *named, "-o", tmp_path / "c.nsm", "--force", *options))
        assert Bundle(tmp_path / "c.nsm").manifest.spec.capacity == capacity


def test_a_checkpoint_takes_no_capacity(checkpoint: Path) -> None:
    refused(invoke("export", checkpoint, "-t", "openvino", "--capacity", "9"), 2, "--capacity apply to foreign")


# -- a target that is added --------------------------------------------------------------------------------------------


def test_a_target_that_is_added_gets_its_limit(bundles: Bundles, tmp_path: Path) -> None:
    bundle = nsm.export_model(stepped(Clock), "onnxruntime", tmp_path / "clock.nsm")
    artifact = add_target(bundle.path, "openvino")
    assert artifact.limit == bundles[Clock].manifest.artifacts[1].limit
    assert add_target(bundle.path, "onnxruntime", force=True).limit is None
    counted = nsm.export_model(stepped(Count), "onnxruntime", tmp_path / "count.nsm")
    assert add_target(counted.path, "openvino").limit is None


def test_without_a_portable_target_the_limit_is_assumed(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = nsm.export_model(stepped(Clock), "onnxruntime", tmp_path / "clock.nsm")
    real = Target.installed
    monkeypatch.setattr(Target, "installed", lambda self: None if self.name == "onnx" else real(self))
    assert add_target(bundle.path, "openvino").limit == 2**24 // 441
    del bundles


def test_an_artifact_that_was_not_run_has_the_limit_that_holds_everywhere(
    bundles: Bundles,
) -> None:
    spec = bundles[Clock].manifest.spec
    artifact = replace(bundles[Clock].manifest.artifacts[0], parity=ParityResult.not_run("no GPU"))
    counters = declared_counters(spec, bundles[Clock].state_init())
    assert with_assumed_limit(artifact, counters, None).limit == 2**24 // 441
    assert with_assumed_limit(artifact, counters, 100).limit is None
    assert declared_counters(bundles[Count].manifest.spec, bundles[Count].state_init()) is None
    assert with_assumed_limit(artifact, None, None).limit is None


# -- manifests ---------------------------------------------------------------------------------------------------------


def test_what_limits_a_stream_comes_back_from_the_manifest(bundles: Bundles) -> None:
    for bundle in (bundles[Log], bundles[Clock], bundles[Count]):
        again = type(bundle.manifest).from_json(json.loads(json.dumps(bundle.manifest.to_json())))
        assert again == bundle.manifest


def test_the_lesser_of_capacity_and_limit_holds(bundles: Bundles, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(bundles[Log].path, tmp_path / "copy.nsm"))
    manifest = Bundle(copy).manifest
    for limit, held in ((7, 7), (200, 100), (None, 100)):
        artifacts: tuple[Artifact, ...] = tuple(replace(item, limit=limit) for item in manifest.artifacts)
        write_manifest(copy, replace(manifest, artifacts=artifacts))
        with nsm.open(copy, "openvino") as session:
            assert session.spec.capacity == held
    assert set(TARGETS_HERE) <= set(TARGETS)
