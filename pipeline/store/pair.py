"""Two stores of the same tokens: what one hook point holds where another holds something else, row by row."""

from __future__ import annotations

from pipeline.base.errors import MismatchError
from pipeline.store.reader import Store


def require_same_rows(store: Store, target: Store) -> None:
    """Raise MismatchError, naming both, unless row r of either is of the same token of the same model, and neither leaves
    out a position that the other has.

    Compared are the hashes of tokens and of special positions, sequences, context, and the model's weights; and how rows
    are chunked, in which they are shuffled. One pass of harvest makes such stores.
    """
    if store.id == target.id:
        raise MismatchError(f"{target.where}: is the store itself; leave --target out to train an SAE on it")
    if not (store.layout.has_tokens and target.layout.has_tokens):
        bare = target if store.layout.has_tokens else store
        raise MismatchError(
            f"{bare.where}: its rows are of no text, so nothing says which rows of another store are theirs"
        )
    for what, one, other in (
        ("model weights", store.config["weights_sha256"], target.config["weights_sha256"]),
        ("context", store.context, target.context),
        ("sequences", store.attributes["n_sequences"], target.attributes["n_sequences"]),
        ("tokens", store.attributes["tokens_sha256"], target.attributes["tokens_sha256"]),
        ("special positions", store.attributes["special_sha256"], target.attributes["special_sha256"]),
        ("rows a chunk", store.layout.chunk_rows, target.layout.chunk_rows),
    ):
        if one != other:
            raise MismatchError(
                f"{target.where}: its rows are not those of {store.where}: {what} {shown(other)}, there {shown(one)}; harvest "
                "both in one pass, as --hook mlp_in --hook mlp_out does"
            )


def shown(value: object) -> str:
    """A value in a few words: hashes by their first digits."""
    if isinstance(value, dict):
        return " ".join(f"{name} {shown(one)}" for name, one in sorted(value.items()))
    return value[:10] if isinstance(value, str) else str(value)
