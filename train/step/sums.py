"""Sums as one vector: named parts that are added up over processes, or fetched from the device, in one go."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Sums:
    """A float64 vector whose parts have names: `sums["l1"]` is a view of `flat`, so writing to either is writing to both."""

    def __init__(self, flat: Tensor, sizes: Mapping[str, int]) -> None:
        self.flat = flat
        self.sizes = dict(sizes)
        self.parts = dict(zip(self.sizes, torch.split(flat, list(self.sizes.values()))))

    @staticmethod
    def zeros(sizes: Mapping[str, int], device: torch.device) -> Sums:
        """All 0; `sizes` are lengths by name."""
        return Sums(torch.zeros(sum(sizes.values()), dtype=torch.float64, device=device), sizes)

    @staticmethod
    def of(**parts: Tensor) -> Sums:
        """Copies of vectors and numbers, by name."""
        vectors = {name: part.double().reshape(-1) for name, part in parts.items()}
        return Sums(torch.cat(list(vectors.values())), {name: len(vector) for name, vector in vectors.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name]

    def fetch(self) -> dict[str, list[float]]:
        """Every part's numbers, in one transfer."""
        numbers = iter(self.flat.tolist())
        return {name: [next(numbers) for _ in range(size)] for name, size in self.sizes.items()}
