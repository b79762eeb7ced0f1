from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nsm.errors import BundleError, ConfigError, InputError
from nsm.spec import COUNT, OFFSET, EntrySpec, StateSpec, StepSpec, TensorSpec
from tests.runtimes.fake import fake_spec


def make_spec() -> StepSpec:
    return StepSpec(
        entries=(
            EntrySpec(
                "step",
                (TensorSpec("tokens", (2, 8), "int64", 1, 0, 19), TensorSpec("valid", (2,), "int64", None, 0, 8)),
                (TensorSpec("outputs", (2, 8, 5), "float32", 1),),
                reads=("lane.offset", "0.bank", "0.mask"),
                writes=("lane.offset", "0.bank"),
            ),
            EntrySpec(
                "decode", (TensorSpec("tokens", (2, 1), "int64", 1, 0, 19),), (), ("0.key",), ("lane.offset", "0.key")
            ),
            EntrySpec("commit", (), (), ("0.bank",), ("lane.offset", "0.bank", "10.cell")),
        ),
        states=(
            StateSpec("lane.offset", (2,), "int64"),
            StateSpec("0.bank", (2, 6, 32), "float32", init="learned"),
            StateSpec("0.mask", (2, 6), "bool", init="learned"),
            StateSpec("0.key", (2, 7, 16), "float16"),
            StateSpec("0.value", (7, 2, 16), "float16", batch_axis=1),
            StateSpec("10.cell", (2, 6), "float32", past="cell_in", present="cell_out"),
        ),
        chunk_size=8,
        batch=2,
    )


def test_a_spec_survives_json() -> None:
    spec = make_spec()
    assert StepSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_states_have_the_names_that_other_tools_know() -> None:
    names = {state.name: (state.past, state.present) for state in make_spec().states}
    assert names == {
        "lane.offset": ("past_state.lane.offset", "present_state.lane.offset"),
        "0.bank": ("past_state.0.bank", "present_state.0.bank"),
        "0.mask": ("past_state.0.mask", "present_state.0.mask"),
        "0.key": ("past_key_values.0.key", "present.0.key"),
        "0.value": ("past_key_values.0.value", "present.0.value"),
        "10.cell": ("cell_in", "cell_out"),
    }


def test_sorted_inputs_pair_with_sorted_outputs() -> None:
    roles = ("bank", "mask", "importance", "open_write", "key", "value", "open_key", "open_value", "tail", "cell")
    states = [StateSpec(f"{layer}.{role}", (1,), "float32") for layer in range(12) for role in roles]
    states += [StateSpec("lane.offset", (1,), "int64"), StateSpec("lane.filled", (1,), "int64")]
    pairs = {state.past: state.present for state in states}
    assert [pairs[past] for past in sorted(pairs)] == sorted(pairs.values())


def test_sizes_in_bytes() -> None:
    spec = make_spec()
    assert [state.nbytes for state in spec.states] == [16, 2 * 6 * 32 * 4, 12, 2 * 7 * 16 * 2, 7 * 2 * 16 * 2, 48]
    assert spec.state_nbytes == 16 + 1536 + 12 + 448 + 448 + 48
    assert StateSpec("x", (), "float64").nbytes == 8


def test_a_state_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"The state 0\.cache of shape \[1, 0, 4\] holds nothing\. Leave it out"):
        StateSpec("0.cache", (1, 0, 4), "float32")


def test_dtypes_are_those_of_numpy() -> None:
    spec = make_spec()
    assert [state.numpy_dtype for state in spec.states[:4]] == [np.int64, np.float32, np.bool_, np.float16]
    tokens = spec.entry("step").input("tokens")
    assert tokens is not None
    assert tokens.numpy_dtype == np.int64


def test_the_index_of_a_lane_is_on_its_axis() -> None:
    array = np.arange(7 * 2 * 16).reshape(7, 2, 16)
    value = make_spec().states[4]
    np.testing.assert_array_equal(array[value.lane_index(1)], array[:, 1])
    np.testing.assert_array_equal(np.eye(2)[StateSpec("x", (2, 2), "float32").lane_index(0)], [1.0, 0.0])


def test_parts_are_found_by_name() -> None:
    spec = make_spec()
    assert spec.state_names == ("lane.offset", "0.bank", "0.mask", "0.key", "0.value", "10.cell")
    assert spec.entry("decode").name == "decode"
    valid = spec.entry("step").input("valid")
    assert valid is not None
    assert valid.maximum == 8
    assert spec.entry("decode").input("valid") is None
    assert (spec.has("commit"), spec.has("advance")) == (True, False)
    names = [state.name for state in spec.states_of(("0.mask", "lane.offset"))]
    assert names == ["lane.offset", "0.mask"]


def test_an_entry_that_there_is_not_is_named_beside_those_there_are() -> None:
    with pytest.raises(InputError, match=r"There is no entry 'advance'\. Entries: step, decode, commit\."):
        make_spec().entry("advance")


def test_an_entry_without_inputs_needs_a_state() -> None:
    with pytest.raises(ConfigError, match="The entry commit has no inputs"):
        EntrySpec("commit", (), (), (), ("0.bank",))


def _chunked(change: str) -> StepSpec:
    """The spec of a model in chunks, whose parts do not fit together."""
    spec = fake_spec()
    step, decode, commit = spec.entries
    assert (decode.name, commit.name) == ("decode", "commit")
    unended = tuple(name for name in commit.writes if name != OFFSET)
    entries = {
        "no commit": (step, decode),
        "no decode": (step, commit),
        "commit without the offset": (step, decode, replace(commit, writes=unended)),
        "decode without the offset": (step, replace(decode, writes=()), commit),
        "commit with inputs": (step, decode, replace(commit, inputs=decode.inputs)),
    }
    return replace(spec, entries=entries[change])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no commit", r"expected an entry commit that writes lane\.offset, given none"),
        (
            "commit without the offset",
            r"expected an entry commit that writes lane\.offset, given one that does not",
        ),
        (
            "decode without the offset",
            r"expected an entry decode that writes lane\.offset, given one that does not",
        ),
        ("commit with inputs", "The entry commit takes inputs; expected states alone"),
    ],
)
def test_a_chunk_that_could_not_be_ended_is_refused(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _chunked(change)


def test_whole_chunks_need_neither_decode_nor_commit() -> None:
    assert not _chunked("no decode").has("decode")


@pytest.mark.parametrize("which", ["reads", "writes"])
def test_an_entry_names_states_that_there_are(which: str) -> None:
    spec = make_spec()
    names = ("0.bank", "0.pending", "0.advance")
    entry = spec.entries[0]
    entry = replace(entry, reads=names) if which == "reads" else replace(entry, writes=names)
    with pytest.raises(ConfigError, match=r"The entry step refers to undefined states: \['0.advance', '0.pending'\]"):
        replace(spec, entries=(entry,))


def test_a_state_that_is_appended_to_gives_its_new_rows_alone() -> None:
    ring = StateSpec("0.key", (2, 4, 64, 8), "float32", append_axis=2)
    assert ring.present_shape(1) == (2, 4, 1, 8)
    assert ring.present_shape(16) == (2, 4, 16, 8)
    whole = replace(ring, append_axis=None)
    assert whole.present_shape(16) == (2, 4, 64, 8)
    assert ring.nbytes == whole.nbytes
    for axis in (-1, 4):
        with pytest.raises(ConfigError, match=rf"0.key of shape \[2, 4, 64, 8\] has no axis {axis} to append on"):
            replace(ring, append_axis=axis)


def _change(data: Any, path: tuple[str | int, ...], value: object) -> None:
    for key in path[:-1]:
        data = data[key]
    if value is KeyError:
        del data[path[-1]]
    else:
        data[path[-1]] = value


STATE: tuple[str | int, ...] = ("states", 0)
INPUT: tuple[str | int, ...] = ("entries", 0, "inputs", 0)
OUTPUT: tuple[str | int, ...] = ("entries", 0, "outputs", 0)

WRONG: dict[str, tuple[tuple[str | int, ...], object]] = {
    "no entries": (("entries",), KeyError),
    "entries null": (("entries",), None),
    "entries a number": (("entries",), 3),
    "entries empty": (("entries",), []),
    "entry a word": (("entries", 0), "step"),
    "entry without a name": (("entries", 0, "name"), KeyError),
    "entry name a number": (("entries", 0, "name"), 3),
    "entry outside the bundle": (("entries", 1, "name"), "../../evil"),
    "entry at the root": (("entries", 1, "name"), "/evil"),
    "entry on another drive": (("entries", 1, "name"), "C:evil"),
    "entry in a folder": (("entries", 1, "name"), "a/b"),
    "entry in a folder of Windows": (("entries", 1, "name"), "a\\b"),
    "entry of a dot": (("entries", 1, "name"), "."),
    "entry with a suffix": (("entries", 1, "name"), "decode.onnx"),
    "entry that ends a line": (("entries", 1, "name"), "decode\n"),
    "entry with a zero byte": (("entries", 1, "name"), "decode\0"),
    "entry of a letter from elsewhere": (("entries", 1, "name"), "d\u0435code"),
    "entry with no name": (("entries", 1, "name"), ""),
    "entry longer than a file's name": (("entries", 1, "name"), "x" * 5000),
    "inputs null": (("entries", 0, "inputs"), None),
    "neither inputs nor reads": (("entries", 2, "reads"), []),
    "entry without reads": (("entries", 0, "reads"), KeyError),
    "reads a word": (("entries", 0, "reads"), "0.bank"),
    "reads a state that is not there": (("entries", 0, "reads"), ["0.pending"]),
    "writes a state that is not there": (("entries", 0, "writes"), ["0.pending"]),
    "state appended outside": (("states", 0, "append_axis"), 1),
    "input name null": ((*INPUT, "name"), None),
    "input without a dtype": ((*INPUT, "dtype"), KeyError),
    "input dtype unknown": ((*INPUT, "dtype"), "float31"),
    "input with an unknown key": ((*INPUT, "colour"), "red"),
    "input shape a word": ((*INPUT, "shape"), "wide"),
    "input shape negative": ((*INPUT, "shape"), [-1, 8]),
    "input minimum a word": ((*INPUT, "minimum"), "low"),
    "states a word": (("states",), "none"),
    "state a number": (STATE, 3),
    "state name a number": ((*STATE, "name"), 3),
    "state of dots": ((*STATE, "name"), ".."),
    "state with no name": ((*STATE, "name"), ""),
    "state without a shape": ((*STATE, "shape"), KeyError),
    "state shape null": ((*STATE, "shape"), None),
    "state shape of words": ((*STATE, "shape"), ["a"]),
    "state dtype unknown": ((*STATE, "dtype"), "real"),
    "state dtype null": ((*STATE, "dtype"), None),
    "state with an unknown key": ((*STATE, "colour"), "red"),
    "state batch axis a word": ((*STATE, "batch_axis"), "first"),
    "state batch axis outside": ((*STATE, "batch_axis"), 4),
    "state init unknown": ((*STATE, "init"), "ones"),
    "state past a number": ((*STATE, "past"), 3),
    "chunk size a word": (("chunk_size",), "eight"),
    "chunk size null": (("chunk_size",), None),
    "chunk size zero": (("chunk_size",), 0),
    "batch negative": (("batch",), -2),
    "batch a list": (("batch",), [2]),
    "no entry step": (("entries", 0, "name"), "begin"),
    "step without inputs": (("entries", 0, "inputs"), []),
    "two entries of a name": (("entries", 1, "name"), "step"),
    "two inputs of a name": (("entries", 0, "inputs", 1, "name"), "tokens"),
    "two states of a name": (("states", 4, "name"), "0.key"),
    "two states from one input": (("states", 5, "past"), "past_state.0.bank"),
    "two states to one output": (("states", 5, "present"), "present_state.0.bank"),
    "tokens without axes": ((*INPUT, "shape"), []),
    "tokens of other lanes": ((*INPUT, "shape"), [3, 8]),
    "no tokens": ((*INPUT, "shape"), [2, 0]),
    "part of a chunk": ((*INPUT, "shape"), [2, 12]),
    "two tokens to decode": (("entries", 1, "inputs", 0, "shape"), [2, 2]),
    "another token to decode": (("entries", 1, "inputs", 0, "dtype"), "int32"),
    "no bounds": (("entries", 1, "inputs", 0), TensorSpec("tokens", (2, 1), "int64", 1).__dict__),
    "a minimum null": ((*INPUT, "minimum"), None),
    "a maximum null": ((*INPUT, "maximum"), None),
    "bounds the wrong way round": ((*INPUT, "minimum"), 20),
    "bounds of other numbers": ((*INPUT, "dtype"), "float32"),
    "counts of other lanes": (("entries", 0, "inputs", 1, "shape"), [3]),
    "output of other lanes": ((*OUTPUT, "shape"), [3, 8, 5]),
    "output of other tokens": ((*OUTPUT, "shape"), [2, 1_000_000_000, 1_000_000]),
    "output of petabytes": ((*OUTPUT, "shape"), [2, 8, 10**12]),
    "output of no size at all": ((*OUTPUT, "shape"), [2, 8, 10**30]),
    "output that step does not give": (("entries", 1, "outputs"), [TensorSpec("more", (2, 1), "float32").__dict__]),
    "ring without a count": (("states", 3, "append_axis"), 1),
    "state without axes": (("states", 5, "shape"), []),
    "state of other lanes": (("states", 1, "shape"), [3, 6, 32]),
    "state of other lanes on its own axis": (("states", 4, "shape"), [7, 3, 16]),
    "offset of another shape": (("states", 0, "shape"), [2, 1]),
    "offset of another dtype": (("states", 0, "dtype"), "float32"),
    "five lanes over arrays of two": (("batch",), 5),
    "dtype of objects": (("states", 1, "dtype"), "O"),
    "dtype of parts": (("states", 1, "dtype"), "f4,f4"),
    "dtype half written": (("states", 1, "dtype"), "f4,("),
    "no capacity": (("capacity",), KeyError),
    "capacity zero": (("capacity",), 0),
    "capacity negative": (("capacity",), -1),
    "capacity of less than a call": (("capacity",), 7),
    "capacity a half": (("capacity",), 8.5),
    "capacity true": (("capacity",), True),
    "capacity a word": (("capacity",), "many"),
    "growth of nothing": (("states", 0, "per_token"), 0),
    "growth backwards": (("states", 0, "per_token"), -1),
    "growth of another number": (("states", 1, "per_token"), 1),
    "growth true": (("states", 0, "per_token"), True),
    "wrap of one number": (("states", 0, "wrap"), [5]),
    "wrap null": (("states", 0, "wrap"), None),
    "wrap of nothing": (("states", 0, "wrap"), [0, 0]),
    "wrap below zero": (("states", 0, "wrap"), [-1, 5]),
    "wrap past the dtype": (("states", 0, "wrap"), [1, 2**63]),
    "wrap of another number": (("states", 1, "wrap"), [0, 5]),
}


@pytest.mark.parametrize(("path", "value"), WRONG.values(), ids=WRONG)
def test_a_spec_that_was_edited_by_hand_is_refused(path: tuple[str | int, ...], value: object) -> None:
    data = json.loads(json.dumps(make_spec().to_json()))
    _change(data, path, value)
    with pytest.raises(BundleError, match="edited by hand") as caught:
        StepSpec.from_json(json.loads(json.dumps(data)))
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*OUTPUT, "shape"), [2, 8, 10**30], r"outputs of step is .* gives at most 1,073,741,824 bytes"),
        (("batch",), 5, r"lane\.offset has the shape \[2\]; expected the size 5, the lanes, on axis 0"),
        (("entries", 1, "name"), "../../evil", r"An entry is called '\.\./\.\./evil'; expected at most 64 letters"),
        (("states", 5, "name"), "..", r"A state is called '\.\.'; expected a name that a file could have"),
        (("entries", 0, "name"), "begin", "has an entry step that takes tokens; given the entries begin, decode"),
        ((*INPUT, "minimum"), None, r"tokens of int64 has the bounds None \.\. 19; integers have both"),
    ],
)
def test_what_does_not_fit_together_is_named(path: tuple[str | int, ...], value: object, message: str) -> None:
    data = json.loads(json.dumps(make_spec().to_json()))
    _change(data, path, value)
    with pytest.raises(BundleError, match=message):
        StepSpec.from_json(data)


def test_the_rows_of_a_ring_are_counted_too() -> None:
    states = (StateSpec(COUNT, (1,), "int64"), StateSpec("0.key", (1, 1 << 16, 64), "float32", append_axis=2))
    tokens, names = TensorSpec("tokens", (1, 1 << 20), "bool", 1), (COUNT, "0.key")
    with pytest.raises(
        ConfigError, match=r"0\.key of step is \[1, 65536, 1048576\] of float32; a call takes and gives"
    ):
        StepSpec((EntrySpec("step", (tokens,), (), names, names),), states, 1, 1)


@pytest.mark.parametrize("data", [[], "spec", 3, None, {}])
def test_what_is_no_spec_is_refused(data: Any) -> None:
    with pytest.raises(BundleError, match=r"spec is .*; expected an object with the keys"):
        StepSpec.from_json(data)
