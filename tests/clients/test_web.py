"""The web client in Node, against Python and the golden trace; the page is tested in test_web_page.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nsm
from nsm.bundle import Bundle
from nsm.errors import (
    BuildError,
    BundleDamagedError,
    DeviceUnavailableError,
    MissingDependencyError,
    RunError,
    StreamError,
    UnsupportedError,
)
from nsm.export.builders import web
from nsm.export.options import ExportOptions
from nsm.export.pipeline import export
from nsm.runtimes.backends.web import WebRuntime, load
from tests.export.helpers import worst
from tests.small_models import CHUNK, make_sequences

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="needs Node.js 20 or later: apt-get install nodejs npm")


@pytest.fixture(scope="module")
def bundle_path(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two lanes, in Node's reach."""
    output = tmp_path_factory.mktemp("web") / "model.nsm"
    try:
        export(checkpoint, ExportOptions(["web"], output=output, batch=2, golden_steps=12))
    except MissingDependencyError as error:
        pytest.skip(f"needs the npm package onnxruntime-web: {error}")
    return output


def javascript(bundle: Path, code: str, **values: Any) -> Any:
    """Run code in Node over a session on the bundle, and take the JSON that it prints."""
    client = (bundle / "web").as_uri()
    script = f"""
        import {{ readFileSync, writeFileSync }} from "node:fs";
        import {{ fromFolder, loadOrt }} from "{client}/node.js";
        import {{ Bundle, open }} from "{client}/nsm.js";
        const given = {json.dumps(values)};
        const reader = fromFolder({json.dumps(str(bundle))});
        const say = (value) => console.log(JSON.stringify(value));
        const plain = (array) => ({{ shape: array.shape, data: Array.from(array.data, Number) }});
        try {{ {code} }} catch (error) {{ say({{ error: error.constructor.name, message: error.message }}); }}
    """
    command = [str(NODE), "--input-type=module", "-e", script]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def array(found: dict[str, Any]) -> np.ndarray:
    return np.array(found["data"]).reshape(found["shape"])


@pytest.fixture
def copy(bundle_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_path, tmp_path / "copy.nsm"))


# -- as a target -------------------------------------------------------------------------------------------------------


def test_the_export_was_checked_on_webassembly(bundle_path: Path) -> None:
    artifact = Bundle(bundle_path).artifact("web")
    assert artifact.parity.status == "passed"
    assert artifact.parity.split is not None
    assert 0 < worst(artifact.parity.free_run) < 1e-5
    names = {record.path for record in artifact.files}
    assert {"web/index.html", "web/nsm.js", "web/ort/ort-wasm-simd-threaded.wasm", "graphs/step.onnx"} <= names
    assert "python -m http.server" in artifact.notes[0]


def test_a_session_on_node_is_like_any_other(bundle_path: Path) -> None:
    tokens = make_sequences(2, 3 * CHUNK + 3)
    with nsm.open(bundle_path, "web") as session, nsm.open(bundle_path, "web") as other:
        first = session.feed(tokens, [27, 5])["outputs"]
        other.restore(session.snapshot())
        np.testing.assert_array_equal(session.feed(tokens, [4, 9])["outputs"], other.feed(tokens, [4, 9])["outputs"])
        session.reset()
        np.testing.assert_array_equal(session.feed(tokens, [27, 5])["outputs"], first)
        session.close()
        with pytest.raises(StreamError, match="The session is closed"):
            session.feed(tokens)


def test_low_precision_is_not_offered(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="web is not built in int8"):
        export(checkpoint, ExportOptions(["web"], precision="int8", output=tmp_path / "m.nsm"))


def test_without_node_it_is_built_and_not_run(
    checkpoint: Path, bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = Bundle(bundle_path).manifest.spec
    files = {entry.name: bundle_path / "graphs" / f"{entry.name}.onnx" for entry in spec.entries}
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DeviceUnavailableError, match=r"node was not found.*Install Node\.js"):
        load(files, spec, "wasm", None)


def test_a_process_that_ends_is_an_error_of_ours(bundle_path: Path) -> None:
    bundle = Bundle(bundle_path)
    runtime = WebRuntime([str(NODE), "-e", "throw new Error('spoiled')"], bundle.manifest.spec, "fp32")
    with pytest.raises(RunError, match=r"Node ended while it ran the bundle.*spoiled"):
        runtime.load_state(bundle.state_init())
    runtime.close()


@pytest.mark.parametrize("target", ["web", None])
@pytest.mark.parametrize("name", ["node.js", "runtime.js", "ort/ort.wasm.min.mjs", "ort/ort-wasm-simd-threaded.wasm"])
def test_code_that_came_with_a_bundle_is_never_run(name: str, target: str | None, copy: Path, tmp_path: Path) -> None:
    """With hashes in the manifest that fit."""
    path, mark = copy / "web" / name, tmp_path / "ran"
    spoiled = f'import {{ writeFileSync as w }} from "node:fs"; w({json.dumps(str(mark))}, "x");\n'
    path.write_bytes(spoiled.encode() + path.read_bytes())
    _record_again(copy, f"web/{name}")
    with pytest.raises(BundleDamagedError, match=rf"web: {name} .*nsm build BUNDLE --target web --force"):
        nsm.open(copy, target)
    assert not mark.exists()


def test_a_graph_that_cannot_be_opened_is_an_error_of_ours(copy: Path) -> None:
    with nsm.open(copy, "web") as session:
        (copy / "graphs" / "step.onnx").write_bytes(b"rubbish")
        with pytest.raises(RunError, match=r"graphs/step\.onnx has 7 bytes, recorded are"):
            session.step(make_sequences(2, CHUNK))


@pytest.mark.parametrize("missing", ["npm", "package"])
def test_what_cannot_be_got_names_the_way_out(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(web.PACKAGE, raising=False)
    if missing == "npm":
        monkeypatch.setenv("PATH", "")
        with pytest.raises(MissingDependencyError, match=f"npm is not installed.*{web.PACKAGE}"):
            web.find_package()
        return
    tool = tmp_path / "bin" / "npm"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho no such version >&2\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    with pytest.raises(MissingDependencyError, match=r"could not download .*: no such version"):
        web.find_package()
    tool.write_text("#!/bin/sh\nmkdir package && touch package/x && tar czf x.tgz package\n")
    with pytest.raises(BuildError, match="does not have ort"):
        web.find_package()


def test_an_installed_package_is_taken(bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(bundle_path / "web" / "ort", tmp_path / "dist")
    monkeypatch.setenv(web.PACKAGE, str(tmp_path))
    assert web.find_package() == tmp_path
    (tmp_path / "dist" / "ort.wasm.min.mjs").write_bytes(b"another version")
    with pytest.raises(MissingDependencyError, match=f"{web.PACKAGE}={tmp_path}: expected"):
        web.find_package()


# -- the client --------------------------------------------------------------------------------------------------------


def test_any_split_of_a_stream_is_what_python_answers(bundle_path: Path) -> None:
    tokens = make_sequences(2, 5 * CHUNK + 5, seed=4)
    pieces = [(0, 3, [3, 0]), (3, 20, [17, 6]), (20, 21, [1, 1]), (21, 45, [24, 20])]
    found = javascript(
        bundle_path,
        """
        const session = await open(reader, await loadOrt());
        const outputs = [];
        for (const [from, to, counts] of given.pieces) {
          const part = given.tokens.map((row) => row.slice(from, to));
          outputs.push(plain((await session.feed(part, counts)).outputs));
        }
        const state = {};
        for (const [name, value] of Object.entries(session.readState())) state[name] = plain(value);
        say({ outputs, state, offsets: session.offsets });
        """,
        tokens=tokens.tolist(),
        pieces=pieces,
    )
    with nsm.open(bundle_path, "web") as session:
        for (start, end, counts), given in zip(pieces, found["outputs"], strict=True):
            wanted = session.feed(tokens[:, start:end], counts)["outputs"]
            np.testing.assert_allclose(array(given), wanted, rtol=1e-6, atol=1e-7)
        assert found["offsets"] == session.offsets.tolist()
        for name, value in session.read_state().items():
            np.testing.assert_allclose(array(found["state"][name]), value, rtol=1e-6, atol=1e-7, err_msg=name)


def test_a_snapshot_goes_from_python_to_javascript_and_back(bundle_path: Path, tmp_path: Path) -> None:
    tokens = make_sequences(2, 19, seed=5)
    with nsm.open(bundle_path, "web") as session:
        session.feed(tokens)
        (tmp_path / "whole").write_bytes(session.snapshot())
        (tmp_path / "lane").write_bytes(session.snapshot(1))
        found = javascript(
            bundle_path,
            """
            const session = await open(reader, await loadOrt());
            await session.restore(new Uint8Array(readFileSync(given.folder + "/whole")));
            const same = Buffer.compare(Buffer.from(await session.snapshot()), readFileSync(given.folder + "/whole"));
            await session.restore(new Uint8Array(readFileSync(given.folder + "/lane")), 0);
            const { outputs } = await session.feed(given.tokens);
            writeFileSync(given.folder + "/back", await session.snapshot(0));
            const refused = [];
            const other = new Uint8Array(readFileSync(given.folder + "/whole"));
            other[13] = "3".charCodeAt(0);
            for (const bytes of [new Uint8Array(10), other]) {
              try { await session.restore(bytes); }
              catch (error) { refused.push([error.constructor.name, error.message]); }
            }
            say({ same, outputs: plain(outputs), refused });
            """,
            folder=str(tmp_path),
            tokens=tokens.tolist(),
        )
        assert found["same"] == 0, "the same bytes"
        assert [name for name, _ in found["refused"]] == ["SnapshotError", "SnapshotError"]
        damaged, later = [message for _, message in found["refused"]]
        assert "damaged" in damaged
        assert "format version 3, and this client reads version 2" in later
        session.restore((tmp_path / "lane").read_bytes(), 0)
        wanted = session.feed(tokens)["outputs"]
        np.testing.assert_allclose(array(found["outputs"]), wanted, rtol=1e-6, atol=1e-7)
        state = session.read_state()
        session.restore((tmp_path / "back").read_bytes(), 1)
        for name, value in session.read_state().items():
            np.testing.assert_allclose(value[1], state[name][0], rtol=1e-6, atol=1e-7)


LIMITS = [({"capacity": 20}, 20), ({"limit": 20}, 20), ({"capacity": 20, "limit": 90}, 20)]


def _limit(bundle: Path, limits: dict[str, int]) -> None:
    """A copy's streams end there, and its states say nothing of how many tokens there were."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["spec"]["capacity"] = limits.get("capacity")
    for artifact in manifest["artifacts"]:
        artifact["limit"] = limits.get("limit")
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("limits", "most"), LIMITS)
def test_a_lane_ends_with_the_capacity_or_the_limit(limits: dict[str, int], most: int, copy: Path) -> None:
    _limit(copy, limits)
    found = javascript(
        copy,
        """
        const s = await open(reader, await loadOrt());
        const row = (count) => [Array(count).fill(1), Array(count).fill(2)];
        const left = [s.tokensLeft];
        const refused = [];
        const attempt = async (call) => {
          const before = JSON.stringify(Object.values(s.readState()).map(plain));
          try { await call(); }
          catch (error) {
            const after = JSON.stringify(Object.values(s.readState()).map(plain));
            refused.push([error.constructor.name, error.message, before === after]);
          }
          left.push(s.tokensLeft);
        };
        await attempt(() => s.step(row(8)));
        await attempt(() => s.feed(row(13)));
        await attempt(() => s.feed(row(12), [12, 4]));
        await attempt(() => s.decode([[1], [1]]));
        await attempt(() => s.decode([[1], [1]], [0, 1]));
        await attempt(() => s.reset(0));
        const snapshot = await s.snapshot(), lane = await s.snapshot(1);
        await attempt(() => s.reset());
        await attempt(() => s.restore(snapshot));
        await attempt(() => s.restore(lane, 0));
        await attempt(() => s.loadState(s.readState()));
        await attempt(() => s.loadState(s.readState(), [1, -1]));
        await attempt(() => s.loadState(s.readState(), [20, 1]));
        await attempt(() => s.step(row(8), [8, 0]));
        say({ left, refused });
        """,
    )
    assert found["left"] == [
        [most, most], [12, 12], [12, 12], [0, 8], [0, 8], [0, 7], [20, 7], [20, 20], [20, 7], [7, 7], [7, 7], [7, 7],
        [0, 19], [0, 19],
    ]  # fmt: skip
    assert [(name, same) for name, _, same in found["refused"]] == [
        ("StreamError", True), ("StreamError", True), ("InputError", True), ("InputError", True), ("StreamError", True)
    ]  # fmt: skip
    messages = [message for _, message, _ in found["refused"]]
    assert "at most 20 tokens" in messages[0]
    assert "Lanes [0,1] have had [8,8] and are given [13,13] more. Restart them with reset(0), reset(1)" in messages[0]
    assert "number of tokens of each of the 2 lanes" in messages[2]


def test_a_count_goes_from_python_to_javascript_and_back(copy: Path, tmp_path: Path) -> None:
    _limit(copy, {"capacity": 40})
    with nsm.open(copy, "web") as session:
        session.feed(make_sequences(2, 19), [19, 4])
        (tmp_path / "whole").write_bytes(session.snapshot())
        found = javascript(
            copy,
            """
            const s = await open(reader, await loadOrt());
            const bytes = new Uint8Array(readFileSync(given.folder + "/whole"));
            await s.restore(bytes);
            const same = Buffer.compare(Buffer.from(await s.snapshot()), Buffer.from(bytes));
            writeFileSync(given.folder + "/lane", await s.snapshot(1));
            say({ same, left: s.tokensLeft });
            """,
            folder=str(tmp_path),
        )
        assert found == {"same": 0, "left": [21, 36]}
        session.restore((tmp_path / "lane").read_bytes(), 0)
        assert session.tokens_left is not None
        assert session.tokens_left.tolist() == [36, 36]


def test_a_state_tells_javascript_how_many_tokens_there_were(tmp_path: Path) -> None:
    bundle = _counting(tmp_path)
    manifest = bundle.manifest.spec
    assert (manifest.capacity, manifest.states[0].per_token) == (32, 2)
    with nsm.open(bundle, "web") as session, nsm.open(bundle, "onnxruntime") as other:
        session.feed(np.ones((2, 9, 3), np.float32), [9, 2])
        (tmp_path / "counted").write_bytes(session.snapshot())
        del other
    found = javascript(
        bundle.path,
        """
        const s = await open(reader, await loadOrt());
        await s.restore(new Uint8Array(readFileSync(given.folder + "/counted")));
        const left = [s.tokensLeft];
        const state = s.readState();
        s.reset();
        s.loadState(state);
        left.push(s.tokensLeft);
        say({ left });
        """,
        folder=str(tmp_path),
    )
    assert found["left"] == [[23, 30], [23, 30]]


def _counting(folder: Path) -> Bundle:
    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = torch.nn.Embedding(64, 3)

        def forward(self, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + self.e(n), n + 2

    model = nsm.as_step(Table(), [torch.zeros(1, dtype=torch.int64)], token_shape=(3,))
    return nsm.export_model(model, ["web", "onnxruntime"], folder / "table.nsm", batch=2)


def test_an_artifact_that_failed_is_opened_only_if_allowed(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (artifact,) = (item for item in manifest["artifacts"] if item["target"] == "web")
    artifact["parity"] = {"status": "failed"}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    found = javascript(copy, "await open(reader, await loadOrt()); say(0);")
    assert found["error"] == "BundleError"
    assert "web failed its parity check" in found["message"]
    allowed = "const s = await open(reader, await loadOrt(), { allowFailed: true }); say((await s.check()).passed);"
    assert javascript(copy, allowed) is True


@pytest.mark.parametrize("most", [0, -1, 1.5, "many", True])
def test_a_capacity_that_is_none_is_refused(most: object, copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["spec"]["capacity"] = most
    (copy / "manifest.json").write_text(json.dumps(manifest))
    found = javascript(copy, "await Bundle.open(reader); say(0);")
    assert found["error"] == "BundleError"
    assert "expected a number above 0, or null" in found["message"]


def test_a_counter_is_kept_small_in_javascript_too(tmp_path: Path) -> None:
    class Phase(torch.nn.Module):
        def forward(self, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + (n % 7).float()[:, None], n + 1

    model = nsm.as_step(Phase(), [torch.zeros(1, dtype=torch.int64)], token_shape=(3,))
    bundle = nsm.export_model(model, ["web"], tmp_path / "phase.nsm")
    base, period = bundle.manifest.spec.states[0].wrap
    found = javascript(
        bundle.path,
        """
        const s = await open(reader, await loadOrt());
        const state = s.readState();
        state.state_0.data[0] = 10n ** 15n;
        s.loadState(state);
        const kept = Number(s.readState().state_0.data[0]);
        say({ kept, first: plain((await s.feed([[[0, 0, 0]]])).outputs).data[0] });
        """,
    )
    assert base == 0
    assert found == {"kept": 10**15 % period, "first": 10**15 % 7}


def test_the_golden_trace_is_replayed_states_included(bundle_path: Path) -> None:
    found = javascript(bundle_path, "const s = await open(reader, await loadOrt()); say(await s.check());")
    assert found["passed"]
    assert (found["streams"], found["steps"], found["exact"]) == (8, 12, 0)
    assert 0 < found["worst"]["error"] < 1e-5
    assert {"outputs", "0.bank", "1.key"} <= set(found["errors"])


def test_a_check_on_other_weights_fails(copy: Path) -> None:
    """With hashes that fit: the client has to notice by what the model answers."""
    path = copy / "graphs" / "weights.bin"
    numbers = np.frombuffer(path.read_bytes(), np.float32).copy()
    path.write_bytes((numbers * np.float32(1.01)).tobytes())
    _record_again(copy, "graphs/weights.bin")
    found = javascript(copy, "const s = await open(reader, await loadOrt()); say(await s.check());")
    assert not found["passed"]
    assert found["worst"]["error"] > 1e-4


def _record_again(bundle: Path, name: str) -> None:
    import hashlib

    manifest = json.loads((bundle / "manifest.json").read_text())
    data = (bundle / name).read_bytes()
    for record in [*manifest["files"], *(r for a in manifest["artifacts"] for r in a["files"])]:
        if record["path"] == name:
            record["sha256"], record["size"] = hashlib.sha256(data).hexdigest(), len(data)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("await s.step([[1, 2]])", "InputError", "has the shape"),
        ("await s.feed([[1], [99]])", "InputError", "must lie in 0 .. 19; given 99"),
        ("await s.feed([[1], [0.5]])", "InputError", "takes whole numbers"),
        ("await s.feed([[1, 2], [3]])", "InputError", "rows have different lengths"),
        ("await s.feed([[1]])", "InputError", "feed takes tokens of shape"),
        ("await s.feed([[1], [1]], [1, 2])", "InputError", "number in 0 .. 1"),
        ("await s.feed([[1], [1]]); await s.step(Array(2).fill(Array(8).fill(1)))", "StreamError", "inside a chunk"),
        ("s.reset(2)", "InputError", "has lanes 0 .. 1; given 2"),
        ("s.loadState({})", "InputError", "has the shape"),
        ("await s.restore(null)", "SnapshotError", "is a Uint8Array"),
        ("await s.runtime.call('other', {})", "InputError", "There is no entry"),
        (
            "const all = s.readState(); all['0.bank'].data.fill(NaN); s.loadState(all); await s.feed([[1], [1]])",
            "NonFiniteError",
            "holds NaN or infinite numbers on lanes",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(code: str, error: str, message: str, bundle_path: Path) -> None:
    found = javascript(bundle_path, f"const s = await open(reader, await loadOrt()); {code}; say(0);")
    assert found["error"] == error
    assert message in found["message"]


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a/../../x", "https://example.org/x", "..\\x", "a//b", "a?b", ""]
)
def test_a_path_out_of_the_bundle_is_refused(path: str, copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][0]["path"] = path
    (copy / "manifest.json").write_text(json.dumps(manifest))
    found = javascript(copy, "await Bundle.open(reader); say(0);")
    assert found["error"] == "BundleError"
    assert "not a path inside the bundle" in found["message"]


@pytest.mark.parametrize("change", ["batch", "shape", "state", "commit", "writes"])
def test_a_spec_that_does_not_fit_the_files_is_refused_before_memory_is_taken(change: str, copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    spec = manifest["spec"]
    if change == "batch":
        spec["batch"] = 10**9
    elif change == "shape":
        spec["states"][-1]["shape"] = [2, 10**9]
    elif change == "commit":
        spec["entries"] = [entry for entry in spec["entries"] if entry["name"] != "commit"]
    elif change == "writes":
        spec["entries"][1]["writes"].remove("lane.offset")
    else:
        del spec["states"][-1]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    found = javascript(copy, "await open(reader, await loadOrt()); say(0);")
    assert found["error"] == "BundleError"
    assert "Was it edited by hand?" in found["message"]


@pytest.mark.parametrize("bad", ["NaN", "Infinity"])
def test_vectors_that_count_have_to_be_finite(bad: str, tmp_path: Path) -> None:
    model = nsm.as_step(torch.nn.GRU(3, 4))
    bundle = nsm.export_model(model, ["web"], output=tmp_path / "gru.nsm", batch=2, golden_steps=12)
    found = javascript(
        bundle.path,
        f"""const s = await open(reader, await loadOrt());
        const [good, bad] = [[1, 2, 3], [1, {bad}, 3]];
        await s.feed([[good, bad], [good, good]], [1, 2]);
        const before = JSON.stringify(plain(Object.values(s.readState())[0]));
        try {{ await s.feed([[good, bad], [good, good]]); say(0); }}
        catch (error) {{
          const after = JSON.stringify(plain(Object.values(s.readState())[0]));
          say({{ error: error.constructor.name, message: error.message, same: before === after }});
        }}""",
    )
    assert found == {
        "error": "InputError",
        "message": "tokens holds NaN or infinite numbers on lanes [0].",
        "same": True,
    }


@pytest.mark.parametrize("kind", ["version", "json", "hash", "size", "archive"])
def test_a_damaged_bundle_is_refused(kind: str, copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    weights, initial = copy / "graphs" / "weights.bin", copy / "state_init.npz"
    if kind == "version":
        manifest["format_version"] = 99
    elif kind == "hash":
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    elif kind == "size":
        weights.write_bytes(b"")
    elif kind == "archive":
        initial.write_bytes(b"x" * 100)
    (copy / "manifest.json").write_text("{" if kind == "json" else json.dumps(manifest))
    if kind == "archive":
        _record_again(copy, "state_init.npz")
    found = javascript(copy, "const s = await open(reader, await loadOrt()); await s.feed([[1], [1]]); say(0);")
    assert found["error"] == ("BundleVersionError" if kind == "version" else "BundleError")
