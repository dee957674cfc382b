"""A member's step on a CUDA device in fused passes (`kernels.py`): the same numbers as `Member`, within rounding.

Between the large products, which are torch's, everything that touches a large array is one pass over it. A step of batchtopk at
d 2304, width 16384, 2048 rows is 34 launches and 3.7 GB, where the plain one is 161 operations and 9.5 GB. What it depends on
beside the contents of tensors is decided on the device: nothing is fetched, and what is not needed (a second search for a
threshold, the auxiliary loss while no latent is dead) is a launch that returns at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from pipeline.base.progress import say
from pipeline.base.runtime import has_triton
from train.config import TrainConfig
from train.step import objectives
from train.step.member import Batch, Member, normalise_batch
from train.step.scratch import Scratch
from train.step.selection import MARGIN
from train.step.sums import Sums
from train.step.traffic import launch

VECTORS = ("b_enc", "ln_gain", "ln_bias", "b_dec", "log_threshold")
"""Weights that one launch updates, in the order in which they lie in memory; the last has a learning rate of its own."""

PENALTIES = {"none": 0, "l1": 1, "l0": 2}
NORMS = {"none": 0, "pre": 1, "post": 2}
SELECTIONS = {"batchtopk": 1, "topk": 2}
TALL, LONG = 4, 512
"""Rows of a program that goes along rows, and numbers of them at a time."""

SQUARES = 1 << 15
"""Gradients whose squares one program sums."""


@functools.cache
def say_plain() -> None:
    """Tell once that steps could be faster."""
    say(
        "Triton is not installed: steps run as plain PyTorch, which moves more than twice the bytes; pip install triton"
    )


def fuses(config: TrainConfig, device: torch.device) -> bool:
    """Whether members of this config (dtype resolved) step in fused passes on the device. Says so where only Triton lacks."""
    if device.type != "cuda" or config.dtype == "float64":
        return False
    if not has_triton():
        say_plain()
        return False
    return True


def member_kind(config: TrainConfig, device: torch.device, *, is_transcoder: bool = False) -> type[Member]:
    """The kind of member that is fastest on the device. Transcoders have no fused step."""
    return FusedMember if not is_transcoder and fuses(config, device) else Member


Normalise = Callable[..., Batch]
"""`normalise_batch`, or what does the same."""


def make_normalise(config: TrainConfig, device: torch.device, scratch: Scratch) -> Normalise:
    """What prepares batches for members of this config."""
    return FusedBatches(scratch).normalise if fuses(config, device) else normalise_batch


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def next_power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


class FusedBatches:
    """`normalise_batch` in two launches; partial sums in the scratch memory given."""

    def __init__(self, scratch: Scratch) -> None:
        self.scratch = scratch

    def normalise(
        self,
        x_raw: Float[Tensor, "row d_model"],
        center: Float[Tensor, " d_model"],
        scale: float,
        out: Batch | None = None,
    ) -> Batch:
        """As `normalise_batch` with a float32 `center`."""
        from train.step import kernels

        if out is None:
            out = normalise_batch(torch.zeros_like(x_raw), center, scale)
        n_rows, d_model = x_raw.shape
        part_rows = 8
        n_parts = ceil_div(n_rows, part_rows)
        parts = self.scratch.take("batch_parts", (n_parts, d_model), torch.float32)
        launch(
            kernels.normalise_kernel,
            (n_parts,),
            [x_raw, center, scale, out.x, out.norm, parts, n_rows, d_model],
            reads=[x_raw, center],
            writes=[out.x, out.norm, parts],
            PART_ROWS=part_rows,
            SIZE=256,
        )
        launch(
            kernels.batch_sums_kernel,
            (ceil_div(d_model, 64),),
            [parts, out.norm, out.total, out.square, n_parts, n_rows, d_model],
            reads=[parts, out.norm],
            writes=[out.total, out.square],
            SIZE=64,
        )
        return out


class FusedMember(Member):
    """A `Member` whose steps run in fused passes; its state, files and numbers are those of any member."""

    def _prepare(self) -> None:
        config, device = self.config, self.device
        names = [name for name in VECTORS if name in self.weights]
        self.vectors = [join(kept, names) for kept in (self.weights, self.adam.first, self.adam.second)]
        self.search = torch.zeros(4, dtype=torch.float32, device=device)
        self.control = torch.zeros(3, dtype=torch.float32, device=device)
        self.norm = torch.zeros((), dtype=torch.float64, device=device)
        self.l0 = torch.zeros((), dtype=torch.float64, device=device)
        self.bins = [torch.zeros(1 << bits, dtype=torch.int32, device=device) for bits in self._bins_bits()]
        self.tables: dict[tuple[Any, ...], Tensor] = {}
        layernorm = self.shape.layernorm
        self.flags: dict[str, Any] = {
            "NORM": NORMS[layernorm],
            "RESCALE": layernorm != "none" and self.shape.layernorm_rescale,
        }
        self.kind = int(config.activation == "jumprelu")

    def _bins_bits(self) -> list[int]:
        """Histograms that batchtopk's threshold is found by: the upper bits, and where products are not bf16 the others."""
        if self.config.activation != "batchtopk":
            return []
        return [15] if self.dtype == torch.bfloat16 else [15, 16]

    def _table(self, numbers: Sequence[float] | Sequence[int], dtype: torch.dtype) -> Tensor:
        """Numbers of the config as a tensor on the device, made once."""
        key = (tuple(numbers), dtype)
        if key not in self.tables:
            self.tables[key] = torch.tensor(numbers, dtype=dtype, device=self.device)
        return self.tables[key]

    def _wide(self, name: str, *shape: int) -> Tensor:
        return self.scratch.take(name, shape, torch.float32)

    def _changed(self) -> dict[str, Tensor]:
        bins = {f"bins{n}": bins for n, bins in enumerate(self.bins)}
        return super()._changed() | bins | {"search": self.search}

    def _step(self, batch: Batch) -> None:
        step = FusedStep(self, batch)
        step.forward()
        step.backward()
        step.update()


def join(parts: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """The named tensors in one, of which they are views from now on."""
    joined = torch.cat([parts[name] for name in names])
    for name, view in zip(names, torch.split(joined, [len(parts[name]) for name in names])):
        parts[name] = view
    return joined


class FusedStep:
    """One step of a member on a batch: forward, backward, update, in this order."""

    def __init__(self, member: FusedMember, batch: Batch) -> None:
        from train.step import kernels

        self.kernels = kernels
        self.member = member
        self.batch = batch
        config, shape = member.config, member.shape
        self.config = config
        self.n_rows, self.d_model = batch.x.shape
        self.width = config.width
        self.n_rows_all = member._n_rows(batch)
        self.ends = member._table(shape.levels, torch.int32)
        self.n_levels = shape.n_levels
        self.terms = objectives.reconstruction_terms(config, shape.levels, member.n_steps)
        self.slopes = member._table([2 * weight / self.n_rows_all for weight in self.terms.weights], torch.float32)
        self.n_parts = ceil_div(self.n_rows, kernels.ROWS)
        self.tiles = (self.n_parts, ceil_div(self.width, kernels.LATENTS))
        self.tiling: dict[str, Any] = {
            "PART_ROWS": kernels.ROWS,
            "TILE_R": kernels.TILE_ROWS,
            "TILE_F": kernels.LATENTS,
        }
        self.pool_size = min(2 * config.aux_k, self.width) if member._may_have_dead else 0
        self.none = member.weights["b_enc"]  # stands where a kernel of this config reads nothing

    @property
    def first_bit(self) -> int:
        """The lowest bit of a float32 that products may have."""
        return 16 if self.member.dtype == torch.bfloat16 else 0

    def _columns(self, *names: str) -> list[Tensor]:
        """Vectors over latents; where there is none, one that is not read."""
        return [self.member.weights.get(name, self.none) for name in names]

    # ---- forward ----

    def forward(self) -> None:
        """Latents, reconstructions of all prefixes and what they leave over."""
        member, k = self.member, self.kernels
        x, b_dec = self.batch.x, member.weights["b_dec"]
        self.x_low = member._take("x", self.n_rows, self.d_model)
        launch(
            k.center_kernel,
            (ceil_div(self.n_rows, 16), ceil_div(self.d_model, 128)),
            [x, b_dec, self.x_low, self.n_rows, self.d_model],
            reads=[x, b_dec],
            writes=[self.x_low],
            TILE_R=16,
            TILE_D=128,
        )
        self.a = torch.mm(self.x_low, member.adam.low["W_enc"], out=member._take("a", self.n_rows, self.width))
        self._find_pool()
        self._latents()
        self._reconstruct()
        self._auxiliary_forward()

    def _find_pool(self) -> None:
        """Dead latents for the auxiliary loss."""
        if not self.pool_size:
            self.slots = self.pool = self.n_dead = self.pool_z = self.pool_gradient = self.none
            return
        member, take = self.member, self.member.scratch.take
        self.pool = take("pool", (self.pool_size,), torch.int32)
        self.slots = take("slots", (self.width,), torch.int32)
        self.n_dead = take("n_dead", (1,), torch.int32)
        self.pool_z = member._take("pool_z", self.n_rows, self.pool_size)
        self.pool_gradient = member._take("pool_gradient", self.n_rows, self.pool_size)
        launch(
            self.kernels.dead_pool_kernel,
            (1,),
            [member.rows_since_fired, self.pool, self.slots, self.n_dead, self.width, self.config.dead_after_rows],
            reads=[member.rows_since_fired],
            writes=[self.slots, self.n_dead],
            touched={"pool": self.pool},
            POOL_SIZE=self.pool_size,
            SIZE=min(4096, next_power(self.width)),
            num_warps=16,
        )

    def _latents(self) -> None:
        member, k = self.member, self.kernels
        norm = member.flags["NORM"]
        in_place = norm == 0 and member.kind == 0
        self.z = self.a if in_place else member._take("z", self.n_rows, self.width)
        self.ratios = self.none
        if member.flags["RESCALE"]:
            self.ratios = self.batch.norm / math.sqrt(self.d_model)
        self.moments = self.none
        bias, gain, shift, log_threshold = self._columns("b_enc", "ln_gain", "ln_bias", "log_threshold")
        if norm:
            self.moments = member._wide("moments", 2, self.n_levels, self.n_rows)
            launch(
                k.moments_kernel,
                (ceil_div(self.n_rows, TALL),),
                [self.a, bias, self.ends, self.moments, self.n_rows, self.width, self.config.layernorm_eps],
                reads=[self.a, bias, self.ends],
                writes=[self.moments],
                N_LEVELS=self.n_levels,
                NORM=norm,
                TILE_R=TALL,
                SIZE=min(LONG, next_power(self.width)),
            )
        thresholds = self._thresholds()
        self.counts = member.scratch.take("counts", (self.n_parts, self.width), torch.int32)
        self.sizes = member._wide("sizes", 2, *self.tiles)
        pointers = [self.a, self.z, bias, gain, shift, log_threshold, self.moments, self.ratios, self.ends, thresholds]
        pointers += [self.slots, self.pool_z, self.counts, self.sizes]
        launch(
            k.select_kernel,
            self.tiles,
            [*pointers, self.n_rows, self.width, member.shape.n_shared, self.pool_size],
            reads=self._read(self.a, bias, gain, shift, log_threshold, self.moments, self.ratios, thresholds),
            writes=[self.z, self.counts, self.sizes],
            touched={"pool": self.pool_z},
            SELECT=SELECTIONS.get(self.config.activation, 0),
            POOL=bool(self.pool_size),
            N_LEVELS=self.n_levels,
            KIND=member.kind,
            **member.flags,
            **self.tiling,
        )

    def _read(self, *tensors: Tensor) -> list[Tensor]:
        """What a pass over latents reads: the tensors, each once, the ends of levels and the slots of the pool."""
        tensors = (*tensors, self.ends, self.slots)
        return list({id(tensor): tensor for tensor in tensors}.values())

    def _thresholds(self) -> Tensor:
        """What is kept is not below these: one number, or one a row."""
        member, k = self.member, self.kernels
        bias, gain, shift = self._columns("b_enc", "ln_gain", "ln_bias")
        common = [self.a, bias, gain, shift, self.moments, self.ratios, self.ends]
        reads = [*{id(tensor): tensor for tensor in common}.values()]
        if self.config.activation == "topk":
            thresholds = member._wide("row_thresholds", self.n_rows)
            launch(
                k.row_threshold_kernel,
                (ceil_div(self.n_rows, TALL),),
                [*common, thresholds, self.n_rows, self.width, member._kept],
                reads=reads,
                writes=[thresholds],
                FIRST_BIT=self.first_bit,
                N_LEVELS=self.n_levels,
                TILE_R=TALL,
                SIZE=min(LONG, next_power(self.width)),
                **member.flags,
            )
            return thresholds
        if self.config.activation != "batchtopk":
            return self.none
        n_passes = 1 + len(member.bins)
        for index in range(n_passes):
            counts = member.bins[index == 2]
            launch(
                k.histogram_kernel,
                self.tiles,
                [*common, member.search, counts, self.n_rows, self.width],
                reads=[member.search] if index == 1 else [*reads, member.search],
                writes=[],
                touched={"bins": counts},
                PASS=index,
                N_LEVELS=self.n_levels,
                num_warps=8,
                **member.flags,
                **self.tiling,
            )
            if member.group is not None:
                dist.all_reduce(counts, group=member.group)
            launch(
                k.find_kernel,
                (1,),
                [member.search, counts, member._kept * self.n_rows_all, MARGIN],
                reads=[member.search] if index == 1 else [member.search, counts],
                writes=[member.search, counts] if index else [member.search],
                PASS=index,
                LAST=index == n_passes - 1,
                N_BINS=len(counts),
                SIZE=8192,
                num_warps=16,
            )
        return member.search[1:]

    def _reconstruct(self) -> None:
        """Every prefix from the one before it; then the suffix sums of the backward in the same memory."""
        member, k, w_dec = self.member, self.kernels, self.member.adam.low["W_dec"]
        n_terms = len(self.terms.sizes)
        self.decoded = member._take("decoded", n_terms, self.n_rows, self.d_model)
        for i, block in enumerate(self.terms.blocks):
            if i == 0:
                torch.mm(self.z[:, block], w_dec[block], out=self.decoded[0])
            else:
                torch.addmm(self.decoded[i - 1], self.z[:, block], w_dec[block], out=self.decoded[i])
        part_rows, grid = 64, (ceil_div(self.n_rows, 64), ceil_div(self.d_model, 128))
        self.remainder = member._take("remainder", self.n_rows, self.d_model) if self.pool_size else self.none
        self.errors = member._wide("errors", n_terms, *grid)
        self.b_dec_parts = member._wide("b_dec_parts", grid[0], self.d_model)
        x, b_dec = self.batch.x, member.weights["b_dec"]
        launch(
            k.residuals_kernel,
            grid,
            [
                x,
                b_dec,
                self.decoded,
                self.slopes,
                self.remainder,
                self.n_dead,
                self.errors,
                self.b_dec_parts,
                self.n_rows,
                self.d_model,
            ],
            reads=[x, b_dec, self.decoded, self.slopes, *([self.n_dead] if self.pool_size else [])],
            writes=[self.decoded, self.errors, self.b_dec_parts],
            touched={"pool": self.remainder},
            N_TERMS=n_terms,
            TERMS=next_power(n_terms),
            POOL=bool(self.pool_size),
            PART_ROWS=part_rows,
            TILE_R=16,
            TILE_D=128,
        )

    def _auxiliary_forward(self) -> None:
        """The auxiliary loss, the slope that it sends back and, of the latents in the pool, its gradient."""
        if not self.pool_size:
            self.losses = self.member._wide("losses", 1).zero_()
            return
        member, k, config = self.member, self.kernels, self.config
        w_dec, tile = member.adam.low["W_dec"], 64
        launch(
            k.pool_select_kernel,
            (self.n_rows,),
            [self.pool_z, self.n_dead, config.aux_k],
            reads=[self.n_dead],
            writes=[],
            touched={"pool": self.pool_z},
            POOL_SIZE=self.pool_size,
            FIRST_BIT=self.first_bit,
            SIZE=next_power(self.pool_size),
        )
        grid = (ceil_div(self.n_rows, tile), ceil_div(self.d_model, tile))
        self.losses = member._wide("losses", *grid)
        self.slope = member._take("slope", self.n_rows, self.d_model)
        sizes = [self.n_rows, self.d_model, self.pool_size]
        launch(
            k.pool_decode_kernel,
            grid,
            [
                self.pool_z,
                self.pool,
                w_dec,
                self.remainder,
                self.slope,
                self.losses,
                self.n_dead,
                *sizes,
                2 * config.aux_coefficient / self.n_rows_all,
            ],
            reads=[self.n_dead],
            writes=[self.losses],
            touched={"pool": w_dec},
            TILE_R=tile,
            TILE_D=tile,
            TILE_K=32,
            num_warps=8,
        )
        launch(
            k.pool_latents_kernel,
            (ceil_div(self.n_rows, tile), ceil_div(self.pool_size, tile)),
            [self.slope, self.pool, w_dec, self.pool_z, self.pool_gradient, self.n_dead, *sizes],
            reads=[self.n_dead],
            writes=[],
            touched={"pool": w_dec},
            TILE_R=tile,
            TILE_P=tile,
            TILE_K=32,
            num_warps=8,
        )

    # ---- backward ----

    def backward(self) -> None:
        """Gradients of all weights: matrices in the products' dtype, vectors in float32, one behind the other."""
        member, low = self.member, self.member.adam.low
        both = member._take("gradients", 2, self.width * self.d_model)
        self.gradients = both
        self.w_dec, self.w_enc = both[0].view(self.width, self.d_model), both[1].view(self.d_model, self.width)
        dz = member._take("dz", self.n_rows, self.width)
        for block, gradient in zip(self.terms.blocks, self.decoded):
            torch.mm(self.z[:, block].T, gradient, out=self.w_dec[block])
        self._auxiliary_backward()
        member.reducer.add_whole(self.w_dec)
        for block, gradient in zip(self.terms.blocks, self.decoded):
            torch.mm(gradient, low["W_dec"][block].T, out=dz[:, block])
        self._latents_backward(dz)
        member.reducer.product(self.x_low.T, dz, out=self.w_enc)
        self._b_dec()

    def _auxiliary_backward(self) -> None:
        if not self.pool_size:
            return
        tile = 64
        launch(
            self.kernels.pool_decoder_kernel,
            (ceil_div(self.pool_size, tile), ceil_div(self.d_model, tile)),
            [self.pool_z, self.pool, self.slope, self.w_dec, self.n_dead, self.n_rows, self.d_model, self.pool_size],
            reads=[self.n_dead],
            writes=[],
            touched={"pool": self.w_dec},
            TILE_P=tile,
            TILE_D=tile,
            TILE_K=32,
            num_warps=8,
        )

    def _latents_backward(self, dz: Tensor) -> None:
        member, k, config = self.member, self.kernels, self.config
        norm, kind = member.flags["NORM"], member.kind
        bias, gain, shift, log_threshold = self._columns("b_enc", "ln_gain", "ln_bias", "log_threshold")
        self.factor = self.none
        if config.penalty != "none":
            self.factor = member.schedule.ramp * member.controller.factor / self.n_rows_all
        factor = self.factor.float() if config.penalty != "none" else self.none
        penalised, pool = config.penalty == "l1", bool(self.pool_size)
        penalty = member.penalty if config.penalty != "none" else self.none
        sums = self.none
        flags: dict[str, Any] = {
            "PENALTY": penalised,
            "POOL": pool,
            "N_LEVELS": self.n_levels,
            "KIND": kind,
            **member.flags,
        }
        if norm:
            sums = member._wide("moments_backward", 2, self.n_levels, self.n_rows)
            launch(
                k.backward_moments_kernel,
                (ceil_div(self.n_rows, TALL),),
                [
                    dz,
                    self.a,
                    self.z,
                    bias,
                    gain,
                    self.moments,
                    self.ratios,
                    self.ends,
                    penalty,
                    factor,
                    self.slots,
                    self.pool_gradient,
                    sums,
                    self.n_rows,
                    self.width,
                    self.pool_size,
                ],
                reads=self._read(dz, self.a, self.z, bias, gain, self.moments, self.ratios, penalty, factor),
                writes=[sums],
                touched={"pool": self.pool_gradient},
                TILE_R=TALL,
                SIZE=min(LONG, next_power(self.width)),
                **flags,
            )
        n_plain = 3 if norm else 1
        n_sums = n_plain + 2 * kind
        parts = member._wide("latent_parts", n_sums, self.n_parts, self.width)
        arguments = [dz, self.a, self.z, bias, gain, shift, log_threshold, self.moments, self.ratios, self.ends, sums]
        arguments += [penalty, factor, self.slots, self.pool_gradient, parts]
        reads = [dz, self.z, gain, shift, log_threshold, self.moments, self.ratios, sums, penalty, factor, bias]
        launch(
            k.backward_kernel,
            self.tiles,
            [*arguments, self.n_rows, self.width, self.pool_size],
            reads=self._read(*reads, *([self.a] if norm or kind else [])),
            writes=[dz, parts],
            touched={"pool": self.pool_gradient},
            BANDWIDTH=config.bandwidth,
            **flags,
            **self.tiling,
        )
        self.vectors = member._wide("vector_gradients", len(member.vectors[0]))
        thresholds = self.vectors[-self.width :]
        launch(
            k.column_sums_kernel,
            (ceil_div(self.width, 128),),
            [parts, self.vectors, thresholds, log_threshold, penalty, factor, self.n_parts, self.width],
            reads=[parts, *([log_threshold, penalty, factor] if kind else [])],
            writes=[self.vectors[: n_plain * self.width], *([thresholds] if kind else [])],
            BANDWIDTH=config.bandwidth,
            L0=config.penalty == "l0",
            N_PLAIN=n_plain,
            KIND=kind,
            TILE_F=128,
        )

    def _b_dec(self) -> None:
        n_plain = 3 if self.member.flags["NORM"] else 1
        out = self.vectors[n_plain * self.width :][: self.d_model]
        w_enc, b_enc = self.member.adam.low["W_enc"], self.vectors[: self.width]
        launch(
            self.kernels.b_dec_kernel,
            (ceil_div(self.d_model, 4),),
            [w_enc, b_enc, self.b_dec_parts, out, len(self.b_dec_parts), self.d_model, self.width],
            reads=[w_enc, b_enc, self.b_dec_parts],
            writes=[out],
            TILE_D=4,
            SIZE=1024,
        )

    # ---- update ----

    def update(self) -> None:
        """Sums over processes, the optimiser, counters."""
        member = self.member
        now = self._collect()
        member.reducer.add(self.vectors)
        member.reducer.add(now.flat)
        member.reducer.wait()
        self._optimise()
        self._account(now)

    def _collect(self) -> Sums:
        sizes = {"counts": self.width, "l1": 2, "errors": len(self.terms.sizes)}
        sizes |= {"total": self.d_model, "square": 1, "aux": 1}
        flat = self.member.scratch.take("now", (sum(sizes.values()),), torch.float64)
        pointers = [self.counts, self.sizes, self.errors, self.losses, self.batch.total, self.batch.square]
        launch(
            self.kernels.collect_kernel,
            (ceil_div(max(self.width, self.d_model), 1024),),
            [
                *pointers,
                flat,
                self.n_parts,
                self.sizes[0].numel(),
                self.errors[0].numel(),
                self.losses.numel(),
                self.config.aux_coefficient / self.n_rows_all,
                self.width,
                self.d_model,
            ],
            reads=pointers,
            writes=[flat],
            N_TERMS=len(self.terms.sizes),
            SIZE=1024,
        )
        return Sums(flat, sizes)

    def _optimise(self) -> None:
        member, k, config = self.member, self.kernels, self.config
        n = self.gradients.numel()
        n_squares = ceil_div(n, SQUARES)
        squares = member._wide("squares", n_squares)
        launch(
            k.squares_kernel,
            (n_squares,),
            [self.gradients, squares, n],
            reads=[self.gradients],
            writes=[squares],
            PART=SQUARES,
            SIZE=2048,
        )
        n_updates = member.adam.n_updates
        launch(
            k.clip_kernel,
            (1,),
            [
                squares,
                self.vectors,
                member.schedule.lr,
                n_updates,
                member.norm,
                member.control,
                n_squares,
                len(self.vectors),
            ],
            reads=[squares, self.vectors, member.schedule.lr, n_updates],
            writes=[n_updates, member.norm, member.control],
            CLIP=config.clip_norm,
            NORMALIZE=config.normalize_gradients,
            BETA1=log2(config.beta1),
            BETA2=log2(config.beta2),
            SIZE=min(4096, next_power(max(n_squares, len(self.vectors)))),
            num_warps=16,
        )
        betas: dict[str, Any] = {"BETA1": config.beta1, "BETA2": config.beta2, "EPS": config.eps}
        size = next_power(self.d_model)
        tall = max(1, 1024 // size)
        self._adam(
            k.adam_rows_kernel,
            (ceil_div(self.width, tall),),
            "W_dec",
            self.w_dec,
            [self.width, self.d_model],
            TILE_R=tall,
            SIZE=size,
            num_warps=min(16, max(4, size // 512)),
            **betas,
        )
        n = self.w_enc.numel()
        self._adam(k.adam_kernel, (ceil_div(n, 1024),), "W_enc", self.w_enc, [n, n, 1.0], SIZE=1024, **betas)
        n = len(self.vectors)
        first_scaled = n - self.width if member.kind else n
        weight, first, second = member.vectors
        launch(
            k.adam_kernel,
            (ceil_div(n, 1024),),
            [weight, self.vectors, first, second, weight, member.control, n, first_scaled, config.threshold_lr],
            reads=[weight, self.vectors, first, second, member.control],
            writes=[weight, first, second],
            LOW=False,
            SIZE=1024,
            **betas,
        )

    def _adam(
        self, kernel: Any, grid: tuple[int, ...], name: str, gradient: Tensor, numbers: list[float], **options: Any
    ) -> None:
        adam = self.member.adam
        weight, first, second, low = adam.weights[name], adam.first[name], adam.second[name], adam.low[name]
        has_low = low.dtype != weight.dtype
        launch(
            kernel,
            grid,
            [weight, gradient, first, second, low, self.member.control, *numbers],
            reads=[weight, gradient, first, second, self.member.control],
            writes=[weight, first, second, *([low] if has_low else [])],
            LOW=has_low,
            **options,
        )

    def _account(self, now: Sums) -> None:
        member, config, sums = self.member, self.config, self.member.sums
        pointers = [now.flat, self.slopes, self.factor, member.norm, member.rows_since_fired]
        scalars = sums.flat[: len(SCALARS)]
        kept = [scalars, sums["total"], sums["errors"], sums["l1"]]
        launch(
            self.kernels.account_kernel,
            (1,),
            [
                *pointers,
                *kept,
                member.l0,
                self.n_rows_all,
                self.width,
                self.d_model,
                member.shape.n_shared,
                config.lambda_shared,
                config.lambda_specialised,
            ],
            reads=[*pointers, *kept],
            writes=[member.rows_since_fired, *kept, member.l0],
            CLIP=config.clip_norm,
            PENALTY=PENALTIES[config.penalty],
            N_TERMS=len(self.terms.sizes),
            SIZE=min(4096, next_power(max(self.width, self.d_model))),
            num_warps=16,
        )
        if config.target_l0:
            member.controller.see(member.l0, first=member.n_steps == 0, acts=member._controls)
        if config.alpha == "auto":
            member.explained += torch.cat([now["errors"], now["square"]])


SCALARS = ("steps", "rows", "square", "loss", "l0", "aux", "grad_norm", "clipped")
"""What `account_kernel` adds to, in this order: the first of `Member.sums`."""


def log2(beta: float) -> float:
    """The binary logarithm of one of Adam's β, finite."""
    return math.log2(beta) if beta else -1e4
