"""SAEs that normalise each row by its own mean and deviation: OpenAI's TopK, SAELens's layer_norm, input_unit_norm."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import pipeline
from evaluate.probing.texts import TextBank, pool_all
from evaluate.run import EvaluateConfig, run
from evaluate.scores.absorption import AbsorptionScore, Probes
from evaluate.scores.labels import Labelled
from pipeline.base.errors import CheckpointError, PipelineError, UsageError
from pipeline.base.results import read_result
from pipeline.live.attach import attach
from pipeline.live.edits import steer
from pipeline.model.split_lm import find_layers
from pipeline.sae.checkpoint import load_checkpoint, save_checkpoint
from pipeline.sae.config import SAEConfig
from pipeline.sae.export import export
from pipeline.sae.foreign.reader import load_foreign
from pipeline.sae.nested import NestedSAE
from support import lm_stores, tiny_models
from train.step.weights import mapped_weights

D, F, K, LAYER = 64, 96, 5, 1


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights by our names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def rows() -> torch.Tensor:
    """Rows of all sizes, not around 0, and a constant one, which has no deviation."""
    generator = torch.Generator().manual_seed(1)
    found = torch.randn(40, D, generator=generator) * torch.logspace(0, 2, 40)[:, None] + 1
    found[7] = 2.0
    return found


def openai(folder: Path, w: dict[str, torch.Tensor], **settings: Any) -> Path:
    """A state dict as OpenAI's Autoencoder with TopK saves it: ordered, its activation's own among the tensors."""
    folder.mkdir(parents=True)
    state: OrderedDict[str, Any] = OrderedDict(pre_bias=w["b_dec"], latent_bias=w["b_enc"])
    state |= {"stats_last_nonzero": torch.zeros(F, dtype=torch.long), "latents_activation_frequency": torch.ones(F)}
    state |= {"latents_mean_square": torch.zeros(F)}
    state |= {"encoder.weight": w["W_enc"].T.contiguous(), "decoder.weight": w["W_dec"].T.contiguous()}
    state |= {"activation": "TopK", "activation_state_dict": OrderedDict(k=K, postact_fn="ReLU")}
    torch.save(state | settings, folder / "autoencoder.pt")
    return folder


def saelens(folder: Path, w: dict[str, torch.Tensor]) -> Path:
    """SAELens's topk with layer_norm."""
    folder.mkdir()
    cfg = {"architecture": "topk", "k": K, "d_in": D, "d_sae": F, "normalize_activations": "layer_norm"}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(w, folder / "sae_weights.safetensors")
    return folder


def matryoshka(folder: Path, w: dict[str, torch.Tensor]) -> Path:
    """bartbussmann's topk with input_unit_norm, which uses no encoder bias."""
    folder.mkdir()
    cfg = {"sae_type": "topk", "top_k": K, "input_unit_norm": True, "act_size": D, "dict_size": F}
    (folder / "config.json").write_text(json.dumps(cfg))
    torch.save(w, folder / "sae.pt")
    return folder


def reference(w: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """z and x̂ of the public definition, row after row in float64."""
    w = {name: tensor.double() for name, tensor in w.items()}
    latents, made = [], []
    for row in x.double():
        mean = row.sum() / D
        deviation = ((row - mean).square().sum() / (D - 1)).sqrt()
        a = ((row - mean) / (deviation + 1e-5) - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        z = torch.zeros(F, dtype=torch.float64)
        for latent in sorted(range(F), key=lambda j: -float(a[j]))[:K]:
            z[latent] = max(float(a[latent]), 0.0)
        latents.append(z)
        made.append((z @ w["W_dec"] + w["b_dec"]) * deviation + mean)
    return torch.stack(latents), torch.stack(made)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Within 1e-6 of the whole's norm."""
    return float((found - wanted).norm() / wanted.norm()) < 1e-6


@pytest.fixture
def sae(tmp_path: Path) -> NestedSAE:
    """OpenAI's TopK, read."""
    return pipeline.load(openai(tmp_path / "theirs", weights()))


@pytest.mark.parametrize("make", [openai, saelens, matryoshka])
def test_rows_are_normalised_exactly(tmp_path: Path, make: Callable[..., Path]) -> None:
    """Latents, and rows decoded of them, are those of the public definition in float64, also of a row without deviation."""
    w = weights()
    sae, _ = load_foreign(make(tmp_path / "s", w))
    z, x_hat = reference(w | {"b_enc": torch.zeros(F)} if make is matryoshka else w, rows())
    assert close(sae.encode(rows()), z)
    assert close(sae.decode(z.float(), rows()), x_hat)
    assert close(sae(rows()), x_hat)
    assert all(torch.equal(one, sae.decode(z.float(), rows())) for one in sae.decode_levels(z.float(), rows()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "postact_fn 'Identity' cannot be read"),
        ({"activation_state_dict": {"postact_fn": "ReLU"}}, "k"),
        ({"activation_state_dict": {"k": K, "temperature": 2.0}}, "activation_state_dict says 'temperature'"),
        ({"activation_state_dict": 5}, "activation_state_dict"),
        ({"activation": "ReLU"}, "activation_state_dict says 'k'"),
        ({"activation": "Identity"}, "activation 'Identity' cannot be read"),
        ({"normalize": False}, r"autoencoder.pt says 'normalize'"),
        ({"pre_bias": torch.zeros(D + 1)}, "do not agree"),
    ],
)
def test_odd_topk_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """What OpenAI's TopK would compute otherwise is refused by name."""
    with pytest.raises(PipelineError, match=message):
        load_foreign(openai(tmp_path / "s", weights(), **settings))


def test_openai_location(tmp_path: Path) -> None:
    """OpenAI's own folders say model, hook and layer; a folder of another name says nothing."""
    folder = openai(tmp_path / "resid_delta_mlp_v5_32k" / "autoencoders" / "8", weights())
    assert load_foreign(folder)[1]["store"] == {"model": "gpt2", "hook": "mlp_out", "layer": 8}
    assert load_foreign(openai(tmp_path / "mine", weights()))[1]["store"] == {}


def test_decoding_needs_the_rows(sae: NestedSAE) -> None:
    """Latents alone are not decoded; beside their rows, what they add is their decoder rows by the row's deviation."""
    x = rows()
    z = sae.encode(x)
    with pytest.raises(ValueError, match="needs the rows"):
        sae.decode(z)
    added = sae.decode(z, x).double() - sae.decode(torch.zeros_like(z), x).double()
    torch.testing.assert_close(added, (sae.weighed(z, x) @ sae.W_dec).double(), rtol=1e-4, atol=1e-4)


def test_checkpoint_keeps_row_norm(tmp_path: Path, sae: NestedSAE) -> None:
    """As a checkpoint of ours it says that it normalises rows, and computes the same."""
    save_checkpoint(tmp_path / "ours.safetensors", sae, 0, {})
    again, header = load_checkpoint(tmp_path / "ours.safetensors")
    assert header.sae.row_norm
    assert torch.equal(again(rows()), sae(rows()))


def test_transcoders_normalise_no_rows() -> None:
    """What a transcoder makes are not the rows whose mean it would take; one dimension has no deviation."""
    for config in ({"d_model": 8, "d_out": 8}, {"d_model": 1}):
        with pytest.raises(UsageError, match="row_norm is of an SAE"):
            SAEConfig(width=4, levels=(4,), row_norm=True, **config)  # type: ignore[arg-type]


def test_others_cannot_take_it(tmp_path: Path, sae: NestedSAE) -> None:
    """Export to other libraries and training on from it are refused in one line."""
    for kind in ("saelens", "dictionary-learning"):
        with pytest.raises(UsageError, match="normalises each row by itself"):
            export(tmp_path / "theirs", kind, tmp_path / kind)
    with pytest.raises(CheckpointError, match="normalises each row by itself"):
        mapped_weights(sae, NestedSAE(SAEConfig(D, F, (F,), "topk", K)))


def test_attached_it_is_a_hook(lm_folder: Callable[[str], Path], sae: NestedSAE) -> None:
    """Spliced logits are those of a plain hook; kept error changes no bit; steering adds the latent's row by the deviation."""
    model, tokens = tiny_models.whole_model(lm_folder("gpt2"), torch.float32), tiny_models.tokens(3, 12).clamp(min=4)
    layer = find_layers(model, model.config.num_hidden_layers)[LAYER]
    latent, strength = 3, 2.0

    def logits() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(tokens).logits
        return found

    def hooked(change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            there = output if isinstance(output, torch.Tensor) else output[0]
            changed = there.clone()
            changed[:, 1:] = change(there[:, 1:])
            return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])

        handle = layer.register_forward_hook(hook)
        found = logits()
        handle.remove()
        return found

    untouched = logits()
    with attach(model, sae, LAYER):
        spliced = logits()
    with attach(model, sae, LAYER, keep_error=True):
        kept = logits()
    with attach(model, sae, LAYER, keep_error=True, edit=steer(latent, strength)):
        steered = logits()
    assert torch.equal(kept, untouched)
    assert not torch.equal(spliced, untouched)
    torch.testing.assert_close(spliced, hooked(lambda x: sae.decode(sae.encode(x), x)), rtol=1e-5, atol=1e-6)
    wanted = hooked(lambda x: x + strength * x.std(-1, keepdim=True) * sae.W_dec[latent])
    torch.testing.assert_close(steered, wanted, rtol=1e-5, atol=1e-6)
    assert float((steered - untouched).abs().max()) > 1e-3


def test_gradients_count_the_deviation(lm_folder: Callable[[str], Path], sae: NestedSAE) -> None:
    """∂/∂z of the residual's sum is the decoder row's sum by the row's deviation."""
    model, tokens = tiny_models.whole_model(lm_folder("gpt2"), torch.float32), tiny_models.tokens(2, 6).clamp(min=4)
    seen: list[torch.Tensor] = []
    with attach(model, sae, LAYER, keep_error=True, gradients=True) as live:
        layer = find_layers(model, model.config.num_hidden_layers)[LAYER]
        handle = layer.register_forward_hook(lambda _m, _a, out: seen.append(out if torch.is_tensor(out) else out[0]))
        model(tokens)
        handle.remove()
        x = seen[0][:, 1:]
        x.sum().backward()
    assert live.z is not None
    assert live.z.grad is not None
    wanted = x.detach().std(-1).flatten()[:, None] * sae.W_dec.sum(1)
    torch.testing.assert_close(live.z.grad, wanted, rtol=1e-4, atol=1e-5)


def test_it_is_scored(tmp_path: Path) -> None:
    """Explained variance is that of its reconstructions, all of its k latents explain as much, and there is a KL."""
    store = lm_stores.make_lm_store(tmp_path, eval_sequences=4)
    folder = openai(tmp_path / "theirs", weights())
    config = EvaluateConfig(
        store.path, tmp_path / "out", scores=("kl", "ev", "l0", "coding"), model=store.config["model"]
    )
    outcome = run(config, [folder])
    assert not outcome.failed
    result = read_result(Path(outcome.results[0]["path"]))
    [level] = result["levels"]
    x = store.eval.read(0, store.eval.n_rows)[torch.from_numpy(store.eval.kept())].double()
    _, x_hat = reference(weights(), x)
    ev = 1 - float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
    assert level["scores"]["ev"] == pytest.approx(ev, rel=1e-4)
    assert level["scores"]["kl_nats"] > 0
    assert level["scores"]["l0"] == K
    coded = {row["n"]: row["value"] for row in result["series"]["sparse_coding_ev"]}
    assert coded[K] == pytest.approx(level["scores"]["ev"], rel=1e-5)
    assert result["checkpoint"]["sae"]["row_norm"] is True


def test_probes_see_raw_units(sae: NestedSAE) -> None:
    """Absorption and probing of texts take latents by their rows' deviations, as what they add to the rows."""
    x = rows()[:20]
    wanted = sae.encode(x) * x.std(-1, keepdim=True)
    at = np.arange(20)
    labelled = Labelled(at, at, np.zeros((20, 1), np.int8), at < 10, "words", ())
    score = AbsorptionScore(sae, Probes((), torch.zeros(0, D), torch.zeros(0), (), {}, labelled, x))
    score.encode(torch.zeros(D))
    z = torch.zeros(20, F)
    z[np.concatenate(score.rows), np.concatenate(score.latents)] = torch.from_numpy(np.concatenate(score.values))
    torch.testing.assert_close(z, wanted)
    n_real = torch.tensor([2, 5, 3, 10])
    pooled = pool_all([sae], TextBank(x, n_real, 16 - n_real, torch.zeros(4, D)))[0]
    for text, (mean, part) in enumerate(zip(pooled.mean, torch.split(wanted, n_real.tolist()))):
        torch.testing.assert_close(mean, part.mean(0), msg=str(text))
