from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nsm
from nsm import Carried
from nsm.errors import ConfigError, InputError, NsmError, SnapshotError, UnsupportedError
from nsm.runtimes.session.session import Session
from tests.nsm.adapters.models import (
    Decay,
    Fault,
    Logarithm,
    OneStream,
)
from tests.nsm.adapters.wrapped import MODELS, decay, language, tokens, voice

H = torch.zeros(1, 3)


# -- the normal form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_lanes_come_first_and_streams_of_any_length_side_by_side_are_what_they_are_alone(name: str) -> None:
    model = MODELS[name]()
    assert model.lanes is None
    spec = model.spec(3)
    assert all(state.shape[0] == 3 and state.batch_axis == 0 for state in spec.states)
    assert all(item.shape[:2] == (3, entry.inputs[0].shape[1]) for entry in spec.entries for item in entry.outputs)
    given = tokens(model, 3, 11)
    counts = [11, 0, 6]
    with nsm.reference(model, batch=3) as session:
        outputs = session.feed(given, counts)["outputs"]
        more = session.feed(given[:, :3], [3, 3, 1])["outputs"]
        state = session.read_state()
    for lane, (first, second) in enumerate(zip(counts, (3, 3, 1), strict=True)):
        stream = np.concatenate([given[lane, :first], given[lane, :second]])[None]
        with torch.no_grad():
            wanted, after = model(torch.from_numpy(stream), return_state=True)
        both = np.concatenate([outputs[lane, :first], more[lane, :second]])
        np.testing.assert_allclose(both, wanted[0], rtol=1e-5, atol=1e-6)
        for key, value in after.items():
            np.testing.assert_allclose(state[key][lane], value[0], rtol=1e-5, atol=1e-6, err_msg=key)


def test_an_lstm_answers_what_torch_answers() -> None:
    torch.manual_seed(0)
    module = nn.LSTM(5, 7, num_layers=2)
    x = torch.randn(9, 2, 5)
    with torch.no_grad():
        wanted, (hidden, cell) = module(x)
        given, state = nsm.as_step(module)(x.transpose(0, 1), return_state=True)
    torch.testing.assert_close(given, wanted.transpose(0, 1))
    torch.testing.assert_close(state["hidden"], hidden.transpose(0, 1))
    torch.testing.assert_close(state["cell"], cell.transpose(0, 1))


def test_states_keep_their_nesting_names_and_initial_values() -> None:
    model = language()
    assert [state.name for state in model.spec().states] == ["h", "c"]
    assert [state.init for state in model.spec().states] == ["zeros", "learned"]
    assert float(model.initial_state(2)["c"].min()) == pytest.approx(0.1)
    learned = decay().initial_state(2)["mean"]
    torch.testing.assert_close(learned[1], torch.linspace(-1, 1, 3))


def test_a_state_without_lanes_makes_one_lane_all_there_is() -> None:
    class Shared(nn.Module):
        def forward(self, x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
            total = total * 0.5 + x.sum(0)
            return total[None] + x, total

    model = nsm.as_step(Shared(), [Carried("total", torch.zeros(3), None)], token_shape=(3,))
    assert model.lanes == 1
    assert model.spec(1).states[0].shape == (1, 3)
    with pytest.raises(
        UnsupportedError, match=r"its states \['total'\] have no axis for streams\. Asked for are 2 lanes"
    ):
        model.spec(2)


def test_a_module_written_for_one_stream_is_found_out() -> None:
    class Single(nn.Module):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = h + x.reshape(1, 3)
            return h * 2, h

    model = nsm.as_step(Single(), [H], token_shape=(3,))
    assert model.lanes == 1
    with pytest.raises(UnsupportedError, match=r"with 3 it fails \(RuntimeError: .*Asked for are 2 lanes"):
        model.spec(2)


def test_a_module_that_runs_for_two_streams_but_gives_other_shapes_takes_one() -> None:
    model = nsm.as_step(OneStream(), [torch.zeros(1, 4)], token_shape=(3,))
    assert model.lanes == 1
    with pytest.raises(UnsupportedError, match=r"with 3 it gives outputs \[1, 1, 3, 4\] .*Asked for are 2 lanes"):
        model.spec(2)


class Scaled(nn.Module):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = 0.5 * h + x
        return 2 * h, h


def test_the_shape_of_a_token_is_that_of_the_samples() -> None:
    samples = np.random.default_rng(0).standard_normal((4, 20, 3)).astype(np.float32)
    model = nsm.as_step(Scaled(), [Carried("h", H)], samples=samples)
    assert (model.token_spec.shape, model.token_spec.dtype) == ((3,), "float32")
    with pytest.raises(ConfigError, match="vocab_size=N for ids"):
        nsm.as_step(Scaled(), [Carried("h", H)], samples=[np.arange(9)])


def test_several_outputs_have_names() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h = 0.5 * h + x
            return h, h.sum(-1, keepdim=True), h

    model = nsm.as_step(Two(), [H], token_shape=(3,), outputs=["main", "sum"])
    outputs, _ = model.call("step", {"tokens": torch.ones(1, 1, 3)}, model.initial_state(1))
    assert {name: value.shape for name, value in outputs.items()} == {"main": (1, 1, 3), "sum": (1, 1, 1)}
    with pytest.raises(ConfigError, match="1 outputs and then the states, 2 in all"):
        nsm.as_step(Two(), [H], token_shape=(3,))


def test_any_number_of_tokens_a_call_is_taken_with_a_time_axis_and_one_without() -> None:
    assert language().spec(1, 7).entry("step").inputs[0].shape == (1, 7)
    assert language().spec().entry("step").inputs[0].shape == (1, 4)
    with pytest.raises(InputError, match="at least one token; given 0"):
        language().spec(1, 0)
    with pytest.raises(UnsupportedError, match="one token at a time, of shape \\[64\\]; asked for are 4"):
        voice().spec(1, 4)
    with pytest.raises(InputError, match="There is no entry 'decode'"):
        voice().call("decode", {"tokens": torch.zeros(1, 1, 64)}, voice().initial_state(1))


def test_lanes_that_all_have_to_go_are_not_waited_for_for_ever() -> None:
    model = language()
    spec = model.spec(2)
    whole = type(spec)(spec.entries[:1], spec.states, 1, 2)
    from nsm.export.sources.torch_session import TorchRuntime

    initial = {name: value.numpy() for name, value in model.initial_state(2).items()}
    session = Session(TorchRuntime(model, whole), whole, initial, "", "pytorch")
    with pytest.raises(InputError, match=r"whole calls on all lanes; given \[4, 0\]"):
        session.feed(tokens(model, 2, 4), [4, 0])


# -- what is refused ---------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[type[NsmError], str]] = {
    "buffer": (UnsupportedError, r"keeps its attributes \['total'\] .*Make it a state"),
    "late buffer": (UnsupportedError, r"keeps its attributes \['total'\]"),
    "attribute": (UnsupportedError, r"keeps its attributes \['last'\]"),
    "number": (UnsupportedError, r"keeps its attributes \['scale'\]"),
    "random": (UnsupportedError, "draws random numbers"),
    "grows": (
        ConfigError,
        r"The state state_0 is float32\[1, 3\] before a step and float32\[1, 6\] after it",
    ),
    "casts": (ConfigError, r"state_0 .* float64\[1, 3\] after it"),
    "half": (ConfigError, r"The output outputs is float16\[1, 1, 3\]"),
    "pooled": (ConfigError, r"The output outputs is float32\[\] for one token"),
    "forgets": (ConfigError, "took 1 states and gave 1 tensors; expected 1 outputs and then the states, 2"),
    "raises": (ConfigError, r"fails on tokens of shape \[1, 1, 3\] .*ValueError: no such luck"),
    "frozen": (UnsupportedError, "a length is built into it, or something is not carried"),
    "drops": (UnsupportedError, "a length is built into it, or something is not carried"),
    "mixes": (UnsupportedError, "answers a stream differently when another one is beside it"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_module_with_a_fault_is_refused(kind: str) -> None:
    error, message = FAULTS[kind]
    torch.manual_seed(0)
    with pytest.raises(error, match=message):
        nsm.as_step(Fault(kind), [H], token_shape=(3,), timed=True, chunk_size=4)


def test_the_same_module_without_a_fault_is_not() -> None:
    assert nsm.as_step(Fault("none"), [H], token_shape=(3,), timed=True, chunk_size=4).lanes is None


@pytest.mark.parametrize(
    ("module", "options", "error", "message"),
    [
        (nn.LSTM(3, 3, bidirectional=True), {}, UnsupportedError, "bidirectional RNN needs the end of a stream"),
        (nn.Linear(3, 3), {"token_shape": (3,)}, ConfigError, "Linear has no step.* told its states"),
        (nn.Linear(3, 3), {"states": [], "token_shape": (3,)}, ConfigError, "a list of Carried or tensors"),
        (nn.Linear(3, 3), {"states": ["h"], "token_shape": (3,)}, ConfigError, "tensor of one stream; given 'h'"),
        (nn.Linear(3, 3), {"states": [H]}, ConfigError, "Expected the kind of tokens"),
        (nn.Linear(3, 3), {"states": [H], "vocab_size": 0}, ConfigError, "vocab_size=0"),
        (nn.Linear(3, 3), {"states": [H], "vocab_size": 9.0}, ConfigError, "vocab_size is a whole number; given 9.0"),
        (nn.Linear(3, 3), {"states": [H], "token_shape": 3}, ConfigError, "token_shape is a list .*; given 3"),
        (nn.LSTM(3, 3), {"chunk_size": 4.0}, ConfigError, "chunk_size is a whole number; given 4.0"),
        (nn.Linear(3, 3), {"states": [H], "token_shape": (3,), "timed": "yes"}, ConfigError, "timed is True or False"),
        (Decay(), {"token_shape": (4,)}, ConfigError, r"fails on tokens of shape \[1, 1, 4\]"),
        (nn.LSTM(3, 3).bfloat16(), {}, ConfigError, r"weight_ih_l0 is torch.bfloat16. Convert .* with .float\(\)"),
        (nn.LSTM(3, 3).to("meta"), {}, ConfigError, r"LSTM lies on the device meta; .* with module\.cpu\(\)"),
        (nn.LSTM(3, 3).double(), {}, ConfigError, "weight_ih_l0 is torch.float64"),
        (
            nn.Linear(3, 3),
            {"states": [H.double()], "token_shape": (3,)},
            ConfigError,
            "its state state_0 is torch.f.*64",
        ),
        (Fault("none").bfloat16(), {"states": [H], "token_shape": (3,)}, ConfigError, "its buffer total is torch.bf"),
    ],
)
def test_what_does_not_fit_is_refused(
    module: nn.Module, options: dict[str, Any], error: type[NsmError], message: str
) -> None:
    with pytest.raises(error, match=message):
        nsm.as_step(module, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", H), "needs a name"),
        (("h", H, 1), "lanes on axis 1, which has to be there and of size 1"),
        (("h", H, 2), "lanes on axis 2"),
        (("h", H, "first"), "lane_axis of the state h is a whole number; given 'first'"),
        (("h", H.half()), r"float16; a state may be float32, int64, int32, bool. Convert it, .* with .float\(\)"),
        (("h", H.numpy()), "is of type ndarray; expected a tensor. .*torch.from_numpy"),
        (("h", H * float("nan")), "holds NaN or infinity"),
    ],
)
def test_a_state_that_makes_no_sense_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Carried(*arguments)


@pytest.mark.parametrize("timed", [False, True])
def test_a_module_that_makes_nothing_finite_of_made_up_tokens_is_examined_on_samples(timed: bool) -> None:
    powers = [value**2 + 9.1 for value in np.random.default_rng(0).standard_normal((2, 7, 3))]
    silence = [np.full((9, 3), 10.0), *powers]
    options: dict[str, Any] = {"token_shape": (3,), "timed": timed, "chunk_size": 4}
    with pytest.raises(
        ConfigError,
        match=r"NaN or infinity in \['outputs', 'state_0'\] for made-up .* and positive ones; .*samples=\[...\]",
    ):
        nsm.as_step(Logarithm(9.0), [H], **options)
    for samples in (powers, silence):
        assert nsm.as_step(Logarithm(9.0), [H], samples=samples, **options).lanes is None
    with pytest.raises(ConfigError, match=r"NaN or infinity in .* for the samples; .*Check its weights"):
        nsm.as_step(Logarithm(9.0), [H], samples=[-item for item in powers], **options)


@pytest.mark.parametrize("timed", [False, True])
def test_what_takes_a_logarithm_is_examined_on_positive_numbers(timed: bool) -> None:
    assert nsm.as_step(Logarithm(), [H], token_shape=(3,), timed=timed, chunk_size=4).lanes is None


@pytest.mark.parametrize("kind", ["buffer", "random", "frozen", "drops", "mixes"])
def test_on_samples_a_fault_is_found_too(kind: str) -> None:
    error, message = FAULTS[kind]
    samples = np.random.default_rng(0).standard_normal((1, 5, 3))
    with pytest.raises(error, match=message):
        nsm.as_step(Fault(kind), [H], token_shape=(3,), timed=True, chunk_size=4, samples=samples)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "samples holds no sequence"),
        ([np.zeros((5, 3))], "hold the same token 5 times"),
        ([np.ones((1, 3))], "hold the same token 1 times"),
        ([np.zeros((5, 4))], r"samples\[0\] is not a sequence for this model: The model takes vectors \[B, T, 3\]"),
    ],
)
def test_samples_that_show_nothing_are_refused(samples: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        nsm.as_step(Fault("none"), [H], token_shape=(3,), timed=True, samples=samples)


def test_a_protocol_that_is_not_kept_is_refused() -> None:
    class NoDictionary(Decay):
        def initial_state(self, batch: int) -> Any:
            return H

    class OtherStates(Decay):
        def step(self, x: Tensor, state: dict[str, Tensor]) -> Any:
            return x, {"mean": state["mean"]}

    with pytest.raises(ConfigError, match="gave a Tensor; expected a dictionary"):
        nsm.as_step(NoDictionary(), token_shape=(3,))
    with pytest.raises(ConfigError, match=r"took the states \['mean', 'seen'\] and gave \['mean'\]"):
        nsm.as_step(OtherStates(), token_shape=(3,))


def test_names_and_sizes_are_checked() -> None:
    two = [Carried("h", H), Carried("h", H)]
    with pytest.raises(ConfigError, match="Two of the states and outputs are called h"):
        nsm.as_step(Fault("none"), two, token_shape=(3,))
    with pytest.raises(ConfigError, match="chunk_size is at least 1; given 0"):
        nsm.as_step(Fault("none"), [H], token_shape=(3,), timed=True, chunk_size=0)
    with pytest.raises(InputError, match=r"nsm.save writes .*; given AdaptedModel.* nsm.export_model"):
        nsm.save(voice(), "voice.pt")


class Leaky(nn.Module):
    """Like `nn.RNN` with another non-linearity, it says nothing of a number that it was made with."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = h + self.rate * (x - h)
        return h, h


def test_modules_that_differ_in_a_number_or_name_are_different_models() -> None:
    first, second = nn.RNN(5, 7), nn.RNN(5, 7, nonlinearity="relu")
    second.load_state_dict(first.state_dict())
    slow, fast = (nsm.as_step(Leaky(rate), [H], token_shape=(3,)) for rate in (0.1, 0.9))
    for one, other in ((nsm.as_step(first), nsm.as_step(second)), (slow, fast)):
        snapshot = nsm.reference(one).snapshot()
        with pytest.raises(SnapshotError, match="another model"):
            nsm.reference(other).restore(snapshot)
    again = nsm.as_step(Leaky(0.1), [H], token_shape=(3,))
    nsm.reference(again).restore(nsm.reference(slow).snapshot())


def test_outputs_without_names_and_types_that_numpy_lacks_are_refused() -> None:
    class Two(Decay):
        def step(self, x: Tensor, state: dict[str, Tensor]) -> Any:
            y, state = super().step(x, state)
            return (y, y), state

    class Half(Decay):
        def step(self, x: Tensor, state: dict[str, Tensor]) -> Any:
            y, state = super().step(x, state)
            return y.bfloat16(), state

    with pytest.raises(ConfigError, match=r"gave 2 outputs; named are \['outputs'\]. Name them all"):
        nsm.as_step(Two(), token_shape=(3,))
    with pytest.raises(ConfigError, match=r"The output outputs is torch.bfloat16; expected float32"):
        nsm.as_step(Half(), token_shape=(3,))


def test_a_room_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match=r"module 'nsm.adapters' has no attribute 'other'"):
        nsm.adapters.other  # type: ignore[attr-defined]  # noqa: B018
