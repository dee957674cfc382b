import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.base.digests import sealed
from pipeline.base.errors import CheckpointError, DiskError, UsageError
from pipeline.base.files import write_json
from pipeline.sae.checkpoint import save_checkpoint
from pipeline.sae.config import SAEConfig
from pipeline.sae.export import FORMATS, Format, export
from pipeline.sae.foreign.reader import load_foreign, load_sae, read_sae
from pipeline.sae.nested import NestedSAE
from test_sae import KINDS, random_sae

PROVENANCE = {"store": {"model": "google/gemma-2-2b", "layer": 19, "context": 128}}


TRANSCODERS = {
    "transcoder": SAEConfig(16, 64, (16, 64), d_out=12),
    "transcoder, skip": SAEConfig(16, 64, (16, 64), d_out=12, skip=True),
    "transcoder, jumprelu": SAEConfig(16, 64, (16, 64), "jumprelu", d_out=16),
    "transcoder, batchtopk, skip": SAEConfig(16, 64, (4, 16, 64), "batchtopk", k=6, d_out=12, skip=True),
}
IN_AND_OUT = {"hook": "mlp_in", "target": {"hook": "mlp_out", "layer": 19}}


def saved(path: Path, kind: str) -> NestedSAE:
    sae = random_sae((KINDS | TRANSCODERS)[kind])
    if sae.config.is_transcoder:
        sae.target_center.normal_(generator=torch.Generator().manual_seed(4))
        sae.target_scale.fill_(1.9)
    sae.W_dec.data /= sae.W_dec.data.norm(dim=-1, keepdim=True)
    if "batchtopk" in kind:
        sae.threshold.data.fill_(1.3)
    of = {"store": PROVENANCE["store"] | IN_AND_OUT} if sae.config.is_transcoder else PROVENANCE
    save_checkpoint(path, sae, 5, of)
    return sae


def rows() -> torch.Tensor:
    return torch.randn(20, 16, generator=torch.Generator().manual_seed(3)) * 3 + 1


@pytest.mark.parametrize("read", [load_sae, read_sae, lambda path: export(path, "saelens", path.parent / "out")])
def test_checkpoint_in_another_folder_is_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """Whatever reads a single checkpoint refuses one that lies in the folder of another member, and reads one in its own."""
    path = tmp_path / "seed1" / "checkpoints" / "step_000005.safetensors"
    path.parent.mkdir(parents=True)
    for seed, is_own in ((1, True), (0, False)):
        save_checkpoint(path, random_sae(KINDS["relu"]), 5, PROVENANCE | {"member": "seed0", "train": {"seed": seed}})
        config = {"format": "nested-sae-member", "version": 1, "config": {"seed": 1}, "store": {}, "order": {}}
        write_json(tmp_path / "seed1" / "config.json", sealed(config))
        if is_own:
            read(path)
        else:
            with pytest.raises(CheckpointError, match="is of member 'seed0', lies in the folder of seed1"):
                read(path)


def test_export_follows_saelens_formula(tmp_path: Path) -> None:
    """An exported SAE takes raw residuals by SAELens' own formula."""
    sae = saved(tmp_path / "c", "relu")
    export(tmp_path / "c", "saelens", tmp_path / "out")
    cfg, w = json.loads((tmp_path / "out/cfg.json").read_text()), load_file(tmp_path / "out/sae_weights.safetensors")
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"]) == ("standard", 16, 64)
    assert cfg["metadata"]["hook_name"] == "blocks.19.hook_resid_post"
    x = rows()
    z = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    assert torch.allclose(z, sae.encode(x) / sae.scale, rtol=1e-4, atol=1e-4)
    assert torch.allclose(z @ w["W_dec"] + w["b_dec"], sae(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "batchtopk"])
def test_every_level_exports_alone(tmp_path: Path, kind: str) -> None:
    """Every level exports as an SAE of its own."""
    sae = saved(tmp_path / "c", kind)
    folders = export(tmp_path / "c", "saelens", tmp_path / "out", level=-1)
    widths = [json.loads((folder / "cfg.json").read_text())["d_sae"] for folder in folders]
    assert widths == list(sae.config.levels)
    w = load_file(folders[0] / "sae_weights.safetensors")
    z = sae.encode(rows())[:, : sae.config.levels[0]] / sae.scale
    assert torch.allclose(z @ w["W_dec"] + w["b_dec"], sae.decode_level(sae.encode(rows()), 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FORMATS)
def test_unnamed_places_stay_unnamed(tmp_path: Path, kind: Format) -> None:
    """An SAE that says of no layer what it is for is exported without a hook, and read back as such."""
    sae = random_sae(KINDS["relu"])
    save_checkpoint(tmp_path / "c", sae, 5, {"member": "mine"})
    (folder,) = export(tmp_path / "c", kind, tmp_path / "out")
    assert "None" not in "".join(path.read_text() for path in folder.glob("*.json"))
    loaded, provenance = load_foreign(folder)
    assert "layer" not in provenance["store"]
    torch.testing.assert_close(loaded(rows()), sae(rows()), rtol=1e-4, atol=1e-4)


def test_inexpressible_sae_is_refused(tmp_path: Path) -> None:
    """What a format cannot express is refused."""
    saved(tmp_path / "ln", "relu, LayerNorm")
    with pytest.raises(UsageError, match="LayerNorm"):
        export(tmp_path / "ln", "dictionary-learning", tmp_path / "out")
    saved(tmp_path / "c", "relu")
    with pytest.raises(UsageError, match="levels 0 to 1"):
        export(tmp_path / "c", "saelens", tmp_path / "out", level=2)


@pytest.mark.parametrize("kind", TRANSCODERS)
def test_transcoder_follows_saelens_formula(tmp_path: Path, kind: str) -> None:
    """An exported transcoder maps raw rows to raw rows by SAELens' formula, and names both hooks."""
    sae, x = saved(tmp_path / "c", kind), rows()
    export(tmp_path / "c", "saelens", tmp_path / "out")
    cfg, w = json.loads((tmp_path / "out/cfg.json").read_text()), load_file(tmp_path / "out/sae_weights.safetensors")
    a = x @ w["W_enc"] + w["b_enc"]
    z = a.relu() * (a > w["threshold"]) if "threshold" in w else a.relu()
    y = z @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if "W_skip" in w else 0)
    assert cfg["architecture"] == ("jumprelu_" * ("threshold" in w)) + ("skip_" * sae.config.skip) + "transcoder"
    assert (cfg["d_in"], cfg["d_out"], cfg["apply_b_dec_to_input"]) == (16, sae.config.d_out, False)
    assert cfg["metadata"]["hook_name"] == "blocks.19.mlp.hook_in"
    assert cfg["metadata"]["hook_name_out"] == "blocks.19.hook_mlp_out"
    assert torch.allclose(z, sae.encode(x) / sae.target_scale, rtol=1e-4, atol=1e-4)
    assert torch.allclose(y, sae(x), rtol=1e-4, atol=1e-4)
    assert torch.allclose(w["W_dec"].norm(dim=1), torch.ones(64))


@pytest.mark.parametrize(
    ("config", "form", "what"),
    [
        (SAEConfig(16, 64, (64,), "topk", k=6, d_out=12), "saelens", "no transcoder with topk"),
        (SAEConfig(16, 64, (64,), layernorm="pre", d_out=12), "saelens", "no transcoder with LayerNorm"),
        (SAEConfig(16, 64, (64,), d_out=12), "dictionary-learning", "has no transcoder"),
    ],
)
def test_inexpressible_transcoder_is_refused(tmp_path: Path, config: SAEConfig, form: Format, what: str) -> None:
    """What a library has no transcoder for is refused by name."""
    save_checkpoint(tmp_path / "c", random_sae(config), 5, PROVENANCE)
    with pytest.raises(UsageError, match=what):
        export(tmp_path / "c", form, tmp_path / "out")


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    """A folder that holds something else is left alone."""
    saved(tmp_path / "c", "relu")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(DiskError, match=r"thesis\.tex"):
        export(tmp_path / "c", "saelens", tmp_path / "out")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from support.train_crasher import die_at_write
from pipeline.sae.export import export
die_at_write(int(sys.argv[4]))
export(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
"""


@pytest.mark.parametrize("form", FORMATS)
def test_killed_export_goes_on(tmp_path: Path, form: Format) -> None:
    """Killed at each of its writes, an export does not block itself: the same command ends with the same bytes, no more."""
    saved(tmp_path / "c", "relu")
    export(tmp_path / "c", form, tmp_path / "whole")
    root, n = Path(__file__).parents[1], 0
    while True:
        n += 1
        words = [str(tmp_path / "c"), form, str(tmp_path / "killed"), str(n)]
        ended = subprocess.run(
            [sys.executable, "-c", KILLED, *words], cwd=root, capture_output=True, text=True, check=False
        )
        assert ended.returncode in (0, -9), ended.stderr
        if ended.returncode == 0:
            break
        export(tmp_path / "c", form, tmp_path / "killed")
        assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
        if n % 2:
            shutil.rmtree(tmp_path / "killed")
    assert n > 6


def test_export_leftovers_do_not_block(tmp_path: Path) -> None:
    """Partly written files of a killed export are swept."""
    saved(tmp_path / "c", "relu")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sae_weights.safetensors.77.partial").write_text("x")
    export(tmp_path / "c", "saelens", tmp_path / "out")
    assert files_of(tmp_path / "out").keys() == {"cfg.json", "sae_weights.safetensors", "digests.json"}


@pytest.mark.slow
@pytest.mark.skipif("PEERS_PYTHON" not in os.environ, reason="PEERS_PYTHON names no environment with sae-lens")
def test_peers_load_exports_and_agree(tmp_path: Path) -> None:
    """The installed peers load every export and agree."""
    for kind in KINDS | TRANSCODERS:
        for form in FORMATS:
            folder = tmp_path / f"{kind}-{form}".replace(", ", "-")
            folder.mkdir()
            sae, x = saved(folder / "c", kind), rows()
            try:
                export(folder / "c", form, folder / "out")
            except UsageError:
                continue
            unit = sae.target_scale if sae.config.is_transcoder else sae.scale
            z, x_hat = (sae.encode(x) / unit).detach(), sae(x).detach()
            save_file({"x": x, "z": z, "x_hat": x_hat}, folder / "reference.safetensors")
    script = Path(__file__).parent / "peers" / "peer_exports.py"
    run = subprocess.run([os.environ["PEERS_PYTHON"], script, tmp_path], capture_output=True, text=True, check=True)
    errors = json.loads(run.stdout.splitlines()[-1])
    assert len(errors) == 14
    for name, (encode, decode) in errors.items():
        assert max(encode, decode) < 1e-5, name
