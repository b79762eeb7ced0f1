"""A stream that moves: from one backend to the next, to PyTorch, and on two ways from one point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import nsm
from nsm.errors import InputError, SnapshotError
from nsm.models.simple import SimpleNSM
from nsm.runtimes.parity.budgets import find_budget
from nsm.runtimes.parity.metrics import relative_error, rms_norm
from nsm.trace import Array
from tests.small_models import CHUNK, make_model, make_sequences


def errors(given: Array, wanted: Array) -> list[float]:
    """Of each chunk, as parity has them."""
    floor = 0.01 * rms_norm(wanted)
    parts = range(0, len(wanted), CHUNK)
    return [relative_error(given[i : i + CHUNK], wanted[i : i + CHUNK], floor) for i in parts]


def test_a_stream_goes_from_onnxruntime_over_openvino_to_pytorch(
    exported: Path, checkpoint: Path, model: SimpleNSM
) -> None:
    """Cut inside chunks, on other lanes, and with another number of lanes at the end."""
    tokens = make_sequences(1, 40 * CHUNK, seed=7)[0]
    first, second, third = np.split(tokens, [13 * CHUNK + 3, 27 * CHUNK + 5])
    with (
        nsm.open(exported, "onnxruntime") as one,
        nsm.open(exported, "openvino") as two,
        nsm.reference(checkpoint) as three,
    ):
        outputs = [one.feed(np.stack([first, first[::-1]]))["outputs"][0]]
        two.feed(make_sequences(2, 11))
        two.restore(one.snapshot(0), lane=1)
        outputs.append(two.feed(np.stack([second[::-1], second]))["outputs"][1])
        three.restore(two.snapshot(1), lane=0)
        outputs.append(three.run(third)["outputs"])
        state = three.read_state()
    with torch.no_grad():
        wanted, after = model(torch.from_numpy(tokens[None]), return_state=True)
    budget = find_budget("fp32")
    assert np.quantile(errors(np.concatenate(outputs), wanted[0].numpy()), 0.99) <= budget.free_run_p99
    for name, value in after.items():
        if value.is_floating_point():
            assert relative_error(state[name], value.numpy(), 0.01 * rms_norm(value.numpy())) <= budget.free_run_p99
        else:
            np.testing.assert_array_equal(state[name], value.numpy())


def test_a_snapshot_of_another_model_is_refused_in_pytorch_too(exported: Path) -> None:
    with nsm.open(exported, "onnxruntime") as session, nsm.reference(make_model(seed=1), batch=2) as other:
        before = other.read_state()
        with pytest.raises(SnapshotError, match="is of another model"):
            other.restore(session.snapshot())
        for name, value in other.read_state().items():
            np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("where", ["onnxruntime", "openvino", "pytorch"])
def test_a_fork_goes_on_twice_from_one_point(where: str, exported: Path, checkpoint: Path) -> None:
    common, left, right = np.split(make_sequences(1, 6 * CHUNK, seed=3)[0], [2 * CHUNK + 3, 4 * CHUNK + 1])
    left, right = left[: 2 * CHUNK - 2], right[: 2 * CHUNK - 2]
    with nsm.reference(checkpoint, 2) if where == "pytorch" else nsm.open(exported, where) as session:
        session.feed(np.stack([common, common[::-1]]))
        session.fork(0, into=1)
        assert session.offsets.tolist() == [3, 3]
        forked = session.feed(np.stack([left, right]))["outputs"]
        for lane, branch in enumerate((left, right)):
            session.reset()
            both = np.stack([np.concatenate([common, branch])] * 2)
            wanted = session.feed(both)["outputs"][lane, len(common) :]
            np.testing.assert_allclose(forked[lane], wanted, rtol=1e-4, atol=1e-5)
        assert np.abs(forked[0] - forked[1]).max() > 1e-3
        session.fork(1, into=1)  # nothing to do is done
        with pytest.raises(InputError, match=r"lanes 0 \.\. 1; given 2"):
            session.fork(0, into=2)
        with pytest.raises(InputError, match="given -1"):
            session.fork(-1, into=0)
