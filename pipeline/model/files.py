"""Where a language model's files are: a local folder, or a Hub id resolved once to the folder of its snapshot."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import errors as hub
from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from pipeline.base.errors import ModelError
from pipeline.base.files import hash_file, sha256

WANTED = ("*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors")
"""What is fetched of a Hub repository: config, tokenizer, safetensors weights; never pickles."""

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "added_tokens*", "special_tokens*", "spiece*")


def model_folder(model: str, revision: str | None, *, trust_remote_code: bool = False) -> tuple[Path, str]:
    """The folder with the model's files, and the commit it is at (`local` for a folder).

    Raises ModelError when there is neither, or the Hub refuses it, saying what to do.
    """
    local = Path(model).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ModelError(f"{local}: not a Hugging Face model folder, it has no config.json")
        return local, "local"
    if model.startswith((".", "/", "~")) or "/" in model.partition("/")[2]:
        raise ModelError(
            f"{local}: no such folder; give a Hugging Face model folder or a Hub id such as google/gemma-2-2b"
        )
    patterns = [*WANTED, "*.py"] if trust_remote_code else list(WANTED)
    with hub_errors(model):
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    return folder, folder.name


def weights_sha256(folder: Path) -> str:
    """Hash over the names and contents of the safetensors files in a model folder; reads them all."""
    files = sorted(folder.glob("model*.safetensors"))
    return sha256("".join(f"{path.name} {hash_file(path)}\n" for path in files))


def tokenizer_sha256(folder: Path) -> str:
    """Hash over the names and contents of the tokenizer's files in a model folder."""
    files = sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})
    return sha256("".join(f"{path.name} {hash_file(path)}\n" for path in files))


@contextlib.contextmanager
def hub_errors(model: str) -> Iterator[None]:
    """Turn what the Hub and transformers say into one ModelError line with the next step."""
    page = f"https://huggingface.co/{model}"
    try:
        yield
    except ModelError:
        raise
    except hub.GatedRepoError as error:
        raise ModelError(
            f"{model}: gated; accept its licence at {page} while signed in, make a read token at "
            "https://huggingface.co/settings/tokens, then run `hf auth login` (or set HF_TOKEN) and try again"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ModelError(f"{model}: no such revision on the Hub; see {page}/commits") from error
    except hub.RepositoryNotFoundError as error:
        raise ModelError(
            f"{model}: neither a folder here nor a model you may see on the Hub; check the name, or for a private or gated "
            f"model accept its terms at {page} and run `hf auth login` (or set HF_TOKEN)"
        ) from error
    except hub.LocalEntryNotFoundError as error:
        raise ModelError(
            f"{model}: no such folder, not in the Hub's cache, and the Hub cannot be reached; give a folder, or "
            f"download it where there is a network (`hf download {model}`)"
        ) from error
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "; pass --trust-remote-code to run the model's own code" if "trust_remote_code" in str(error) else ""
        raise ModelError(f"{model}: cannot be loaded ({first}){hint}") from error
