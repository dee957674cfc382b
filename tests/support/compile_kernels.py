"""Compile every kernel of a step for GPUs that are not here, as the step would launch it, and say what each takes.

    python tests/support/compile_kernels.py --target 80 --target 90 --shape 2304x16384

Prints JSON: {"sm_90 2304x16384": {"adam_rows_kernel": {"registers": 128, "spills": 0, "shared": 32}, …}, …}; of launches of
one kernel with different options, the one that takes most registers. Spills are bytes of local memory a thread.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import click
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from evaluate.scores.vocabulary import clean_arguments, clean_kernel, compare_arguments, compare_kernel
from train.config import RECIPES, TrainConfig
from train.step import traffic
from train.step.fused.batch import FusedBatches
from train.step.fused.step import FusedMember
from train.step.scratch import Scratch
from train.step.traffic import Launch

META = torch.device("meta")
CONFIGS: dict[str, dict[str, Any]] = {
    "batchtopk, 2 levels": {"recipe": "batchtopk"},
    "batchtopk, float32, 5 levels": {
        "recipe": "batchtopk",
        "dtype": "float32",
        "levels": (0.0625, 0.125, 0.25, 0.5, 1),
    },
    "topk": {"recipe": "topk"},
    "topk, sparse": {"recipe": "topk", "sparse": True},
    "batchtopk, sparse, float32, 5 levels": {
        "recipe": "batchtopk",
        "dtype": "float32",
        "levels": (0.0625, 0.125, 0.25, 0.5, 1),
        "sparse": True,
    },
    "jumprelu": {"recipe": "jumprelu"},
    "paper, LayerNorm before": {"recipe": "paper"},
    "paper, LayerNorm after": {"recipe": "paper", "layernorm": "post"},
    "vocabulary": {},
}
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def launches_of(name: str, d_model: int, width: int, rows: int) -> list[Launch]:
    """What two steps of a config launch, latents dead in the second; on tensors without values."""
    changes = {"width": width, "dtype": "bf16"} | CONFIGS[name]
    sparse = changes.pop("sparse", False)
    config: TrainConfig = RECIPES[changes.pop("recipe")](**changes)
    noted: list[Launch] = []
    center = torch.zeros(d_model, device=META)
    member = FusedMember(config, d_model, center, 1.0, META, Scratch(META), is_sparse=sparse)
    member.before_first.clear()
    member.n_steps = config.sparsity_warmup_steps
    raw = torch.zeros(rows, d_model, dtype=torch.bfloat16, device=META)
    traffic.observers.append(noted.append)
    try:
        batch = FusedBatches(Scratch(META)).normalise(raw, member.center, 1.0)
        member.step(batch)
        member.n_rows = config.dead_after_rows
        member.step(batch)
    finally:
        traffic.observers.clear()
    return noted


def vocabulary_launches(rows: int) -> list[Launch]:
    """The pass over Gemma-2's vocabulary, bf16 logits before the soft cap and after it."""
    made = []
    for cap in (30.0, None):
        logits = torch.zeros(rows, 256_000, dtype=torch.bfloat16, device=META)
        p, of_row = torch.zeros(rows, 256_000, device=META), torch.zeros(rows, dtype=torch.int64, device=META)
        out, entropy = torch.zeros(3, rows, device=META), torch.zeros(rows, device=META)
        arguments, options = compare_arguments(logits, of_row, p, of_row, of_row, entropy, out, cap)
        made.append(Launch(compare_kernel, (rows,), arguments, options, [], [], {}))
        arguments, options = clean_arguments(logits, of_row, p, of_row, out[:2], cap)
        made.append(Launch(clean_kernel, (rows,), arguments, options, [], [], {}))
    return made


def source_of(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile for a launch: types, constants, divisibility by 16 of pointers and sizes."""
    names = launch.kernel.arg_names
    constants = {name: value for name, value in launch.options.items() if name in names}
    options = {name: value for name, value in launch.options.items() if name not in names} | {"enable_fp_fusion": True}
    signature, attributes = {}, {}

    def type_of(value: Any, *path: int) -> Any:
        """Of an argument, or of each in a bundle of them."""
        if isinstance(value, tuple):
            return type(value)(*(type_of(part, *path, index) for index, part in enumerate(value)))  # type: ignore[arg-type]
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"

    for index, (name, value) in enumerate(zip(names, launch.arguments)):
        if isinstance(value, int) and value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = type_of(value, index)
    signature |= {name: "constexpr" for name in names if name in constants}
    return ASTSource(launch.kernel, signature, constants, attributes), options


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, bytes of local memory a thread, bytes of shared memory a program."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", said)}
    return {"registers": found["REG"], "spills": found["LOCAL"] + found["STACK"], "shared": found["SHARED"]}


def compiled(launch: Launch, target: GPUTarget) -> dict[str, int]:
    """What a launch's kernel takes on the target."""
    source, options = source_of(launch)
    made = triton.compile(source, target=target, options=options)
    return resources(made.asm["cubin"]) | {"shared": made.metadata.shared}


@click.command(help=__doc__)
@click.option("--target", "targets", multiple=True, type=int, default=(80, 90, 100))
@click.option("--shape", "shapes", multiple=True, default=("576x4608", "2304x16384", "4096x32768"))
@click.option("--config", "names", multiple=True, type=click.Choice(list(CONFIGS)), default=tuple(CONFIGS))
@click.option("--rows", default=2048)
def main(targets: tuple[int, ...], shapes: tuple[str, ...], names: tuple[str, ...], rows: int) -> None:
    done: dict[Any, dict[str, int]] = {}
    table: dict[str, dict[str, dict[str, int]]] = {}
    for shape in shapes:
        d_model, width = (int(number) for number in shape.split("x"))
        noted = [
            launch
            for name in names
            for launch in (
                vocabulary_launches(rows) if name == "vocabulary" else launches_of(name, d_model, width, rows)
            )
        ]
        for capability in targets:
            target = GPUTarget("cuda", capability, 32)
            rows_of_table = table.setdefault(f"sm_{capability} {shape}", {})
            for launch in noted:
                source, options = source_of(launch)
                key = (capability, launch.kernel.__name__, source.hash(), str(sorted(options.items())))
                if key not in done:
                    done[key] = compiled(launch, target)
                kept = rows_of_table.setdefault(launch.kernel.__name__, done[key])
                for name, number in done[key].items():
                    kept[name] = max(kept[name], number)
    print(json.dumps(table))


if __name__ == "__main__":
    main()
