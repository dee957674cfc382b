"""Stores as data set repositories of the Hugging Face Hub: pushed as they lie, with a card; pulled by `staging.stage`.

A repository holds the store at its top, so that hf://datasets/owner/name is a URL like any other: `python -m train --store` reads
from there too. The root's zarr.json comes last; without it nothing is a store. Tokens are found by huggingface_hub itself.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.base import network
from pipeline.base.errors import DamagedError, MismatchError, StoreError
from pipeline.base.files import PARTIAL, human_bytes, read_bytes
from pipeline.store.layout import extras_of
from pipeline.store.objects import open_files
from pipeline.store.reader import Store, describe_store
from pipeline.store.root import ROOT_KEY, read_root
from pipeline.store.staging import stage

CARD = "README.md"


def url_of(repo_id: str, revision: str | None = None) -> str:
    """Where a repository's store is."""
    return f"hf://datasets/{repo_id}" + (f"@{revision}" if revision else "")


def push_store(path: Path, repo_id: str, *, private: bool = False, quiet: bool = False) -> str:
    """Upload a finished local store, every byte checked, and a card; the address of the last commit.

    Stopped anywhere, the same call goes on: what is there is not uploaded again (by huggingface_hub, which commits large folders
    in parts). Raises DamagedError or StoreError for a store that is not whole, MismatchError where another store is in the
    repository, StoreError for what the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    store = Store.open(path)
    if problems := store.verify(quiet=quiet):
        raise DamagedError(problems[0])
    page = f"https://huggingface.co/datasets/{repo_id}"
    api = HfApi()
    with network.hub_errors(repo_id, StoreError, page):
        options = {"repo_type": "dataset", "exist_ok": True, "private": private}
        network.retried(lambda: api.create_repo(repo_id, **options), repo_id)  # type: ignore[arg-type]
        there = network.retried(lambda: list(api.list_repo_files(repo_id, repo_type="dataset")), repo_id)
        if ROOT_KEY in there and (found := read_root(open_files(url_of(repo_id)))["id"]) != store.id:
            raise MismatchError(
                f"{repo_id}: store {found[:10]}… is there, this is {store.id[:10]}…; use another repository"
            )
        message = f"Activation store {store.id[:10]}"
        ignored = [ROOT_KEY, f"*{PARTIAL}", CARD]
        network.retried(
            lambda: api.upload_folder(
                repo_id=repo_id,
                folder_path=path,
                repo_type="dataset",
                ignore_patterns=ignored,
                commit_message=message,
            ),
            repo_id,
        )
        last = {CARD: store_card(store, repo_id).encode(), ROOT_KEY: read_bytes(path / ROOT_KEY)}
        operations = [CommitOperationAdd(name, data) for name, data in last.items()]
        return str(
            api.create_commit(
                repo_id, operations, commit_message=f"{message}: complete", repo_type="dataset"
            ).commit_url
        )


def pull_store(repo_id: str, path: Path, revision: str | None = None, *, quiet: bool = False) -> Store:
    """Copy a repository's store to a local folder, every byte checked; returns it, opened.

    Stopped anywhere, the same call goes on. Raises as `stage` does.
    """
    return stage(url_of(repo_id, revision), path, quiet=quiet)


def store_card(store: Store, repo_id: str) -> str:
    """Markdown with the Hub's front matter: whose rows these are, what made them, how many, and how to use them."""
    config, described = store.config, describe_store(store)
    corpus = config.get("corpus") or {}
    makers = "; ".join(", ".join(f"{name} {value}" for name, value in sorted(one.items())) for one in store.made_by)
    facts = {
        "model": f"{config['model']} (revision {config['revision'] or 'not pinned'})",
        "hook point": f"{config.get('hook', 'resid_post')}, layer {config['layer']}",
        "rows": f"{store.train.n_rows:,} for training, {store.eval.n_rows:,} for evaluation, of {store.d_model} dimensions",
        "sequences": f"{config['context']} tokens each",
        "corpus": f"{corpus.get('id')} (revision {corpus.get('revision') or corpus.get('sha256')})",
        "stored as": f"{config['dtype']}, codec {config['codec']}, {human_bytes(described['bytes'])}",
        "made by": makers or "not recorded",
        "id": store.id,
    }
    beside = ", ".join(sorted(extras_of(store.attributes)))
    facts |= {"beside the rows": beside} if beside else {}
    return "\n".join(
        [
            "---",
            "tags: [nested-sae, activations, interpretability]",
            "---",
            f"# {repo_id.split('/')[-1]}",
            "",
            "Activations of a language model, a Zarr v3 group that any Zarr reader opens, every byte under a checksum.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {plain(str(value))} |" for name, value in facts.items()),
            "",
            "```",
            f"python -m train --store {url_of(repo_id)} --out runs     # straight from here, window by window",
            f"python -m pipeline pull-store {repo_id} acts.zarr        # a local copy, checked",
            "```",
            "",
        ]
    )


def plain(text: str) -> str:
    """Text of a store's root as a cell of a table."""
    return "".join(c if c.isprintable() and c not in "|<>`" else " " for c in text)[:300]
