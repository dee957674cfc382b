"""`evaluate/attach.ipynb`: its cells run in order, show what they say, and carry outputs as shipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support import notebook

PATH = Path(__file__).parents[1] / "evaluate" / "attach.ipynb"


@pytest.fixture(scope="module")
def ran() -> tuple[dict[str, Any], list[str]]:
    """What the cells leave behind, and what each printed."""
    return notebook.run(PATH)


def test_levels_add_up(ran: tuple[dict[str, Any], list[str]]) -> None:
    """The whole dictionary stays nearer to the untouched model than the shared one alone, and special rows have no latents."""
    names, _ = ran
    assert names["kl"][0] > names["kl"][1] > 0
    assert not names["z"][0].any()
    assert names["z"][1:].any(1).all()


def test_untouched_logits_are_shown(ran: tuple[dict[str, Any], list[str]]) -> None:
    """The logits that the notebook calls untouched are those of the model alone."""
    names, _ = ran
    with torch.no_grad():
        assert torch.equal(names["model"](**names["inputs"]).logits, names["logits"])


def test_edits_do_something(ran: tuple[dict[str, Any], list[str]]) -> None:
    """Steering changes the text towards its word; ablating the strongest latents costs logit."""
    names, _ = ran
    assert names["steered"] != names["plain"]
    assert names["steered"].count("not") > names["plain"].count("not")
    assert names["ablated"] < names["untouched"]


def test_attribution_foretells_ablation(ran: tuple[dict[str, Any], list[str]]) -> None:
    """Strongest attributions have the sign and, by and large, the order of what ablation measures."""
    names, _ = ran
    assert min(names["measured"]) > 0
    assert np.corrcoef(names["first_order"], names["measured"])[0, 1] > 0.5


def test_shipped_outputs_are_there(ran: tuple[dict[str, Any], list[str]]) -> None:
    """Each cell that prints carries as many printed lines as it prints now, and no error is shipped."""
    _, printed = ran
    shipped = [cell["outputs"] for cell in notebook.code_cells(json.loads(PATH.read_text()))]
    assert {one["output_type"] for outputs in shipped for one in outputs} == {"stream"}
    n_lines = [sum(len(one["text"]) for one in outputs) for outputs in shipped]
    assert n_lines == [len(text.splitlines()) for text in printed]
