"""JSON to dataclasses: what fits comes back equal, and what does not is named with its place."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest

from nsm.decode import decode, encode
from nsm.errors import BundleError, ConfigError


@dataclass(frozen=True)
class Part:
    name: str
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ConfigError("A size is not negative.")


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    kind: Literal["a", "b"]
    ratio: float
    on: bool
    limit: int | None
    notes: Mapping[str, str]
    anything: Any


WHOLE = Whole((Part("x"), Part("y", 3)), "b", 0.5, True, None, {"k": "v"}, [1, {"deep": None}])


def _json() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(encode(WHOLE)))
    return data


def test_what_was_written_comes_back() -> None:
    assert decode(Whole, _json(), "whole") == WHOLE
    assert decode(Whole, {**_json(), "limit": 3}, "whole").limit == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_float_that_is_not_finite_is_null_in_json_and_nan_again(value: float) -> None:
    data = encode(replace(WHOLE, ratio=value, anything=[value]))
    assert (data["ratio"], data["anything"], data["limit"]) == (None, [None], None)
    back = decode(Whole, json.loads(json.dumps(data, allow_nan=False)), "whole")
    assert math.isnan(back.ratio)
    assert back.limit is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("parts", {"name": "x"}, r"whole\.parts is .*; expected a list"),
        ("parts", [{"name": "x"}], r"whole\.parts\[0\] is .*; expected an object with the keys \['name', 'size'\]"),
        ("parts", [{"name": "x", "size": -1}], r"whole\.parts\[0\] is invalid: A size is not negative"),
        ("parts", [{"name": "x", "size": True}], r"whole\.parts\[0\]\.size is True; expected int"),
        ("kind", "c", r"whole\.kind is 'c'; expected one of \['a', 'b'\]"),
        ("ratio", "half", r"whole\.ratio is 'half'; expected float"),
        ("on", 1, r"whole\.on is 1; expected bool"),
        ("limit", "none", r"whole\.limit is 'none'; expected int or NoneType"),
        ("notes", [], r"whole\.notes is \[\]; expected an object"),
        ("notes", {"k": 3}, r"whole\.notes\.k is 3; expected str"),
        ("kind", "c" * 200, r"'c{70,80}\.\.\.; expected"),
    ],
)
def test_what_does_not_fit_is_named(key: str, value: object, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        decode(Whole, {**_json(), key: value}, "whole")


def test_a_missing_and_an_unknown_key_are_refused_even_where_there_is_a_default() -> None:
    refused: list[object] = [{"name": "x"}, {"name": "x", "size": 1, "colour": "red"}, [], None, "part"]
    for data in refused:
        with pytest.raises(BundleError, match=r"expected an object with the keys \['name', 'size'\]"):
            decode(Part, data, "part")
