"""Adaptation decided slot by slot, in plain loops."""

from __future__ import annotations

from torch import Tensor

from nsm.modules.bank.adaptation import FRESH, REST_RATE, RESTED, TRACE_RATE, Adaptation


def decide_by_loop(
    adaptation: Adaptation, mask: list[bool], importance: list[float], weights: Tensor
) -> tuple[list[bool], list[float], list[bool]]:
    """One lane, slot by slot; weights [R, C, S]."""
    slots, heads, tokens = len(mask), weights.shape[0], weights.shape[1]
    mass = [sum(float(weights[r, t, s]) for r in range(heads) for t in range(tokens)) / heads for s in range(slots)]
    total, active = sum(mass), sum(mask)
    trace = []
    for slot in range(slots):
        if mask[slot]:
            share = mass[slot] * active / (mass[slot] * active + total + 1e-6)
            trace.append(importance[slot] + TRACE_RATE * total / tokens * (share - importance[slot]))
        else:
            trace.append(importance[slot] + REST_RATE * (FRESH - importance[slot]))
    best = max((slot for slot in range(slots) if mask[slot]), key=lambda slot: trace[slot])
    kept = [mask[slot] and (trace[slot] >= adaptation.prune_threshold or slot == best) for slot in range(slots)]
    busy = min(trace[slot] for slot in range(slots) if kept[slot]) > adaptation.allocate_threshold
    highest = sum(float(weights[r, t].max()) for r in range(heads) for t in range(tokens))
    novel = highest / (heads * total + 1e-6) < 1 - adaptation.novelty_threshold
    free = [slot for slot in range(slots) if not mask[slot] and trace[slot] > RESTED]
    allocated = [bool(free) and slot == free[0] and (busy or novel) for slot in range(slots)]
    for slot in range(slots):
        if allocated[slot]:
            kept[slot], trace[slot] = True, FRESH
    return kept, trace, allocated
