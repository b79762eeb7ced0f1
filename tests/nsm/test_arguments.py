"""Arguments as plain numbers: numpy's are taken, and what is no such number is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from nsm.arguments import each_whole, flag, real, whole
from nsm.errors import ConfigError, InputError


@pytest.mark.parametrize(
    ("read", "given", "wanted"),
    [
        (whole, 3, 3),
        (whole, np.int64(3), 3),
        (whole, np.uint8(3), 3),
        (whole, torch.tensor(3), 3),
        (real, 0.5, 0.5),
        (real, np.float32(0.5), 0.5),
        (real, Fraction(1, 2), 0.5),
        (real, 4, 4),
        (real, np.int32(4), 4),
        (flag, True, True),
        (flag, np.False_, False),
        (flag, 1, True),
        (each_whole, (), []),
        (each_whole, (2, np.int64(4)), [2, 4]),
        (each_whole, range(2), [0, 1]),
        (each_whole, np.array([2, 4]), [2, 4]),
    ],
)
def test_numbers_become_plain(read: Callable[[str, Any], Any], given: Any, wanted: Any) -> None:
    found = read("size", given)
    assert (found, type(found)) == (wanted, type(wanted))
    assert json.loads(json.dumps(found)) == wanted


@pytest.mark.parametrize(
    ("read", "given", "message"),
    [
        (whole, 20.0, r"size is a whole number; given 20\.0 of type float\."),
        (whole, np.float32(2), r"size is a whole number; given np\.float32\(2\.0\) of type float32\."),
        (whole, "4", r"size is a whole number; given '4' of type str\."),
        (whole, None, r"size is a whole number; given None of type NoneType\."),
        (real, "0.1", r"size is a number; given '0\.1' of type str\."),
        (real, torch.tensor(0.5), r"size is a number; given tensor\(0\.5000\) of type Tensor\."),
        (flag, "no", r"size is True or False; given 'no' of type str\."),
        (flag, 1.0, r"size is True or False; given 1\.0 of type float\."),
        (each_whole, 4, r"size is a list of whole numbers; given 4 of type int\."),
        (each_whole, "44", r"size is a list of whole numbers; given '44' of type str\."),
        (each_whole, [2, 4.0], r"Every one of size is a whole number; given 4\.0 of type float\."),
        (each_whole, np.ones((2, 2), int), r"Every one of size is a whole number; given \[1, 1\] of type list\."),
    ],
)
def test_what_is_no_such_number_is_named(read: Callable[[str, Any], Any], given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read("size", given)


@pytest.mark.parametrize("read", [whole, real])
def test_the_error_may_be_another(read: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"batch is a .*given 'two'") as found:
        read("batch", "two", InputError)
    assert type(found.value) is InputError
