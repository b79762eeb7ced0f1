"""Where recordings come from: a model that runs a sequence, or a golden trace that was recorded when one did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from nsm.errors import InputError
from nsm.trace import Trace
from nsm.utils.recording import Array, LayerRecording, Recording, bank_states

if TYPE_CHECKING:
    import torch

    from nsm.models import StreamModel

ROUTING, MASK = "routing.", "mask."


def record_model(model: StreamModel, tokens: ArrayLike, stream: int = 0) -> Recording:
    """Run one stream through the model, chunk by chunk from its beginning, without gradients.

    Args:
        model: any `StreamModel` with a layer that routes.
        tokens: ids [T] or [B, T], or vectors [T, input_dim] or [B, T, input_dim]; a torch tensor or an array.
        stream: which of the B.

    Raises:
        InputError: tokens that the model does not take, no such stream, or a model no layer of which routes.
    """
    import torch

    sequence = _stream_of(model, tokens, stream)
    size, length = model.chunk_size, sequence.shape[1]
    routings: list[dict[str, torch.Tensor]] = []
    with torch.no_grad():
        state = model.initial_state(1)
        states = [state]
        for start in range(0, length, size):
            chunk = sequence[:, start : start + size]
            count, valid = chunk.shape[1], None
            if count < size:
                chunk = torch.cat([chunk, chunk[:, -1:].expand(-1, size - count, *chunk.shape[2:])], 1)
                valid = torch.full((1,), count, device=chunk.device)
            _, state, routing = model.traced_step(chunk, state, valid)
            routings.append({name: weights[:, :count] for name, weights in routing.items()})
            if valid is None:
                states.append(state)
    names = _routed(routings[0], "This model")
    seen = size * np.arange(len(states))
    positions = np.arange(length)
    layers = []
    for index in names:
        parts = {
            role: np.concatenate([_numpy(state[f"{index}.{role}"]) for state in states])
            for role in ("bank", "mask", "importance")
            if f"{index}.{role}" in state
        }
        routed = np.concatenate([_numpy(part[f"{ROUTING}{index}"])[0] for part in routings])
        banks, slots = bank_states(parts["bank"]), routed.shape[-1]
        manager: Any = model.layers[index].manager
        learned = _numpy(manager.get_importance_scores())
        layers.append(
            LayerRecording(
                layer=index,
                routing=routed,
                routable=parts["mask"][positions // size, :slots],
                states=banks,
                change=np.concatenate([_unknown(banks[:1]), _distance(banks[1:], banks[:-1])]),
                mask=parts["mask"],
                importance=parts.get("importance", np.broadcast_to(learned, (len(states), learned.size))),
                threshold=float(manager.prune_threshold),
            )
        )
    return Recording(tuple(layers), positions, seen, length, size)


def read_trace(trace: Trace, stream: int = 0) -> Recording:
    """The recording of one stream in a golden trace; needs no torch.

    The trace must have the outputs `routing.{layer}` [N, T, P, R, S1], and `mask.{layer}` [N, T, P, S] for a layer
    whose mask changes. Banks, and masks over time, are those around its sampled steps.

    Raises:
        InputError: a trace without routing, or no such stream among those whose states were kept.
    """
    names = _routed(trace.outputs, "This trace")
    if not 0 <= stream < trace.state_streams:
        raise InputError(
            f"The trace has the states of streams 0 .. {trace.state_streams - 1}; asked for stream {stream}."
        )
    tokens = trace.inputs["tokens"]
    counts = np.full(trace.steps, tokens.shape[2])
    if "valid" in trace.inputs:
        counts = trace.inputs["valid"][stream].astype(np.int64)
    ends = np.cumsum(counts)
    starts = ends - counts
    # The banks that there are: after every sampled step, and before it where that is not after another.
    sampled = [int(step) for step in trace.sampled]
    records = {int(starts[step]): ("before", index) for index, step in enumerate(sampled)}
    records |= {int(ends[step]): ("after", index) for index, step in enumerate(sampled)}
    seen = np.array(sorted(records))
    kept = trace.positions[None, :] < counts[:, None]
    positions = (starts[:, None] + trace.positions)[kept]
    recording = Recording((), positions, seen, int(ends[-1]), int(tokens.shape[2]))

    def at(name: str) -> Array:
        groups = {"before": trace.before, "after": trace.after}
        return np.stack([groups[group][name][stream, index] for group, index in map(records.__getitem__, seen)])

    layers = []
    for index in names:
        routed = trace.outputs[f"{ROUTING}{index}"][stream][kept]
        mask, banks = at(f"{index}.mask"), bank_states(at(f"{index}.bank"))
        if f"{MASK}{index}" in trace.outputs:
            active = trace.outputs[f"{MASK}{index}"][stream][kept] > 0
        else:
            active = np.broadcast_to(mask[0], (len(routed), mask.shape[-1]))
        change = _unknown(banks)
        for row, step in enumerate(sampled):
            around = [bank_states(group[f"{index}.bank"][stream, row]) for group in (trace.after, trace.before)]
            change[np.searchsorted(seen, ends[step])] = _distance(*around)
        layers.append(
            LayerRecording(
                layer=index,
                routing=routed,
                routable=active[:, : routed.shape[-1]],
                states=banks,
                change=change,
                mask=mask,
                importance=at(f"{index}.importance") if f"{index}.importance" in trace.after else None,
            )
        )
    return Recording(tuple(layers), positions, seen, recording.length, recording.step)


def _stream_of(model: StreamModel, tokens: ArrayLike, stream: int) -> torch.Tensor:
    """The tokens of one stream, [1, T, ...], as the model takes them."""
    import torch

    spec, first = model.token_spec, next(model.parameters())
    given = torch.as_tensor(tokens).detach()
    if given.dim() == 1 + len(spec.shape):
        given = given.unsqueeze(0)
    if not spec.shape and given.dtype not in (torch.int64, torch.int32):
        kind = "ids" if not given.is_floating_point() else "vectors"
        raise InputError(f"The model takes ids of dtype int64; given {kind} of {given.dtype}.")
    given = given.to(first.device, torch.int64 if not spec.shape else first.dtype)
    model.check_tokens(given)
    if not 0 <= stream < len(given):
        raise InputError(f"There are streams 0 .. {len(given) - 1}; asked for stream {stream}.")
    return given[stream : stream + 1]


def _routed(outputs: Any, whose: str) -> list[int]:
    """The layers of which there is routing, ascending."""
    found = sorted(int(name.removeprefix(ROUTING)) for name in outputs if name.startswith(ROUTING))
    if not found:
        raise InputError(
            f"{whose} has no routing to show: there is no NSM layer in it, or it was recorded without the outputs "
            f"{ROUTING}0, {ROUTING}1, ... Use a model with NSM layers, or record the trace with its routing."
        )
    return found


def _distance(new: Array, old: Array) -> Array:
    return np.asarray(np.linalg.norm(new - old, axis=-1))


def _unknown(states: Array) -> Array:
    return np.full(states.shape[:-1], np.nan)


def _numpy(tensor: torch.Tensor) -> Array:
    return np.asarray(tensor.detach().cpu().numpy())
