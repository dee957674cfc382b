"""The evaluate stage as a whole: one pass for all checkpoints equals each alone, the slow way, in any batches."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluate import plan as planning
from evaluate.checkpoints.find import find_checkpoints, loss_curve, open_checkpoint, require_fit, resolve_levels
from evaluate.config import source_identity
from evaluate.run import EvaluateConfig, run
from pipeline.base.errors import CheckpointError, DamagedError, ModelError, PipelineError, StoreError, UsageError
from pipeline.base.results import read_result
from pipeline.base.runtime import tf32
from pipeline.model.split_lm import SplitLM
from pipeline.sae.checkpoint import load_checkpoint, save_checkpoint
from pipeline.sae.nested import NestedSAE
from pipeline.store.reader import Store
from support import lm_stores, tiny_models
from support.reference import reference_behaviour, reference_firing, reference_reconstruction


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, acts.zarr and three members in runs: two nested SAEs and a flat one. Read-only."""
    folder = tmp_path_factory.mktemp("evaluate")
    store = lm_stores.make_lm_store(folder, eval_sequences=20)
    for seed in (0, 1):
        lm_stores.save_member(folder / "runs", store, lm_stores.make_sae(store, seed=seed), seed=seed)
    lm_stores.save_member(folder / "runs", store, lm_stores.make_sae(store, levels=(96,)), seed=2)
    return folder


@pytest.fixture(scope="module")
def results(place: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of all three members, evaluated together, by seed."""
    outcome = run(config(place, tmp_path_factory.mktemp("out")), [place / "runs"])
    assert not outcome.failed
    return [read_result(Path(entry["path"])) for entry in outcome.results]


def config(place: Path, out: Path, **changes: Any) -> EvaluateConfig:
    return EvaluateConfig(store=place / "acts.zarr", out=out, **changes)


def members(place: Path) -> list[Path]:
    return sorted((place / "runs").iterdir())


def evaluated(place: Path, out: Path, places: list[Path] | None = None, **changes: Any) -> list[dict[str, Any]]:
    outcome = run(config(place, out, **changes), places or [place / "runs"])
    assert not outcome.failed
    return [read_result(Path(entry["path"])) for entry in outcome.results]


def numbers(data: Any, name: str = "") -> dict[str, float]:
    """Every number of nested JSON data by its path."""
    if isinstance(data, int | float) and not isinstance(data, bool):
        return {name: float(data)}
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return {path: value for key, part in items for path, value in numbers(part, f"{name}.{key}").items()}


def require_equal(found: Any, expected: Any) -> None:
    """The numbers of two results agree up to float32 rounding, by which a value at the edge of two bins may fall into either."""
    a, b = numbers(found), numbers(expected)
    bins = {name for name in b if ".histogram." in name}
    assert {n: v for n, v in a.items() if n not in bins} == pytest.approx(
        {n: v for n, v in b.items() if n not in bins}, rel=1e-5, abs=2e-7
    )
    assert sum(a[name] for name in bins) == sum(b[name] for name in bins)
    assert all(abs(a[name] - b[name]) <= 1 for name in bins)


def copied_member(place: Path, out: Path, seed: int = 0) -> Path:
    """A copy of a member that a test may damage."""
    return Path(shutil.copytree(members(place)[seed], out / members(place)[seed].name))


def resaved(folder: Path, store: dict[str, Any] | None = None, change: Any = None) -> Path:
    """The member's checkpoint written again with other provenance or weights, as a file of its own."""
    source = next((folder / "checkpoints").iterdir())
    sae, header = load_checkpoint(source)
    if change is not None:
        with torch.no_grad():
            change(sae)
    provenance = header.provenance | {"store": header.provenance["store"] | (store or {})}
    path = folder.parent / f"changed-{folder.name}.safetensors"
    save_checkpoint(path, sae, header.step, provenance)
    return path


def test_encoders_alone_may_be_tf32(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA encoders run where float32 products may be TF32; the language model and decoders run where they may not."""
    seen: dict[str, set[str]] = {"encode": set(), "decode_levels": set(), "suffix": set()}

    def note(kind: type, name: str) -> None:
        original = getattr(kind, name)

        def noted(*args: Any, **options: Any) -> Any:
            seen[name].add(torch.get_float32_matmul_precision())
            return original(*args, **options)

        monkeypatch.setattr(kind, name, noted)

    note(NestedSAE, "encode")
    note(NestedSAE, "decode_levels")
    note(SplitLM, "suffix")
    monkeypatch.setattr("evaluate.scores.scorer.tf32", lambda device: tf32(torch.device("cuda")))
    evaluated(place, tmp_path, [members(place)[0]], scores=("kl", "ev"), rows=32)
    assert seen == {"encode": {"high"}, "decode_levels": {"highest"}, "suffix": {"highest"}}


def test_levels_equal_the_hooked_model(place: Path, results: list[dict[str, Any]]) -> None:
    """Every level equals the slow way of hooking the whole model."""
    store = Store.open(place / "acts.zarr")
    whole = tiny_models.whole_model(place / "model", store.dtype)
    tokens, kept = torch.from_numpy(store.eval.tokens).long(), torch.from_numpy(~store.eval.special)
    clean = hooked(whole, tokens, lambda residual: residual)
    sae = load_checkpoint(next((members(place)[0] / "checkpoints").iterdir()))[0].requires_grad_(False)
    x = store.eval.read(0, store.eval.n_rows)[kept.flatten()]
    groups = (torch.arange(store.eval.n_rows) // (16 * store.context))[kept.flatten()]
    for level, found in enumerate(results[0]["levels"]):
        x_hat = sae.decode_level(sae.encode(x), level)
        other = hooked(whole, tokens, lambda residual, new=x_hat: residual.masked_scatter(kept[..., None], new))
        expected = reference_behaviour(clean, other, tokens, kept)
        scores = found["scores"]
        assert scores["kl_nats"] == pytest.approx(expected["kl"], rel=1e-4, abs=2e-7)
        assert (scores["ce"], scores["top1"]) == pytest.approx((expected["ce"], expected["top1"]), rel=1e-5)
        for name, value in reference_reconstruction(x, x_hat, groups).items():
            assert scores[name] == pytest.approx(value, rel=1e-5), name
        for name, value in reference_firing(sae.encode(x)[:, : sae.config.levels[level]]).items():
            assert scores[name] == pytest.approx(value, rel=1e-5), name


def hooked(whole: Any, tokens: torch.Tensor, change: Any) -> torch.Tensor:
    handle = whole.model.layers[lm_stores.LAYER].register_forward_hook(lambda _m, _a, output: change(output))
    with torch.no_grad():
        logits: torch.Tensor = whole(input_ids=tokens, use_cache=False).logits
    handle.remove()
    return logits


def test_scores_follow_from_baselines(results: list[dict[str, Any]]) -> None:
    """Scores of the job follow from its baselines."""
    base, scores = results[0]["baselines"], results[0]["levels"][1]["scores"]
    assert base["ce_zero"] == pytest.approx(math.log(tiny_models.VOCAB), rel=1e-6)
    assert scores["kl_score"] == pytest.approx((base["kl_zero"] - scores["kl_nats"]) / base["kl_zero"])
    assert scores["kl_score_mean"] == pytest.approx((base["kl_mean"] - scores["kl_nats"]) / base["kl_mean"])
    assert results[1]["baselines"] == base


def test_sample_says_what_averages_cover(place: Path, results: list[dict[str, Any]]) -> None:
    """The sample says what the averages are over."""
    store, sample = Store.open(place / "acts.zarr"), results[0]["sample"]
    assert sample["n_rows"] == store.eval.n_rows == 20 * 16
    assert sample["n_tokens"] == int((~store.eval.special).sum())
    assert sample["n_tokens_without_massive"] == int(store.eval.kept().sum())
    assert results[0]["levels"][1]["scores"]["dead_in_training"] == 0.25
    assert results[0]["features"]["training"] == {"dead": 0.25, "fired_rows": 4096, "rows_seen": 4096}


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_changes_no_result(
    place: Path, results: list[dict[str, Any]], tmp_path: Path, batch_size: int
) -> None:
    """Results do not depend on the batch size."""
    found = evaluated(place, tmp_path, members(place)[:1], batch_size=batch_size)[0]
    for part in ("levels", "baselines", "features", "series"):
        require_equal(found[part], results[0][part])
    assert found["key"] == results[0]["key"]  # so a batch that fits another machine finds the work done


def test_groups_score_as_all_at_once(
    place: Path, results: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints in groups score as all at once."""
    monkeypatch.setattr(
        planning, "make_plan", lambda *args: planning.Plan(batch=16, chunk=256, group=2, peak=0, limit=0)
    )
    found = evaluated(place, tmp_path)
    for one, other in zip(found, results):
        for part in ("levels", "baselines", "features", "series", "key", "curve"):
            assert one[part] == other[part], part


def test_flat_sae_has_one_level(results: list[dict[str, Any]]) -> None:
    """The flat SAE has one level and no shared block."""
    assert [level["n_latents"] for level in results[2]["levels"]] == [96]
    assert "shared" not in results[2]["features"]["density"]
    assert results[0]["features"]["utilisation"].keys() == {"shared", "specialised"}


def test_coding_rate_reaches_one(results: list[dict[str, Any]]) -> None:
    """The sparse coding rate reaches one when all latents are kept."""
    points = {(p["level"], p["n"]): p["value"] for p in results[0]["series"]["sparse_coding_rate"]}
    assert [n for level, n in points if level == 0] == [2, 5, 10, 20]  # the inner level has 32 latents
    assert points[1, 100] == pytest.approx(1, abs=1e-5)
    values = [points[1, n] for n in (2, 5, 10, 20, 50, 100)]
    assert values == sorted(values)


def test_curve_stops_at_the_checkpoint(results: list[dict[str, Any]]) -> None:
    """The curve stops at the checkpoint's step."""
    curve = results[0]["curve"]
    assert curve["step"] == list(range(1, 21))
    assert curve["ev"][0] == [0.1, 0.2]


def test_long_curve_keeps_its_ends(place: Path, tmp_path: Path) -> None:
    """A long curve is thinned and keeps its ends."""
    folder = copied_member(place, tmp_path)
    (folder / "metrics.jsonl").write_text(
        "".join(f'{{"step": {i}, "loss": {i}}}\n' for i in range(21)) * 100 + '{"step": 2'
    )
    checkpoint = dataclasses.replace(open_checkpoint(next((folder / "checkpoints").iterdir())), step=20)
    curve = loss_curve(checkpoint)
    assert len(curve["step"]) == len(curve["loss"]) == 500
    assert (curve["step"][0], curve["step"][-1]) == (0, 20)


@pytest.mark.parametrize("step", ["null", "-1", "1.5", "true"])
def test_metrics_without_step_are_damaged(place: Path, tmp_path: Path, step: str) -> None:
    """A line of metrics whose step is no whole number is damage, and no traceback."""
    folder = copied_member(place, tmp_path)
    (folder / "metrics.jsonl").write_text(f'{{"step": 1}}\n{{"step": {step}}}\n')
    with pytest.raises(DamagedError, match=r"line 2: 'step' should be a whole number"):
        loss_curve(open_checkpoint(next((folder / "checkpoints").iterdir())))


def test_broken_metrics_line_is_an_error(place: Path, tmp_path: Path) -> None:
    """A broken line of metrics is an error."""
    folder = copied_member(place, tmp_path)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DamagedError, match=r"metrics\.jsonl: line 2 is not JSON"):
        loss_curve(open_checkpoint(next((folder / "checkpoints").iterdir())))


def test_metrics_in_pipe_are_refused(place: Path, tmp_path: Path) -> None:
    """A pipe or a device in the place of a member's metrics is not called a member without them."""
    folder = copied_member(place, tmp_path)
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    with pytest.raises(PipelineError, match=r"metrics\.jsonl: cannot be read \(a pipe, expected a regular file\)"):
        loss_curve(open_checkpoint(next((folder / "checkpoints").iterdir())))


def test_done_checkpoints_are_skipped(place: Path, tmp_path: Path) -> None:
    """Done checkpoints are skipped and other settings are other work."""
    asked = config(place, tmp_path, scores=("l0",))
    first = run(asked, members(place)[:1])
    written = Path(first.results[0]["path"]).stat().st_mtime_ns
    again = run(asked, members(place))
    assert [entry["skipped"] for entry in again.results] == [True, False, False]
    assert Path(again.results[0]["path"]).stat().st_mtime_ns == written
    other = run(dataclasses.replace(asked, rows=32), members(place)[:1])
    assert other.results[0]["path"] != first.results[0]["path"]
    assert len(list(tmp_path.glob("*-step_*.json"))) == 4


def test_a_score_is_added_not_repeated(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for more scores computes those alone, into the same file and row; what is there stays as it was."""
    first = evaluated(place, tmp_path, members(place)[:1], scores=("kl", "l0"))[0]
    monkeypatch.setattr("evaluate.models.Models.load", lambda *_: pytest.fail("the model was loaded"))
    both = evaluated(place, tmp_path, members(place)[:1], scores=("kl", "l0", "ev", "coding"))[0]
    monkeypatch.undo()
    at_once = evaluated(place, tmp_path / "other", members(place)[:1], scores=("kl", "l0", "ev", "coding"))[0]
    for part in ("key", "evaluation", "baselines", "levels", "series", "sample", "features"):
        assert both[part] == at_once[part], part
    assert first["levels"][0]["scores"]["kl_nats"] == both["levels"][0]["scores"]["kl_nats"]
    assert len(list(tmp_path.glob("*-step_*.json"))) == 1
    again = run(config(place, tmp_path, scores=("ev", "kl")), members(place)[:1])
    assert [entry["skipped"] for entry in again.results] == [True]


def test_checkpoints_lack_different_scores(place: Path, tmp_path: Path) -> None:
    """Some checkpoints have scores that others lack: each gets what it lacks, all end alike."""
    evaluated(place, tmp_path, members(place)[:1], scores=("l0",))
    found = evaluated(place, tmp_path, scores=("l0", "ev"))
    assert all(result["evaluation"]["families"].keys() == {"l0", "ev"} for result in found)
    assert len(found) == 3


def test_no_behaviour_loads_no_model(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without behaviour no language model is loaded."""
    monkeypatch.setattr("evaluate.models.Models.load", lambda *_: pytest.fail("the model was loaded"))
    found = evaluated(place, tmp_path, members(place)[:1], scores=("ev", "l0"))[0]
    assert found["baselines"] == {}
    assert "kl_nats" not in found["levels"][0]["scores"]


def test_rows_round_up_to_sequences(place: Path, tmp_path: Path) -> None:
    """Rows are rounded up to whole sequences."""
    found = evaluated(place, tmp_path, members(place)[:1], rows=33, scores=("ev",))[0]
    assert (found["sample"]["n_sequences"], found["sample"]["n_rows"]) == (3, 48)


def test_levels_can_be_chosen(place: Path, tmp_path: Path, results: list[dict[str, Any]]) -> None:
    """Levels can be chosen."""
    found = evaluated(place, tmp_path, members(place)[:1], levels="last")[0]
    assert found["levels"] == results[0]["levels"][1:]
    checkpoint = open_checkpoint(next((members(place)[2] / "checkpoints").iterdir()))
    assert resolve_levels("0,1", checkpoint) == [0]  # the flat SAE has one
    with pytest.raises(CheckpointError, match="has levels 0 to 0, --levels 1 names none"):
        resolve_levels("1", checkpoint)


def test_damaged_checkpoint_spares_the_others(place: Path, tmp_path: Path) -> None:
    """One damaged checkpoint is reported and the others are finished."""
    runs = tmp_path / "runs"
    shutil.copytree(place / "runs", runs)
    broken = next((sorted(runs.iterdir())[1] / "checkpoints").iterdir())
    data = bytearray(broken.read_bytes())
    data[-100] ^= 1
    broken.write_bytes(data)
    outcome = run(config(place, tmp_path / "out", scores=("ev",)), [runs])
    assert len(outcome.results) == 2
    assert [(path, type(error)) for path, error in outcome.failed] == [(broken.parent.parent, DamagedError)]
    outcome = run(config(place, tmp_path / "out", scores=("ev",)), [broken])
    assert "bytes changed" in str(outcome.failed[0][1])


@pytest.mark.parametrize(("value", "what"), [(math.nan, "reconstruction"), (1e30, "reconstruction|KL")])
def test_numbers_not_finite_are_an_error(place: Path, tmp_path: Path, value: float, what: str) -> None:
    """A checkpoint whose numbers are not finite is an error, not minus one."""
    bad = resaved(copied_member(place, tmp_path), change=lambda sae: sae.b_dec.fill_(value))
    outcome = run(config(place, tmp_path / "out"), [bad, *members(place)[1:2]])
    assert [entry["member"] for entry in outcome.results] == [members(place)[1].name]
    assert len(outcome.failed) == 1
    with pytest.raises(CheckpointError, match=f"the ({what}).* is not finite"):
        raise outcome.failed[0][1]


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ({"layer": 12}, "trained on layer 12, store .* has 1"),
        ({"architecture_sha256": "f" * 64}, "trained on a model's config.json 'ffff.*--allow-other-model if"),
        ({"weights_sha256": "f" * 64, "model": "other/model"}, "trained on model weights 'ffff.*other/model against"),
        ({"id": "e" * 64}, "trained on store 'eeee.*--allow-other-store"),
    ],
)
def test_checkpoint_of_another_source_is_refused(
    place: Path, tmp_path: Path, store: dict[str, Any], message: str
) -> None:
    """A checkpoint of another layer, model or store is refused, naming both."""
    path = resaved(copied_member(place, tmp_path), store)
    outcome = run(config(place, tmp_path / "out", scores=("ev",)), [path])
    with pytest.raises(CheckpointError, match=message):
        raise outcome.failed[0][1]


def test_checkpoint_of_another_width_is_refused(place: Path, tiny_store: Path) -> None:
    """A checkpoint of another width is refused, naming both."""
    checkpoint = open_checkpoint(next((members(place)[0] / "checkpoints").iterdir()))
    narrow = dataclasses.replace(checkpoint, sae=dataclasses.replace(checkpoint.sae, d_model=32))
    with pytest.raises(CheckpointError, match=r"rows have 32 dimensions, those of store .* have 64"):
        require_fit(narrow, Store.open(tiny_store), allow_other_store=False)


def test_another_store_is_allowed_when_asked(place: Path, tmp_path: Path) -> None:
    """Another store of the same model and layer is allowed when asked for."""
    path = resaved(copied_member(place, tmp_path), {"id": "e" * 64})
    assert evaluated(place, tmp_path / "out", [path], scores=("ev",), allow_other_store=True)


def test_another_model_is_refused(place: Path, tmp_path: Path) -> None:
    """Another model than the store's is refused, naming both."""
    other = tiny_models.make_model(tmp_path / "other", "llama")
    with pytest.raises(ModelError, match=r"other: its weights .* are not those that made store .*acts\.zarr"):
        run(config(place, tmp_path / "out", model=str(other)), members(place))


def test_changed_config_is_another_model(place: Path, tmp_path: Path) -> None:
    """A model of the store's weights whose config.json changed (a softcap, a window) is refused; who saved that file is no
    matter."""
    folder = Path(shutil.copytree(place / "model", tmp_path / "model"))
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | {"transformers_version": "0"}))
    assert evaluated(place, tmp_path / "same", members(place)[:1], model=str(folder), scores=("kl",))
    (folder / "config.json").write_text(json.dumps(known | {"rms_norm_eps": 0.5}))
    with pytest.raises(ModelError, match=r"model/config\.json: not that of the model which made store .*acts\.zarr"):
        run(config(place, tmp_path / "out", model=str(folder), scores=("kl",)), members(place))


def test_missing_store_is_an_error(tmp_path: Path, place: Path) -> None:
    """A store that is not there is an error."""
    with pytest.raises(StoreError, match="there is no activation store here"):
        run(EvaluateConfig(store=tmp_path / "none.zarr", out=tmp_path), members(place))


def test_too_many_rows_are_refused(place: Path, tmp_path: Path) -> None:
    """More rows than the split has are refused."""
    with pytest.raises(UsageError, match="has 320 rows; ask for fewer"):
        run(config(place, tmp_path, rows=10_000), members(place))


@pytest.mark.parametrize(
    "changes", [{"scores": ("kl", "fid")}, {"scores": ()}, {"levels": "first"}, {"dtype": "fp8"}, {"batch_size": 0}]
)
def test_settings_that_mean_nothing_are_refused(place: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Settings that mean nothing are refused."""
    with pytest.raises(UsageError):
        config(place, tmp_path, **changes)


def test_folder_means_its_final_checkpoints(place: Path, tmp_path: Path) -> None:
    """A folder stands for the final checkpoint of each member or all steps."""
    folder = copied_member(place, tmp_path / "runs")
    final = folder / "checkpoints" / "step_000020.safetensors"
    early = Path(shutil.copy(final, folder / "checkpoints" / "step_000010.safetensors"))
    assert find_checkpoints([tmp_path / "runs"], all_steps=False) == ([final], [])
    assert find_checkpoints([folder], all_steps=True) == ([early, final], [])
    assert find_checkpoints([early, tmp_path / "runs", early], all_steps=False) == ([early, final], [])


def test_unfinished_member_is_a_failure(place: Path, tmp_path: Path) -> None:
    """An unfinished member is a failure and its latest step is not guessed."""
    folder = copied_member(place, tmp_path / "runs")
    (folder / "complete.json").unlink()
    copied_member(place, tmp_path / "runs", seed=1)
    found, failed = find_checkpoints([tmp_path / "runs"], all_steps=False)
    assert [path.parent.parent.name for path in found] == [members(place)[1].name]
    assert "its training is not complete" in str(failed[0][1])


def test_foreign_places_are_errors(tmp_path: Path) -> None:
    """Places without anything of ours are errors."""
    with pytest.raises(CheckpointError, match="no such checkpoint or folder"):
        find_checkpoints([tmp_path / "none"], all_steps=False)
    with pytest.raises(CheckpointError, match="holds no training member"):
        find_checkpoints([tmp_path], all_steps=False)


def test_stray_ranks_are_named(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank outside the world is refused; a world that something left in the environment is said, with what is left out."""
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UsageError, match="RANK=3 and WORLD_SIZE=1, so no such process; unset both"):
        run(config(place, tmp_path, scores=("ev",)), [place / "runs"])
    monkeypatch.setenv("WORLD_SIZE", "9")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    run(config(place, tmp_path, scores=("ev",)), [place / "runs"])
    said = "process 3 of 9: 0 of 3 checkpoints, as RANK and WORLD_SIZE in the environment say but not torchrun's"
    assert said in capsys.readouterr().err


def test_torchrun_processes_share_checkpoints(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of a torchrun share the checkpoints."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        outcome = run(config(place, tmp_path, scores=("ev",)), [place / "runs"])
        done.append([entry["member"][-12] for entry in outcome.results])
    assert done == [["0", "2"], ["1"]]
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 2 + 2 + 1


@pytest.mark.parametrize("limit", [2 * 10**6, 4 * 10**6, 20 * 10**6, 10**9, 10**12])
def test_plan_holds_its_limit(limit: int) -> None:
    """A plan holds its limit."""
    parts = planning.Sizes(fixed=1_000_000, sequence=200_000, row=5000, checkpoint=300_000)
    plan = planning.make_plan(parts, 50, 16, 128, 1000, limit, "cpu")
    assert plan.peak == parts.peak(plan.batch, plan.chunk, plan.group) <= limit
    assert 1 <= plan.group <= 50
    if limit == 10**12:
        assert (plan.batch, plan.group) == (16, 50)
    with pytest.raises(UsageError, match=r"at least 1\.7 MB are needed; raise --max-memory"):
        planning.make_plan(parts, 50, 16, 128, 1000, 10**6, "cpu")


def test_small_memory_gives_equal_scores(place: Path, results: list[dict[str, Any]], tmp_path: Path) -> None:
    """A small memory gives the same scores."""
    with pytest.raises(UsageError, match="raise --max-memory"):
        run(config(place, tmp_path, max_memory=100_000), members(place))
    found = evaluated(place, tmp_path, members(place)[:1], max_memory=4_000_000)
    assert found[0]["sample"]["batch_size"] < 16
    require_equal(found[0]["levels"], results[0]["levels"])


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2 * 10**9, 450 * 10**6])
def test_job_stays_within_planned_memory(tmp_path: Path, limit: int) -> None:
    """A job stays within the memory its plan states."""
    script = Path(__file__).parent / "support" / "measure_memory.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path), str(limit)], capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] <= limit
    assert found["peak"] / 4 < found["grown"] < found["peak"] + 100 * 10**6  # allocator and libraries come on top


def test_texts_are_known_by_content(tmp_path: Path) -> None:
    """Texts are known by their content, not their path."""
    names = []
    for folder in ("a", "b"):
        (tmp_path / folder / "texts").mkdir(parents=True)
        (tmp_path / folder / "texts" / "train.jsonl").write_text("{}")
        names.append(source_identity(str(tmp_path / folder / "texts")))
    assert names[0] == names[1]
    (tmp_path / "b" / "texts" / "train.jsonl").write_text("{} ")
    assert source_identity(str(tmp_path / "b" / "texts")) != names[0]
    assert source_identity("LabHC/bias_in_bios") == "LabHC/bias_in_bios"


def test_dry_run_writes_nothing(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run writes nothing."""
    outcome = run(config(place, tmp_path / "out"), [place / "runs"], dry_run=True)
    assert not (tmp_path / "out").exists()
    assert outcome.results == []
    said = capsys.readouterr().err
    assert "3 checkpoints on 320 tokens" in said
    assert "peak memory at most" in said


def test_announcement_names_what_follows(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is done after the passes is announced where it is asked for, of the checkpoints that it is asked for."""
    asked = config(place, tmp_path / "out", scores=("ev", "absorption", "structure"), latents="all")
    run(asked, [place / "runs"], dry_run=True)
    said = capsys.readouterr().err
    for what in ("absorption", "structure, 5 meta-dictionaries", "pages of the latents of 3 checkpoints"):
        assert f"  then {what}: about " in said


def test_results_are_json_with_definitions(results: list[dict[str, Any]]) -> None:
    """Results are plain JSON with their definitions."""
    assert json.loads(json.dumps(results[0], allow_nan=False)) == results[0]
    for level in results[0]["levels"]:
        assert level["scores"].keys() <= results[0]["definitions"].keys()
