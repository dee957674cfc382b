"""Special tokens of every kind of tokenizer: what begins a row and what parts documents is special wherever it stands, and it is
so for harvest, evaluation, texts with labels, attached SAEs and inspect alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors

import harvest.run
from evaluate.config import EvaluateConfig
from evaluate.models import Models
from evaluate.probing.texts import make_bank, text_model
from evaluate.scores.sample import Sample
from harvest.corpus import Document
from harvest.texts import Reader
from pipeline.base.errors import CorpusError, ModelError, UsageError
from pipeline.base.fields import Fields
from pipeline.live.attach import attach
from pipeline.live.edits import steer
from pipeline.live.inspect import inspect_checkpoint
from pipeline.model.specials import First, first_ids
from pipeline.model.splicing import splice
from pipeline.model.split_lm import SplitLM, load_tokenizer
from pipeline.sae.checkpoint import save_checkpoint
from pipeline.sae.config import SAEConfig
from pipeline.sae.foreign.reader import load_sae
from pipeline.sae.nested import NestedSAE
from pipeline.store.reader import Store
from support import tiny_models
from support.harvests import CONTEXT, harvest_config
from train.config import TrainConfig
from train.folder import FOR_LIVE, identity
from train.stores import identity_of

pytestmark = pytest.mark.usefixtures("one_thread")

WORD = "the"
"""A word of the corpus; its token is an undeclared BOS here."""


def model_with(folder: Path, template: str, kind: str = "llama") -> Path:
    """A tiny model whose tokenizer puts other tokens around a text."""
    tiny_models.make_model(folder, kind)
    tokenizer = tiny_models.build_tokenizer(adds_bos=False)
    known = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<pad>", "<eos>", "<bos>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=known)
    tokenizer.save_pretrained(folder)
    return folder


def word_id(folder: Path) -> int:
    """The one token of the word in a running text."""
    tokenizer = load_tokenizer(str(folder))
    [id] = tokenizer.convert_tokens_to_ids(["Ġ" + WORD])
    assert id not in tokenizer.all_special_ids
    return int(id)


def harvested(folder: Path, tmp_path: Path, **changes: Any) -> Store:
    """A store of that model."""
    corpus = tiny_models.make_corpus(tmp_path / "corpus.jsonl")
    config = harvest_config(folder, corpus, tmp_path / "acts.zarr", dtype="float32", **changes)
    harvest.run.run(config, quiet=True)
    return Store.open(config.store)


def usable(store: Store, split: str) -> np.ndarray[Any, Any]:
    """Which positions of a split are not special, [seq, pos]."""
    part = getattr(store, split)
    return np.concatenate([part.shard_usable(k) for k in range(part.n_shards)]).reshape(-1, CONTEXT)


CASES = [
    ("<pad> <bos> $A", {}, [0, 2], 1),  # two tokens first, as [gMASK]<sop>
    ("<pad> <bos> $A", {"bos": "2,0"}, [2, 0], 1),  # or in an order that is asked for
    ("<pad> <bos> <pad> $A", {}, [0, 2, 0], 1),
    ("<pad> <bos> $A", {"bos": "2"}, 2, 2),  # or one of them
    ("<pad> <bos> $A", {"bos": "none"}, None, 1),
    ("$A", {}, None, 1),  # none: the end of a text stands between documents
    ("<pad> $A", {}, 0, 0),  # id 0
    ("<bos> $A <eos>", {}, 2, 2),
]


@pytest.mark.parametrize(("template", "options", "bos", "separator"), CASES)
def test_rows_begin_as_said(tmp_path: Path, template: str, options: dict[str, Any], bos: First, separator: int) -> None:
    """Rows begin with the tokens that were found or chosen, documents are parted, and both are special wherever they stand."""
    store = harvested(model_with(tmp_path / "lm", template), tmp_path, **options)
    assert (store.config["bos"], store.config["separator"]) == (bos, separator)
    for split in ("train", "eval"):
        tokens = np.asarray(getattr(store, split).tokens)
        assert (tokens[:, : len(first_ids(bos))] == first_ids(bos)).all()
        assert (tokens[:, 1:] == separator).any()
        special = np.isin(tokens, [0, 1, 2, 3])
        special[:, 0] = True
        assert np.array_equal(usable(store, split), ~special)


def test_rows_need_room_for_text(tmp_path: Path) -> None:
    """A context that the first tokens fill makes no store."""
    with pytest.raises(UsageError, match=r"--context 2: a row begins with 2 tokens"):
        harvested(model_with(tmp_path / "lm", "<pad> <bos> $A"), tmp_path, context=2, chunk_rows=64)
    assert not (tmp_path / "acts.zarr").exists()


def test_two_first_tokens_everywhere(tmp_path: Path) -> None:
    """Where a tokenizer puts two tokens first, labelled texts and a text that is inspected begin with both, and both are special
    and left alone."""
    store = harvested(model_with(tmp_path / "lm", "<pad> <bos> $A"), tmp_path)
    folder, config = store.config["model"], store.config
    lm, tokenizer = SplitLM.load(folder, dtype="float32", part="prefix", layers=[1]), load_tokenizer(folder)
    bank = make_bank(["It was the best"], text_model(lm, tokenizer, 1, config["bos"]), 64, 1, "texts")
    ids = torch.tensor([tokenizer("It was the best")["input_ids"]])
    assert ids[0, :2].tolist() == config["bos"] == [0, 2]
    assert torch.equal(bank.rows, lm.prefix(ids)[1][0, 2:])
    sae = NestedSAE(SAEConfig(store.d_model, 48, (48,)))
    save_checkpoint(tmp_path / "sae.safetensors", sae, 1, {"store": identity_of(store, TrainConfig())})
    _, tokens = inspect_checkpoint(str(tmp_path / "sae.safetensors"), "It was", None, None, None, 3, "cpu")
    assert [token.text for token in tokens if not token.blocks] == ["<pad>", "<bos>"]


@pytest.mark.parametrize("options", [{}, {"bos": "{word},2"}])
def test_two_first_tokens_attached(tmp_path: Path, options: dict[str, Any]) -> None:
    """Attached, an SAE leaves the rows alone that evaluation leaves alone, both first tokens among them wherever they stand, left
    padding before them or not; its logits are evaluation's, bit for bit."""
    folder = model_with(tmp_path / "lm", "<pad> <bos> $A")
    options = {name: value.format(word=word_id(folder)) for name, value in options.items()}
    store = harvested(folder, tmp_path, **options)
    first = store.config["bos"]
    torch.manual_seed(0)
    sae = NestedSAE(SAEConfig(store.d_model, 48, (48,)))
    torch.nn.init.normal_(sae.W_dec)
    save_checkpoint(tmp_path / "sae.safetensors", sae, 1, {"store": identity_of(store, TrainConfig())})
    sae = load_sae(tmp_path / "sae.safetensors")[0]
    lm = SplitLM.load(str(folder), dtype="float32", part="whole", layers=[1])
    batch = Sample(store, 8, 8, torch.device("cpu")).batch(0, 8)
    tokens, kept = batch.tokens, batch.kept.clone()
    (tokens[0, 5], tokens[1, 7]), (kept[0, 5], kept[1, 7]) = first, (False, False)
    residual = lm.prefix(tokens)[1]
    with torch.no_grad(), attach(lm.model, sae) as live:
        attached = lm.model(tokens).logits
        assert live.kept is not None
        assert torch.equal(live.kept, kept)
        assert torch.equal(attached, lm.unembed(lm.suffix(splice(residual, kept, sae(residual[kept])), tokens)))
        ids = torch.tensor([[0, 0, *first, 40, 41], [*first, 42, 43, 44, 45]])
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
        lm.model(input_ids=ids, attention_mask=mask)
        assert live.kept.tolist() == [[False] * 4 + [True] * 2, [False] * 2 + [True] * 4]


@pytest.mark.parametrize(
    ("kind", "options"), [("llama", {}), ("llama", {"edit": steer(2, 3.0), "keep_error": True}), ("gpt2", {})]
)
def test_two_first_tokens_generate(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    """Texts that begin with two tokens, left-padded in one batch and generated with a cache, get the logits of each text alone in
    one pass with a plain hook that leaves padding and special tokens as they are."""
    folder = model_with(tmp_path / "lm", "<pad> <bos> $A", kind)
    tokenizer = load_tokenizer(str(folder))
    model = tiny_models.whole_model(folder, torch.float32)
    torch.manual_seed(0)
    sae = NestedSAE(SAEConfig(64, 48, (48,)))
    torch.nn.init.normal_(sae.W_dec)
    texts = [tokenizer(text)["input_ids"] for text in ("It was", "It was the best of times")]
    assert all(ids[:2] == [0, 2] for ids in texts)
    longest = max(map(len, texts))
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in texts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in texts])
    with attach(model, sae, 1, tokenizer=tokenizer, **options):
        out = model.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
        )

    def change(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        z = sae.encode(x)
        edited = z.index_add(1, torch.tensor([2]), torch.full((len(z), 1), 3.0))
        new = x + (edited - z) @ sae.W_dec / sae.scale if options else sae(x)
        return torch.where(torch.isin(ids, torch.tensor([0, 1, 2]))[:, None], x, new)

    layer = (model.transformer.h if kind == "gpt2" else model.model.layers)[1]
    for i, ids in enumerate(texts):
        alone = torch.tensor([[*ids, *out.sequences[i, longest:].tolist()]])

        def plain(_module: Any, _args: Any, output: Any, ids: torch.Tensor = alone[0]) -> Any:
            rows = output if isinstance(output, torch.Tensor) else output[0]
            changed = change(rows[0], ids)[None]
            return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])

        handle = layer.register_forward_hook(plain)
        with torch.no_grad():
            expected = model(alone).logits[0, len(ids) - 1 : -1]
        handle.remove()
        torch.testing.assert_close(torch.stack([step[i] for step in out.logits]), expected, rtol=1e-4, atol=1e-4)


def test_tokenizers_specials_stay_attached(tmp_path: Path) -> None:
    """An SAE that records no store leaves alone what the model's config names, and what a tokenizer that is given declares."""
    folder = model_with(tmp_path / "lm", "<pad> <bos> $A")
    lm, tokenizer = SplitLM.load(str(folder), dtype="float32", part="whole", layers=[1]), load_tokenizer(str(folder))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(lm.model.config, name, None)
    ids = torch.tensor([tokenizer("It was the")["input_ids"]])
    sae = NestedSAE(SAEConfig(64, 8, (8,)))
    for given, left_alone in ((None, [0]), (tokenizer, [0, 1])):
        with torch.no_grad(), attach(lm.model, sae, 1, tokenizer=given) as live:
            lm.model(ids)
        assert live.kept is not None
        assert (~live.kept[0]).nonzero()[:, 0].tolist() == left_alone


def test_ids_lose_their_first_tokens(tmp_path: Path) -> None:
    """Ids that were made with the same tokenizer begin with its two tokens, which a row has anyway."""
    tokenizer = load_tokenizer(str(model_with(tmp_path / "lm", "<pad> <bos> $A")))
    reader = Reader(tokenizer, len(tokenizer), first=(0, 2))
    parts = reader.parts(iter([Document("one", tokenizer("It was")["input_ids"]), Document("two", [2, 7, 8])]))
    plain = tokenizer("It was", add_special_tokens=False)["input_ids"]
    assert [list(part.ids) for part in parts] == [plain, [7, 8]]


@pytest.fixture(scope="module")
def undeclared(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store whose BOS and separator are a word's token, which no tokenizer declares and which texts hold."""
    place = tmp_path_factory.mktemp("undeclared")
    folder = model_with(place / "lm", "<bos> $A")
    return harvested(folder, place, bos=str(word_id(folder)))


@pytest.fixture
def checkpoint(undeclared: Store, tmp_path: Path) -> Path:
    """A random SAE as trained on that store."""
    torch.manual_seed(0)
    sae = NestedSAE(SAEConfig(undeclared.d_model, 48, (16, 48)))
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.W_dec.normal_()
    about = identity_of(undeclared, TrainConfig())
    save_checkpoint(tmp_path / "sae.safetensors", sae, 1, {"store": about})
    return tmp_path / "sae.safetensors"


def expected_kept(store: Store, tokens: torch.Tensor) -> torch.Tensor:
    """Everything but declared special tokens, the word, and first positions."""
    special = torch.isin(tokens, torch.tensor([0, 1, 2, 3, store.config["bos"]]))
    special[:, 0] = True
    return ~special


def test_undeclared_bos_is_special_in_stores(undeclared: Store) -> None:
    """An undeclared BOS is special where it begins a row, parts documents, or is a word of the text; for evaluation too."""
    bos = undeclared.config["bos"]
    assert undeclared.config["special_ids"] == [0, 1, 2, 3, bos]
    tokens = torch.from_numpy(np.asarray(undeclared.train.tokens).astype(np.int64))
    assert (tokens[:, 1:] == bos).sum() > 50
    assert np.array_equal(usable(undeclared, "train"), expected_kept(undeclared, tokens).numpy())
    batch = Sample(undeclared, 8, 8, torch.device("cpu")).batch(0, 8)
    assert torch.equal(batch.kept, expected_kept(undeclared, batch.tokens))


def test_undeclared_bos_is_special_in_texts(undeclared: Store) -> None:
    """Labelled texts begin with it, and its positions do not count."""
    folder = undeclared.config["model"]
    lm = SplitLM.load(folder, dtype="float32", part="prefix", layers=[1])
    tokenizer, config = load_tokenizer(folder), undeclared.config
    model = text_model(lm, tokenizer, 1, config["bos"], special=config["special_ids"])
    text = f"It was {WORD} best of {WORD} times"
    bank = make_bank([text], model, 64, 1, "texts")
    ids = torch.tensor([[config["bos"], *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    kept = expected_kept(undeclared, ids)
    assert (ids[0, 1:] == config["bos"]).sum() == 2
    assert torch.equal(bank.rows, lm.prefix(ids)[1][kept])


def test_undeclared_bos_is_special_attached(undeclared: Store, checkpoint: Path) -> None:
    """An SAE that was loaded knows its store's special tokens; its rows and latents are evaluation's."""
    sae = load_sae(checkpoint)[0]
    model = tiny_models.whole_model(Path(undeclared.config["model"]), torch.float32)
    tokens = torch.from_numpy(np.asarray(undeclared.eval.tokens[:4]).astype(np.int64))
    with torch.no_grad(), attach(model, sae) as live:
        model(tokens)
    assert live.kept is not None
    assert torch.equal(live.kept, expected_kept(undeclared, tokens))
    rows = undeclared.eval.read(0, 4 * CONTEXT)
    assert torch.allclose(live.latents[live.kept], sae.encode(rows[live.kept.flatten()]), atol=1e-4)


def test_undeclared_bos_is_special_inspected(undeclared: Store, checkpoint: Path) -> None:
    """A text that is inspected begins with the store's BOS, which is left alone there and inside; what looks special is text."""
    _, tokens = inspect_checkpoint(str(checkpoint), f"<eos> was {WORD} best", None, None, None, 3, "cpu")
    shown = [token.text for token in tokens]
    assert shown[0].strip() == WORD
    assert "<eos>" not in shown
    assert [token.text.strip() for token in tokens if not token.blocks] == [WORD, WORD]


def test_other_tokenizer_begins_its_own_way(
    undeclared: Store, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With another tokenizer than the store's the text begins as that one begins it, and this is said."""
    other = model_with(tmp_path / "other", "<pad> <bos> $A")
    _, tokens = inspect_checkpoint(str(checkpoint), f"was {WORD} best", str(other), None, None, 3, "cpu")
    assert [token.text for token in tokens if not token.blocks] == ["<pad>", "<bos>"]
    assert "not the one of the SAE's store" in capsys.readouterr().err


def test_other_tokenizer_makes_no_texts(undeclared: Store, tmp_path: Path) -> None:
    """Evaluation does not read texts with another tokenizer than the store's, unless that is meant."""
    folder = Path(undeclared.config["model"])
    name = folder / "tokenizer_config.json"
    before = name.read_text()
    config = EvaluateConfig(Path(undeclared.path), tmp_path)
    cpu = torch.device("cpu")
    assert Models(config, undeclared, cpu).tokenizer is not None
    try:
        name.write_text(before + " ")
        with pytest.raises(ModelError, match="not those that made the tokens of store"):
            _ = Models(config, undeclared, cpu).tokenizer
        allowed = EvaluateConfig(Path(undeclared.path), tmp_path, allow_other_model=True)
        assert Models(allowed, undeclared, cpu).tokenizer is not None
    finally:
        name.write_text(before)


def test_members_record_the_tokens(undeclared: Store) -> None:
    """What a checkpoint says of its store says how the tokens were made."""
    about = identity_of(undeclared, TrainConfig())
    assert {name: about[name] for name in FOR_LIVE if name in about} == {
        name: undeclared.config[name] for name in ("architecture_sha256", "tokenizer_sha256", "bos", "special_ids")
    }


def test_older_members_go_on(undeclared: Store) -> None:
    """A member whose folder does not say how its tokens were made is the same member: the store's id fixes that."""
    about = identity_of(undeclared, TrainConfig())
    before = {name: value for name, value in about.items() if name not in FOR_LIVE}
    now, then, other = (
        identity(Fields(Path("c"), {"config": {}, "order": {}, "store": store}))
        for store in (about, before, about | {"id": "other"})
    )
    assert now == then != other


def test_roles_must_be_there(tmp_path: Path) -> None:
    """A role that no message has, as a misspelt one, is refused before a store is begun."""
    folder = model_with(tmp_path / "lm", "<bos> $A")
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about["chat_template"] = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    turns = [{"role": role, "content": "it was the best of times " * 9} for role in ("user", "assistant")]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 90)
    config = harvest_config(folder, tmp_path / "chats.jsonl", tmp_path / "acts.zarr", text_field="messages")
    with pytest.raises(CorpusError, match="--roles assitant: no token is of such a message"):
        harvest.run.run(config.replace(roles=("assitant",)), quiet=True)
    assert not (tmp_path / "acts.zarr").exists()
