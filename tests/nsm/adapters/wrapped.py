"""Modules of `models.py` as step models, and tokens for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import nsm
from nsm import Carried
from nsm.adapters import AdaptedModel
from tests.nsm.adapters.models import Decay, Language, VoiceActivity, Window


def voice() -> AdaptedModel:
    torch.manual_seed(0)
    return nsm.as_step(VoiceActivity(), [Carried("h", torch.zeros(1, 12))], token_shape=(64,))


def language() -> AdaptedModel:
    torch.manual_seed(0)
    states = [(Carried("h", torch.zeros(2, 1, 10), 1), Carried("c", torch.full((2, 1, 10), 0.1), 1))]
    return nsm.as_step(Language(), states, vocab_size=11, timed=True, chunk_size=4)


def window() -> AdaptedModel:
    torch.manual_seed(0)
    cache = torch.zeros(1, 4, 6)
    return nsm.as_step(Window(), [cache, cache, torch.zeros(1, 4)], token_shape=(6,))


def decay() -> AdaptedModel:
    torch.manual_seed(0)
    return nsm.as_step(Decay(), token_shape=(3,))


def recurrent(kind: type[nn.LSTM | nn.GRU | nn.RNN], **options: Any) -> AdaptedModel:
    torch.manual_seed(0)
    return nsm.as_step(kind(5, 7, **options), chunk_size=4)


MODELS: dict[str, Callable[[], AdaptedModel]] = {
    "voice": voice,
    "language": language,
    "window": window,
    "decay": decay,
    "lstm": lambda: recurrent(nn.LSTM, num_layers=3),
    "gru": lambda: recurrent(nn.GRU, batch_first=True),
    "rnn": lambda: recurrent(nn.RNN, num_layers=2, nonlinearity="relu"),
}


def tokens(model: AdaptedModel, batch: int, length: int, seed: int = 0) -> np.ndarray:
    random, spec = np.random.default_rng(seed), model.token_spec
    if spec.maximum is not None:
        return random.integers(0, spec.maximum + 1, (batch, length))
    return random.standard_normal((batch, length, *spec.shape)).astype(np.float32)
