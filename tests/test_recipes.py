"""Recipes return whole, valid configs; wrong ones are refused with what is wrong."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.base.errors import UsageError
from pipeline.base.files import canonical_json
from train.config import RECIPES, TrainConfig, batchtopk, paper
from train.folder import plain


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_survives_json(name: str) -> None:
    """A recipe names itself and survives JSON."""
    config = RECIPES[name]()
    assert config.recipe == name
    assert TrainConfig.from_dict(json.loads(canonical_json(config.to_dict()))) == config


def test_paper_is_what_the_paper_states() -> None:
    """Paper is what the paper states."""
    config = paper()
    assert (config.activation, config.layernorm, config.penalty) == ("relu", "pre", "l1")
    assert (config.lambda_shared, config.lambda_specialised) == (0.04, 0.04)
    assert (config.lr, config.lr_warmup_steps, config.clip_norm) == (3e-4, 1000, 1.0)
    assert (config.steps, config.batch_size, config.width, config.checkpoint_every) == (4882, 2048, 16384, 100)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_make_one_to_five_levels(name: str) -> None:
    """Every recipe makes flat, two-level and five-level SAEs."""
    recipe = RECIPES[name]
    assert recipe(alpha=0.0).level_sizes() == (16384,)
    assert recipe(alpha=0.2).level_sizes() == (3280, 16384)
    five = recipe(levels=(1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0))
    assert five.level_sizes() == (1024, 2048, 4096, 8192, 16384)
    assert five.alpha is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alpha": 1.0}, "outside"),
        ({"alpha": None}, "either alpha or levels"),
        ({"alpha": 0.2, "levels": (0.5, 1.0)}, "either alpha or levels"),
        ({"levels": (0.5, 0.25, 1.0)}, "must increase"),
        ({"levels": (0.25, 0.5)}, "must increase"),
        ({"activation": "batchtopk", "penalty": "none"}, "so no lambda"),
        ({"activation": "batchtopk", "penalty": "none", "lambda_shared": 0.0, "lambda_specialised": 0.0}, "needs k"),
        ({"activation": "batchtopk", "k": 4}, "penalty none"),
        ({"penalty": "l0"}, "penalty l1"),
        ({"aux_k": 8}, "auxiliary"),
        ({"target_l0": 80.0, "lambda_shared": 0.0, "lambda_specialised": 0.0}, "both lambdas are 0"),
        ({"steps": 500, "lr_warmup_steps": 501}, "lower them"),
        ({"steps": 500, "sparsity_warmup_steps": 501}, "sparsity_warmup_steps"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"beta1": 1.0}, "beta1"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"lambda_shared": float("nan")}, "lambda_shared"),
        ({"max_norm": -1.0}, "max_norm"),
        ({"no_such_field": 1}, "unknown training fields: no_such_field"),
    ],
)
def test_contradiction_is_refused(changes: dict[str, Any], said: str) -> None:
    """A contradiction is refused with what is wrong."""
    with pytest.raises(UsageError, match=said):
        paper(**changes)


def test_unknown_choice_lists_the_known() -> None:
    """An unknown choice is refused with the ones there are."""
    config = paper()
    object.__setattr__(config, "objective", "other")  # past the type checker that is on in tests
    with pytest.raises(UsageError, match="'other' is not one of nested, additive"):
        config._check_choices()


def test_default_schedules_fit_short_trainings() -> None:
    """Schedules that are not given take at most a fifth of a shorter training."""

    def schedules(config: TrainConfig) -> tuple[int, int, int]:
        return config.lr_warmup_steps, config.sparsity_warmup_steps, config.lr_decay_steps

    assert schedules(paper()) == (1000, 1000, 0)
    assert schedules(paper(steps=48820)) == (10_000, 10_000, 0)
    assert schedules(paper(steps=300)) == (61, 61, 0)
    assert schedules(batchtopk()) == (244, 0, 2441)
    assert schedules(batchtopk(steps=300)) == (15, 0, 150)
    assert schedules(batchtopk(steps=300, lr_warmup_steps=200)) == (200, 0, 100)


def test_wanted_l0_is_refused_beside_k() -> None:
    """A wanted L0 is refused where k sets it."""
    with pytest.raises(UsageError, match="k asks for"):
        batchtopk(target_l0=80.0)


def test_rates_follow_the_width() -> None:
    """A recipe without a learning rate of its own takes one in inverse proportion to the width, up to a bound."""
    assert [batchtopk(width=width).lr for width in (1536, 3072, 24576, 768)] == [7e-3, 3.5e-3, 4.375e-4, 1e-2]
    assert batchtopk(width=768, lr=1e-3).lr == 1e-3
    assert RECIPES["jumprelu"](width=1536).lr == batchtopk(width=1536).lr / 2
    assert paper(width=768).lr == 3e-4


def test_recipes_train_flat_and_nested_alike() -> None:
    """What a recipe fills in does not depend on the levels, so that a report compares flat with nested dictionaries."""
    for make in RECIPES.values():
        flat, two = make(steps=2000, alpha=0.0).to_dict(), make(steps=2000, alpha=0.2).to_dict()
        five = make(steps=2000, levels=(0.0625, 0.125, 0.25, 0.5, 1.0)).to_dict()
        assert {name for name in flat if not flat[name] == two[name] == five[name]} == {"alpha", "levels"}


def test_dead_rows_follow_the_run() -> None:
    """A latent is dead after a hundredth of the run's rows, and never before 10,000."""
    assert batchtopk().dead_after_rows == 4882 * 2048 // 100
    assert batchtopk(steps=100, batch_size=512).dead_after_rows == 10_000
    assert batchtopk(steps=48820, dead_after_rows=5).dead_after_rows == 5


def test_small_dictionaries_keep_fewer() -> None:
    """k is at most a sixteenth of the width and auxiliary latents an eighth, unless they are given."""
    assert (batchtopk(width=256).k, batchtopk(width=256).aux_k) == (16, 32)
    assert batchtopk(width=256, k=40).k == 40
    with pytest.raises(UsageError, match="k must be at most the width, 256, got 999"):
        batchtopk(width=256, k=999)


@given(
    name=st.sampled_from(sorted(RECIPES)),
    steps=st.integers(1, 300),
    width=st.integers(10, 300),
    given_steps=st.sampled_from([{}, {"lr_warmup_steps": 1.0}, {"lr_decay_steps": 1.0}, {"lr_warmup_steps": 0.5}]),
)
def test_every_length_and_width_has_defaults(name: str, steps: int, width: int, given_steps: dict[str, float]) -> None:
    """However short the run and small the dictionary, what is not given agrees with what is."""
    changes = {field: int(share * steps) for field, share in given_steps.items()}
    config = RECIPES[name](steps=steps, width=width, **changes)
    assert config.lr_warmup_steps + config.lr_decay_steps <= steps
    assert config.k <= width


@pytest.mark.parametrize("recipe", RECIPES)
def test_older_members_keep_names(recipe: str) -> None:
    """A config without --skip, --level-lr and --threshold-pull is written, and named, as before there were any."""
    config = RECIPES[recipe](level_lr=0.0, threshold_pull=0.0)
    written = plain(config)
    assert written.keys() == config.to_dict().keys() - {"skip", "level_lr", "threshold_pull"}
    assert TrainConfig.from_dict(written) == config
