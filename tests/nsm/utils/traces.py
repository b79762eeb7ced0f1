"""The trace of a model's run, with its routing."""

from __future__ import annotations

import numpy as np
import torch

from nsm.models.stream import StreamModel
from nsm.trace import Arrays, Trace


def trace_of(model: StreamModel, tokens: np.ndarray, sampled: list[int], positions: list[int]) -> Trace:
    """The model's run over tokens [N, T, K] with its routing, as a recorder would keep it."""
    state = model.initial_state(len(tokens))
    outputs: dict[str, list[np.ndarray]] = {}
    around: tuple[list[Arrays], list[Arrays]] = ([], [])
    with torch.no_grad():
        for step in range(tokens.shape[1]):
            before = state
            output, state, routing = model.traced_step(torch.from_numpy(tokens[:, step]), state)
            named = {"outputs": output, **routing}
            for name, value in named.items():
                outputs.setdefault(name, []).append(value.numpy()[:, positions])
            if step in sampled:
                for kept, states in zip(around, (before, state), strict=True):
                    kept.append({name: value.numpy().copy() for name, value in states.items()})
    before_states, after_states = (
        {name: np.stack([states[name] for states in kept], 1) for name in kept[0]} for kept in around
    )
    return Trace(
        inputs={"tokens": tokens, "valid": np.full(tokens.shape[:2], tokens.shape[2])},
        outputs={name: np.stack(parts, 1) for name, parts in outputs.items()},
        positions=np.array(positions),
        sampled=np.array(sampled),
        before=before_states,
        after=after_states,
        fingerprint="f",
        source="recorded",
        conditioning={"one_step": {"outputs": 1e-7}, "free_run": {"outputs": 1e-7}},
    )
