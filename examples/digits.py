"""Handwritten digits as streams of tokens, shared by the digit examples.

scikit-learn's 1797 digits have 8 x 8 pixels of 17 grey levels. A digit becomes 72 tokens: its 64 pixels row by row,
then 8 times the token ASK, on which the model predicts the class. A chunk has 8 tokens, so a row is a chunk, and the
first row lies eight commits before the prediction, far outside the model's windows: the model has to keep it in the
bank. Digits follow each other without a reset, so the model must also forget the previous digit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from nsm.models import StepModel

ASK = 17
VOCABULARY = 18
CHUNK = 8
TOKENS = 64 + CHUNK
CLASSES = 10
_TEST_DIGITS = 360

Images = NDArray[np.int64]


@dataclass(frozen=True)
class Digits:
    """Images [N, 8, 8] with grey levels 0 .. 16, and labels [N]."""

    images: Images
    labels: NDArray[np.int64]


def load() -> tuple[Digits, Digits]:
    """Return the training digits and the test digits; the split is fixed."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images, labels = data.images.astype(np.int64)[order], data.target.astype(np.int64)[order]
    test = Digits(images[:_TEST_DIGITS], labels[:_TEST_DIGITS])
    return Digits(images[_TEST_DIGITS:], labels[_TEST_DIGITS:]), test


def tokens(images: Images) -> NDArray[np.int64]:
    """Convert images [..., 8, 8] to tokens [..., 72]: the pixels, then ASK tokens."""
    pixels = images.reshape(*images.shape[:-2], 64)
    return np.concatenate([pixels, np.full((*pixels.shape[:-1], CHUNK), ASK)], -1)


def streams(digits: Digits, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Chain digits into `count` equal streams: tokens [count, n * 72], labels [count, n]."""
    each = len(digits.labels) // count
    images = digits.images[: count * each].reshape(count, each, 8, 8)
    return tokens(images).reshape(count, -1), digits.labels[: count * each].reshape(count, each)


def predictions(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the class at each digit's last token, [B, n], from logits [B, n * 72, 10]."""
    last = logits.reshape(logits.shape[0], -1, TOKENS, CLASSES)[:, :, -1]
    result: NDArray[np.int64] = last.argmax(-1)
    return result


@torch.no_grad()
def classify(model: StepModel, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Classify streams [B, n * 72] with the PyTorch model, digit by digit with carried state; return [B, n]."""
    state, pieces = None, []
    for piece in torch.from_numpy(ids).split(TOKENS, 1):
        logits, state = model(piece, state, return_state=True)
        pieces.append(logits.numpy())
    return predictions(np.concatenate(pieces, 1))


def varied(images: Images, generator: np.random.Generator) -> Images:
    """Shift the images by up to one pixel, and change the grey of their ink by up to two levels."""
    count = len(images)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    rows = generator.integers(0, 3, count)[:, None] + np.arange(8)
    columns = generator.integers(0, 3, count)[:, None] + np.arange(8)
    moved = padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    noise = generator.integers(-2, 3, moved.shape)
    inked: Images = np.where(moved > 0, np.clip(moved + noise, 0, 16), moved)
    return inked
