import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import pipeline
from evaluate.__main__ import found
from pipeline.__main__ import cli
from pipeline.base.errors import CheckpointError
from pipeline.base.files import hash_file, write_json
from pipeline.experiment.verify import verify
from pipeline.sae import hub
from pipeline.sae.checkpoint import save_checkpoint
from pipeline.sae.config import SAEConfig
from pipeline.sae.export import export
from pipeline.sae.foreign.reader import FORMATS, Format, load_foreign, read_sae, sha256_of
from pipeline.sae.nested import NestedSAE
from test_foreign import D, F, dictionary, linear_style, weights
from test_sae import KINDS, random_sae

TOKEN = "hf_secret_of_the_test"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandIn(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as create, commit and snapshot_download use."""

    files: ClassVar[dict[str, bytes]]
    seen: ClassVar[list[str]]

    def log_message(self, format: str, *args: Any) -> None:
        self.seen.append(self.path)

    def answer(self, data: Any, code: int = 200, body: bool = True) -> None:
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hash(raw) & 0xFFFFFFFF:x}"')
        self.end_headers()
        if body:
            self.wfile.write(raw)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/owner/name", "name": "owner/name", "id": "1"})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/owner/name/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "success": True,
                }
            )
        else:
            self.answer({"valid": True, "errors": [], "warnings": []})

    def do_GET(self, body: bool = True) -> None:
        name = self.path.split("?")[0].split("/resolve/")[-1].partition("/")[2]
        if "/resolve/" in self.path and name in self.files:
            self.answer(self.files[name], body=body)
        elif "/revision/" in self.path and self.files:
            siblings = [{"rfilename": file} for file in self.files]
            self.answer({"id": "owner/name", "modelId": "owner/name", "sha": COMMIT, "siblings": siblings, "tags": []})
        elif "/tree/" in self.path and self.files:
            self.answer([{"type": "file", "path": f, "size": len(d), "oid": "0" * 40} for f, d in self.files.items()])
        else:
            self.answer({"error": "Repository not found"}, 404)

    def do_HEAD(self) -> None:
        self.do_GET(body=False)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[StandIn]]:
    """A Hub on loopback that huggingface_hub talks to; its constants are read at import, so they are patched."""
    import huggingface_hub.constants as constants
    from huggingface_hub import HfApi, snapshot_download

    class Handler(StandIn):
        files: ClassVar[dict[str, bytes]] = {}
        seen: ClassVar[list[str]] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint=endpoint, token=TOKEN))
    cache = tmp_path / "hub-cache"

    def download(repo_id: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> str:
        options: dict[str, Any] = {"revision": revision, "allow_patterns": allow_patterns, "cache_dir": cache}
        return str(snapshot_download(repo_id, endpoint=endpoint, token=TOKEN, **options))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    yield Handler
    server.shutdown()
    thread.join()
    server.server_close()


def a_checkpoint(folder: Path) -> Path:
    path = folder / "step_000005.safetensors"
    provenance = {
        "member": "alpha0.2-seed0",
        "store": {"model": "google/gemma-2-2b", "layer": 19, "context": 128},
        "train": {"recipe": "paper", "alpha": 0.2, "seed": 0},
        "rows_seen": 10_000,
    }
    save_checkpoint(path, random_sae(KINDS["relu"]), 5, provenance)
    return path


def some_results(checkpoint: Path) -> Path:
    scores = {"kl_nats": 0.5, "kl_score": 0.9, "ce_score": 0.91, "ev": 0.8, "l0": 12.0, "dead": None}
    levels = [{"level": 0, "n_latents": 16, "scores": scores}, {"level": 1, "n_latents": 64, "scores": scores}]
    write_json(checkpoint.parent / "r.json", {"checkpoint": {"sha256": hash_file(checkpoint)}, "levels": levels})
    return checkpoint.parent / "r.json"


def test_pushed_sae_comes_back_equal(
    stand_in: type[StandIn], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is pushed comes back by id as the same SAE."""
    checkpoint = a_checkpoint(tmp_path)
    hub.push(checkpoint, "owner/name", some_results(checkpoint))
    assert set(stand_in.files) == {"sae.safetensors", "README.md", "results.json"}
    x = torch.randn(4, 16)
    assert torch.equal(pipeline.load("owner/name").encode(x), pipeline.load(checkpoint).encode(x))
    pulled = hub.pull("owner/name", tmp_path / "pulled")
    assert pulled.read_bytes() == checkpoint.read_bytes()
    printed = capfd.readouterr()
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert TOKEN not in printed.out + printed.err
    assert not any(TOKEN.encode() in data for data in [*written, *stand_in.files.values()])


def test_pulled_file_keeps_its_name(stand_in: type[StandIn], tmp_path: Path) -> None:
    """A repository whose one checkpoint has another name than ours is pulled under that name, and the path is there."""
    checkpoint = a_checkpoint(tmp_path)
    stand_in.files["theirs.safetensors"] = checkpoint.read_bytes()
    pulled = hub.pull("owner/name", tmp_path / "pulled")
    assert pulled == tmp_path / "pulled" / "theirs.safetensors"
    assert pulled.read_bytes() == checkpoint.read_bytes()


def test_pulled_folder_of_others_is_whole(stand_in: type[StandIn], tmp_path: Path) -> None:
    """A repository of another trainer is pulled with all its files."""
    export(a_checkpoint(tmp_path), "saelens", tmp_path / "out")
    for name in ("cfg.json", "sae_weights.safetensors"):
        stand_in.files[name] = (tmp_path / "out" / name).read_bytes()
    pulled = hub.pull("owner/name", tmp_path / "pulled")
    assert pulled == tmp_path / "pulled"
    assert pipeline.load(pulled).config.width == 64


SUITE = "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"


def an_export(tmp_path: Path) -> Path:
    (folder,) = export(a_checkpoint(tmp_path), "saelens", tmp_path / "e")
    return folder


def a_dictionary(tmp_path: Path) -> Path:
    state = weights() | {"threshold": torch.tensor(0.3), "k": torch.tensor(20), "group_sizes": torch.tensor([16, 80])}
    return dictionary(tmp_path / "d", "MatryoshkaBatchTopKSAE", state, submodule_name="resid_post_layer_1")


def a_sparsify(tmp_path: Path) -> Path:
    w, folder = weights(), tmp_path / "layers.3"
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps({"k": 9, "d_in": D}))
    own = {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "W_dec": w["W_dec"],
        "b_dec": w["b_dec"],
    }
    save_file(own, folder / "sae.safetensors")
    return folder


def a_gemma_scope(tmp_path: Path) -> Path:
    folder = tmp_path / SUITE
    folder.mkdir(parents=True)
    np.savez(
        folder / "params.npz", **{name: t.numpy() for name, t in (weights() | {"threshold": torch.ones(F)}).items()}
    )
    return folder


@pytest.mark.parametrize(
    ("make", "name", "says"),
    [
        (an_export, "owner/name", "SAELens, its files as they were"),
        (a_dictionary, "owner/name", "96 latents in levels of 16, 96"),
        (a_sparsify, "owner/name/layers.3", "residual stream after layer 3"),
        (a_gemma_scope, f"owner/{SUITE}", "gemma-2-2b"),
    ],
)
def test_saes_of_others_travel(
    stand_in: type[StandIn], tmp_path: Path, make: Callable[[Path], Path], name: str, says: str
) -> None:
    """An SAE made elsewhere is pushed as its own files, with a card that says what it is and its results, and is loaded and
    pulled as the same SAE of the same place."""
    folder = make(tmp_path)
    write_json(tmp_path / "r.json", {"checkpoint": {"sha256": sha256_of(folder)}, "levels": []})
    hub.push(folder, name, tmp_path / "r.json")
    inside = name.removeprefix("owner/").partition("/")[2]
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {f"{inside}/{file}".lstrip("/") for file in (*kept, "README.md", "results.json")} == set(stand_in.files)
    card = stand_in.files[f"{inside}/README.md".lstrip("/")].decode()
    assert says in card
    assert f'pipeline.load("{name}")' in card
    x = torch.randn(4, load_foreign(folder)[0].config.d_model)
    assert torch.equal(pipeline.load(name).encode(x), pipeline.load(folder).encode(x))
    pulled = hub.pull(name, tmp_path / "pulled" / name.removeprefix("owner/"))
    assert {path.name: path.read_bytes() for path in pulled.iterdir() if path.name in kept} == kept
    assert load_foreign(pulled)[1]["store"] == load_foreign(folder)[1]["store"]
    assert verify(str(pulled)).problems == []


@pytest.mark.parametrize(("make", "path"), [(a_sparsify, "name/layers.3"), (a_gemma_scope, SUITE)])
def test_places_told_by_paths_stay(
    stand_in: type[StandIn], tmp_path: Path, make: Callable[[Path], Path], path: str
) -> None:
    """An SAE whose path alone says what it is of is neither pushed nor pulled to where it would say nothing, or another thing."""
    folder = make(tmp_path)
    for name in ("owner/name", "owner/name/layers.4", "owner/gemma-scope-9b-pt-res/layer_20"):
        with pytest.raises(CheckpointError, match=r"only its path says what it is of; push it to OWNER/NAME/FOLDER"):
            hub.push(folder, name)
    assert not stand_in.files
    hub.push(folder, f"owner/{path}")
    for out in ("other", "layers.4", "gemma-scope-9b-pt-res/layer_20"):
        with pytest.raises(CheckpointError, match=f"give an --out that ends in {path}$"):
            hub.pull(f"owner/{path}", tmp_path / out)
        assert not (tmp_path / out).exists()


def test_others_results_are_not_taken(stand_in: type[StandIn], tmp_path: Path) -> None:
    """Results of another SAE are neither pushed nor pulled beside one made elsewhere."""
    folder = a_dictionary(tmp_path)
    write_json(tmp_path / "r.json", {"checkpoint": {"sha256": "0" * 64}, "levels": []})
    with pytest.raises(CheckpointError, match="results of another checkpoint"):
        hub.push(folder, "owner/name", tmp_path / "r.json")
    assert not stand_in.files
    hub.push(folder, "owner/name")
    stand_in.files["results.json"] = (tmp_path / "r.json").read_bytes()
    with pytest.raises(CheckpointError, match="results of another checkpoint"):
        hub.pull("owner/name", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_cards_quote_foreign_text(tmp_path: Path) -> None:
    """What an SAE made elsewhere calls its model breaks neither the card's table nor the Hub's front matter."""
    folder = dictionary(tmp_path / "d", "AutoEncoder", linear_style(weights()), lm_name="a/b\nlicense: mit | x")
    card = hub.repository_files(folder, None, "owner/name")["README.md"].decode()
    assert "| model | a/b license: mit \\| x |" in card
    assert card.split("---")[1].count("\n") == 2


def test_repository_of_many_downloads_none(stand_in: type[StandIn], tmp_path: Path) -> None:
    """A repository with several checkpoints, or none, is refused before a file of it is downloaded."""
    for names in (["a.safetensors", "b.safetensors"], ["layer_0/a.safetensors"]):
        stand_in.files.clear()
        stand_in.files.update(dict.fromkeys(names, b"x" * 1000))
        with pytest.raises(CheckpointError, match=f"found {len(names) if len(names) > 1 else 0} checkpoints"):
            pipeline.load("owner/name")
    assert not [path for path in stand_in.seen if "/resolve/" in path]


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: "+".join(known.files))
def test_formats_need_their_files_alone(known: Format) -> None:
    """Of each foreign format a repository's folder gives the files that are read, all of them, and no other."""
    noise = [
        ".gitattributes",
        "optimizer.pt",
        "a/optimizer.pt",
        "a/sparsity.npy",
        *(f"b/{name}" for name in known.files),
    ]
    names = [*noise, *(f"a/{name}" for name in known.files)]
    assert hub.wanted_within("owner/name", names, "a") == [f"a/{name}" for name in known.files]


def test_suite_folder_is_downloaded_alone(stand_in: type[StandIn], tmp_path: Path) -> None:
    """owner/name/folder reads the SAE in that folder of a suite and downloads nothing else; one that is not there is named."""
    packed = io.BytesIO()
    shapes = {"W_enc": (8, 12), "W_dec": (12, 8), "b_enc": (12,), "b_dec": (8,), "threshold": (12,)}
    np.savez(packed, **{name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    for layer in (19, 20):
        stand_in.files[f"layer_{layer}/width_16k/average_l0_71/params.npz"] = packed.getvalue()
    assert pipeline.load("owner/name/layer_20/width_16k/average_l0_71").config.width == 12
    fetched = {path.split("/resolve/")[1].partition("/")[2] for path in stand_in.seen if "/resolve/" in path}
    assert fetched == {"layer_20/width_16k/average_l0_71/params.npz"}
    with pytest.raises(CheckpointError, match=r"owner/name/layer_21: .* found 0 checkpoints among 0 files"):
        pipeline.load("owner/name/layer_21")
    assert (found("owner/name/layer_20/width_16k/average_l0_71") / "params.npz").is_file()
    words = [
        "export",
        "owner/name/layer_19/width_16k/average_l0_71",
        "--format",
        "saelens",
        "--out",
        str(tmp_path / "o"),
    ]
    cli.main(words, standalone_mode=False)
    assert json.loads((tmp_path / "o" / "cfg.json").read_text())["d_sae"] == 12


def test_mistyped_path_asks_no_hub(stand_in: type[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path into a folder that is here is never taken for a repository, of one part or more, wherever an SAE is named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for place in ("runs/l19", "runs/l19/alpha0.2"):
        with pytest.raises(CheckpointError, match="found nothing; runs is a folder here, so it is taken for a path"):
            pipeline.load(place)
        assert hub.hub_id(place) is None
    assert stand_in.seen == []
    assert hub.hub_id("owner/name/a/b") == ("owner/name", "a/b")


def test_only_what_is_needed_is_downloaded(stand_in: type[StandIn], tmp_path: Path) -> None:
    """Other files of a repository stay there."""
    stand_in.files |= {"sae.safetensors": a_checkpoint(tmp_path).read_bytes(), "rows.npy": b"x" * 1000}
    assert pipeline.load("owner/name").config.width == 64
    assert not [path for path in stand_in.seen if "rows.npy" in path]


def test_pulled_results_are_of_the_checkpoint(stand_in: type[StandIn], tmp_path: Path) -> None:
    """Results of another checkpoint in a repository are refused, and nothing is written."""
    checkpoint = a_checkpoint(tmp_path)
    stand_in.files["sae.safetensors"] = checkpoint.read_bytes()
    stand_in.files["results.json"] = json.dumps({"checkpoint": {"sha256": "0" * 64}, "levels": []}).encode()
    with pytest.raises(CheckpointError, match="results of another checkpoint"):
        hub.pull("owner/name", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_evaluated_paths_stay_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that is there, one mistyped in a folder that is, and what is no id are never asked of the Hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    monkeypatch.setattr(hub, "find_checkpoint", lambda source: pytest.fail(f"asked for {source}"))
    for place in ("runs/a", "runs/b", "runs", str(tmp_path / "x" / "y"), "one"):
        assert found(place) == Path(place)


def test_transcoder_card_runs(tmp_path: Path) -> None:
    """The card of a transcoder names both points, and its example is one that runs."""
    sae = NestedSAE(SAEConfig(8, 16, (4, 16), d_out=6, skip=True))
    of = {"store": {"layer": 19, "hook": "mlp_in", "target": {"layer": 19, "hook": "mlp_out"}}}
    save_checkpoint(tmp_path / "c.safetensors", sae, 1, of)
    card = hub.model_card(read_sae(tmp_path / "c.safetensors"), None, "owner/name")
    assert "A nested (Matryoshka) transcoder" in card
    assert "mlp_in of layer 19 to mlp_out of layer 19" in card
    names = {"sae": sae, "x": torch.zeros(2, 8)}
    exec("\n".join(line for line in card.splitlines() if line.startswith(("z =", "y_hat ="))), names)
    assert names["y_hat"].shape == (2, 6)


def test_model_card_says_the_essentials(tmp_path: Path) -> None:
    """The model card says what it is, how good, and how to load it."""
    checkpoint = a_checkpoint(tmp_path)
    results = hub.read_results(some_results(checkpoint))
    card = hub.model_card(read_sae(checkpoint), results, "owner/name")
    for text in (
        "base_model: google/gemma-2-2b",
        "layer 19",
        "| 16 |",
        "| KL (nats/token) ↓",
        'pipeline.load("owner/name")',
    ):
        assert text in card, text


def test_results_of_others_are_not_pushed(stand_in: type[StandIn], tmp_path: Path) -> None:
    """Results of another checkpoint are not pushed."""
    checkpoint = a_checkpoint(tmp_path)
    write_json(tmp_path / "r.json", {"checkpoint": {"sha256": "0" * 64}, "levels": []})
    with pytest.raises(CheckpointError, match="another checkpoint"):
        hub.push(checkpoint, "owner/name", tmp_path / "r.json")
    assert not stand_in.files


def test_unknown_repository_is_one_error(stand_in: type[StandIn]) -> None:
    """An unknown repository is one clear error."""
    with pytest.raises(CheckpointError, match="owner/none"):
        pipeline.load("owner/none")


def test_load_takes_file_member_or_folder(tmp_path: Path) -> None:
    """Load takes a file, a member folder or a folder with one checkpoint."""
    member = tmp_path / "alpha0.2-seed0"
    (member / "checkpoints").mkdir(parents=True)
    checkpoint = a_checkpoint(member / "checkpoints")
    with pytest.raises(CheckpointError, match="not finished"):
        pipeline.load(member)
    write_json(
        member / "complete.json", {"final": "checkpoints/step_000005.safetensors", "sha256": hash_file(checkpoint)}
    )
    for source in (checkpoint, str(checkpoint), member, member / "checkpoints"):
        assert pipeline.load(source).config.width == 64
    with pytest.raises(CheckpointError, match="found nothing"):
        pipeline.load(tmp_path / "nothing")
