"""Checkpoints: what is saved comes back bit for bit, nothing in a file runs, and every bad file has its reason."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nsm
from nsm.errors import CheckpointError, ConfigError, InputError, OutputExistsError
from nsm.models.checkpoint import MAX_GOLDEN, fingerprint, load, load_checkpoint, save
from nsm.models.simple import SimpleNSM
from nsm.modules.bank.manager import StateManager
from nsm.modules.layer import NSMLayer
from tests.nsm.variants import make, random_tokens

VECTORS: dict[str, Any] = {"vocab_size": None, "input_dim": 3, "state_dim": 16, "d_model": 8}
SMALL: dict[str, Any] = {"d_model": 8, "num_states": 4, "num_layers": 1}


@pytest.fixture(scope="module")
def small(model_factory: Callable[..., SimpleNSM]) -> SimpleNSM:
    return model_factory(**SMALL)


@pytest.fixture(scope="module")
def vectors(model_factory: Callable[..., SimpleNSM]) -> SimpleNSM:
    return model_factory(**{**SMALL, **VECTORS})


@pytest.fixture(scope="module")
def content(small: SimpleNSM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is in a good file. Take a copy to spoil it."""
    path = tmp_path_factory.mktemp("content") / "model.pt"
    save(small, path, samples=np.arange(24).reshape(6, 4) % 19)
    result: dict[str, Any] = torch.load(path, weights_only=True)
    return result


class Touch:
    """Unpickling this creates the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def manager_of(model: nn.Module) -> StateManager:
    layer = model.get_submodule("layers.0")
    assert isinstance(layer, NSMLayer)
    return layer.manager


def spoiled(content: dict[str, Any], path: Path, **changes: Any) -> Path:
    torch.save({**content, **changes}, path)
    return path


# -- there and back ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [{}, {"gate_type": "lstm", "consolidate_every": 3, "communication": True}, {"consolidate_every": 0}, VECTORS],
    ids=["gru", "lstm", "never", "vectors"],
)
def test_what_comes_back_gives_the_same_bits(
    model_factory: Callable[..., SimpleNSM], tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = model_factory(**changes)
    save(model, tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt")
    assert loaded is not model
    assert loaded.config == model.config
    assert not loaded.training
    tokens = torch.randn(2, 20, 3) if model.token_spec.shape else torch.randint(0, 20, (2, 20))
    outputs, state = model(tokens, return_state=True)
    loaded_outputs, loaded_state = loaded(tokens, return_state=True)
    assert torch.equal(loaded_outputs, outputs)
    assert loaded_state.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(loaded_state[name], value), name


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["hierarchy", "memory", "topk", "adaptive, lstm, memory, vectors", "hybrid", "both ways"]
)
def test_every_model_of_the_family_comes_back(tmp_path: Path, name: str) -> None:
    model = make(name)
    save(model, tmp_path / "model.pt", samples=random_tokens(model, 3, 5).numpy())
    checkpoint = load_checkpoint(tmp_path / "model.pt")
    assert type(checkpoint.model) is type(model)
    assert checkpoint.model.config == model.config
    assert len(checkpoint.golden) + len(checkpoint.calibration) == 3
    tokens = random_tokens(model, 2, 20)
    assert torch.equal(checkpoint.model(tokens), model(tokens))


@torch.no_grad()
def test_pruned_slots_stay_pruned(model_factory: Callable[..., SimpleNSM], tmp_path: Path) -> None:
    model = model_factory()
    manager = manager_of(model)
    manager.importance[:2] = -9.0
    assert manager.prune_low_importance_states() == 2
    save(model, tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt")
    assert torch.equal(manager_of(loaded).mask, manager.mask)
    tokens = torch.randint(0, 20, (2, 20))
    assert torch.equal(loaded(tokens), model(tokens))


def test_a_model_in_training_is_loaded_for_evaluation_and_left_in_training(
    model_factory: Callable[..., SimpleNSM], tmp_path: Path
) -> None:
    model = model_factory(**SMALL).train()
    save(model, tmp_path / "model.pt")
    assert model.training
    assert not load(tmp_path / "model.pt").training


def test_a_path_may_be_a_string_and_a_name_without_a_folder(
    small: SimpleNSM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    nsm.save(small, "model.pt")
    assert nsm.load("model.pt").config == small.config


# -- samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 15, 16, 17, 40])
def test_samples_are_split_into_golden_and_calibration(small: SimpleNSM, tmp_path: Path, count: int) -> None:
    """Every sample is in one of the two, in its order; at most half and one, and at most 8, are golden."""
    samples = [[number % 20, number // 20, *[7] * (number % 4)] for number in range(count)]
    save(small, tmp_path / "model.pt", samples=samples)
    checkpoint = load_checkpoint(tmp_path / "model.pt")
    golden, calibration = ([item.tolist() for item in part] for part in (checkpoint.golden, checkpoint.calibration))
    assert len(golden) == min(MAX_GOLDEN, (count + 1) // 2)
    assert sorted(golden + calibration) == sorted(samples)
    assert golden == [sample for sample in samples if sample in golden]
    assert calibration == [sample for sample in samples if sample in calibration]
    if count > 2:
        assert samples[0] in golden
        assert samples[-1] in golden


def test_samples_keep_their_values_and_take_the_dtype_of_the_tokens(
    small: SimpleNSM, vectors: SimpleNSM, tmp_path: Path
) -> None:
    ids = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    save(small, tmp_path / "ids.pt", samples=ids)
    floats = np.arange(24).reshape(2, 4, 3) / 8
    save(vectors, tmp_path / "vectors.pt", samples=floats)
    for name, samples, dtype in (("ids.pt", ids, np.int64), ("vectors.pt", floats, np.float32)):
        checkpoint = load_checkpoint(tmp_path / name)
        for item, expected in zip(checkpoint.golden + checkpoint.calibration, samples, strict=True):
            assert item.dtype == dtype
            assert np.array_equal(item, expected)


def test_samples_may_be_tensors(small: SimpleNSM, tmp_path: Path) -> None:
    save(small, tmp_path / "model.pt", samples=list(torch.tensor([[1, 2, 3], [4, 5, 6]])))
    assert load_checkpoint(tmp_path / "model.pt").calibration[0].tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    ("form", "sample", "message"),
    [
        ("ids", [1.0, 2.0], "its dtype is float64, the model takes int64"),
        ("ids", [True, False], "its dtype is bool, the model takes int64"),
        ("ids", ["one"], "its dtype is <U3, the model takes int64"),
        ("ids", [1, 20], r"Token ids must lie in 0 \.\. 19; given 1 \.\. 20"),
        ("ids", [-1, 2], r"Token ids must lie in 0 \.\. 19; given -1 \.\. 2"),
        ("ids", np.array([2**64 - 1], np.uint64), r"Token ids must lie in 0 \.\. 19"),
        ("ids", [[1, 2], [3, 4]], r"ids \[B, T\], at least one token; given shape \[1, 2, 2\]"),
        ("ids", np.zeros(0, np.int64), r"ids \[B, T\], at least one token; given shape \[1, 0\]"),
        ("ids", 3, r"ids \[B, T\]"),
        ("ids", [1, [2, 3]], ""),
        ("vectors", np.zeros((4, 3), np.int64), "its dtype is int64, the model takes float32"),
        ("vectors", np.zeros((4, 2)), r"vectors \[B, T, 3\], at least one token; given shape \[1, 4, 2\]"),
        ("vectors", np.zeros(3), r"vectors \[B, T, 3\], at least one token; given shape \[1, 3\]"),
    ],
)
def test_a_bad_sample_is_named(
    small: SimpleNSM, vectors: SimpleNSM, tmp_path: Path, form: str, sample: Any, message: str
) -> None:
    model, good = (small, [1, 2]) if form == "ids" else (vectors, np.zeros((2, 3)))
    with pytest.raises(InputError, match=rf"samples\[1\] is not a sequence for this model: .*{message}"):
        save(model, tmp_path / "model.pt", samples=[good, sample])
    assert list(tmp_path.iterdir()) == []


# -- writing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failing_save_leaves_the_old_file_and_nothing_else(
    small: SimpleNSM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "model.pt"
    save(small, path)
    before = path.read_bytes()

    def write_a_part(_: object, file: io.BufferedWriter) -> None:
        file.write(b"half a file")
        raise error

    monkeypatch.setattr(torch, "save", write_a_part)
    with pytest.raises(type(error)):
        save(small, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_replaced_leaves_nothing_behind(small: SimpleNSM, tmp_path: Path) -> None:
    (tmp_path / "model.pt").mkdir()
    with pytest.raises(InputError, match=r"model\.pt"):
        save(small, tmp_path / "model.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_saving_again_replaces_the_file(
    model_factory: Callable[..., SimpleNSM], small: SimpleNSM, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    save(model_factory(), path)
    save(small, path)
    assert load(path).config == small.config


def test_only_models_of_the_family_are_saved(tmp_path: Path) -> None:
    class Mine(SimpleNSM):
        pass

    mine = Mine(vocab_size=5, d_model=8, num_states=2)
    for model, name in ((mine, "Mine"), (nn.Linear(2, 2), "Linear")):
        with pytest.raises(InputError, match=f"nsm.save writes SimpleNSM, .*; given {name}"):
            save(model, tmp_path / "model.pt")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_in_another_precision_is_not_written(
    model_factory: Callable[..., SimpleNSM], tmp_path: Path, dtype: torch.dtype
) -> None:
    """It would come back in float32, as another model."""
    model = model_factory(**SMALL).to(dtype)
    with pytest.raises(
        ConfigError, match=rf"SimpleNSM is to be .* in float32; its weight \S+ is {dtype}\..*model\.float\(\)"
    ):
        save(model, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []
    save(model.float(), tmp_path / "model.pt")
    assert load_checkpoint(tmp_path / "model.pt").fingerprint == fingerprint(model)


# -- fingerprint -------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_model_and_not_of_the_file(small: SimpleNSM, tmp_path: Path) -> None:
    save(small, tmp_path / "one.pt")
    save(small, tmp_path / "two.pt", samples=[[1, 2], [3, 4]])
    one, two = (load_checkpoint(tmp_path / name) for name in ("one.pt", "two.pt"))
    assert one.fingerprint == two.fingerprint == fingerprint(small)
    assert len(one.fingerprint) == 64


@torch.no_grad()
def test_any_weight_changes_the_fingerprint(model_factory: Callable[..., SimpleNSM]) -> None:
    model = model_factory(**SMALL)
    seen = {fingerprint(model)}
    for tensor in model.state_dict().values():
        flat = tensor.view(-1)
        flat[-1] = ~flat[-1] if tensor.dtype == torch.bool else flat[-1] + 1
        seen.add(fingerprint(model))
    assert len(seen) == 1 + len(model.state_dict())


@torch.no_grad()
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"routing": "softmax"}, {"routing": "entmax"}),
        ({"consolidate_every": 2}, {"consolidate_every": 3}),
        ({"hierarchy": (2,)}, {"hierarchy": (3,)}),
        ({"chunk_size": 7, "window": 8}, {"chunk_size": 8}),
    ],
    ids=["routing", "consolidate_every", "hierarchy", "chunk_size"],
)
def test_models_that_differ_in_their_config_alone_have_different_fingerprints(
    model_factory: Callable[..., SimpleNSM], one: dict[str, Any], other: dict[str, Any]
) -> None:
    """The weights are the same and of the same shapes, what the models compute is not."""
    first, second = model_factory(**one), model_factory(**other)
    second.load_state_dict(first.state_dict())
    tokens = torch.randint(0, 20, (1, 40))
    assert not torch.equal(first(tokens), second(tokens))
    assert fingerprint(first) != fingerprint(second)


# -- files that are no checkpoints -------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no file .*nothing\.pt"):
        load(tmp_path / "nothing.pt")


NOT_PYTORCH = {
    "empty": b"",
    "text": b"hello world\n",
    "json": b'{"format": "nsm-checkpoint"}\n',
    "csv": b"1,2,3\n4,5,6\n",
    "zip": b"PK\x05\x06" + bytes(18),
    "half a zip": b"PK\x03\x04",
    "onnx": b"\x08\x0a\x12\x07pytorch",
    "zeros": bytes(100),
    "pickle cut in a string": b"\x80\x02X\x01",
    "pickle cut in a number": b"\x80\x02G\x00",
    "pickle of another protocol": pickle.dumps({"format": "nsm-checkpoint"}, protocol=4),
}


@pytest.mark.parametrize("raw", NOT_PYTORCH.values(), ids=NOT_PYTORCH.keys())
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"model\.pt (cannot be read as a PyTorch file|was refused)"):
        load(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read: .*it is no regular file"):
        load(tmp_path)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_refused(small: SimpleNSM, tmp_path: Path, share: float) -> None:
    path = tmp_path / "model.pt"
    save(small, path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(CheckpointError, match=r"cannot be read as a PyTorch file .*It is damaged"):
        load(path)


@settings(max_examples=60, deadline=None)
@given(end=st.integers(0, 400))
def test_a_truncated_file_of_the_old_format_is_refused(tmp_path_factory: pytest.TempPathFactory, end: int) -> None:
    """Bare pickles: what the reader raises depends on where the file ends."""
    buffer = io.BytesIO()
    content = {"format": "nsm-checkpoint", "version": 3, "weight": torch.ones(3)}
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    raw = buffer.getvalue()
    path = tmp_path_factory.mktemp("old") / "model.pt"
    path.write_bytes(raw[: min(end, len(raw) - 1)])
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        load(path)


def test_a_damaged_reference_in_the_old_format_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    tensor = torch.ones(3)
    torch.save({"weight": tensor}, buffer, _use_new_zipfile_serialization=False)
    key = str(tensor.untyped_storage()._cdata).encode()
    assert buffer.getvalue().count(key) == 2  # where it is used, and in the list of what is there
    path = tmp_path / "model.pt"
    path.write_bytes(buffer.getvalue().replace(key, b"9" * len(key), 1))
    with pytest.raises(CheckpointError, match=r"cannot be read as a PyTorch file .*It is damaged"):
        load(path)


@pytest.mark.parametrize("held", [torch.ones(3), [1, 2], 7, "nsm-checkpoint"])
def test_a_pytorch_file_that_holds_no_dictionary_is_refused(tmp_path: Path, held: object) -> None:
    torch.save(held, tmp_path / "model.pt")
    with pytest.raises(
        CheckpointError, match=rf"not a checkpoint written by nsm.save: it holds a {type(held).__name__}"
    ):
        load(tmp_path / "model.pt")


def test_a_bare_state_dict_is_refused_and_the_way_out_told(small: SimpleNSM, tmp_path: Path) -> None:
    torch.save(small.state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="A bare state_dict has no config: build the model"):
        load(tmp_path / "model.pt")


@pytest.mark.parametrize("version", [0, 1, 2, 99, None, "3", True])
def test_another_version_is_refused(content: dict[str, Any], tmp_path: Path, version: object) -> None:
    path = spoiled(content, tmp_path / "model.pt", version=version)
    with pytest.raises(CheckpointError, match=f"has checkpoint version {version!r}; this nsm reads version 3"):
        load(path)


@pytest.mark.parametrize(
    ("version", "kind"),
    [
        (torch.tensor(3), "Tensor"),
        (torch.tensor([3, 3]), "Tensor"),
        ([3], "list"),
        ({"version": 3}, "dict"),
        (3.0, "float"),
        (10**18, "int"),
    ],
    ids=lambda item: str(type(item).__name__),
)
def test_a_version_that_is_no_number_is_refused(
    content: dict[str, Any], tmp_path: Path, version: object, kind: str
) -> None:
    path = spoiled(content, tmp_path / "model.pt", version=version)
    with pytest.raises(CheckpointError, match=f"has checkpoint version of type {kind}; this nsm reads version 3"):
        load(path)


@pytest.mark.parametrize("tag", [torch.ones(2), ["nsm-checkpoint"], None, 1, "nsm"], ids=str)
def test_another_tag_is_refused(content: dict[str, Any], tmp_path: Path, tag: object) -> None:
    path = spoiled(content, tmp_path / "model.pt", format=tag)
    with pytest.raises(CheckpointError, match="a dictionary without our format tag"):
        load(path)


@pytest.mark.parametrize("key", ["golden", "calibration"])
@pytest.mark.parametrize("change", ["a number", "their order", "one less", "one more", "the shape", "moved over"])
def test_samples_that_changed_since_they_were_saved_are_refused(
    content: dict[str, Any], tmp_path: Path, key: str, change: str
) -> None:
    """All of these pass as sequences of the model: only their hash tells."""
    sequences = [item.clone() for item in content[key]]
    assert len(sequences) > 1
    if change == "a number":
        sequences[0][0] = (sequences[0][0] + 1) % 20
    elif change == "their order":
        sequences = sequences[::-1]
    elif change == "one less":
        sequences = sequences[:-1]
    elif change == "one more":
        sequences = [*sequences, sequences[0]]
    elif change == "the shape":
        sequences[0] = sequences[0].reshape(2, -1)
    if change == "moved over":
        path = spoiled(
            content, tmp_path / "model.pt", golden=[*content["golden"], *content["calibration"]], calibration=[]
        )
    else:
        path = spoiled(content, tmp_path / "model.pt", **{key: sequences})
    with pytest.raises(
        CheckpointError, match=r"its samples were changed since they were saved\. Copy it again, or save"
    ):
        load_checkpoint(path)


@pytest.mark.parametrize("part", ["fingerprint", "samples_sha256"])
@pytest.mark.parametrize("value", [torch.ones(2), None, "", 7, ["a"]], ids=str)
def test_a_hash_that_is_none_is_refused(content: dict[str, Any], tmp_path: Path, part: str, value: object) -> None:
    path = spoiled(content, tmp_path / "model.pt", **{part: value})
    with pytest.raises(CheckpointError, match=r"is damaged: its (weights are not|samples were changed)"):
        load(path)


def test_only_checkpoints_are_replaced(small: SimpleNSM, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    buffer = io.BytesIO()
    torch.save(small.state_dict(), buffer)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x/data.pkl", b"something else")
    for held in (b"print('training')", b"PK\x03\x04 half a zip", buffer.getvalue(), archive.getvalue()):
        path.write_bytes(held)
        with pytest.raises(OutputExistsError, match=r"model\.pt exists and is not a checkpoint written by nsm\.save"):
            save(small, path)
        assert path.read_bytes() == held
    path.write_bytes(b"")
    save(small, path)
    save(small, path)
    content = torch.load(path, weights_only=True)
    spoiled(content, path, version=2)
    save(small, path)
    load(path)


def test_weights_that_changed_since_they_were_saved_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    name = next(iter(content["weights"]))
    content["weights"][name] = content["weights"][name] + 1.0
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="is damaged: its weights are not those that were saved"):
        load(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "missing", ["model", "config", "weights", "golden", "calibration", "fingerprint", "samples_sha256"]
)
def test_a_missing_part_is_named(content: dict[str, Any], tmp_path: Path, missing: str) -> None:
    torch.save({key: value for key, value in content.items() if key != missing}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=f"does not make a model: it lacks the part '{missing}'"):
        load(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "OtherNSM"}, "OtherNSM"),
        ({"model": ["SimpleNSM"]}, "unhashable"),
        ({"config": None}, "config and its weights are dictionaries"),
        ({"config": {"vocab_size": 20, "surprise": 1}}, "surprise"),
        ({"config": {"vocab_size": 20, "num_states": 0}}, "SimpleNSM needs num_states >= 1.*given 0"),
        ({"config": {"vocab_size": 20, "d_model": "four"}}, "d_model of SimpleNSM is a whole number; given 'four'"),
        ({"weights": {}}, r"weight \S+ is \[\d.*\], in the file absent"),
        ({"weights": [1]}, "config and its weights are dictionaries"),
        ({"golden": 3}, "not iterable"),
        ({"calibration": [3]}, "numpy"),
    ],
)
def test_parts_that_make_no_model_are_refused(
    content: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = spoiled(content, tmp_path / "model.pt", **changes)
    with pytest.raises(CheckpointError, match=f"do not make a model: (.|\n)*{message}"):
        load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"feed_forward": float("inf")},
        {"feed_forward": float("nan")},
        {"feed_forward": 1e308},
        {"prune_threshold": torch.tensor(0.1)},
        {"prune_threshold": float("nan")},
        {"communication": torch.tensor(True)},
        {"causal": None},
        {"gate_type": torch.tensor(1)},
        {"routing": ["softmax"]},
        {"hierarchy": torch.tensor([2])},
        {"initial_states": 1.0},
        {"max_seq_length": torch.ones(2)},
    ],
    ids=lambda changes: " ".join(f"{name} {value}" for name, value in changes.items()),
)
def test_a_config_that_was_altered_is_refused(content: dict[str, Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    path = spoiled(content, tmp_path / "model.pt", config={**content["config"], **changes})
    with pytest.raises(CheckpointError, match=r"its config and weights do not make a model: "):
        load(path)


def test_weights_of_the_wrong_shape_missing_and_surplus_are_named(content: dict[str, Any], tmp_path: Path) -> None:
    weights = content["weights"]
    fewer = {key: value for key, value in weights.items() if key != "head.1.bias"}
    for changed, message in (
        ({**weights, "head.1.bias": torch.zeros(3)}, r"head\.1\.bias is \[5\], in the file \[3\]"),
        (fewer, r"head\.1\.bias is \[5\], in the file absent"),
        ({**weights, "tail.bias": torch.zeros(3)}, r"tail\.bias is absent, in the file \[3\]"),
    ):
        path = spoiled(content, tmp_path / "model.pt", weights=changed)
        with pytest.raises(CheckpointError, match=f"do not make a model: by its config the weight {message}"):
            load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named_and_counted(
    content: dict[str, Any], tmp_path: Path, value: float
) -> None:
    bank = content["weights"]["layers.0.manager.bank"].clone()
    bank.view(-1)[[0, 5]] = value
    path = spoiled(content, tmp_path / "model.pt", weights={**content["weights"], "layers.0.manager.bank": bank})
    with pytest.raises(
        CheckpointError, match=rf"2 of the {bank.numel()} numbers in layers\.0\.manager\.bank are NaN or infinite"
    ):
        load(path)


# -- files that would run code -----------------------------------------------------------------------------------


def test_a_pickled_module_is_refused(small: SimpleNSM, tmp_path: Path) -> None:
    torch.save(small, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"was refused: it holds pickled Python objects .*nsm\.save"):
        load(tmp_path / "model.pt")


@pytest.mark.parametrize("where", ["pickle", "old format", "zip", "in a checkpoint", "in the weights", "in a sample"])
def test_code_in_a_file_is_never_run(content: dict[str, Any], tmp_path: Path, where: str) -> None:
    path, touched = tmp_path / "model.pt", tmp_path / "touched"
    evil = Touch(touched)
    if where == "pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    elif where == "old format":
        torch.save(evil, path, _use_new_zipfile_serialization=False)
    elif where == "zip":
        torch.save(evil, path)
    elif where == "in a checkpoint":
        spoiled(content, path, extra=evil)
    elif where == "in the weights":
        spoiled(content, path, weights={**content["weights"], "head.1.bias": evil})
    else:
        spoiled(content, path, golden=[evil])
    with pytest.raises(CheckpointError, match="was refused: it holds pickled Python objects"):
        load_checkpoint(path)
    assert not touched.exists()
    # The same bytes do run where pickles are trusted.
    if where == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert touched.exists()


def test_loading_reads_one_file_and_writes_none(small: SimpleNSM, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save(small, path)
    before = (os.stat(path).st_mtime_ns, path.read_bytes())
    load(path)
    assert (os.stat(path).st_mtime_ns, path.read_bytes()) == before
    assert list(tmp_path.iterdir()) == [path]
