"""The page in Chromium: what it answers and draws is what Python's session answers and holds, in each of its ways."""

from __future__ import annotations

import codecs
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import nsm
from nsm.bundle import Bundle
from nsm.errors import MissingDependencyError
from nsm.export.options import ExportOptions
from nsm.export.pipeline import export
from nsm.models.stream import StreamModel
from nsm.trace import Array, Arrays
from tests.clients.browser import CHROMIUM, Browser, served
from tests.small_models import make_model

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
    pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js 20 or later: apt-get install nodejs npm"),
]

ASK, ROWS = 17, 8
HATCHING, BELOW, ABOVE = (0x66, 0x70, 0x80), (0xC2, 0x60, 0x3A), (0x2A, 0x7F, 0xA8)
"""Colours: of a masked slot, of numbers below zero, and above."""
MARGIN, GAP = 26, 8
"""Pixels at the left of a bank's picture, and between address and content."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def exported(checkpoint: Path, output: Path) -> Path:
    """A bundle with two lanes for the web; the page streams on the first."""
    try:
        export(checkpoint, ExportOptions(["web"], output=output, batch=2, golden_steps=4))
    except MissingDependencyError as error:
        pytest.skip(f"needs the npm package onnxruntime-web: {error}")
    return output


def saved(model: StreamModel, ids: int, path: Path) -> Path:
    nsm.save(model, path, samples=np.random.default_rng(0).integers(0, ids, (8, 100)))
    return path


def feed(session: nsm.Session, tokens: Array) -> Array:
    """Tokens [T] to the first lane; its last logits."""
    idle = np.zeros_like(tokens)
    logits: Array = session.feed(np.stack([tokens, idle]), [len(tokens), 0])["outputs"][0, -1]
    return logits


def opened(browser: Browser, address: str, kind: str) -> None:
    browser.size(1100, 900)
    browser.open(f"{address}/web/")
    browser.wait("document.documentElement?.dataset.done")
    assert browser.value("document.documentElement.dataset.ready") == kind


# -- a digit -----------------------------------------------------------------------------------------------------------


def digits_model() -> StreamModel:
    """Untrained, over the ids and classes of examples/train_digits.py; a slot is allocated with every chunk."""
    torch.manual_seed(0)
    return nsm.AdaptiveNSM(
        vocab_size=ASK + 1,
        output_dim=10,
        d_model=16,
        state_dim=16,
        max_states=16,
        initial_states=3,
        novelty_threshold=0.1,
        num_layers=1,
        num_heads=2,
        chunk_size=ROWS,
    ).eval()


def test_a_digit_that_is_drawn_is_read_row_by_row(browser: Browser, tmp_path: Path) -> None:
    path = exported(saved(digits_model(), ASK + 1, tmp_path / "model.pt"), tmp_path / "model.nsm")
    with served(path) as address, nsm.open(path, "web") as session:
        opened(browser, address, "digits")
        check_pictures(browser, session.read_state(), active=3)

        browser.click("clear")
        box = browser.box("pixels")
        assert not ink(browser).any()
        across = [(0.2 + 0.06 * i, 0.2) for i in range(10)]
        down = [(0.74 - 0.04 * i, 0.25 + 0.07 * i) for i in range(10)]
        browser.drag([(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in [*across, *down]])
        drawn = ink(browser)
        assert 10 < (drawn > 0).sum() < 40, "a seven, and not everything"
        tokens = np.concatenate([np.rint(drawn).astype(np.int64).ravel(), np.full(ROWS, ASK)])

        seen = read(browser)
        assert len(seen) >= 4, "the picture changes while it reads"
        wanted = feed(session, tokens)
        check_pictures(browser, session.read_state(), active=3 + 9)
        assert_chances(browser, wanted)

        read(browser)  # without a reset
        again = feed(session, tokens)
        assert not np.allclose(again, wanted, atol=1e-3)
        assert_chances(browser, again)

        browser.click("fresh")
        session.reset()
        check_pictures(browser, session.read_state(), active=3)
        read(browser)
        assert_chances(browser, wanted)


def ink(browser: Browser) -> Array:
    """What stands in the 8 by 8 pixels, [8, 8], 0 to 16, by how dark they are."""
    pixels = browser.pixels("#pixels")[15::30, 15::30, 0].astype(float)
    ground, text = 0xFB, 0x1F
    return (ground - pixels) / (ground - text) * 16


def read(browser: Browser) -> set[bytes]:
    """Click on the button, wait for the end, and return the pictures of the first bank meanwhile."""
    seen = set()
    browser.click("read")
    while browser.value("document.getElementById('read').disabled"):
        seen.add(browser.pixels("#state canvas").tobytes())
    return seen


def assert_chances(browser: Browser, logits: Array) -> None:
    """The bars say what these logits [10] say, in per cent, and mark the best."""
    shown = browser.value("Array.from(document.querySelectorAll('#bars > span'), span => span.textContent)")
    powers = np.exp(logits - logits.max())
    assert shown[::3] == [str(digit) for digit in range(10)]
    np.testing.assert_allclose([float(text.split()[0]) for text in shown[2::3]], 100 * powers / powers.sum(), atol=0.06)
    assert browser.value("document.querySelector('#bars .good').textContent") == str(logits.argmax())
    widths = browser.value("Array.from(document.querySelectorAll('#bars i'), bar => bar.style.width)")
    assert [float(width.rstrip("%")) for width in widths] == [float(text.split()[0]) for text in shown[2::3]]


def check_pictures(browser: Browser, state: Arrays, active: int) -> None:
    """Each canvas shows the first lane of its bank: colours by sign, their strength by size; masked slots hatched."""
    names = browser.value("Array.from(document.querySelectorAll('#state div'), label => label.textContent)")
    assert names == [name for name in state if name.endswith(".bank")]
    for index, name in enumerate(names):
        bank, mask = state[name][0], state[name.replace("bank", "mask")][0]
        assert mask.sum() == active
        rows = bank.transpose(1, 0, 2).reshape(len(mask), -1)
        pixels = browser.pixels(f"#state canvas:nth-of-type({index + 1})").astype(int)
        height = pixels.shape[0] // len(rows)
        width = (pixels.shape[1] - MARGIN - GAP) // rows.shape[1]
        magnitudes = np.sort(np.abs(rows), axis=None)
        scale = magnitudes[int(len(magnitudes) * 0.98)] or 1.0
        half = rows.shape[1] // 2
        columns = MARGIN + width * np.arange(rows.shape[1]) + width // 2 + GAP * (np.arange(rows.shape[1]) >= half)
        for slot, numbers in enumerate(rows):
            band = pixels[slot * height : (slot + 1) * height]
            if not mask[slot]:
                inside = band[:, MARGIN:, 3] > 128
                assert 0.05 < inside.mean() < 0.5, f"{name}: slot {slot} is hatched"
                assert (np.abs(band[:, MARGIN:][inside][:, :3] - HATCHING) < 6).all()
                continue
            cells = band[height // 2, columns]
            strength = np.minimum(1.0, np.abs(numbers) / scale)
            np.testing.assert_allclose((cells[:, 3] / 255 - 0.06) / 0.94, strength, atol=0.02, err_msg=f"{name} {slot}")
            clear = strength > 0.3
            colours = np.where(numbers[:, None] < 0, BELOW, ABOVE)
            assert (np.abs(cells[clear, :3] - colours[clear]) < 6).all()


# -- a text ------------------------------------------------------------------------------------------------------------


def test_a_text_goes_on_as_python_goes_on(browser: Browser, tmp_path: Path) -> None:
    model = make_model(vocab_size=256, output_dim=256, num_layers=1)
    path = exported(saved(model, 256, tmp_path / "model.pt"), tmp_path / "model.nsm")
    with served(path) as address, nsm.open(path, "web") as session:
        opened(browser, address, "text")
        check_pictures(browser, session.read_state(), active=6)
        prompt = "Größe: "
        for heat, seed in ((0.0, 1), (0.7, 5), (0.7, 6)):
            for name, value in (("prompt", prompt), ("heat", heat), ("seed", seed)):
                browser.value(f"document.getElementById('{name}').value = {value!r}")
            browser.click("write")
            browser.wait("document.getElementById('stop').disabled")
            shown = browser.value("document.getElementById('text').textContent")
            assert shown == written(session, prompt, heat, seed)
            assert shown.startswith(prompt)
            check_pictures(browser, session.read_state(), active=6)
            assert "tokens/s" in browser.value("document.getElementById('speed').textContent")

        browser.value("document.getElementById('write').click(), document.getElementById('stop').click()")
        browser.wait("document.getElementById('stop').disabled")
        assert browser.value("document.getElementById('text').textContent") == prompt


def written(session: nsm.Session, prompt: str, heat: float, seed: int) -> str:
    """400 bytes more, drawn with the page's numbers (mulberry32)."""
    numbers, decoder = mulberry32(seed), codecs.getincrementaldecoder("utf-8")("replace")
    session.reset()
    text = decoder.decode(prompt.encode())
    logits = feed(session, np.frombuffer(prompt.encode(), np.uint8).astype(np.int64))
    for _ in range(400):
        following = int(logits.argmax())
        if heat > 0:
            powers = np.exp((logits.astype(float) - logits.max()) / heat)
            following = int(np.searchsorted(np.cumsum(powers / powers.sum()), next(numbers)))
        text += decoder.decode(bytes([following]))
        logits = feed(session, np.array([following]))
    return text


def mulberry32(seed: int) -> Iterator[float]:
    """Numbers in [0, 1)."""
    low = 0xFFFFFFFF
    while True:
        seed = (seed + 0x6D2B79F5) & low
        mixed = ((seed ^ (seed >> 15)) * (1 | seed)) & low
        mixed = ((mixed + (((mixed ^ (mixed >> 7)) * (61 | mixed)) & low)) & low) ^ mixed
        yield (mixed ^ (mixed >> 14)) / 2**32


# -- a stream that was recorded ----------------------------------------------------------------------------------------


def test_a_recorded_stream_is_replayed_and_checked(browser: Browser, checkpoint: Path, tmp_path: Path) -> None:
    path = exported(checkpoint, tmp_path / "model.nsm")
    with served(path) as address, nsm.open(path, "web") as session:
        opened(browser, address, "replay")
        assert "SimpleNSM" in browser.value("document.getElementById('what').textContent")
        browser.click("play")
        browser.wait("!document.getElementById('play').disabled")
        assert browser.value("document.getElementById('at').textContent") == "step 4 of 4"
        for tokens in Bundle(path).trace().inputs["tokens"][0]:
            session.step(np.stack([tokens, tokens]))
        check_pictures(browser, session.read_state(), active=6)

        browser.click("check")
        browser.wait("document.documentElement.dataset.checked")
        assert browser.value("document.documentElement.dataset.checked") == "passed"
        assert "8 streams of 4 steps" in browser.value("document.getElementById('verdict').textContent")

        tops = "['input', 'state', 'verdict'].map(id => document.getElementById(id).getBoundingClientRect().top)"
        given, drawn, checked = browser.value(tops)
        assert drawn < checked
        browser.size(390, 844, phone=True)
        assert browser.value("document.documentElement.scrollWidth") == 390, "nothing sticks out on a phone"
        given, drawn, checked = browser.value(tops)
        assert given < drawn < checked, "the bank comes before the check"
