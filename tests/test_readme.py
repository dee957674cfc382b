import re
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import save_checkpoint
from pipeline.sae import NestedSAE, SAEConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_file_tree_names_every_file_and_no_other() -> None:
    folders = re.split(r"\n    (pipeline|harvest|train|evaluate|data|tests)/\n", README[README.index("## Files") :])
    listed = {
        f"{folder}/{name}"
        for folder, text in zip(folders[1::2], folders[2::2])
        for name in re.findall(r"\n? {6}(\S+\.py)", text)
    }
    there = {
        f"{p.parent.name}/{p.name}" for f in folders[1::2] for p in (ROOT / f).glob("*.py") if p.name != "__init__.py"
    }
    assert listed - {"tests/test_*.py"} == {path for path in there if not path.startswith("tests/test_")}


def test_the_notebook_example_steers_the_model_as_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = NestedSAE(SAEConfig(192, 32, (8, 32)))
    torch.nn.init.orthogonal_(sae.W_dec)
    save_checkpoint(tmp_path / "sae.safetensors", sae, 1, {})
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    text = re.sub(r'pipeline\.load\("[^"]*"\)', f'pipeline.load("{tmp_path}/sae.safetensors")', code[1])
    said = []
    for strength in (0.0, 0.0, 300.0):
        space = {"name": str(ROOT / "data" / "tiny-gemma2"), "latent": 5, "layer": 3, "strength": strength}
        exec(text, space)
        said.append(space["text"])
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    "command", ["pip install -c constraints.txt -e .", "python -m pytest", "python -m pipeline demo"]
)
def test_the_commands_of_the_readme_are_those_that_ci_runs(command: str) -> None:
    assert command in README
    assert command.replace("-e .", "-e '.[test]'") in (ROOT / ".ci" / "run").read_text()
