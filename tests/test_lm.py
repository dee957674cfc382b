"""Splitting a language model: prefix and suffix are the untouched model's own arithmetic, bit for bit."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import transformers
from huggingface_hub import errors as hub
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import Tensor, nn

from pipeline.base.errors import ModelError, UsageError
from pipeline.base.runtime import resolve_device
from pipeline.model import files as model_files
from pipeline.model.points import Point
from pipeline.model.specials import resolve_bos, resolve_separator, special_ids
from pipeline.model.split_lm import ModelInfo, SplitLM, load_tokenizer, placement, require_room, truncated
from support import tiny_models

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
Folder = Callable[[str], Path]
pytestmark = pytest.mark.usefixtures("one_thread")


def whole_run(folder: Path, dtype: str, tokens: Tensor) -> Any:
    """The untouched model's outputs, with all hidden states."""
    with torch.no_grad():
        return tiny_models.whole_model(folder, DTYPES[dtype])(tokens, output_hidden_states=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_prefix_then_suffix_is_the_model(lm_folder: Folder, kind: str, dtype: str) -> None:
    """Prefix then suffix is the whole model bit for bit."""
    folder, tokens = lm_folder(kind), tiny_models.tokens(3, 33)
    whole = whole_run(folder, dtype, tokens)
    for layer in (1, tiny_models.LAYERS - 1):
        residual = SplitLM.load(str(folder), dtype=dtype, part="prefix", layers=[layer]).prefix(tokens)[layer]
        suffix = SplitLM.load(str(folder), dtype=dtype, part="suffix", layers=[layer])
        hidden = suffix.suffix(residual)
        if layer < tiny_models.LAYERS - 1:  # the last of hidden_states is after the final norm
            assert torch.equal(residual, whole.hidden_states[layer + 1])
        assert torch.equal(hidden, whole.hidden_states[-1])
        assert torch.equal(suffix.unembed(hidden), whole.logits)


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_model_cut_in_memory_agrees(lm_folder: Folder, kind: str) -> None:
    """One model cut in memory gives both parts."""
    tokens = tiny_models.tokens(2, 20)
    lm = SplitLM.load(str(lm_folder(kind)), dtype="bf16", part="whole", layers=[1])
    hidden = lm.suffix(lm.prefix(tokens)[1], tokens)
    assert torch.equal(lm.unembed(hidden), whole_run(lm_folder(kind), "bf16", tokens).logits)
    with torch.no_grad():
        assert torch.equal(lm.model(tokens).logits, lm.unembed(hidden))  # and the model is left as it was


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_layer_agrees_too(tmp_path: Path, dtype: str) -> None:
    """A wide layer is equal bit for bit too."""
    wide = {"hidden_size": 2304, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}
    folder = tiny_models.make_model(tmp_path / "wide", "gemma2", dtype=torch.bfloat16, **wide)
    tokens = tiny_models.tokens(5, 31)
    whole = whole_run(folder, dtype, tokens)
    residual = SplitLM.load(str(folder), dtype=dtype, part="prefix", layers=[0]).prefix(tokens)[0]
    suffix = SplitLM.load(str(folder), dtype=dtype, part="suffix", layers=[0])
    assert torch.equal(residual, whole.hidden_states[1])
    assert torch.equal(suffix.unembed(suffix.suffix(residual)), whole.logits)


def test_one_pass_gives_several_layers(lm_folder: Folder) -> None:
    """Several layers come out of one pass."""
    tokens = tiny_models.tokens(2, 16)
    both = SplitLM.load(str(lm_folder("gemma2")), dtype="bf16", part="prefix", layers=[2, 0]).prefix(tokens)
    assert sorted(both) == [0, 2]
    for layer, residual in both.items():
        alone = SplitLM.load(str(lm_folder("gemma2")), dtype="bf16", part="prefix", layers=[layer])
        assert torch.equal(alone.prefix(tokens)[layer], residual)


def test_logits_come_a_few_rows_each(lm_folder: Folder) -> None:
    """Logits may be asked for a few rows at a time."""
    tokens = tiny_models.tokens(2, 16)
    lm = SplitLM.load(str(lm_folder("gemma2")), dtype="float32", part="whole", layers=[1])
    hidden = lm.suffix(lm.prefix(tokens)[1])
    rows = lm.unembed(hidden.reshape(-1, lm.d_model)[:7])
    assert rows.shape == (7, lm.vocab)
    assert torch.allclose(rows, lm.unembed(hidden).reshape(-1, lm.vocab)[:7], atol=1e-5)


def test_logits_carry_the_soft_cap(lm_folder: Folder) -> None:
    """Logits carry the soft cap of the architecture."""
    lm = SplitLM.load(str(lm_folder("gemma2")), dtype="float32", part="suffix", layers=[1])
    hidden = 1e3 * torch.randn(4, lm.d_model, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(lm.unembed(hidden), 30 * torch.tanh(hidden @ lm.unembedding.T / 30), atol=1e-4)
    assert float(lm.unembed(hidden).abs().max()) > 29


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_prefix_loads_only_its_layers(lm_folder: Folder, kind: str) -> None:
    """A prefix loads its own layers only and loads them right."""
    folder = lm_folder(kind)
    prefix = SplitLM.load(str(folder), dtype="float32", part="prefix", layers=[1])
    whole = tiny_models.whole_model(folder, torch.float32).state_dict()
    held = {name: tensor for name, tensor in prefix.model.state_dict().items() if not tensor.is_meta}
    assert [len(list(block.parameters())) > 0 for block in prefix._blocks] == [True, True, False, False]
    assert all(torch.equal(tensor, whole[name]) for name, tensor in held.items())
    assert not [name for name in held if ".2." in name or ".3." in name]
    assert prefix.n_layers == tiny_models.LAYERS


def test_per_layer_lists_are_cut_too(lm_folder: Folder) -> None:
    """Lists with one entry a layer are cut with the layers."""
    config = truncated(ModelInfo.read(str(lm_folder("gemma3"))).config, 2)
    assert config.layer_types == ["full_attention", "sliding_attention"]


def test_later_layers_never_run(lm_folder: Folder) -> None:
    """Layers after the last one asked for never run."""
    lm = SplitLM.load(str(lm_folder("llama")), dtype="float32", part="whole", layers=[1])
    ran: list[int] = []
    for n, block in enumerate(lm._blocks):
        block.mlp.register_forward_hook(lambda *_args, n=n: ran.append(n))
    residual = lm.prefix(tiny_models.tokens(1, 8))[1]
    assert ran == [0, 1]
    ran.clear()
    lm.suffix(residual)
    assert ran == [2, 3]


def test_suffix_holds_no_earlier_weights(lm_folder: Folder) -> None:
    """A suffix holds no weights of the layers before the cut."""
    suffix = SplitLM.load(str(lm_folder("llama")), dtype="float32", part="suffix", layers=[1])
    on_meta = [all(p.is_meta for p in block.parameters()) for block in suffix._blocks]
    assert on_meta == [True, True, False, False]


def test_prefix_holds_no_untied_head(lm_folder: Folder) -> None:
    """A prefix holds no untied head."""
    prefix = SplitLM.load(str(lm_folder("llama")), dtype="float32", part="prefix", layers=[0])
    assert prefix.model.lm_head.weight is None


class TupleLayer(nn.Module):
    """A decoder layer as older code has it: the hidden states come in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, mask: None = None) -> tuple[Tensor, None]:
        return hidden_states + self.linear(hidden_states), mask


class TupleLM(nn.Module):
    """The least that SplitLM asks of a model, with layers that return tuples."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(16, 8), nn.ModuleList(TupleLayer() for _ in range(3))

    @property
    def base_model(self) -> nn.Module:
        return self

    def get_decoder(self) -> nn.Module:
        return self

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, use_cache: bool = True
    ) -> Any:
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            hidden = layer(hidden, mask=None)[0]
        return (2 * hidden,)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_layers_may_return_tuples(layer: int) -> None:
    """Layers may return tuples."""
    torch.manual_seed(0)
    model = TupleLM()
    text = SimpleNamespace(num_hidden_layers=3, hidden_size=8, vocab_size=16, max_position_embeddings=None)
    info = ModelInfo("tuple", Path(), "local", SimpleNamespace(get_text_config=lambda: text))
    lm = SplitLM(model, info, "whole", [layer])
    tokens = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        assert torch.equal(lm.suffix(lm.prefix(tokens)[layer]), model(tokens)[0])


@pytest.mark.parametrize("layers", [[4], [-1], [0, 9]])
def test_layer_out_of_range_is_refused(lm_folder: Folder, layers: list[int]) -> None:
    """A layer out of range is refused with the range."""
    with pytest.raises(ModelError, match="out of range; it has layers 0 to 3"):
        SplitLM.load(str(lm_folder("llama")), part="prefix", layers=layers)


def test_too_long_context_is_refused(lm_folder: Folder) -> None:
    """A context longer than the model's is refused."""
    lm = SplitLM.load(str(lm_folder("gpt2")), part="prefix", layers=[0])
    with pytest.raises(ModelError, match="context of 65 is longer than the model's 64"):
        lm.prefix(tiny_models.tokens(1, 65))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "a/b/c"])
def test_missing_folder_is_named(name: str) -> None:
    """A missing folder is said to be missing."""
    with pytest.raises(ModelError, match="no such folder"):
        SplitLM.load(name, layers=[0])


def test_folder_without_model_is_refused(tmp_path: Path) -> None:
    """A folder without a model is refused."""
    with pytest.raises(ModelError, match=r"no config\.json"):
        SplitLM.load(str(tmp_path), layers=[0])


@pytest.fixture
def copy(lm_folder: Folder, tmp_path: Path) -> Path:
    """A llama folder to damage."""
    return Path(shutil.copytree(lm_folder("llama"), tmp_path / "model"))


def test_model_without_weights_is_refused(copy: Path) -> None:
    """A model without weights is refused."""
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        SplitLM.load(str(copy), layers=[0])


def test_panicking_tokenizer_is_one_line(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer.json at which the tokenizers' Rust panics, which is no Exception, is refused as others are."""
    panic = type("PanicException", (BaseException,), {})

    def read(*_args: object, **_kwargs: object) -> None:
        raise panic("range end index 10 out of range")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", read)
    with pytest.raises(ModelError, match=r"cannot be loaded \(range end index 10 out of range\)"):
        load_tokenizer(str(copy))


def test_truncated_weight_file_is_refused(copy: Path) -> None:
    """A truncated weight file is refused."""
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        SplitLM.load(str(copy), layers=[0])


def test_missing_weight_is_never_random(copy: Path) -> None:
    """A missing weight is never replaced by random numbers."""
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if ".0." in name)
    del weights[name]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing"):
        SplitLM.load(str(copy), part="prefix", layers=[0])


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "quantize_config.json", "hf_quant_config.json"]
)
def test_unapplied_parts_are_refused(copy: Path, name: str) -> None:
    """An adapter or quantised weights beside the weights, which would not be applied, are refused by name."""
    (copy / name).write_text("{}")
    with pytest.raises(ModelError, match=f"has {name}: "):
        SplitLM.load(str(copy), layers=[0])


@pytest.mark.parametrize("inside", [True, False])
def test_quantised_config_is_refused(copy: Path, inside: bool) -> None:
    """A quantisation in the config, or in the text model's within it, is refused."""
    config = json.loads((copy / "config.json").read_text())
    given = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (copy / "config.json").write_text(json.dumps(config | ({"text_config": given} if inside else given)))
    with pytest.raises(ModelError, match=r"quantised weights.*\(quantization_config gptq"):
        ModelInfo.read(str(copy))


def sharded(folder: Path) -> None:
    """Write the weights of a folder as two files and an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, places = sorted(weights), {}
    for n, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{n:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_sharded_weights_are_the_same(lm_folder: Folder, copy: Path) -> None:
    """Weights in several files give the same model."""
    sharded(copy)
    tokens = tiny_models.tokens(2, 8)
    one, other = (
        SplitLM.load(str(folder), dtype="float32", part="prefix", layers=[1]).prefix(tokens)[1]
        for folder in (copy, lm_folder("llama"))
    )
    torch.testing.assert_close(one, other)


def test_missing_and_stray_files_are_refused(lm_folder: Folder, copy: Path) -> None:
    """A file that the index names and is gone, one it does not name, and weights twice are refused by name."""
    sharded(copy)
    stray = copy / "model-00009-of-00009.safetensors"
    shutil.copy(copy / "model-00001-of-00002.safetensors", stray)
    with pytest.raises(ModelError, match=r"model-00009-of-00009.* is not among the files"):
        ModelInfo.read(str(copy))
    stray.unlink()
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"model-00002-of-00002.* is missing, which model.safetensors.index.json names"
    ):
        ModelInfo.read(str(copy))
    shutil.copy(lm_folder("llama") / "model.safetensors", copy)
    with pytest.raises(ModelError, match=r"has both model.safetensors and model.safetensors.index.json"):
        ModelInfo.read(str(copy))


def test_adapter_tensors_are_refused(copy: Path) -> None:
    """Tensors of an adapter within the weights, which no part of the model takes, are refused by name."""
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 64)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"q_proj.lora_A.weight.*an adapter or quantisation that is not applied"):
        SplitLM.load(str(copy), part="prefix", layers=[1])


@pytest.mark.parametrize("where", ["torch_dtype", "dtype"])
def test_dtype_is_what_is_asked(copy: Path, where: str) -> None:
    """Whatever dtype a config names, the model computes in the one that is asked for."""
    config = json.loads((copy / "config.json").read_text())
    config.pop("dtype", None)
    config[where] = "float16"
    (copy / "config.json").write_text(json.dumps(config))
    lm = SplitLM.load(str(copy), dtype="float32", part="prefix", layers=[1])
    assert {tensor.dtype for tensor in lm.model.parameters()} == {torch.float32}
    assert lm.prefix(tiny_models.tokens(1, 4))[1].dtype == torch.float32


@pytest.mark.parametrize("device", ["mps", "meta", "xpu:0"])
def test_other_devices_are_refused(device: str) -> None:
    """A device on which float64 sums may be missing is refused in one line."""
    with pytest.raises(UsageError, match=f"--device {device}: not supported"):
        resolve_device(device)


def test_own_code_needs_the_flag(copy: Path) -> None:
    """A model of its own code needs the flag."""
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.LM"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        SplitLM.load(str(copy), layers=[0])


def refused(kind: type[Exception]) -> Exception:
    """An error of the Hub's library, without the answer that it carries."""
    return kind.__new__(kind, "401 Client Error\nmore lines")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (refused(hub.GatedRepoError), "accept its terms at https://huggingface.co/google"),
        (refused(hub.RepositoryNotFoundError), "neither a path here nor something you may see"),
        (refused(hub.RevisionNotFoundError), "no such revision"),
        (hub.LocalEntryNotFoundError("offline"), "the Hub cannot be reached"),
    ],
)
def test_hub_refusal_names_next_step(monkeypatch: pytest.MonkeyPatch, error: Exception, says: str) -> None:
    """What the Hub refuses is one line with the next step."""

    def refuse(*_args: Any, **_kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(model_files, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=says) as caught:
        SplitLM.load("google/gemma-2-2b", layers=[0])
    assert "\n" not in str(caught.value)


def test_folder_without_tokenizer_is_refused(copy: Path) -> None:
    """A folder without a tokenizer is refused."""
    for path in copy.glob("token*"):
        path.unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(str(copy))


def test_special_ids_are_all_declared(lm_folder: Folder) -> None:
    """Special ids are all that the tokenizer declares."""
    assert special_ids(load_tokenizer(str(lm_folder("llama")))) == [0, 1, 2, 3]


def test_auto_takes_the_tokenizers_bos() -> None:
    """Auto takes the BOS that the tokenizer puts first itself."""
    assert resolve_bos(tiny_models.build_tokenizer(adds_bos=True), "auto") == 2
    assert resolve_bos(tiny_models.build_tokenizer(adds_bos=False), "auto") is None
    assert resolve_bos(tiny_models.build_tokenizer(), "none") is None
    assert resolve_bos(tiny_models.build_tokenizer(), "7") == 7


def with_template(template: str) -> Any:
    """The test tokenizer, putting other tokens around a text."""
    tokenizer = tiny_models.build_tokenizer(adds_bos=False)
    known = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<pad>", "<eos>", "<bos>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=known)
    return tokenizer


def test_two_leading_tokens_are_taken() -> None:
    """A tokenizer that puts two tokens before a text begins rows with both, unless others are chosen; then what ends a text parts
    documents, or the last of them."""
    tokenizer = with_template("<pad> <bos> $A")
    assert resolve_bos(tokenizer, "auto") == [0, 2]
    assert resolve_bos(tokenizer, "2") == 2
    assert resolve_bos(tokenizer, "2,0") == [2, 0]
    assert resolve_separator(tokenizer, [0, 2], "m") == 1
    tokenizer.eos_token = None
    assert resolve_separator(tokenizer, [0, 2], "m") == 2


def test_bos_of_id_zero() -> None:
    """Token 0 is a BOS like any other."""
    assert resolve_bos(with_template("<pad> $A"), "auto") == 0


def test_trailing_token_is_no_bos() -> None:
    """A token that the tokenizer puts behind a text only does not begin a row."""
    assert resolve_bos(with_template("$A <eos>"), "auto") is None


def test_chosen_bos_is_special() -> None:
    """A BOS that the tokenizer does not declare is special all the same."""
    assert special_ids(tiny_models.build_tokenizer(), 7, None) == [0, 1, 2, 3, 7]


@pytest.mark.parametrize("bos", ["yes", "-1", "100000", "2,", "2, 3", "2,x", "²"])
def test_unknown_bos_is_refused(bos: str) -> None:
    """A BOS that is no token is refused."""
    with pytest.raises(ModelError, match="not a token id"):
        resolve_bos(tiny_models.build_tokenizer(), bos)


def test_weight_hash_follows_the_bytes(lm_folder: Folder, copy: Path) -> None:
    """The weight hash follows the bytes."""
    before = ModelInfo.read(str(copy)).weights_sha256
    assert before == ModelInfo.read(str(lm_folder("llama"))).weights_sha256
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert ModelInfo.read(str(copy)).weights_sha256 != before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_gpu_prefix_then_suffix_agrees(lm_folder: Folder, kind: str) -> None:
    """On a GPU prefix then suffix is the whole model too."""
    tokens = tiny_models.tokens(3, 33).cuda()
    with torch.no_grad():
        logits = tiny_models.whole_model(lm_folder(kind), torch.bfloat16).cuda()(tokens).logits
    prefix = SplitLM.load(str(lm_folder(kind)), device="cuda", part="prefix", layers=[1])
    suffix = SplitLM.load(str(lm_folder(kind)), device="cuda", part="suffix", layers=[1])
    assert torch.equal(suffix.unembed(suffix.suffix(prefix.prefix(tokens)[1])), logits)


def test_gemma_bos_row_is_an_outlier() -> None:
    """The BOS row of a Gemma is an outlier of another scale."""
    model = str(Path(__file__).parents[1] / "data" / "tiny-gemma2")
    tokenizer = load_tokenizer(model)
    text = "It was the best of times, it was the worst of times, and the captain looked out over the sea. " * 12
    tokens = torch.tensor(tokenizer(text, add_special_tokens=True)["input_ids"][:128])[None]
    assert tokens[0, 0] == tokenizer.bos_token_id
    norms = SplitLM.load(model, dtype="float32", part="prefix", layers=[3]).prefix(tokens)[3][0].norm(dim=-1)
    others = norms[1:]
    assert norms[0] > others.max()
    assert norms[0] > others.median() + 4 * others.std()


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_readout_folds_the_final_norm(kind: str, tmp_path: Path) -> None:
    """A stream x and −x differ in normed logits, soft cap apart, by twice the readout of x over its root mean square."""
    lm = SplitLM.load(str(tiny_models.make_model(tmp_path, kind)), dtype="float32", part="whole", layers=[1])
    x = torch.randn(5, lm.d_model, generator=torch.Generator().manual_seed(0))
    last = SplitLM(lm.model, lm.info, "suffix", [lm.n_layers - 1])
    plus, minus = (last.suffix(stream[None])[0] @ lm.unembedding.T for stream in (x, -x))
    centred = x - x.mean(1, keepdim=True)
    layernorm = kind in ("gpt2", "gpt_neox")
    rms = (centred if layernorm else x).square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close((plus - minus) / 2, x @ lm.readout().T / rms, rtol=1e-3, atol=1e-4)


def test_spread_model_is_the_plain(lm_folder: Folder) -> None:
    """Layers that accelerate has spread, each behind hooks of its own, give the same rows bit for bit; on a CPU all lie there."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    folder = str(lm_folder("gemma2"))
    tokens = torch.arange(3, 35).view(2, 16)
    rows = SplitLM.load(folder, part="prefix", layers=[1]).prefix(tokens)[1]
    mapped = SplitLM.load(folder, part="prefix", layers=[1], device_map="auto")
    assert torch.equal(mapped.prefix(tokens)[1], rows)
    accelerate.dispatch_model(mapped.model, {"": "cpu"}, force_hooks=True)
    assert torch.equal(mapped.prefix(tokens)[1], rows)


@pytest.mark.parametrize("hook", ["resid_post", "mlp_out", "mlp_in"])
def test_spread_suffix_is_the_plain(lm_folder: Folder, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So do the layers after the cut, and the head."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    folder, point = str(lm_folder("llama")), Point(1, hook)
    tokens = torch.arange(3, 35).view(2, 16)
    rows = SplitLM.load(folder, part="prefix", layers=[point]).prefix(tokens)[point]
    plain = SplitLM.load(folder, part="suffix", layers=[point])
    drop_unused = SplitLM._drop_unused

    def behind_hooks(self: SplitLM) -> None:
        accelerate.dispatch_model(self.model, {"": "cpu"}, force_hooks=True)
        drop_unused(self)

    monkeypatch.setattr(SplitLM, "_drop_unused", behind_hooks)
    spread = SplitLM.load(folder, part="suffix", layers=[point], device_map="auto")
    assert hasattr(spread._blocks[2], "_hf_hook")
    logits = plain.unembed(plain.suffix(rows, tokens))
    assert torch.equal(spread.unembed(spread.suffix(rows, tokens)), logits)


def test_offloaded_suffix_is_the_plain(lm_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So do layers and a head that a map found no room for on a GPU, whose weights come from the host or the disk when they run;
    the readout reads the head there too."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    folder, tokens = str(lm_folder("llama")), torch.arange(3, 35).view(2, 16)
    rows = SplitLM.load(folder, part="prefix", layers=[1]).prefix(tokens)[1]
    plain = SplitLM.load(folder, part="suffix", layers=[1])
    drop_unused = SplitLM._drop_unused

    def offloaded(self: SplitLM) -> None:
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
        places |= {f"model.layers.{n}": "disk" for n in range(self.n_layers)}
        accelerate.dispatch_model(self.model, places, offload_dir=str(tmp_path))
        drop_unused(self)

    monkeypatch.setattr(SplitLM, "_drop_unused", offloaded)
    there = SplitLM.load(folder, part="suffix", layers=[1], device_map="auto")
    assert there._blocks[2].self_attn.q_proj.weight.is_meta
    assert torch.equal(there.unembed(there.suffix(rows, tokens)), plain.unembed(plain.suffix(rows, tokens)))
    assert torch.equal(there.readout(), plain.readout())


@pytest.mark.parametrize("part", ["prefix", "suffix", "whole"])
def test_part_too_large_is_refused(part: Any, lm_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that does not fit into what is free on a GPU is refused in a line that names --device-map, before a weight is read;
    its size is that of the weights that it keeps."""
    folder, cuda = str(lm_folder("llama")), torch.device("cuda:0")
    kept = SplitLM.load(folder, dtype="bf16", part=part, layers=[1]).model.parameters()
    n_bytes = sum(p.numel() * 2 for p in kept if not p.is_meta)
    info, free = ModelInfo.read(folder), [n_bytes]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 1 << 40))
    require_room(info, part, [1], torch.bfloat16, cuda)
    free[0] -= 1
    monkeypatch.setattr("pipeline.model.split_lm.resolve_device", lambda device: cuda)
    with pytest.raises(ModelError, match=rf"its {part} take .* are free on cuda:0; --device-map auto"):
        SplitLM.load(folder, dtype="bf16", device="cuda:0", part=part, layers=[1])


def test_weights_go_straight_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With accelerate a model comes to a GPU from its file, without it by the host; a map without accelerate is an error."""
    cuda, cpu = torch.device("cuda:1"), torch.device("cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert placement(cuda, None) == {"": cuda}
    assert placement(cpu, None) is None
    assert placement(cuda, "balanced") == "balanced"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert placement(cuda, None) is None
    with pytest.raises(UsageError, match="pip install accelerate"):
        placement(cuda, "auto")


class Watched:
    """A safetensors file of which is noted what tensors are read."""

    read: ClassVar[dict[str, int]] = {}

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.file = safe_open(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def get_slice(self, name: str) -> Any:
        """A slice that notes when it is read."""
        watched, held = self, self.file.get_slice(name)

        class Slice:
            def __getattr__(self, other: str) -> Any:
                return getattr(held, other)

            def __getitem__(self, index: Any) -> Tensor:
                tensor: Tensor = held[index]
                watched.read[name] = tensor.nbytes
                return tensor

        return Slice()


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "llama"])
@pytest.mark.parametrize("part", ["prefix", "suffix"])
def test_part_reads_its_own_weights(part: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model in several files the weights of a part are read and no others, tensor by tensor; it computes what it computes
    where all are read."""
    folder = tiny_models.make_model(tmp_path, kind)
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(
        tmp_path / "shards", max_shard_size="100KB"
    )
    for path in folder.glob("*token*"):
        shutil.copy(path, tmp_path / "shards")
    folder = tmp_path / "shards"
    assert len(list(folder.glob("*.safetensors"))) > 2
    whole, tokens = SplitLM.load(str(folder), dtype="float32", layers=[1]), torch.arange(3, 35).view(2, 16)
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", Watched)
    monkeypatch.setattr(Watched, "read", {})
    lm = SplitLM.load(str(folder), dtype="float32", part=part, layers=[1])
    held = {id(p): p.nbytes for p in lm.model.parameters() if not p.is_meta}
    assert (len(Watched.read), sum(Watched.read.values())) == (len(held), sum(held.values()))
    assert sum(held.values()) < 0.9 * sum(p.nbytes for p in whole.model.parameters())
    rows = whole.prefix(tokens)[1]
    if part == "prefix":
        assert torch.equal(lm.prefix(tokens)[1], rows)
    else:
        assert torch.equal(lm.unembed(lm.suffix(rows, tokens)), whole.unembed(whole.suffix(rows, tokens)))
