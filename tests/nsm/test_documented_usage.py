"""Every documented snippet runs as it is written, and the names are imported when they are used."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch

import nsm


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where nothing is imported yet. Warnings are errors there too."""
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


# -- the parts ---------------------------------------------------------------------------------------------------


def test_state_propagator() -> None:
    from nsm import StatePropagator

    for gate_type in ("gru", "lstm", "mingru"):
        propagator = StatePropagator(state_dim=128, gate_type=gate_type, enable_communication=True)
        prev, new = torch.randn(4, 128), torch.randn(4, 128)
        assert propagator(prev, new).shape == (4, 128)
        prev, new = torch.randn(4, 16, 128), torch.randn(4, 16, 128)
        assert propagator(prev, new).shape == (4, 16, 128)


def test_state_propagator_with_a_cell() -> None:
    from nsm import StatePropagator

    propagator = StatePropagator(state_dim=128, gate_type="lstm")
    prev, new, cell = torch.randn(3, 4, 16, 128)
    state, next_cell = propagator(prev, new, cell)
    assert state.shape == next_cell.shape == (4, 16, 128)
    state, next_cell = propagator(prev, new, cell=cell)
    assert not torch.equal(next_cell, cell)


def test_nsm_layer() -> None:
    from nsm import NSMLayer

    layer = NSMLayer(state_dim=128, token_dim=64, num_heads=8, num_states=16)
    tokens = torch.randn(2, 40, 64)
    output, states = layer(tokens)
    assert output.shape == (2, 40, 64)
    assert states.shape == (2, 16, 128)
    output, states = layer(tokens, states)
    mask = torch.ones(2, 16, dtype=torch.bool)
    output, states = layer(tokens, states, mask)
    assert output.shape == (2, 40, 64)
    assert states.shape == (2, 16, 128)


@pytest.mark.parametrize("state_dim", [32, 64, 100, 126, 256])
def test_nsm_layer_takes_any_even_state_dim(state_dim: int) -> None:
    from nsm import NSMLayer

    output, states = NSMLayer(state_dim=state_dim, token_dim=64, num_heads=8, num_states=16)(torch.randn(2, 20, 64))
    assert output.shape == (2, 20, 64)
    assert states.shape == (2, 16, state_dim)


def test_state_manager() -> None:
    from nsm import StateManager

    manager = StateManager(state_dim=128, max_states=64, initial_states=16, prune_threshold=0.3)
    states = manager()
    assert states.shape == (16, 128)
    assert manager.allocate_states(2) == 2
    assert manager().shape == (18, 128)
    assert manager.prune_low_importance_states() == 0
    scores = manager.get_importance_scores()
    assert scores.shape == (64,)
    assert bool(((scores > 0) & (scores < 1)).all())
    assert manager.get_active_count() == manager.num_active_states == 18
    assert manager.get_state_info()["num_active_states"] == 18
    assert manager.memory_usage == pytest.approx(18 * 128 * 4 / 1e6)


def test_token_to_state_router() -> None:
    from nsm import TokenToStateRouter

    for token_dim, state_dim in ((64, 128), (64, 64), (30, 78)):
        router = TokenToStateRouter(token_dim, state_dim, 16, num_heads=4)
        tokens, states = torch.randn(2, 40, token_dim), torch.randn(2, 16, state_dim)
        routed, weights = router(tokens, states)
        assert routed.shape == (2, 16, state_dim)
        assert weights.shape == (2, 40, 16)
        assert bool((weights >= 0).all())
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 40))


def test_token_to_state_router_by_keywords() -> None:
    from nsm import TokenToStateRouter

    router = TokenToStateRouter(token_dim=64, state_dim=128, num_states=16, num_heads=4)
    assert router(torch.randn(1, 3, 64), torch.randn(1, 16, 128))[1].shape == (1, 3, 16)


def test_hybrid_attention() -> None:
    from nsm import HybridAttention

    attention = HybridAttention(64, 128, num_heads=8)
    assert attention(torch.randn(2, 40, 64), torch.randn(2, 16, 128)).shape == (2, 40, 64)


# -- the models --------------------------------------------------------------------------------------------------


def test_simple_nsm_over_vectors() -> None:
    from nsm import SimpleNSM

    model = SimpleNSM(input_dim=784, state_dim=128, num_states=16, output_dim=10, gate_type="gru")
    assert model(torch.randn(32, 784)).shape == (32, 10)
    assert model(torch.randn(4, 20, 784)).shape == (4, 20, 10)


def test_simple_nsm_over_ids() -> None:
    from nsm.models import SimpleNSM

    model = SimpleNSM(vocab_size=10000, d_model=256, num_states=64, max_seq_length=1024)
    assert model(torch.randint(0, 10000, (2, 20))).shape == (2, 20, 10000)


def test_simple_nsm_goes_on_where_it_stopped() -> None:
    from nsm import SimpleNSM

    model = SimpleNSM(vocab_size=100, d_model=16, num_states=4, num_heads=2)
    ids = torch.randint(0, 100, (2, 20))
    first, state = model(ids[:, :7], return_state=True)
    second, state = model(ids[:, 7:], state, return_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), model(ids), rtol=1e-5, atol=1e-5)
    assert isinstance(model(ids, state=state), torch.Tensor)


def test_adaptive_nsm() -> None:
    from nsm.models import AdaptiveNSM

    model = AdaptiveNSM(input_dim=768, state_dim=256, max_states=64, initial_states=16, prune_threshold=0.1)
    x = torch.randn(2, 20, 768)
    assert model(x).shape == (2, 20, 768)
    assert model.state_manager.num_active_states == 16
    assert model.state_manager.memory_usage == pytest.approx(16 * 256 * 4 / 1e6)


def test_hybrid_model() -> None:
    from nsm.models import HybridModel

    model = HybridModel(
        vocab_size=10000, d_model=512, num_states=64, num_attention_layers=2, num_nsm_layers=4, num_heads=8
    )
    assert model(torch.randint(0, 10000, (1, 20))).shape == (1, 20, 10000)


@pytest.mark.parametrize(
    "options",
    [
        {"routing": "topk", "top_k": 4},
        {"routing": "sparsemax"},
        {"hierarchy": (4,)},
        {"memory_rows": 32},
        {"communication": True},
        {"communication": False},
    ],
    ids=str,
)
def test_the_options_that_are_named(options: dict[str, Any]) -> None:
    """Sparse routing, hierarchical states, memory augmentation, state-to-state communication on and off."""
    from nsm.models import SimpleNSM

    model = SimpleNSM(vocab_size=100, d_model=16, num_states=8, num_heads=2, **options)
    assert model(torch.randint(0, 100, (2, 70))).shape == (2, 70, 100)


# -- the names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("nsm", ["NSMLayer", "StateManager", "StatePropagator", "TokenToStateRouter", "HybridAttention", "SimpleNSM"]),
        ("nsm.models", ["SimpleNSM"]),
        ("nsm.modules", ["StatePropagator", "NSMLayer", "StateManager", "TokenToStateRouter", "HybridAttention"]),
    ],
)
def test_a_name_is_the_same_thing_wherever_it_is_imported_from(module: str, names: list[str]) -> None:
    for name in names:
        assert getattr(importlib.import_module(module), name) is getattr(nsm, name)


@pytest.mark.parametrize("module", ["nsm", "nsm.models", "nsm.modules"])
def test_all_that_a_module_offers_is_there(module: str) -> None:
    imported = importlib.import_module(module)
    assert sorted(set(imported.__all__)) == sorted(imported.__all__)
    for name in imported.__all__:
        assert getattr(imported, name) is not None
        assert name in dir(imported)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'nsm' has no attribute 'SimpelNSM'"):
        _ = nsm.SimpelNSM


def test_importing_nsm_imports_neither_torch_nor_numpy() -> None:
    loaded = run_python("import sys, nsm; dir(nsm); nsm.__version__; print(*{'torch', 'numpy'} & set(sys.modules))")
    assert (loaded.returncode, loaded.stdout, loaded.stderr) == (0, "\n", "")


TORCH_NAMES = [
    "HybridAttention",
    "NSMLayer",
    "SimpleNSM",
    "StateManager",
    "StatePropagator",
    "TokenToStateRouter",
    "load",
    "save",
]


def test_without_torch_the_names_that_need_it_say_what_to_install() -> None:
    done = run_python(f"""
import sys
sys.modules["torch"] = None
import nsm
from nsm.errors import MissingDependencyError
for name in {TORCH_NAMES}:
    try:
        getattr(nsm, name)
    except MissingDependencyError as error:
        print(error, "|", type(error.__cause__).__name__)
""")
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        f'nsm.{name} needs torch, which is not installed. Install it with: pip install "nsm-toolkit[torch]" '
        "| ModuleNotFoundError"
        for name in TORCH_NAMES
    ]


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("Session", "numpy"),  # part of every installation: there is no extra to name
        ("SimpleNSM", "nsm.modules.layer"),  # a part of nsm itself: the installation is broken
    ],
)
def test_what_no_extra_would_install_is_left_as_python_tells_it(name: str, missing: str) -> None:
    done = run_python(f"""
import sys
sys.modules[{missing!r}] = None
import nsm
try:
    nsm.{name}
except ModuleNotFoundError as error:
    print(error.name)
""")
    assert (done.stdout, done.stderr) == (f"{missing}\n", "")
