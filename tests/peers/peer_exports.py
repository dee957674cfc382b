"""Runs in an environment of its own with sae-lens and dictionary-learning: load each export, compare with our encode.

    python -m venv peers && peers/bin/pip install torch==2.13.0 sae-lens dictionary-learning google-crc32c
    peers/bin/pip uninstall -y torchvision        # its CUDA build breaks transformers under a CPU torch
    PEERS_PYTHON=peers/bin/python python -m pytest tests/test_export.py

Prints one JSON line: folder name → relative errors of encode and decode.
"""

import json
import sys
from pathlib import Path

import dictionary_learning.dictionary as dictionaries
import sae_lens
import torch
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
import pipeline.sae.saelens  # noqa: F401 (registers the LayerNorm class)

CLASSES = (dictionaries.AutoEncoder, dictionaries.JumpReluAutoEncoder, AutoEncoderTopK, MatryoshkaBatchTopKSAE)


def load(folder: Path) -> torch.nn.Module:
    if (folder / "cfg.json").exists():
        return sae_lens.SAE.load_from_disk(folder)
    name = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    return {c.__name__: c for c in CLASSES}[name].from_pretrained(str(folder / "ae.pt"))


errors = {}
for reference in sorted(Path(sys.argv[1]).glob("*/reference.safetensors")):
    expected, sae = load_file(reference), load(reference.parent / "out")
    z = sae.encode(expected["x"])
    is_transcoder = "transcoder" in type(sae).__name__.lower()  # whose skip connection is in its forward alone
    x_hat = sae(expected["x"]) if is_transcoder else sae.decode(expected["z"])
    errors[reference.parent.name] = [
        float((z - expected["z"]).norm() / expected["z"].norm()),
        float((x_hat - expected["x_hat"]).norm() / expected["x_hat"].norm()),
    ]
print(json.dumps(errors))
