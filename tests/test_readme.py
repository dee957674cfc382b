import re
from pathlib import Path

import pytest
import torch

from pipeline.sae.checkpoint import save_checkpoint
from pipeline.sae.nested import NestedSAE, SAEConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tree_names_every_folder() -> None:
    """The README's tree shows every folder that holds code, a line each, and no other."""
    parents: list[str] = []
    listed = set()
    for indent, name in re.findall(r"^    ( *)([a-z]+)/ ", README[README.index("## Folders") :], re.M):
        parents[len(indent) // 2 :] = [name]
        listed.add("/".join(parents))
    top = ("pipeline", "harvest", "train", "evaluate", "data", "tests")
    assert listed == {str(path.parent.relative_to(ROOT)) for folder in top for path in (ROOT / folder).rglob("*.py")}


def test_notebook_example_steers_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notebook example steers the model as the readme says."""
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
def test_ci_runs_the_readmes_commands(command: str) -> None:
    """The commands of the readme are those that ci runs."""
    assert command in README
    assert command.replace("-e .", "-e '.[test]'") in (ROOT / ".ci" / "run").read_text()
