"""Slots that come and go while a stream runs: every backend prunes and allocates those that PyTorch does."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch

from nsm.modules.bank.adaptation import FRESH, REST_RATE, RESTED, Adaptation
from nsm.trace import Array
from tests.runtimes.streams import ADAPTIVE, DEFAULTS, Exported, Exporter, Opener

CALLS = 1040
# So much of importance may rounding have added up to on any backend, and so far from all thresholds is what decides.
ROUNDING, MARGIN = 1e-6, 1e-5


@dataclass(frozen=True)
class Decided:
    """A stream [calls, B, K, 3] whose kind changes now and then, and PyTorch's masks and importances [calls, B, S]."""

    tokens: Array
    masks: Array
    importances: Array

    def changes(self) -> tuple[int, int]:
        """How many slots were pruned, and how many allocated."""
        changes = np.diff(self.masks.astype(int), axis=0)
        return int((changes < 0).sum()), int((changes > 0).sum())

    def margin(self, adaptation: Adaptation) -> float:
        """How near an importance came to a threshold that would have decided otherwise on the other side of it.

        With six slots and the default novelty nothing else decides: the highest of six weights is over a tenth.
        """
        active, before, after = self.masks[:-1], self.importances[:-1], self.importances[1:]
        rested = before + REST_RATE * (FRESH - before)
        distances = [
            np.abs(after - adaptation.prune_threshold)[active],
            np.abs(after - adaptation.allocate_threshold)[active],
            np.abs(rested - RESTED)[~active],
        ]
        return float(min(distance.min() for distance in distances))


@torch.no_grad()
def decide(exported: Exported) -> Decided:
    random = np.random.default_rng(5)
    batch, count = exported.spec.batch, exported.spec.entry("step").inputs[0].shape[1]
    kinds = random.standard_normal((CALLS // 80, batch, 3)) * 3
    spread = random.choice([0.1, 1.0, 3.0], (CALLS // 80, batch))
    which = np.arange(CALLS) // 80
    noise = random.standard_normal((CALLS, batch, count, 3))
    tokens = (kinds[which][:, :, None] + spread[which][:, :, None, None] * noise).astype(np.float32)
    state, states = exported.model.initial_state(batch), []
    for call in torch.from_numpy(tokens):
        _, state = exported.model.step(call, state)
        states.append(state)
    masks, importances = (np.stack([state[f"0.{role}"].numpy() for state in states]) for role in ("mask", "importance"))
    return Decided(tokens, masks, importances)


@pytest.fixture(scope="module")
def decided(exporter: Exporter) -> Decided:
    return decide(exporter(ADAPTIVE))


@pytest.fixture(scope="module")
def decided_by_default(exporter: Exporter) -> Decided:
    return decide(exporter(DEFAULTS))


def test_slots_are_pruned_and_allocated_again_and_again(decided: Decided) -> None:
    """Otherwise the test below would compare masks that never change."""
    assert min(decided.changes()) >= 3
    assert decided.masks.any(-1).all()


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_backends_prune_and_allocate_the_slots_that_pytorch_does(target: str, opener: Opener, decided: Decided) -> None:
    _, session = opener(ADAPTIVE, target)
    for call, (piece, mask) in enumerate(zip(decided.tokens, decided.masks, strict=True)):
        session.step(piece)
        np.testing.assert_array_equal(session.read_state()["0.mask"], mask, err_msg=f"call {call}")


@pytest.mark.slow
def test_the_default_thresholds_decide_too_and_nothing_is_on_the_edge(
    exporter: Exporter, decided_by_default: Decided
) -> None:
    config, defaults = exporter(DEFAULTS).model.config, Adaptation()
    assert {name: config[name] for name in asdict(defaults)} == asdict(defaults)
    assert min(decided_by_default.changes()) >= 10
    assert decided_by_default.margin(Adaptation()) > MARGIN


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "onnxruntime", "openvino"])
def test_lanes_that_take_token_by_token_decide_alike_at_the_default_thresholds(
    target: str, opener: Opener, decided_by_default: Decided
) -> None:
    """By calls of `step` and, every other chunk, of `decode` and `commit`."""
    _, session = opener(DEFAULTS, target)
    for call, piece in enumerate(decided_by_default.tokens):
        if call % 2:
            for token in np.split(piece, piece.shape[1], 1):
                session.decode(token)
        else:
            session.step(piece)
        state, about = session.read_state(), f"call {call}"
        np.testing.assert_array_equal(state["0.mask"], decided_by_default.masks[call], err_msg=about)
        np.testing.assert_allclose(
            state["0.importance"], decided_by_default.importances[call], rtol=0, atol=ROUNDING, err_msg=about
        )
