"""What travels to a GPU box without a network."""

from __future__ import annotations

import re
from importlib.metadata import requires
from pathlib import Path

import pytest

packaging = pytest.importorskip("packaging.requirements")
BOX = {"numpy", "scipy", "scikit-learn", "packaging", "typing-extensions", "pyyaml"}
"""What a box that has torch and transformers has."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_carried_wheels_need_no_others() -> None:
    """All that the carried packages require is carried, or on any box with torch and transformers: zarr could not be imported."""
    script = (Path(__file__).parent / "gpu" / "wheels.sh").read_text()
    found = re.search(r'names="(.*)"', script)
    assert found is not None
    carried = {canonical(name) for name in found[1].split()}
    wanted = [packaging.Requirement(line) for name in carried for line in requires(name) or []]
    needed = {canonical(one.name) for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})}
    assert needed - carried <= BOX
