"""Hook points: bit for bit what plain hooks on the untouched model see, and spliced where they were read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import harvest.run
from evaluate.checkpoints.find import Checkpoint, require_fit
from evaluate.scores.behaviour import Baselines, Behaviour, clean_pass, score_residual, splice
from evaluate.scores.sample import Sample
from harvest.config import HarvestConfig
from pipeline.base.errors import CheckpointError, ModelError, UsageError
from pipeline.model.points import HOOKS, Point, canonical
from pipeline.model.split_lm import SplitLM
from pipeline.model.trial import try_split
from pipeline.sae.config import SAEConfig
from pipeline.sae.export import transformer_lens_name
from pipeline.store.reader import Store
from support import sweep_models, tiny_models
from support.harvests import harvest_config
from support.reference import reference_behaviour
from train.stores import require_hook

Folder = Callable[[str], Path]
pytestmark = pytest.mark.usefixtures("one_thread")

INSIDE = ("resid_mid", "attn_out", "mlp_in", "mlp_out")
PARTS = {
    "llama": ("self_attn", "mlp", "mlp", "post_attention_layernorm"),
    "gemma2": ("post_attention_layernorm", "mlp", "post_feedforward_layernorm", "pre_feedforward_layernorm"),
    "gpt2": ("attn", "mlp", "mlp", "ln_2"),
    "gpt_neox": ("attention", "mlp", "mlp", ""),
    "opt": ("self_attn", "fc1", "fc2", "final_layer_norm"),
}
"""Parts of a layer whose output is attn_out, whose input is mlp_in, whose output is mlp_out, whose input is resid_mid."""


def plain_hooks(model: Any, tokens: Tensor, layer: int, kind: str) -> dict[str, Tensor]:
    """What plain hooks on a layer's parts see in a whole forward pass."""
    block = next(m for n, m in model.named_modules() if n.endswith((f"layers.{layer}", f"h.{layer}")))
    seen: dict[str, Tensor] = {}
    attention, reader, mlp, middle = PARTS[kind]

    def keep_output(name: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, out: Any) -> None:
            seen.setdefault(name, (out if isinstance(out, Tensor) else out[0]).clone())

        return hook

    def keep_input(name: str) -> Callable[..., None]:
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            seen.setdefault(name, (args[0] if args else kwargs["hidden_states"]).clone())

        return hook

    handles = [
        block.register_forward_pre_hook(keep_input("resid_pre"), with_kwargs=True),
        block.register_forward_hook(keep_output("resid_post")),
        getattr(block, attention).register_forward_hook(keep_output("attn_out")),
        getattr(block, reader).register_forward_pre_hook(keep_input("mlp_in"), with_kwargs=True),
        getattr(block, mlp).register_forward_hook(keep_output("mlp_out")),
    ]
    if middle:
        handles.append(getattr(block, middle).register_forward_pre_hook(keep_input("resid_mid"), with_kwargs=True))
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.fixture
def folder_of(lm_folder: Folder, tmp_path: Path) -> Folder:
    """The folder of a tiny model of a kind."""

    def make(kind: str) -> Path:
        if kind in tiny_models.KINDS:
            return lm_folder(kind)
        sweep_models.build(kind, tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.mark.parametrize("kind", PARTS)
def test_points_equal_plain_hooks(folder_of: Folder, kind: str) -> None:
    """Every hook point of a middle layer is bit for bit what a plain hook sees, all in one pass."""
    folder, tokens = folder_of(kind), tiny_models.tokens(3, 15, vocab=sweep_models.VOCAB)
    hooks = [hook for hook in HOOKS if hook != "embed" and (hook != "resid_mid" or PARTS[kind][3])]
    points = {hook: canonical(2, hook) for hook in hooks}
    lm = SplitLM.load(str(folder), dtype="float32", part="prefix", layers=list(points.values()))
    found = lm.prefix(tokens)
    seen = plain_hooks(tiny_models.whole_model(folder, torch.float32), tokens, 2, kind)
    assert {
        hook: torch.equal(found[point], seen[hook].reshape(3, 15, -1)) for hook, point in points.items()
    } == dict.fromkeys(hooks, True)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_embed_is_before_the_first_layer(folder_of: Folder, kind: str) -> None:
    """embed is what the first layer is given; no layer runs."""
    folder, tokens = folder_of(kind), tiny_models.tokens(2, 9, vocab=sweep_models.VOCAB)
    found = SplitLM.load(str(folder), dtype="float32", part="prefix", layers=[Point(0, "embed")]).prefix(tokens)
    seen = plain_hooks(tiny_models.whole_model(folder, torch.float32), tokens, 0, kind)
    assert torch.equal(found[Point(0, "embed")], seen["resid_pre"])


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("layer", [0, 3])
def test_splicing_is_the_hook(folder_of: Folder, kind: str, layer: int) -> None:
    """The suffix from changed rows gives the logits of the whole model whose plain hook changes them so."""
    folder, tokens = folder_of(kind), tiny_models.tokens(2, 11, vocab=sweep_models.VOCAB)
    whole = tiny_models.whole_model(folder, torch.float32)
    block = next(m for n, m in whole.named_modules() if n.endswith((f"layers.{layer}", f"h.{layer}")))
    attention, reader, mlp, _ = PARTS[kind]

    def change(out: Any) -> Any:
        return 0.5 * out if isinstance(out, Tensor) else (0.5 * out[0], *out[1:])

    def change_input(_m: Any, args: Any, kwargs: Any) -> Any:
        return (
            ((0.5 * args[0], *args[1:]), kwargs)
            if args
            else (args, kwargs | {"hidden_states": 0.5 * kwargs["hidden_states"]})
        )

    for hook, part in (("attn_out", attention), ("mlp_in", reader), ("mlp_out", mlp)):
        module, point = getattr(block, part), Point(layer, hook)
        lm = SplitLM.load(str(folder), dtype="float32", part="suffix", layers=[point])
        rows = SplitLM.load(str(folder), dtype="float32", part="prefix", layers=[point]).prefix(tokens)[point]
        handle = (
            module.register_forward_pre_hook(change_input, with_kwargs=True)
            if hook == "mlp_in"
            else module.register_forward_hook(lambda _m, _a, out: change(out))
        )
        with torch.no_grad():
            expected = whole(tokens, use_cache=False).logits
        handle.remove()
        assert torch.equal(lm.unembed(lm.suffix(0.5 * rows, tokens)), expected), hook


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "opt"])
def test_spliced_middle_is_the_stream(folder_of: Folder, kind: str) -> None:
    """resid_mid spliced is the stream that both the MLP reads and its output is added to."""
    folder, tokens = folder_of(kind), tiny_models.tokens(2, 11, vocab=sweep_models.VOCAB)
    lm = SplitLM.load(
        str(folder), dtype="float32", part="whole", layers=[Point(2, "resid_mid"), Point(2, "attn_out"), 1]
    )
    found = lm.prefix(tokens)
    changed = found[1] + 0.5 * found[Point(2, "attn_out")]
    halved = SplitLM(lm.model, lm.info, "whole", [Point(2, "attn_out")])
    expected = halved.suffix(0.5 * found[Point(2, "attn_out")], tokens)
    assert torch.equal(lm.suffix(changed, tokens), expected)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "opt", "mixtral"])
def test_every_point_passes_the_trial(folder_of: Folder, kind: str) -> None:
    """The trial accepts every point of a sequential layer."""
    points = [Point(1, hook) for hook in INSIDE] + [Point(0, "embed")]
    try_split(SplitLM.load(str(folder_of(kind)), dtype="float32", part="whole", layers=[1]), points)


def test_parallel_layers_have_no_middle(lm_folder: Folder) -> None:
    """A layer whose attention and MLP run beside each other has no resid_mid, and this is said."""
    with pytest.raises(ModelError, match=r"resid_mid was not found in layer 1 \(found: attn_out, mlp_out, mlp_in\)"):
        SplitLM.load(str(lm_folder("gpt_neox")), part="prefix", layers=[Point(1, "resid_mid")])


def test_one_point_has_one_name() -> None:
    """resid_pre is the stream after the layer before, and before the first layer it is embed."""
    assert canonical(3, "resid_pre") == Point(2, "resid_post") == canonical(2, "resid_post")
    assert canonical(0, "resid_pre") == canonical(5, "embed") == Point(0, "embed")
    assert Point(2).recorded == {"layer": 2}
    assert Point(2, "mlp_out").recorded == {"layer": 2, "hook": "mlp_out"}


def test_one_pass_makes_a_store_each(lm_folder: Folder, tmp_path: Path) -> None:
    """Several hooks make one store each in one pass, of the bytes that each alone makes, and record the point."""
    corpus = tiny_models.make_corpus(tmp_path / "corpus.jsonl")
    config = harvest_config(lm_folder("gemma2"), corpus, tmp_path / "both", hooks=("resid_pre", "mlp_out"))
    assert [Path(path).name for path in harvest.run.run(config, quiet=True)] == [
        "layer_1.resid_pre.zarr",
        "layer_1.mlp_out.zarr",
    ]
    alone = config.replace(store=str(tmp_path / "alone.zarr"), hooks=("mlp_out",))
    harvest.run.run(alone, quiet=True)
    one, other = (Store.open(path) for path in (tmp_path / "both/layer_1.mlp_out.zarr", alone.store))
    assert one.id == other.id
    assert (one.config["layer"], one.config["hook"]) == (1, "mlp_out")
    before = Store.open(tmp_path / "both/layer_1.resid_pre.zarr")
    assert before.config["layer"] == 0
    assert "hook" not in before.config


def test_scores_splice_at_the_hook(lm_folder: Folder, tmp_path: Path) -> None:
    """Scores of a store of mlp_out are those of the whole model with a plain hook there; ablations too."""
    corpus = tiny_models.make_corpus(tmp_path / "corpus.jsonl")
    folder = lm_folder("gemma2")
    config = harvest_config(folder, corpus, tmp_path / "acts.zarr", hooks=("mlp_out",), dtype="float32")
    harvest.run.run(config, quiet=True)
    store = Store.open(config.store)
    batch = Sample(store, 8, 8, torch.device("cpu")).batch(0, 8)
    lm = SplitLM.load(str(folder), dtype="float32", part="suffix", layers=[Point(1, "mlp_out")])
    clean = clean_pass(lm, batch, 50)
    scores = Behaviour("cpu")
    scores.update(batch, score_residual(lm, batch, clean, splice(batch, 0.3 * batch.x + 1), 50))
    baselines = Baselines.empty(lm, store.mean, store.context, 50)
    baselines.update(batch, clean)
    whole = tiny_models.whole_model(folder, torch.float32)

    def hooked(change: Callable[[Tensor], Tensor]) -> Tensor:
        part = whole.model.layers[1].post_feedforward_layernorm
        handle = part.register_forward_hook(lambda _m, _a, out: change(out))
        with torch.no_grad():
            logits: Tensor = whole(batch.tokens, use_cache=False).logits
        handle.remove()
        return logits

    untouched = hooked(lambda out: out)
    for other, found in (
        (hooked(lambda out: torch.where(batch.kept[..., None], 0.3 * out + 1, out)), scores.means(0)),
        (hooked(torch.zeros_like), baselines.zero.means(0)),
        (hooked(lambda out: torch.where(batch.kept[..., None], store.mean, out)), baselines.mean.means(0)),
    ):
        expected = reference_behaviour(untouched, other, batch.tokens, batch.kept)
        assert found == pytest.approx(expected, rel=1e-4, abs=2e-6)


def test_same_point_twice_is_refused() -> None:
    """One point under two names is refused."""
    config = HarvestConfig("acts", layers=(2, 3), hooks=("resid_post", "resid_pre"))
    with pytest.raises(UsageError, match=r"--layer 3 --hook resid_pre: the same point as layer_2\.zarr"):
        config.stores()


@pytest.mark.parametrize(("trained", "scored"), [(None, "mlp_out"), ("mlp_out", None), ("attn_out", "mlp_out")])
def test_other_hooks_sae_is_refused(tiny_store: Path, trained: str | None, scored: str | None) -> None:
    """An SAE of one hook is not scored on a store of another, whatever else is allowed to differ."""
    store = Store.open(tiny_store)
    hook = {"hook": trained} if trained else {}
    about = {"id": "other", "layer": store.config["layer"], "weights_sha256": store.config["weights_sha256"]} | hook
    checkpoint = Checkpoint(Path("c"), "", SAEConfig(store.d_model, 8, (8,)), 1, {"store": about})
    store.config["hook"] = scored or "resid_post"
    with pytest.raises(CheckpointError, match=f"trained on hook '{trained or 'resid_post'}', store .* has"):
        require_fit(checkpoint, store, allow_other_store=True, allow_other_model=True)


@pytest.mark.parametrize(
    ("recorded", "name"),
    [
        ({"layer": 3}, "blocks.3.hook_resid_post"),
        ({"layer": 3, "hook": "mlp_out"}, "blocks.3.hook_mlp_out"),
        ({"layer": 0, "hook": "embed"}, "blocks.0.hook_resid_pre"),
        ({"layer": 3, "hook": "mlp_in"}, "blocks.3.mlp.hook_in"),
    ],
)
def test_export_names_the_point(recorded: dict[str, Any], name: str) -> None:
    """Exports name the point as TransformerLens does."""
    assert transformer_lens_name(recorded) == name


@pytest.mark.parametrize(
    ("made_for", "store", "fits"),
    [
        ({"id": "a", "layer": 3}, {"layer": 4}, True),
        ({"id": "a", "layer": 3, "hook": "mlp_out"}, {"layer": 3}, False),
        ({"id": "a", "layer": 3}, {"layer": 3, "hook": "mlp_out"}, False),
        ({"layer": 3, "hook": "attn_out"}, {"layer": 3, "hook": "mlp_out"}, False),
        ({"layer": 3}, {"layer": 3, "hook": "mlp_out"}, True),
        ({"id": "a", "hook": None}, {"layer": 3}, True),
    ],
)
def test_training_starts_at_its_hook(made_for: dict[str, Any], store: dict[str, Any], fits: bool) -> None:
    """An SAE to start from is of the store's hook, where both say which."""
    with contextlib.nullcontext() if fits else pytest.raises(CheckpointError, match="init_from holds an SAE of"):
        require_hook(made_for, store)
