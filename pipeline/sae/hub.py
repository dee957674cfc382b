"""SAEs that travel, ours and others': load one from a path or the Hugging Face Hub, push one with a model card, pull one.

The Hub is reached through huggingface_hub alone, which finds the user's token itself; no token is read, printed or
stored here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.base import network
from pipeline.base.digests import DIGESTS, is_sealed, vouch
from pipeline.base.errors import CheckpointError
from pipeline.base.fields import Fields
from pipeline.base.files import read_bytes, read_json, write_alone
from pipeline.sae.checkpoint import Header
from pipeline.sae.foreign.reader import (
    FORMATS,
    folder_of,
    is_foreign,
    load_sae,
    read_sae,
    require_format,
    sha256_of,
    stays_itself,
)
from pipeline.sae.member import final_checkpoint, read_completion
from pipeline.sae.nested import NestedSAE

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/([\w-][\w.-]*(?:/[\w-][\w.-]*)*))?")
"""owner/name, and a folder in the repository."""
WEIGHTS, RESULTS = "sae.safetensors", "results.json"


def load(source: str | Path, device: torch.device | str = "cpu") -> NestedSAE:
    """An SAE ready for `encode`, `decode` and `decode_level` on raw residuals.

    `source`: a checkpoint file, a member's folder (its final checkpoint), a folder with one checkpoint, one of another
    trainer (`pipeline.sae.foreign`), or the id of a Hub repository ("owner/name"), with a folder in it where it holds many
    ("google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"). Raises CheckpointError when there is none or more than one.
    """
    return load_sae(find_checkpoint(source), device)[0]


def find_checkpoint(source: str | Path) -> Path:
    """The one checkpoint file, or folder made elsewhere, that `source` means (see `load`). Raises CheckpointError."""
    path = folder_of(Path(source))
    if path.is_file():
        return path
    if path.is_dir():
        return checkpoint_in(path)
    if named := hub_id(source):
        repo_id, folder = named
        return checkpoint_in(download(repo_id, folder=folder) / folder)
    shadowed = isinstance(source, str) and HUB_ID.fullmatch(source) is not None
    here = f"; {path.parts[0]} is a folder here, so it is taken for a path" if shadowed else ""
    raise CheckpointError(
        f"{source}: expected a checkpoint, a folder with one, or a Hub id owner/name; found nothing{here}"
    )


def hub_id(source: str | Path) -> tuple[str, str] | None:
    """Repository, and folder in it, of what is an id on the Hub: text of that form which is no path here, nor meant for one,
    since nothing here has its first part's name."""
    named = HUB_ID.fullmatch(source) if isinstance(source, str) else None
    if named is None or Path(Path(named[0]).parts[0]).exists():
        return None
    return named[1], named[2] or ""


def checkpoint_in(folder: Path) -> Path:
    """The final checkpoint of a member's folder, the only one of another, or the folder of another trainer itself.

    Raises CheckpointError.
    """
    if is_foreign(folder):
        return folder
    if (completion := read_completion(folder)) is not None:
        return final_checkpoint(folder, completion)
    if (folder / "checkpoints").is_dir():
        raise CheckpointError(f"{folder}: training is not finished; name one of its checkpoints, or finish it")
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise CheckpointError(f"{folder}: expected one checkpoint, found {len(found)}; name the file")
    return found[0]


def wanted_files(repo_id: str, names: Collection[str]) -> list[str]:
    """Which files of a repository its one SAE needs, and what is said of it. Raises CheckpointError when there is none or more
    than one: before anything is downloaded."""
    about = [name for name in (RESULTS, "README.md") if name in names]
    for known in FORMATS:  # before ours: sparsify's weights have the name of ours, beside a config
        if all(name in names for name in known.files):
            return [*known.files, *(name for name in (DIGESTS,) if name in names), *about]
    if WEIGHTS in names:
        return [WEIGHTS, *about]
    if "complete.json" in names:
        return ["complete.json", "config.json", *(name for name in names if name.startswith("checkpoints/"))]
    found = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if len(found) != 1:
        raise CheckpointError(
            f"{repo_id}: expected one SAE at its top, found {len(found)} checkpoints among {len(names)} files; name the folder "
            f"of the one you want, as {repo_id}/FOLDER, or download it (`hf download`) and give its path"
        )
    return [*found, *about]


def wanted_within(repo_id: str, names: Collection[str], folder: str) -> list[str]:
    """`wanted_files` of a folder of a repository; "" is its top. Raises CheckpointError."""
    if not folder:
        return wanted_files(repo_id, names)
    inside = [name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")]
    return [f"{folder}/{name}" for name in wanted_files(f"{repo_id}/{folder}", inside)]


def download(repo_id: str, revision: str | None = None, folder: str = "") -> Path:
    """Folder of a Hub repository's snapshot in the user's cache, with what the one SAE at its top or in a folder needs; what is
    cached already serves without a network. Raises CheckpointError with what to do."""
    from huggingface_hub import HfApi, snapshot_download

    with network.hub_errors(repo_id, CheckpointError, f"https://huggingface.co/{repo_id}"):
        try:
            names = network.retried(lambda: HfApi().list_repo_files(repo_id, revision=revision), repo_id)
        except Exception as error:
            if network.first_of(error, *network.lost()) is None:
                raise
            names = None  # what is cached may do
        wanted = None if names is None else wanted_within(repo_id, names, folder)
        return Path(
            network.retried(lambda: snapshot_download(repo_id, revision=revision, allow_patterns=wanted), repo_id)
        )


def named_place(name: str) -> tuple[str, str]:
    """Repository, and folder in it ("" for its top), of an id that is no path: what the Hub does not allow it says itself."""
    named = HUB_ID.fullmatch(name)
    return (named[1], named[2] or "") if named else (name, "")


def push(source: str | Path, name: str, results: Path | None = None, private: bool = False) -> str:
    """Upload a checkpoint, or the files of an SAE made elsewhere as they are, its model card and its results (if given) to a
    repository, or a folder in one; the address of the commit.

    Raises CheckpointError when the results are of another SAE, when only its old path says what an SAE is of, or the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    checkpoint, (repo_id, folder) = find_checkpoint(source), named_place(name)
    files = repository_files(checkpoint, results, repo_id, folder)
    operations = [CommitOperationAdd(f"{folder}/{file}".lstrip("/"), data) for file, data in files.items()]
    api = HfApi()
    with network.hub_errors(repo_id, CheckpointError, f"https://huggingface.co/{repo_id}"):
        network.retried(lambda: api.create_repo(repo_id, exist_ok=True, private=private), repo_id)
        header = read_sae(checkpoint)
        made = header.provenance.get("source")
        message = f"SAE of {made}" if made else f"Nested SAE, step {header.step}"
        # a commit is not tried again: one whose answer alone was lost would be there twice
        return str(api.create_commit(repo_id, operations, commit_message=message).commit_url)


def pull(name: str, out: Path, revision: str | None = None) -> Path:
    """Copy the SAE of a repository, or of a folder in one, and its results into `out` under their own names, checked; its path.

    Raises CheckpointError when the results are of another SAE, or only the SAE's path says what it is of, and `out` another.
    """
    repo_id, folder = named_place(name)
    there = download(repo_id, revision, folder) / folder
    found = checkpoint_in(there)
    load_sae(found)
    if (there / RESULTS).exists():
        require_results_of(found, read_results(there / RESULTS))
    if found.is_dir():
        if not stays_itself(found, out):
            path = "/".join(part for part in (repo_id.split("/")[-1], folder) if part)
            raise CheckpointError(f"{name}: only its path says what it is of; give an --out that ends in {path}")
        (out / DIGESTS).unlink(missing_ok=True)
        for file in sae_files(found):
            copy(found / file, out / file)
    else:
        copy(found, out / found.name)
    for file in (RESULTS, "README.md"):
        if (there / file).exists():
            copy(there / file, out / file)
    if (out / "README.md").exists():
        vouch(out / "README.md")
    return out if found.is_dir() else out / found.name


def sae_files(folder: Path) -> list[str]:
    """Names of what an SAE made elsewhere consists of, and of their digests where it has some."""
    return [*require_format(folder).files, *(name for name in (DIGESTS,) if (folder / name).is_file())]


def copy(source: Path, target: Path) -> None:
    """Copy a file atomically; what a killed copy left is swept."""
    write_alone(target, read_bytes(source))


def read_results(path: Path) -> Fields:
    """A results file. Raises DamagedError."""
    fields = Fields(path, read_json(path))
    is_sealed(path, fields.data)
    return fields


def require_results_of(checkpoint: Path, results: Fields) -> None:
    """Raise CheckpointError unless results are of this checkpoint."""
    if results.inner("checkpoint").text("sha256") != sha256_of(checkpoint):
        raise CheckpointError(
            f"{results.path}: results of another checkpoint than {checkpoint}; evaluate this one first"
        )


def repository_files(checkpoint: Path, results: Path | None, repo_id: str, folder: str = "") -> dict[str, bytes]:
    """What a repository, or a folder in one, holds: weights, card, and results. Raises CheckpointError when the results are of
    another SAE, or the path that one made elsewhere has now is all that says what it is of."""
    header = load_sae(checkpoint)[1]
    if checkpoint.is_dir():
        if not stays_itself(checkpoint, Path("/", f"models--{repo_id.replace('/', '--')}", "snapshots", "0", folder)):
            raise CheckpointError(
                f"{checkpoint}: only its path says what it is of; push it to OWNER/NAME/FOLDER where NAME/FOLDER is the path's "
                f"end, or an export of it: python -m pipeline export {checkpoint} --format saelens --out FOLDER"
            )
        files = {name: read_bytes(checkpoint / name) for name in sae_files(checkpoint)}
    else:
        files = {WEIGHTS: read_bytes(checkpoint)}
    data = read_results(results) if results else None
    if data is not None:
        require_results_of(checkpoint, data)
    files["README.md"] = model_card(header, data, f"{repo_id}/{folder}".rstrip("/")).encode()
    if results:
        files[RESULTS] = read_bytes(results)
    return files


def hook_point(store: Mapping[str, Any]) -> str:
    """Where an SAE's rows come from, in words."""
    hook, layer = store.get("hook", "resid_post"), store.get("layer")
    if hook is None:
        return "rows of a place that nobody named"
    where = "a layer that it does not say" if layer is None else f"layer {layer}"
    return hook if hook == "embed" else f"{'residual stream after' if hook == 'resid_post' else f'{hook} of'} {where}"


def card_facts(header: Header) -> dict[str, str]:
    """What a card's table says of an SAE: by name, in words."""
    sae, store, train = header.sae, header.provenance.get("store") or {}, header.provenance.get("train") or {}
    made = header.provenance.get("source")
    reads = hook_point(store) if "hook" in store or not made else "not said"
    levels = ", ".join(f"{m:,}" for m in sae.levels)
    facts = {
        "hook point": reads + (f" to {hook_point(store.get('target') or {})}" if sae.is_transcoder else ""),
        "width": f"{sae.width:,} latents" + (f" in levels of {levels}" if sae.n_levels > 1 else ""),
        "activation": sae.activation
        + (f", k = {sae.k}" if sae.k else "")
        + f", LayerNorm {sae.layernorm}"
        + ", each row normalised by itself" * sae.row_norm,
    }
    if made:
        return {"made with": f"{made}, its files as they were", "model": str(store.get("model") or "not said")} | facts
    rows_seen = header.provenance.get("rows_seen") or 0
    return {
        "model": f"{store.get('model')} (revision {store.get('revision') or 'not pinned'})",
        **facts,
        "recipe": f"{train.get('recipe')}, α = {train.get('alpha')}, seed {train.get('seed')}",
        "trained on": f"{rows_seen:,} rows in {header.step:,} steps, context {store.get('context')}",
        "code": str(header.provenance.get("git")),
    }


def model_card(header: Header, results: Fields | None, name: str) -> str:
    """Markdown with the Hub's front matter: what the SAE is, what made it, its scores, and how to load it by its name there."""
    sae, store = header.sae, header.provenance.get("store") or {}
    kind, made = ("transcoder", "y_hat") if sae.is_transcoder else ("sparse autoencoder", "x_hat")
    nested, base = sae.n_levels > 1, str(store.get("model"))
    rows_too = ", x" if sae.needs_rows else ""
    lines = [
        "---",
        *([] if header.provenance.get("source") else ["library_name: nested-sae"]),
        f"tags: [sparse-autoencoder, {'matryoshka, ' * nested}interpretability]",
        *([f"base_model: {base}"] if base.count("/") == 1 and HUB_ID.fullmatch(base) else []),
        "---",
        f"# {name.split('/')[-1]}",
        "",
        f"A nested (Matryoshka) {kind}: every prefix of its dictionary is a dictionary too."
        if nested
        else f"A {kind}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {fact} | {in_cell(value)} |" for fact, value in card_facts(header).items()),
        "",
        *score_table(results),
        "```python",
        "import pipeline",
        f'sae = pipeline.load("{name}")  # takes raw rows',
        "z = sae.encode(x)",
        f"{made} = sae.decode(z{rows_too})"
        + f"  # sae.decode_level(z, 0{rows_too}): the shared dictionary alone" * nested,
        "```",
        "",
    ]
    return "\n".join(lines)


def in_cell(text: str) -> str:
    """Foreign text as one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def score_table(results: Fields | None) -> list[str]:
    """Markdown rows of the main scores by level, with unit and direction; empty without results."""
    if results is None:
        return []
    from pipeline.definitions import METRICS

    names = ("kl_nats", "kl_score", "ce_score", "ev", "l0", "dead")
    arrows = {"lower": "↓", "higher": "↑", "neither": ""}
    titles = [f"{METRICS[name].label} ({METRICS[name].unit}) {arrows[METRICS[name].better]}".strip() for name in names]
    lines = ["| latents | " + " | ".join(titles) + " |", "|---" * (len(names) + 1) + "|"]
    for level in results.objects("levels"):
        scores = level.numbers_or_nulls("scores")
        values = [scores.get(name) for name in names]
        cells = ["–" if value is None else f"{value:.4g}" for value in values]
        lines.append(f"| {level.whole('n_latents'):,} | " + " | ".join(cells) + " |")
    return [*lines, ""]
