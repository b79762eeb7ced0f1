"""What is asked of a foreign module before it is trusted to be a step model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from nsm.adapters.adapted import AdaptedModel, plain_attributes
from nsm.errors import ConfigError, InputError, UnsupportedError
from nsm.models.checkpoint import split_samples
from nsm.models.step import State

TOLERANCE = 1e-4
"""Largest difference, relative to the largest number, that other lengths or lanes may make in float32."""


@torch.no_grad()
def examine(model: AdaptedModel, samples: Sequence[ArrayLike] | NDArray[Any] | None = None) -> None:
    """Run a module on made-up tokens, or on samples, and declare what it gives.

    What it gives must be finite; its states must keep their shapes and dtypes; the same call must give the same answer,
    and leave no buffer changed; with a time axis any split of a sequence must give the same; and lanes must not mix.
    Where it does not run for two lanes side by side, it is declared to take one.

    Args:
        model: the module, in the form of a step model.
        samples: real sequences, [T, *token] each, for a module that makes nothing of made-up tokens.

    Raises:
        InputError: samples that the model does not take.
        ConfigError, UnsupportedError: says what it does, what was expected, and what to do.
    """
    length = 2 * model.chunk_size if model.timed else 2
    made_up = samples is None
    tokens = _made_up(model, length) if samples is None else _drawn(model, samples, length)
    kept = _kept(model)
    if odd := _not_finite(model, tokens.split(1, 1)[:2]):
        if not (made_up and tokens.is_floating_point()):
            raise _no_numbers(model, odd, tokens, made_up)
        tokens = tokens.abs() + 0.1  # powers and amplitudes, of which there may be a logarithm
        if odd := _not_finite(model, tokens.split(1, 1)[:2]):
            raise _no_numbers(model, odd, tokens, made_up)
    first, after = _run(model, tokens[:, :1], model.initial_state(1))
    _check_states(model, after)
    _check_outputs(model, first)
    model.declare({name: tuple(v.shape[2:]) for name, v in zip(model.outputs, first, strict=True)}, 1)
    again, after_again = _run(model, tokens[:, :1], model.initial_state(1))
    _check_kept(model, kept, _same(first, again) and _same_state(after, after_again))
    _check_consumed(model, tokens[:, :1])
    if model.timed:
        # Over several tokens a module may do what it does not over one, so it is looked at before lengths are compared.
        if odd := _not_finite(model, [tokens]):
            raise _no_numbers(model, odd, tokens, made_up)
        _check_kept(model, kept)
        _check_lengths(model, tokens)
    model.declare(model._shapes, *_lanes(model, tokens[0, :2, None]))
    _check_kept(model, kept)


def _made_up(model: AdaptedModel, length: int) -> Tensor:
    """Tokens [1, length, *token]: uniform ids, or standard normal numbers."""
    generator = torch.Generator().manual_seed(0)
    spec = model.token_spec
    shape = (1, length, *spec.shape)
    if spec.maximum is not None:
        return torch.randint(0, spec.maximum + 1, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=model.dtype)


def _drawn(model: AdaptedModel, samples: Sequence[ArrayLike] | NDArray[Any], length: int) -> Tensor:
    """Tokens [1, length, *token] of the samples, one after the other, from where two that follow each other differ."""
    golden, others = split_samples(model, samples)
    if not golden:
        raise InputError("samples holds no sequence; give a few, [T, *token] each, or leave it out.")
    stream = torch.cat([torch.from_numpy(item) for item in (*golden, *others)])
    start = next((i for i in range(len(stream) - 1) if not torch.equal(stream[i], stream[i + 1])), None)
    if start is None:
        raise InputError(
            f"The samples hold the same token {len(stream)} times, which shows neither lengths nor lanes that are "
            "confused. Give some that differ."
        )
    return stream.roll(-start, 0)[None, torch.arange(length) % len(stream)]


def _run(model: AdaptedModel, tokens: Tensor, state: State) -> tuple[list[Tensor], State]:
    try:
        return model.run(tokens, state)
    except ConfigError:
        raise
    except Exception as error:  # whatever a module raises
        states = {name: list(value.shape) for name, value in state.items()}
        raise ConfigError(
            f"{type(model.module).__name__} fails on tokens of shape {list(tokens.shape)} (lanes, tokens, ...) and "
            "states "
            f"of shapes {states} (lanes first): {type(error).__name__}: {error}. Do token_shape, timed and the states "
            "fit it?"
        ) from error


def _not_finite(model: AdaptedModel, calls: Sequence[Tensor]) -> list[str]:
    """What is not finite after one of these calls, each from the beginning of a stream."""
    for tokens in calls:
        outputs, after = _run(model, tokens, model.initial_state(1))
        values: list[tuple[str, Any]] = [*zip(model.outputs, outputs, strict=False), *after.items()]
        odd = [name for name, value in values if isinstance(value, Tensor) and not bool(torch.isfinite(value).all())]
        if odd:
            return odd
    return []


def _no_numbers(model: AdaptedModel, odd: Sequence[str], tokens: Tensor, made_up: bool) -> ConfigError:
    """What to raise where these outputs or states are not finite on these tokens, and cannot be compared."""
    numbers = ", standard normal numbers and positive ones" if tokens.is_floating_point() else ""
    return ConfigError(
        f"{type(model.module).__name__} gives NaN or infinity in {odd} for "
        f"{f'made-up tokens{numbers}' if made_up else 'the samples'}; only finite numbers can be compared. "
        + (
            "If it takes others, give as_step a few real sequences to examine it on: samples=[...], [T, *token] each."
            if made_up
            else "Look at its weights, its initial states, and these samples."
        )
    )


def _kept(model: AdaptedModel) -> dict[str, Tensor | str]:
    """A copy of what a module could keep from call to call: buffers, and tensors, numbers and names in attributes."""
    found: dict[str, Tensor] = dict(model.module.named_buffers())
    for prefix, part in model.module.named_modules():
        attributes = {name: value for name, value in vars(part).items() if isinstance(value, Tensor)}
        found |= {f"{prefix}.{name}".lstrip("."): value for name, value in attributes.items()}
    plain = {name.lstrip("."): value for name, value in plain_attributes(model.module).items()}
    return {**plain, **{name: value.detach().clone() for name, value in found.items()}}


def _check_kept(model: AdaptedModel, before: dict[str, Tensor | str], repeated: bool = True) -> None:
    """Raise unless the module keeps nothing to itself; `repeated` says whether the same call gave the same answer."""
    now = _kept(model)
    changed = [name for name, value in now.items() if name not in before or not _equal(value, before[name])]
    if changed or not repeated:
        what = f"its attributes {changed}" if changed else "something that is neither an argument nor a result"
        raise UnsupportedError(
            f"{type(model.module).__name__} keeps {what} from one call to the next, which no exported graph does. "
            "Make it a state: an argument of forward that is returned, new, and not written in place. (If the module "
            "draws random numbers, they have no place in eval mode.)"
        )


def _equal(one: Tensor | str, two: Tensor | str) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return torch.equal(one, two)
    return type(one) is type(two) and one == two


def _check_states(model: AdaptedModel, after: State) -> None:
    for name, start in model.initial_state(1).items():
        given: Any = after[name]
        if not isinstance(given, Tensor) or given.shape != start.shape or given.dtype != start.dtype:
            found = f"{given.dtype}{list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise ConfigError(
                f"The state {name} is {start.dtype}{list(start.shape)} before a step and {found} after it (lanes "
                "first). A "
                "step has static shapes: keep a window of fixed length instead of a cache that grows, and cast to the "
                "dtype it had. Are outputs and states in order?"
            )


def _check_outputs(model: AdaptedModel, outputs: list[Tensor]) -> None:
    if len(outputs) != len(model.outputs):
        raise ConfigError(f"The module gave {len(outputs)} outputs; named are {list(model.outputs)}. Name them all.")
    values: list[Any] = list(outputs)
    for name, value in zip(model.outputs, values, strict=True):
        if not isinstance(value, Tensor) or value.dtype != model.dtype or value.shape[:2] != (1, 1):
            found = f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            wanted = "[B, T, ...]" if model.timed else "[B, ...]"
            raise ConfigError(
                f"The output {name} is {found} for one token of one stream; expected is {model.dtype} of shape "
                f"{wanted}. timed={model.timed} says whether there is a time axis."
            )


def _check_consumed(model: AdaptedModel, tokens: Tensor) -> None:
    """A state that is written in place would be a result that changes its argument."""
    given = model.initial_state(1)
    kept = {name: value.clone() for name, value in given.items()}
    _run(model, tokens, given)
    changed = [name for name, value in given.items() if not torch.equal(value, kept[name])]
    if changed:
        raise UnsupportedError(
            f"{type(model.module).__name__} writes into the states {changed} that it was given. Return new tensors."
        )


def _check_lengths(model: AdaptedModel, tokens: Tensor) -> None:
    """Other lengths than one, and any split, must give the same: else a length is built in."""
    size = model.chunk_size
    whole, end = _run(model, tokens, model.initial_state(1))
    longer = torch.cat([tokens, tokens[:, :1]], 1)
    for parts in ([size, size], [1] * (2 * size), [1, 2 * size - 1], [2 * size, 1]):
        state, outputs = model.initial_state(1), []
        for part in longer[:, : sum(parts)].split(parts, 1):
            given, state = _run(model, part, state)
            outputs.append(given)
        joined = [torch.cat(items, 1)[:, : 2 * size] for items in zip(*outputs, strict=True)]
        shape = [value.shape[1] for value in joined]
        if any(count != 2 * size for count in shape) or not _same(joined, whole):
            raise UnsupportedError(
                f"{type(model.module).__name__} answers {2 * size} tokens in one call differently than in calls of "
                f"{parts if len(parts) < 5 else 'one'}: a length is built into it, or something is not carried as "
                "state. If it only ever takes a fixed number of tokens, let these be one token: timed=False, "
                "token_shape=(T, ...)."
            )
        if sum(parts) == 2 * size and not _same_state(state, end):
            raise UnsupportedError(
                f"{type(model.module).__name__} ends in another state after {2 * size} tokens in one call than in "
                f"calls of {parts if len(parts) < 5 else 'one'}."
            )


def _lanes(model: AdaptedModel, tokens: Tensor) -> tuple[int | None, str]:
    """None where two lanes, of a token each, run as they do alone; 1, and why, where they do not run side by side.

    Raises:
        UnsupportedError: they do, but one has to do with the other.
    """
    fixed = [state.name for state in model.carried if state.lane_axis is None]
    if fixed:
        return 1, f"its states {fixed} have no axis for streams"
    try:
        both, state = model.run(tokens, model.initial_state(2))
    except Exception as error:  # whatever a module raises that was written for one stream
        return 1, f"with two it fails ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    values = [*zip(model.outputs, both, strict=True), *state.items()]
    shapes = {name: (2, 1, *shape) for name, shape in model._shapes.items()}
    shapes |= {name: tuple(value.shape) for name, value in model.initial_state(2).items()}
    odd = next((f"{name} {list(value.shape)}" for name, value in values if value.shape != shapes[name]), None)
    if odd is not None:
        return 1, f"with two it gives {odd} (lanes first)"
    for lane in range(2):
        alone, after = _run(model, tokens[lane : lane + 1], model.initial_state(1))
        beside = {name: value[lane : lane + 1] for name, value in state.items()}
        if not _same([value[lane : lane + 1] for value in both], alone) or not _same_state(beside, after):
            raise UnsupportedError(
                f"{type(model.module).__name__} answers a stream differently when another one is beside it. Does it "
                "normalise over the batch or decide by it, keep something from call to call in a list, or are lanes "
                "not where the states say? (Carried(..., lane_axis=N))"
            )
    return None, ""


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(_close(one, two) for one, two in zip(first, second, strict=True))


def _same_state(first: State, second: State) -> bool:
    return all(_close(value, second[name]) for name, value in first.items())


def _close(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, two)
    scale = max(float(two.abs().max()), 1e-3) if two.numel() else 1.0
    return bool(((one - two).abs() <= TOLERANCE * scale).all())
