"""Reading charts back from a page."""

from __future__ import annotations

import re
from xml.etree import ElementTree


def svgs(text: str) -> list[ElementTree.Element]:
    """The pictures in a text, each well-formed."""
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg class=\"chart\".*?</svg>", text, re.S)]


def points(picture: ElementTree.Element, style: str) -> list[tuple[float, float]]:
    line = next(item for item in picture.iter("polyline") if style in item.attrib["class"].split())
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]
