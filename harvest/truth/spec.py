"""What a store of known features is made of: a TOML file, checked field by field when it is read."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.base.errors import UsageError
from pipeline.base.files import read_text

SHIPPED = Path(__file__).parent
"""The folder of the specs that have a name: tree, forest, large."""

MAX_FEATURES = 1 << 20


@dataclass(frozen=True)
class Trees:
    """`count` trees of one shape. A node at depth t has branching[t] children; [] makes single features.

    probability: P(a root fires), of each of `count` roots, or of the first one, falling as rank^−zipf.
    child_probability: P(a child fires | its parent does) by depth of the parent: one number, or one for each child.
    exclusive: at most one child of a node fires at a time; otherwise children fire independently, given their parent.
    magnitude: mean strength of a firing by depth, or one number. Strengths are log-normal: `spread` is their standard
    deviation over their mean, and `spread_across` the same of the features' means.
    """

    count: int
    branching: tuple[int, ...]
    probability: float | tuple[float, ...]
    child_probability: tuple[float | tuple[float, ...], ...] = ()
    exclusive: bool = False
    zipf: float = 0.0
    magnitude: float | tuple[float, ...] = 1.0
    spread: float = 0.0
    spread_across: float = 0.0

    @property
    def n_nodes(self) -> tuple[int, ...]:
        """Nodes of one tree at each depth."""
        nodes = [1]
        for n in self.branching:
            nodes.append(nodes[-1] * n)
        return tuple(nodes)

    def roots(self) -> tuple[float, ...]:
        """P(a root fires) of every tree."""
        if isinstance(self.probability, tuple):
            return self.probability
        return tuple(self.probability * (i + 1) ** -self.zipf for i in range(self.count))

    def children(self, depth: int) -> tuple[float, ...]:
        """P(child | parent) of each child of a node at some depth."""
        given = self.child_probability[depth]
        return given if isinstance(given, tuple) else (given,) * self.branching[depth]

    def magnitudes(self) -> tuple[float, ...]:
        """Mean strength by depth."""
        return self.magnitude if isinstance(self.magnitude, tuple) else (self.magnitude,) * (len(self.branching) + 1)


@dataclass(frozen=True)
class Spec:
    """A distribution of rows: x = bias + Σ over firing features of strength · direction + noise. FORMAT.md lists the fields.

    coherence: random directions, or the largest |cosine| that two directions may have (0: orthogonal).
    correlation: of the Gaussians that decide whether the roots of `correlated` consecutive trees fire (a copula: their
    probabilities stay). bias: length of a constant vector; noise: standard deviation of every coordinate.
    Raises UsageError, one line that names the field.
    """

    d_model: int
    n_features: int
    trees: tuple[Trees, ...]
    seed: int = 0
    coherence: float | Literal["random"] = "random"
    correlation: float = 0.0
    correlated: int = 1
    bias: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        found = sum(group.count * sum(group.n_nodes) for group in self.trees)
        if found != self.n_features:
            raise UsageError(f"n_features = {self.n_features}: the trees have {found} nodes")
        if self.coherence != "random":
            least = welch_bound(self.n_features, self.d_model)
            if self.coherence < least:
                raise UsageError(
                    f"coherence = {self.coherence:g}: {self.n_features} directions in {self.d_model} dimensions cannot be "
                    f"below {least:.3g} (Welch's bound)"
                )
        if (self.correlated > 1) != (self.correlation > 0):
            raise UsageError(
                f"correlated = {self.correlated}, correlation = {self.correlation:g}: give both (trees that hang together "
                "and how much) or neither"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return {name: plain(value) for name, value in dataclasses.asdict(self).items()}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Spec:
        """Read and check a spec. Raises UsageError that names the field."""
        return read_spec(data)


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def welch_bound(n: int, d: int) -> float:
    """The least that the largest |cosine| between n directions in d dimensions can be."""
    return 0.0 if n <= d else ((n - d) / (d * (n - 1))) ** 0.5


def load_spec(name: str) -> Spec:
    """The spec of a TOML file, or a shipped one by its name. Raises UsageError: what is wrong, and in which field."""
    path = SHIPPED / f"{name}.toml" if "/" not in name and not name.endswith(".toml") else Path(name)
    if not path.is_file():
        raise UsageError(f"--truth {name}: no such file, and not one of {', '.join(shipped())}")
    try:
        data = tomllib.loads(read_text(path))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: not a TOML file: {error}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return read_spec(data)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def shipped() -> list[str]:
    """Names of the specs that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def read_spec(data: Mapping[str, Any]) -> Spec:
    """Check plain data field by field. Raises UsageError."""
    require_known(data, Spec, "")
    groups = need(data, "trees", "")
    if not isinstance(groups, list) or not groups or not all(isinstance(group, dict) for group in groups):
        raise UsageError("trees: expected at least one [[trees]] table")
    coherence = data.get("coherence", "random")
    return Spec(
        d_model=whole(need(data, "d_model", ""), "d_model", 1),
        n_features=whole(need(data, "n_features", ""), "n_features", 1, MAX_FEATURES),
        trees=tuple(read_trees(group, f"trees[{i}].") for i, group in enumerate(groups)),
        seed=whole(data.get("seed", 0), "seed", 0),
        coherence="random" if coherence == "random" else number(coherence, "coherence", 0, 1),
        correlation=number(data.get("correlation", 0.0), "correlation", 0, 1),
        correlated=whole(data.get("correlated", 1), "correlated", 1),
        bias=number(data.get("bias", 0.0), "bias", 0, 1e6),
        noise=number(data.get("noise", 0.0), "noise", 0, 1e6),
    )


def read_trees(data: Mapping[str, Any], at: str) -> Trees:
    """Check one [[trees]] table. Raises UsageError."""
    require_known(data, Trees, at)
    count = whole(need(data, "count", at), f"{at}count", 1, MAX_FEATURES)
    branching = need(data, "branching", at)
    if not isinstance(branching, list):
        raise UsageError(f"{at}branching: expected a list of whole numbers, found {branching!r}")
    sizes = tuple(whole(n, f"{at}branching[{i}]", 1, MAX_FEATURES) for i, n in enumerate(branching))
    n_depths = len(sizes) + 1
    probability = need(data, "probability", at)
    zipf = number(data.get("zipf", 0.0), f"{at}zipf", 0, 10)
    if isinstance(probability, list) and zipf:
        raise UsageError(f"{at}zipf = {zipf:g}: goes with one probability, not with a list")
    magnitude = data.get("magnitude", 1.0)
    exclusive = data.get("exclusive", False)
    if not isinstance(exclusive, bool):
        raise UsageError(f"{at}exclusive: expected true or false, found {exclusive!r}")
    return Trees(
        count=count,
        branching=sizes,
        probability=one_or_each(probability, f"{at}probability", count, "tree", 0, 1),
        child_probability=read_children(data.get("child_probability", []), at, sizes, exclusive),
        exclusive=exclusive,
        zipf=zipf,
        magnitude=one_or_each(magnitude, f"{at}magnitude", n_depths, "depth", 0, 1e6),
        spread=number(data.get("spread", 0.0), f"{at}spread", 0, 10),
        spread_across=number(data.get("spread_across", 0.0), f"{at}spread_across", 0, 10),
    )


def read_children(
    given: Any, at: str, sizes: tuple[int, ...], exclusive: bool
) -> tuple[float | tuple[float, ...], ...]:
    """P(child | parent) by depth of the parent. Raises UsageError when a tree cannot be so."""
    name = f"{at}child_probability"
    if not isinstance(given, list) or len(given) != len(sizes):
        raise UsageError(
            f"{name}: expected a list of {len(sizes)}, one entry for each depth of branching, found {given!r}"
        )
    found = []
    for depth, (value, n) in enumerate(zip(given, sizes)):
        each = one_or_each(value, f"{name}[{depth}]", n, "child", 0, None)
        values = each if isinstance(each, tuple) else (each,) * n
        if max(values) > 1:
            raise UsageError(
                f"{name}[{depth}] = {max(values):g}: P(child | parent) is at most 1, a child cannot fire more often than its "
                "parent"
            )
        if exclusive and sum(values) > 1 + 1e-9:
            raise UsageError(
                f"{name}[{depth}]: {n} exclusive children need {sum(values):g} of their parent's probability, there is 1"
            )
        found.append(each)
    return tuple(found)


def require_known(data: Mapping[str, Any], kind: type[Spec] | type[Trees], at: str) -> None:
    """Raise UsageError for a field that no spec has."""
    if unknown := sorted(set(data) - set(kind.__dataclass_fields__)):
        raise UsageError(f"{at}{unknown[0]}: not a field; there are {', '.join(kind.__dataclass_fields__)}")


def need(data: Mapping[str, Any], name: str, at: str) -> Any:
    """A field that must be there. Raises UsageError."""
    if name not in data:
        raise UsageError(f"{at}{name}: missing")
    return data[name]


def whole(value: Any, name: str, least: int, most: int = (1 << 31) - 1) -> int:
    """A whole number within bounds. Raises UsageError."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UsageError(f"{name} = {value!r}: expected a whole number from {least} to {most}")
    return value


def number(value: Any, name: str, least: float, most: float | None) -> float:
    """A number within bounds (NaN is in none). Raises UsageError."""
    bounds = f"a number from {least:g}" + ("" if most is None else f" to {most:g}")
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= (most or float("1e300")):
        raise UsageError(f"{name} = {value!r}: expected {bounds}")
    return float(value)


def one_or_each(
    value: Any, name: str, n: int, what: str, least: float, most: float | None
) -> float | tuple[float, ...]:
    """One number, or a list of n of them. Raises UsageError."""
    if not isinstance(value, list):
        return number(value, name, least, most)
    if len(value) != n:
        raise UsageError(f"{name}: {len(value)} numbers, expected one, or {n}: one for each {what}")
    return tuple(number(part, f"{name}[{i}]", least, most) for i, part in enumerate(value))
