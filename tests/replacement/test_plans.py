import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.replacement.plans import PATH_WEIGHTS, PLANS, Plan, parse_path_weights
from bqat_jax.replacement.schedules import Constant, Linear

# A drawn plan, and the known one with the same expected loss.
SAMPLED = {'prefix_sampled': 'prefix', 'single_sampled': 'single'}
KNOWN_PLANS = ('none', 'prefix', 'single', 'suffix')
DRAWN_PLANS = ('prefix_sampled', 'single_sampled', 'bernoulli')


def masks_of(plan):
    return np.asarray(plan.draw(jax.random.key(0))[0]).astype(int).tolist()


def test_models():
    assert masks_of(Plan('none', 3)) == []
    assert masks_of(Plan('prefix', 4)) == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert masks_of(Plan('prefix', 3, include_last=True)) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert masks_of(Plan('single', 3)) == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert masks_of(Plan('suffix', 3)) == [[0, 1, 1], [0, 0, 1]]
    plan = Plan('none', 1)
    mask, weights = plan.draw(jax.random.key(0))
    assert plan.num_paths == 0 and mask.shape == (0, 1) and weights.shape == (0,)


def test_halving_weights_are_block_kds_for_prefixes():
    """w_i = 1 / 2^(n-i) for i leading LP blocks."""

    def weights(*arguments, **options):
        return Plan(*arguments, **options).draw(jax.random.key(0))[1].tolist()

    assert weights('prefix', 4) == [1 / 8, 1 / 4, 1 / 2]
    assert weights('prefix', 3, include_last=True) == [1 / 4, 1 / 2, 1]
    assert weights('single', 3) == [1 / 4] * 3
    assert weights('suffix', 3) == [1 / 2, 1 / 4]
    assert weights('prefix', 4, 'uniform') == [1, 1, 1]
    assert weights('prefix', 5, 'mean') == [0.25] * 4
    assert weights('prefix', 3, (0.5, 2.0)) == [0.5, 2]
    assert weights('prefix', 3, schedule=Constant(value=0.5)) == [1 / 8, 1 / 4]


@pytest.mark.parametrize('name', SAMPLED)
@pytest.mark.parametrize('blocks', [2, 3, 5])
@pytest.mark.parametrize('weights', [*PATH_WEIGHTS, 'list'])
def test_expected_loss_of_sampled_models_is_that_of_all(name, blocks, weights):
    """By enumeration of every draw, for an arbitrary loss of each model."""
    known = Plan(SAMPLED[name], blocks)
    losses = {model: loss for model, loss in zip(known.models, np.random.default_rng(0).uniform(size=9), strict=False)}
    if weights == 'list':
        weights = tuple(float(w) for w in np.random.default_rng(1).uniform(size=len(known.models)))
    (_, _, all_weights), = Plan(SAMPLED[name], blocks, weights).outcomes()  # fmt: skip
    expected = np.dot(all_weights, [losses[model] for model in known.models])
    for paths in range(1, len(known.models) + 1):
        total, probability = 0.0, 0.0
        for p, mask, path_weights in Plan(name, blocks, weights, paths).outcomes():
            chosen = [tuple(map(bool, row)) for row in np.asarray(mask)]
            assert len(set(chosen)) == paths
            total += p * float(np.dot(path_weights, [losses[model] for model in chosen]))
            probability += p
        assert probability == pytest.approx(1)
        assert total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('name', SAMPLED)
@pytest.mark.parametrize('paths', [1, 2])
def test_draws_are_the_enumerated_ones_and_equally_likely(name, paths):
    plan, count = Plan(name, 4, num_sampled=paths), 3000
    masks, weights = jax.jit(jax.vmap(plan.draw))(jax.random.split(jax.random.key(0), count))

    def described(mask, weights):
        rows = [tuple(map(bool, row)) for row in np.asarray(mask)]
        return frozenset(zip(rows, np.asarray(weights).tolist(), strict=True))

    seen = {described(mask, weights): 0 for _, mask, weights in plan.outcomes()}
    for mask, weight in zip(np.asarray(masks), np.asarray(weights), strict=True):
        seen[described(mask, weight)] += 1
    p = 1 / len(seen)
    for times in seen.values():  # binomial: five standard deviations
        assert abs(times - count * p) < 5 * np.sqrt(count * p * (1 - p))


@pytest.mark.parametrize('progress', [0.0, 0.5, 1.0])
def test_bernoulli_blocks_are_independent_and_lp_with_the_probability_of_the_moment(progress):
    plan, count = Plan('bernoulli', 3, num_sampled=2, probability=Linear(start=0.2, end=1.0)), 4000
    masks, weights = jax.vmap(lambda key: plan.draw(key, progress))(jax.random.split(jax.random.key(1), count))
    p, masks = 0.2 + 0.8 * progress, np.asarray(masks).reshape(count, 6)
    error = 5 * np.sqrt(max(p * (1 - p), 1e-9) / count)
    np.testing.assert_allclose(masks.mean(0), p, atol=error)
    for one, other in itertools.combinations(range(6), 2):
        np.testing.assert_allclose((masks[:, one] & masks[:, other]).mean(), p**2, atol=error)
    np.testing.assert_allclose(weights, 0.5 ** (~masks.reshape(count, 2, 3)).sum(-1))
    for name, expected in (('uniform', 1.0), ('mean', 0.5), ((0.1, 0.7), (0.1, 0.7))):
        drawn = Plan('bernoulli', 3, name, 2).draw(jax.random.key(0), progress)[1]
        np.testing.assert_allclose(drawn, jnp.broadcast_to(jnp.array(expected, jnp.float32), (2,)))


def test_weights_follow_their_schedule():
    for name in set(PLANS) - {'none'}:
        plan = Plan(name, 3, 'uniform', schedule=Linear(start=0.0, end=2.0))
        scale = len(plan.models) if plan.models and plan.is_drawn else 1
        np.testing.assert_allclose(plan.draw(jax.random.key(0), 0.25)[1], 0.5 * scale)


def test_plans_say_what_they_need():
    assert not any(Plan(name, 3).is_drawn for name in KNOWN_PLANS)
    assert all(Plan(name, 3).is_drawn for name in DRAWN_PLANS)
    needing = {name for name in KNOWN_PLANS + DRAWN_PLANS if Plan(name, 3).needs_partner_features}
    assert needing == {'single', 'single_sampled', 'suffix', 'bernoulli'}
    assert {name: Plan(name, 4).num_paths for name in KNOWN_PLANS} == {'none': 0, 'prefix': 3, 'single': 4, 'suffix': 3}
    assert all(Plan(name, 4, num_sampled=2).num_paths == 2 for name in DRAWN_PLANS)


@pytest.mark.parametrize(
    ('arguments', 'options', 'message'),
    [
        (('prefx', 3), {}, 'none, prefix, single'),
        (('prefix', 1), {}, 'at least two blocks'),
        (('prefix_sampled', 3), {'num_sampled': 0}, '1 to 2'),
        (('prefix_sampled', 3), {'num_sampled': 3}, '1 to 2'),
        (('single_sampled', 3), {'num_sampled': 4}, '1 to 3'),
        (('bernoulli', 3), {'num_sampled': 0}, 'at least 1'),
        (('bernoulli', 3), {'probability': Linear(start=0.5, end=1.5)}, 'between 0 and 1'),
        (('single', 3), {'include_last': True}, 'prefix, prefix_sampled'),
        (('prefix', 3), {'weights': 'half'}, 'halving, uniform, mean'),
        (('prefix', 3), {'weights': (1.0,)}, '2 finite numbers'),
        (('prefix', 3), {'weights': (1.0, -1.0)}, 'none of them negative'),
        (('prefix', 3), {'schedule': Linear(start=1.0, end=-1.0)}, 'negative'),
    ],
)
def test_bad_plans_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        Plan(*arguments, **options)


def test_weights_are_named_or_listed():
    assert parse_path_weights('mean') == 'mean' and parse_path_weights('0.5, 1') == (0.5, 1.0)
    with pytest.raises(ValueError, match='halving, uniform, mean, or a number'):
        parse_path_weights('half')
