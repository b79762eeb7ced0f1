"""Each experiment has a step that fails it alone, and right steps pass them all."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from nsm.adapters.validate import EXPERIMENTS, Step, examine, summary
from nsm.adapters.validate.subject import Subject
from nsm.errors import ConfigError, InputError, NsmError, UnsupportedError
from tests.nsm.adapters import steps

FAULTS: dict[str, tuple[str, type[NsmError], str]] = {
    "NotFinite": ("finite", ConfigError, r"NaN or infinity in \['y'\] for made-up tokens, .* and positive.*SAMPLES"),
    "Grows": ("shapes", ConfigError, r"ring is float32\[1, 5, 3\] before a step and float32\[1, 6, 3\] after it"),
    "Double": ("shapes", ConfigError, r"output y is float64\[1, 1, 3\] for one token.*shape \[B, T, ...\]"),
    "Pooled": ("shapes", UnsupportedError, r"answers 8 tokens in one call with y \[1, 1, 3\]; expected \[1, 8, 3\]"),
    "Writes": ("arguments", UnsupportedError, r"writes into \['ring'\], which it was given"),
    "Counts": ("repeat", UnsupportedError, r"gives another output y at call \d+ when the same stream is run again"),
    "Unread": ("read", ConfigError, r"never reads its states \['h'\]"),
    "FirstOfCall": ("split", UnsupportedError, r"answers 8 tokens in one call differently .*a length is built.*LENGTH"),
    "WrongWhenFull": ("split", UnsupportedError, r"differently .*\(output y, from token \d+ on\)"),
    "MixesTokens": ("lanes", UnsupportedError, r"mixes its lanes\. Does it normalise over the batch.*LANES"),
    "OneCount": ("lanes", UnsupportedError, r"mixes its lanes\. Does it take the counter or state of one stream"),
    "FourMixed": ("lanes", UnsupportedError, r"mixes its lanes\. Does it take the counter or state of one stream"),
    "Window": ("offline", UnsupportedError, r"is not the model: from token 70 on, y departs"),
    "OtherShape": (
        "offline",
        UnsupportedError,
        r"gives y \[1, 96, 3\] step by step, and the offline run .*\[1, 95, 3\]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_with_a_fault_fails_its_experiment_and_no_other(fault: str) -> None:
    name, error, message = FAULTS[fault]
    step: Step = getattr(steps, fault)()
    subject = Subject(step)
    for experiment in EXPERIMENTS:
        if experiment.name == name:
            with pytest.raises(error, match=message):
                experiment.run(subject)
            if name in ("finite", "shapes", "arguments", "repeat"):  # what later ones rely on
                return
        else:
            experiment.run(subject)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_examination_ends_with_the_first_experiment_that_fails(fault: str) -> None:
    _, error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        examine(getattr(steps, fault)())


@pytest.mark.parametrize("step", [steps.Right(), steps.Positive(), steps.Four(), steps.OneStream(), steps.Long(7)])
def test_a_right_step_passes(step: Step) -> None:
    found = examine(step)
    assert [item.name for item in found.experiments] == [item.name for item in EXPERIMENTS]
    assert found.lanes == step.lanes
    assert found.shapes == {"y": (3,)}
    skipped = {item.name: item.detail for item in found.experiments if item.status == "skipped"}
    assert set(skipped) >= {"random", "kept"}
    assert ("split" in skipped) == (not step.timed)
    assert skipped.get("lanes", step.why) == step.why
    assert ("offline" in skipped) == isinstance(step, steps.Positive)
    assert summary(found.experiments).startswith("examined: finite, shapes, arguments, fill, repeat, read")


def test_without_an_offline_run_the_report_says_so() -> None:
    found = examine(steps.Positive())
    assert "offline (not compared with an offline run)" in summary(found.experiments)
    assert found.experiments[-1].detail == "not compared with an offline run. OFFLINE"


def test_on_samples_that_the_step_takes_it_passes() -> None:
    samples = [np.full((9, 3), 10, np.float32), np.random.default_rng(0).random((30, 3)).astype(np.float32) + 9]
    assert examine(steps.NotFinite(), samples).lanes is None
    with pytest.raises(ConfigError, match=r"NaN or infinity .* for the samples; .*Check its weights"):
        examine(steps.NotFinite(), [samples[1] - 5])
    with pytest.raises(InputError, match="hold the same token 9 times"):
        examine(steps.NotFinite(), samples[:1])


@pytest.mark.parametrize("length", [2, 40, 100, 300])
def test_a_window_is_examined_until_it_is_full(length: int) -> None:
    found = examine(steps.Long(length))
    assert found.filled == length
    assert not any(item.severity == "warning" for item in found.messages)


def test_a_window_that_is_too_long_to_be_filled_is_said() -> None:
    found = examine(steps.Long(400, size=30_000_000))
    assert found.filled == 333
    assert any("states ['cache'] are still filling after 333 tokens" in item.text for item in found.messages)


@pytest.mark.parametrize(
    ("rows", "capacity"), [(100, None), (100, 100), (300, 200), (9, 9), (3, 3), (2, 2), (20, None)]
)
def test_a_step_whose_table_ends_is_examined_up_to_there(rows: int, capacity: int | None) -> None:
    found = examine(steps.Table(rows, capacity))
    assert all(item.status == "passed" for item in found.experiments if item.name not in ("random", "kept", "split"))
    assert not any(item.severity == "warning" for item in found.messages)


def test_a_step_that_fails_at_once_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="The table ends"):
        examine(steps.Table(0))


def test_what_shows_only_when_the_window_is_full_is_found() -> None:
    class Wraps(steps.Long):
        """Reads the first stream's oldest input for all of them."""

        def one(self, x: np.ndarray, state: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
            y, after = super().one(x, state)
            return y + state["cache"][:1, 0], after

        def offline(self, inputs: dict[str, np.ndarray]) -> None:
            return None

    with pytest.raises(UnsupportedError, match="mixes its lanes"):
        examine(Wraps(150))


def test_every_experiment_says_what_it_shows_and_what_it_caught() -> None:
    assert len({item.name for item in EXPERIMENTS}) == len(EXPERIMENTS)
    assert all(item.shows and item.caught and item.run.__doc__ for item in EXPERIMENTS)


def test_an_examination_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from nsm.adapters.validate import examine; print('fine')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "fine\n"
