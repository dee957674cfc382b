"""python -m harvest: the language model's residual stream over a corpus, into an activation store."""

from __future__ import annotations

if __name__ == "__main__":
    from pipeline.base import startup  # before what takes time to import

    startup.begin()

from typing import Any

import click
from click.core import ParameterSource

from harvest.config import HarvestConfig
from pipeline.base.cli import COUNT, NAMED_SOURCE, OUT_STORE, WHOLE, main, only_reads, print_json
from pipeline.base.errors import UsageError
from pipeline.model.points import HOOKS

DEFAULTS = {name: field.default for name, field in HarvestConfig.__dataclass_fields__.items()}


class Names(click.ParamType[tuple[str, ...]]):
    """Names with commas between them."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return (
            value if isinstance(value, tuple) else tuple(name.strip() for name in str(value).split(",") if name.strip())
        )


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option(
    "--truth",
    type=NAMED_SOURCE,
    help="Rows of known features instead of a model: a spec (TOML), or the name of a shipped one: tree, forest, large.",
)
@click.option("--model", type=NAMED_SOURCE, default=DEFAULTS["model"], help="Hugging Face model: a folder or a Hub id.")
@click.option(
    "--revision", help="Branch, tag or commit of a Hub model. [default: its main branch; the commit is recorded]"
)
@click.option(
    "--layer",
    "layers",
    type=WHOLE,
    multiple=True,
    default=DEFAULTS["layers"],
    help="Decoder layer model.layers[LAYER], from 0. Give it several times for several layers in one pass.",
)
@click.option(
    "--hook",
    "hooks",
    type=click.Choice(HOOKS),
    multiple=True,
    default=DEFAULTS["hooks"],
    help="Where at that layer: resid_post, the residual stream after it; resid_pre before it; resid_mid between attention and "
    "MLP; attn_out, mlp_out: what they add; mlp_in: what the MLP reads, behind its norm; embed: the stream before layer 0. "
    "Several: one pass, one store each.",
)
@click.option(
    "--corpus",
    type=NAMED_SOURCE,
    default=DEFAULTS["corpus"],
    help="A Hub data set, streamed, or a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt; those of text also .zst, "
    ".gz, .bz2, .xz), a folder of them, or one that datasets saved.",
)
@click.option("--subset", help="Subset (configuration) of a data set.")
@click.option("--split", default=DEFAULTS["split"], help="Split of a data set.")
@click.option(
    "--text-field",
    default=DEFAULTS["text_field"],
    help="Field or column that holds the text, or a.b for nested ones. A list of token ids is taken as it is, a list of "
    "messages is written with the tokenizer's chat template.",
)
@click.option(
    "--parse-special",
    is_flag=True,
    help="Read special tokens' names in texts (the turn markers of chats) as those tokens. Off, since a corpus could then "
    "forge them.",
)
@click.option(
    "--roles",
    type=Names(),
    default=(),
    show_default=False,
    help="Of chats: keep only tokens of messages of these roles, as assistant or user,assistant. [default: all]",
)
@click.option(
    "--skip-bad", type=COUNT, default=DEFAULTS["skip_bad"], help="Records that may be passed over, each named."
)
@click.option(
    "--eval-corpus",
    type=NAMED_SOURCE,
    help="Separate corpus for the evaluation split. [default: the first documents of --corpus]",
)
@click.option(
    "--tokens",
    type=COUNT,
    default=DEFAULTS["tokens"],
    help="Training tokens, BOS included: 10000000, 10_000_000 or 10M. More than the store has extends it.",
)
@click.option("--eval-tokens", type=COUNT, help="Evaluation tokens, on top. [default: a twentieth of --tokens]")
@click.option("--context", type=WHOLE, default=DEFAULTS["context"], help="Tokens of a sequence, BOS included.")
@click.option(
    "--store",
    type=OUT_STORE,
    required=True,
    help="Where to write: PATH, or for several layers or hooks PATH/layer_L.zarr, PATH/layer_L.HOOK.zarr each; or a URL.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bf16", "float32"]),
    default=DEFAULTS["dtype"],
    help="What the model computes in. auto: bf16 where the hardware multiplies it, else float32 (exact: never TF32); what "
    "a store was made with, when it goes on.",
)
@click.option(
    "--store-dtype",
    type=click.Choice(["auto", "bf16", "float32"]),
    default=DEFAULTS["store_dtype"],
    help="What is stored. auto: what --dtype says, and bf16 without it.",
)
@click.option("--device", default=DEFAULTS["device"], help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--batch-size",
    type=WHOLE,
    help="Sequences of a forward pass. [default: for the device, halved on a GPU until it fits; recorded]",
)
@click.option("--seed", type=WHOLE, default=DEFAULTS["seed"], help="Order of documents, then of sequences.")
@click.option(
    "--bos",
    default=DEFAULTS["bos"],
    help="First token of every sequence, or tokens. auto: what the tokenizer itself puts first; none; or a token ID, or ID,ID.",
)
@click.option(
    "--attention",
    default=DEFAULTS["attention"],
    help="Attention implementation of transformers: eager, sdpa, … (Gemma-2 is defined with eager).",
)
@click.option(
    "--compile", is_flag=True, help="torch.compile the layers. Rows are then not bit for bit the plain model's."
)
@click.option(
    "--device-map",
    type=click.Choice(["auto", "balanced", "sequential"]),
    help="Spread the layers of a model too large for one GPU over all of them, as transformers does it (needs accelerate).",
)
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
@click.option(
    "--max-buffer", type=COUNT, default=DEFAULTS["max_buffer"], help="Documents within which streams are shuffled."
)
@click.option("--chunk-rows", type=COUNT, help="Rows read at once. [default: about 1024, whole sequences]")
@click.option(
    "--shard-rows",
    type=COUNT,
    help="Rows of a file, a multiple of --chunk-rows. [default: 64 chunks, of large stores up to 1024]",
)
@click.option(
    "--codec",
    type=click.Choice(["none", "lz4", "zstd"]),
    default=DEFAULTS["codec"],
    help="Compression. Measured: lz4 1.2 times smaller and read 4 times slower, zstd 1.27 and 8 times; training can map "
    "only none.",
)
@click.option(
    "--mixed",
    is_flag=True,
    help="Go on with another torch, transformers or GPU than made the rows that are there: they differ in their last bits. The "
    "store records all of them.",
)
@click.option(
    "--prepare-only",
    is_flag=True,
    help="Tokenise and prepare the store, make no rows. With --part: tokenise only that part of the documents.",
)
@click.option(
    "--part",
    metavar="I/N",
    help="Make the rows of part I of N, from 0/N on, of a store that is prepared: for job arrays. N may be many more than run at "
    "once.",
)
@click.option("--finish-only", is_flag=True, help="Finish a store whose parts are made, or name those that are not.")
@click.option("--dry-run", is_flag=True, help="Say what would be done and how large it would be, and stop.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print the plan as JSON, for train --planned.")
@click.option("--repair", is_flag=True, help="Read everything, and make again exactly what is damaged or gone.")
def command(
    layers: tuple[int, ...],
    hooks: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    repair: bool,
    prepare_only: bool,
    part: str | None,
    finish_only: bool,
    truth: str | None,
    **options: Any,
) -> None:
    """Run a language model over text and keep its residual stream after a layer, for training SAEs from disk.

    Makes a Zarr store with the rows of one layer: training and evaluation split, token ids, norms, mean and scale.
    Size: 4.6 kB a token for Gemma-2-2B in bf16, so 46 GB for 10M tokens. Stopped at any moment, the same command goes
    on; under torchrun several processes share the shards, and the bytes are the same.

    \b
    Example, in a minute on a laptop:
      python -m harvest --model data/tiny-gemma2 --layer 3 --corpus data/corpus/train.jsonl.zst \\
                        --tokens 200k --store runs/acts.zarr
    Production, on one GPU (first accept the licence of google/gemma-2-2b on the Hub, then `hf auth login`):
      python -m harvest --layer 19 --tokens 10M --store /data/gemma-2-2b-19.zarr
    Rows whose features are known, for scores against the truth, in seconds:
      python -m harvest --truth forest --tokens 2M --store runs/forest.zarr
    """
    if as_json and not dry_run:
        raise UsageError("--json goes with --dry-run")
    if truth is not None and (prepare_only or part or finish_only):
        raise UsageError("--truth runs whole, in seconds; leave out --prepare-only, --part and --finish-only")
    if truth is not None:
        truth_command(truth, options, dry_run, as_json, repair)
        return
    config = HarvestConfig(layers=tuple(layers), hooks=tuple(hooks), **options)
    if only_reads():
        return
    from harvest import run as stage  # here, so that --help does not load torch and transformers
    from harvest.steps import Steps

    steps = Steps.of(prepare_only=prepare_only, part=part, finish_only=finish_only)
    if repair and steps != Steps():
        raise UsageError("--repair reads and mends a whole store; leave out --prepare-only, --part and --finish-only")
    if not dry_run:
        stage.run(config, repair=repair, steps=steps)
    elif (plan := stage.dry_run(config, repair=repair)) and as_json:
        print_json(plan)


def truth_command(truth: str, options: dict[str, Any], dry_run: bool, as_json: bool, repair: bool) -> None:
    """Write the store of a spec. Raises UsageError for an option that only a model has."""
    from harvest.truth.run import TruthConfig, planned_truth, run_truth

    fields = TruthConfig.__dataclass_fields__
    context = click.get_current_context()
    given = [
        name
        for name in (*options, "layers", "hooks")
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE
    ]
    if foreign := [name for name in given if name not in fields]:
        option = {"layers": "layer", "hooks": "hook"}.get(foreign[0], foreign[0].replace("_", "-"))
        raise UsageError(f"--{option}: --truth runs no model over no text")
    config = TruthConfig(truth, **{name: value for name, value in options.items() if name in fields})
    if only_reads():
        return
    if not dry_run:
        run_truth(config, repair=repair)
    elif (plan := planned_truth(config)) and as_json:
        print_json(plan)


if __name__ == "__main__":
    main(command, "harvest", "what is committed stays; run the same command again to go on")
