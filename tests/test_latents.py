"""Latent pages: peaks, windows, counts, relatives and logit lens against slow references; hostile text in the files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evaluate.latents import collect as latents_module
from evaluate.latents.collect import (
    N_BARS,
    N_CONTEXTS,
    N_QUANTILES,
    RADIUS,
    Contexts,
    Histogram,
    PairCounts,
    choose_chunks,
    lots,
    write_latents,
)
from evaluate.latents.files import begin, latents_folder, read_summary, script_json, write_index
from evaluate.latents.hierarchy import Blocks, Counts, both_ways, relate
from evaluate.scores.sample import Batch
from evaluate.scores.structure import Hierarchy
from pipeline.base.errors import DamagedError
from pipeline.base.runtime import torch_rng
from pipeline.base.token_text import TokenText, spelled, text_of_bytes, visible
from pipeline.model.split_lm import load_tokenizer
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE
from pipeline.store.reader import Store

WIDTH, N_SHARED = 300, 60


class Words:
    """A stand-in tokenizer: token 7 is the word ' t7', and a decoder that drops the space before the first word."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1]

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        return "".join(f" t{i}" for i in token_ids)[1:]


def make_sae(store: Store, levels: tuple[int, ...] = (N_SHARED, WIDTH)) -> NestedSAE:
    """Random unit directions and a bias that leaves each latent firing on a part of the rows."""
    sae = NestedSAE(SAEConfig(store.d_model, WIDTH, levels))
    weights = torch.nn.functional.normalize(torch.randn(WIDTH, store.d_model, generator=torch_rng("latents")), dim=1)
    sae.W_dec.data, sae.W_enc.data = weights, weights.T.contiguous()
    sae.b_enc.data.fill_(-0.2)
    sae.center.copy_(store.mean)
    sae.scale.fill_(store.scale)
    return sae.requires_grad_(False)


def read_script(path: Path) -> Any:
    """The data that a data file passes on."""
    text = path.read_text(encoding="ascii")
    return json.loads(text[text.index("{") : text.rindex("}") + 1])


def read_latents(folder: Path) -> list[dict[str, Any]]:
    """All latents of all pages, with tokens as text."""
    found = []
    for path in sorted(folder.glob("page_*.js")):
        data = read_script(path)
        found += [one | {"strings": data["strings"]} for one in data["latents"]]
    return found


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> Store:
    return Store.open(tiny_store)


@pytest.fixture(scope="module")
def unembedding(store: Store) -> Tensor:
    return torch.randn(97, store.d_model, generator=torch_rng("unembedding"))


@pytest.fixture(scope="module")
def written(store: Store, unembedding: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(make_sae(store), store, Words(), folder, unembedding=unembedding, quiet=True)
    return folder


@pytest.fixture(scope="module")
def activations(store: Store) -> np.ndarray:
    """Latents of the whole evaluation split in one go, 0 where a row does not count [seq, pos, latent]."""
    z = make_sae(store).encode(store.eval.read(0, store.eval.n_rows)).numpy()
    return (z * store.eval.kept()[:, None]).reshape(-1, store.context, WIDTH)


def test_contexts_are_peaks_of_the_largest(written: Path, activations: np.ndarray) -> None:
    """Each context is a sequence's peak and the list is of the largest."""
    for latent in read_latents(written):
        z = activations[..., latent["id"]]
        peaks = np.sort(z.max(1))[::-1][:N_CONTEXTS]
        found = [context[4][context[2]] for context in latent["contexts"]]
        assert found == pytest.approx(peaks[peaks > 0], rel=6e-3)
        assert len({context[0] for context in latent["contexts"]}) == len(found)


def test_context_holds_tokens_around_its_peak(written: Path, activations: np.ndarray, store: Store) -> None:
    """A context holds the tokens and activations around its peak."""
    for latent in read_latents(written)[::7]:
        for seq, pos, peak, tokens, acts in latent["contexts"]:
            start, stop = max(0, pos - RADIUS), min(store.context, pos + RADIUS + 1)
            assert peak == pos - start
            assert [latent["strings"][t] for t in tokens] == [f" t{i}" for i in store.eval.tokens[seq, start:stop]]
            assert acts == pytest.approx(activations[seq, start:stop, latent["id"]], rel=6e-3, abs=1e-6)


def test_special_and_massive_rows_never_peak(written: Path, activations: np.ndarray, store: Store) -> None:
    """Special and massive rows neither peak nor count."""
    index = read_script(written / "index.js")
    kept = store.eval.kept()
    assert 0 < kept.sum() < len(kept)
    assert index["summary"]["n_tokens"] == kept.sum()
    density = (activations.reshape(-1, WIDTH) > 0).sum(0) / kept.sum()
    assert index["density"] == pytest.approx(density, rel=6e-3)
    rows = {(c[0] * store.context + c[1]) for latent in read_latents(written) for c in latent["contexts"]}
    assert all(kept[row] for row in rows)


def test_index_describes_each_latent(written: Path, activations: np.ndarray) -> None:
    """The index gives level, peak and what a latent peaks on."""
    index = read_script(written / "index.js")
    assert index["level"] == [0] * N_SHARED + [1] * (WIDTH - N_SHARED)
    assert index["max"] == pytest.approx(activations.max((0, 1)), rel=6e-3)
    for latent in read_latents(written)[:20]:
        peaks = {latent["strings"][tokens[peak]].strip() for _, _, peak, tokens, _ in latent["contexts"]}
        assert set(index["label"][latent["id"]].split(" · ")) - {""} <= peaks
    assert read_summary(written)["dead"] == int((activations.max((0, 1)) == 0).sum())


def test_relatives_fire_inside_beyond_chance(written: Path, activations: np.ndarray) -> None:
    """Relatives are the pairs whose containment exceeds its null significantly, by falling excess: against a slow count."""
    fires = (activations > 0).astype(np.float64)
    moved = np.roll(fires, 1, axis=0).reshape(-1, WIDTH)
    fires = fires.reshape(-1, WIDTH)
    count, together, null = fires.sum(0), fires.T @ fires, fires.T @ moved
    often = count[N_SHARED:] >= 20
    bound = scipy.stats.norm.isf(0.01 / (N_SHARED * often.sum()))
    latents, listed = read_latents(written), 0
    for s in range(N_SHARED):
        far = {}
        for f in np.flatnonzero(often) + N_SHARED:
            p, q = together[s, f] / count[f], null[s, f] / count[f]
            if p - q > bound * math.sqrt((p + q) * (1 - (p + q) / 2) / count[f]):
                far[f] = p - q
        links = latents[s]["related"]
        assert len(links) == min(12, len(far))
        excesses = [share - chance for _, _, share, chance, _ in links]
        assert excesses == pytest.approx(sorted(far.values(), reverse=True)[: len(links)], abs=6e-3)
        for f, c, share, chance, cosine in links:
            assert (c, share) == (together[s, f], pytest.approx(together[s, f] / count[f], rel=6e-3))
            assert chance == pytest.approx(null[s, f] / count[f], rel=6e-3, abs=1e-9)
            assert -1 <= cosine <= 1
        listed += len(links)
    assert listed > 20


def test_summary_is_what_structure_reports(written: Path, activations: np.ndarray) -> None:
    """Containment, null and excess over all specialised latents are those of `--scores structure` on the same rows."""
    context = activations.shape[1]
    hierarchy = Hierarchy(SAEConfig(d_model=1, width=WIDTH, levels=(N_SHARED, WIDTH)), context, 0)
    z = torch.from_numpy(activations).float()
    kept = torch.ones(z.shape[:2], dtype=torch.bool)
    rows = z.flatten(0, 1)
    nothing, index = torch.zeros(len(rows), dtype=torch.int64), torch.arange(len(rows))
    hierarchy.update(
        rows,
        Batch(
            0,
            z[..., :1],
            nothing.view_as(kept),
            kept,
            rows[:, :1],
            torch.ones(2, len(rows)),
            nothing,
            nothing,
            index,
        ),
    )
    expected, found = hierarchy.features()["level"], read_summary(written)["containment"]
    assert found["n"] == expected["n"] > 20
    for name in ("containment", "null", "excess", "low", "high"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


def test_pair_batches_change_no_count(
    written: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts do not depend on how many pairs are held at once."""
    monkeypatch.setattr(latents_module, "PAIR_VALUES", 2 * 17 * (WIDTH - N_SHARED))
    monkeypatch.setattr(latents_module, "BATCH_VALUES", 7 * store.context * WIDTH)
    write_latents(make_sae(store), store, Words(), tmp_path, quiet=True)
    for one, other in zip(read_latents(written), read_latents(tmp_path)):
        assert [link[:2] for link in one["related"]] == [link[:2] for link in other["related"]]
        assert [c[:3] for c in one["contexts"]] == [c[:3] for c in other["contexts"]]


def test_flat_dictionary_has_no_relatives(store: Store, tmp_path: Path) -> None:
    """A flat dictionary has no relatives."""
    summary = write_latents(make_sae(store, (WIDTH,)), store, Words(), tmp_path, quiet=True)
    assert (summary["n_shared"], summary["related_latents"], summary["logit_lens"]) == (0, 0, False)
    assert all(latent["related"] == [] and "up" not in latent for latent in read_latents(tmp_path))


def test_relatives_carry_both_shares_and_cosine() -> None:
    """By hand: tokens together, containment, its null and the cosine of decoder rows; the larger excess comes first."""
    firing = Counts(torch.tensor([500.0, 50.0, 40.0], dtype=torch.float64), n_shared=1, n_tokens=1000)
    decoder = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
    pairs = relate(Blocks(torch.tensor([[45.0, 40.0]]), torch.tensor([[25.0, 10.0]])), firing, decoder, 0)
    assert [(s, f, c) for s, f, c, *_ in pairs] == [(0, 1, 45), (0, 2, 40)]
    assert [round(pair[3], 3) for pair in pairs] == [0.9, 1.0]
    assert [round(pair[4], 3) for pair in pairs] == [0.5, 0.25]
    assert [round(pair[5], 6) for pair in pairs] == [0.6, 0.0]
    assert [link[0] for link in both_ways(pairs, 3)[0]] == [2, 1]
    assert [link[0] for link in both_ways(pairs, 3)[1]] == [0]


def test_a_frequent_container_is_not_hidden() -> None:
    """Wholly inside a latent that fires on 60 % of tokens, where lift is at most 1.7: the pair is listed."""
    firing = Counts(torch.tensor([600.0, 100.0], dtype=torch.float64), n_shared=1, n_tokens=1000)
    assert len(relate(Blocks(torch.tensor([[100.0]]), torch.tensor([[60.0]])), firing, torch.eye(2), 0)) == 1


def test_independent_latents_are_not_related() -> None:
    """Independent latents are not related."""
    fires = (torch.rand(400, 10, 60, generator=torch_rng("independent")) < 0.1).float()
    firing = Counts(fires.double().sum((0, 1)), n_shared=20, n_tokens=4000)
    counted = PairCounts(20, 40, torch.device("cpu"))
    for part in fires.split(7):
        counted.update(part[..., :20], part[..., 20:])
    assert relate(counted.blocks(), firing, torch.eye(60), 0) == []


def test_logit_lens_is_decoder_times_unembedding(written: Path, store: Store, unembedding: Tensor) -> None:
    """The logit lens is the decoder row times the unembedding."""
    sae = make_sae(store)
    for latent in read_latents(written)[::41]:
        logits = sae.W_dec[latent["id"]] / sae.scale @ unembedding.T
        order = (logits - logits.mean()).sort(descending=True)
        strings = latent["strings"]
        assert [strings[token] for token, _ in latent["up"]] == [f" t{i}" for i in order.indices[:10]]
        assert [strings[token] for token, _ in latent["down"]] == [f" t{i}" for i in order.indices.flip(0)[:10]]
        assert [value for _, value in latent["up"]] == pytest.approx(order.values[:10].tolist(), rel=6e-3)


def test_batches_change_no_peak() -> None:
    """Peaks do not depend on the batches they come in."""
    z = torch.rand(40, 9, 5, generator=torch_rng("peaks"))
    whole, parts = Contexts(5, 12, torch.device("cpu")), Contexts(5, 12, torch.device("cpu"))
    whole.update(z, z, 0)
    for start in range(0, 40, 7):
        part = z[start : start + 7]
        parts.update(part, part, start)
    assert torch.equal(whole.value, parts.value)
    assert torch.equal(whole.row, parts.row)
    assert torch.equal(whole.window, parts.window)


def test_batches_change_nothing_drawn() -> None:
    """Lots and histograms do not depend on the batches that rows come in; lots are even, of firings alone, and differ by seed."""
    z = (torch.randn(60, 9, 5, generator=torch_rng("lots")) * torch.tensor([0.1, 1, 3, 10, 0])).relu()
    whole, parts = Histogram(5, torch.device("cpu")), Histogram(5, torch.device("cpu"))
    whole.update(z)
    drawn = lots(z, 0, 1)
    for start in range(0, 60, 7):
        parts.update(z[start : start + 7])
        assert torch.equal(lots(z[start : start + 7], start, 1), drawn[start : start + 7])
    assert torch.equal(whole.count, parts.count)
    assert torch.equal(whole.top, parts.top)
    assert torch.equal(drawn > 0, z > 0)
    assert abs(float(drawn[drawn > 0].mean()) - 0.5) < 0.05
    assert not torch.equal(drawn, lots(z, 0, 2))


def test_bars_count_activations(written: Path, activations: np.ndarray) -> None:
    """Bars are equal steps from 0, together all of a latent's firing, the last one holding its maximum."""
    for latent in read_latents(written)[::7]:
        z = activations[..., latent["id"]].reshape(-1)
        steps = latent["step"] * np.arange(len(latent["bars"]) + 1)
        assert latent["bars"] == np.histogram(z[z > 0], steps)[0].tolist()
        assert sum(latent["bars"]) == (z > 0).sum()
        assert len(latent["bars"]) <= N_BARS
        assert not latent["bars"] or latent["bars"][-1] > 0


def test_drawn_contexts_are_spread(written: Path, activations: np.ndarray) -> None:
    """Firings drawn by lot fall in activation, and are stronger than about the share that is said."""
    differences = []
    for latent in read_latents(written):
        z = activations[..., latent["id"]]
        firing = np.sort(z[z > 0])
        found = [(weaker, context[4][context[2]]) for weaker, *context in latent["drawn"]]
        assert len(found) == min(N_QUANTILES, int((z.max(1) > 0).sum()))
        assert [value for _, value in found] == sorted((value for _, value in found), reverse=True)
        differences += [np.searchsorted(firing, value) / len(firing) - weaker for weaker, value in found]
    assert abs(np.mean(differences)) < 0.05
    assert np.abs(differences).mean() < 0.2


def test_labels_are_judged_as_rules(written: Path, activations: np.ndarray, store: Store) -> None:
    """Precision and recall of a label are those of "it fires on these tokens" over rows that count."""
    index, kept = read_script(written / "index.js"), store.eval.kept()
    tokens = np.char.add("t", store.eval.tokens.reshape(-1).astype(str))
    judged = 0
    for latent in range(WIDTH):
        fires = activations[..., latent].reshape(-1) > 0
        on = np.isin(tokens, index["label"][latent].split(" · ")) & kept
        for name, total in (("precision", on.sum()), ("recall", fires.sum())):
            expected = (on & fires).sum() / total if total else None
            assert index[name][latent] == (None if expected is None else pytest.approx(expected, rel=6e-3, abs=1e-9))
        judged += index["precision"][latent] is not None
    assert judged > WIDTH / 2


def test_rows_are_chunks_drawn_by_seed(store: Store) -> None:
    """Rows are whole chunks drawn by seed and at most as many as asked."""
    assert sum(stop - start for start, stop in choose_chunks(store.train, 10**9, 0)) == store.train.n_rows
    some = choose_chunks(store.train, 700, 0)
    assert some == choose_chunks(store.train, 700, 0) != choose_chunks(store.train, 700, 1)
    assert sum(stop - start for start, stop in some) <= 700
    assert choose_chunks(store.train, 1, 0)


def test_token_keeps_its_leading_space() -> None:
    """A token keeps its leading space though decoders drop it."""
    assert TokenText(Words())(7) == " t7"


def test_overlong_token_is_cut() -> None:
    """A token longer than any real one is cut."""

    class Long(Words):
        def decode(self, token_ids: list[int], **_: bool) -> str:
            return "x" * 1_000_000 if token_ids != [1] else ""

    assert TokenText(Long())(7) == "x" * 100 + "…"


def test_confusing_characters_are_spelled_out() -> None:
    """Characters that reorder, hide or break text are spelled out."""
    assert visible("a\u202eb\u2066c\x00\u2028\n\t") == "a⟨U+202E⟩b⟨U+2066⟩c⟨U+0000⟩⟨U+2028⟩↵⇥"
    assert visible("naïve ünïcode שלום 日本 👩‍🚀") == "naïve ünïcode שלום 日本 👩‍🚀"


def test_lone_bytes_are_named() -> None:
    """Tokens that are a part of a character are shown as bytes, of both kinds of vocabulary; whole characters as they are."""
    tokenizer = load_tokenizer(str(Path(__file__).parents[1] / "data" / "tiny-gemma2"))
    text = TokenText(tokenizer)
    assert "".join(map(text, tokenizer.encode("ש 𐍈", add_special_tokens=False))) == "⟨D7⟩⟨A9⟩ ⟨F0⟩⟨90⟩⟨8D⟩⟨88⟩"
    assert text_of_bytes("<0xE2>") == "⟨E2⟩"
    assert text_of_bytes("ĠâĢ") == " ⟨E2⟩⟨80⟩"
    assert text_of_bytes("▁x") == ""


def test_tokens_without_ink_are_spelled() -> None:
    """Spaces, joiners and nothing at all are seen where a token stands alone; all else stays."""
    assert [spelled(text) for text in ("   ", "\u200d", " \u00a0", "")] == ["␣␣␣", "⟨U+200D⟩", "␣⟨U+00A0⟩", "⟨no text⟩"]
    assert [spelled(text) for text in (" a", "↵", "שלום", "日本")] == [" a", "↵", "שלום", "日本"]


@given(st.text())
def test_script_data_roundtrips_as_ascii(text: str) -> None:
    """Data in a script reads back and can neither end the script nor leave ASCII."""
    written = script_json({"text": text})
    assert written.isascii()
    assert "<" not in written
    assert json.loads(written) == {"text": text}


def test_interrupted_folder_looks_incomplete(written: Path, tmp_path: Path) -> None:
    """A folder whose writing was stopped does not look complete."""
    write_index(tmp_path, read_summary(written), {"level": [0]})
    (tmp_path / "page_0009.js").write_text("old")
    begin(tmp_path, 2)
    assert not list(tmp_path.iterdir())


def test_bad_index_is_refused(written: Path, tmp_path: Path) -> None:
    """An index of another version or cut short is refused."""
    write_index(tmp_path, read_summary(written) | {"version": 1}, {"level": [0]})
    with pytest.raises(DamagedError, match="version 3"):
        read_summary(tmp_path)
    text = (written / "index.js").read_bytes()
    (tmp_path / "index.js").write_bytes(text[: len(text) // 2])
    with pytest.raises(DamagedError, match="evaluate again"):
        read_summary(tmp_path)


def test_latents_lie_beside_their_results() -> None:
    """Latents lie beside their results."""
    path = Path("results/alpha0.2-seed0-0123456789-step_000400-abcdef0123.json")
    assert latents_folder(path).name == "alpha0.2-seed0-0123456789-step_000400-abcdef0123.latents"
