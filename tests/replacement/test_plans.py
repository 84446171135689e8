import jax
import numpy as np
import pytest

from bqat_jax.replacement.plans import PATH_WEIGHTS, PLANS, Plan, prefix_weights


def plan_of(name, blocks, paths=1, weights='halving'):
    return Plan(name, prefix_weights(weights, blocks), paths)


def test_halving_weights_are_block_kds():
    assert prefix_weights('halving', 4) == (1 / 8, 1 / 4, 1 / 2)
    assert prefix_weights('uniform', 4) == (1, 1, 1)
    assert prefix_weights('mean', 5) == (0.25,) * 4


def test_prefix_has_every_prefix_once():
    mask, weights = plan_of('prefix', 4).draw(jax.random.key(0))
    np.testing.assert_array_equal(mask, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
    np.testing.assert_allclose(weights, [1 / 8, 1 / 4, 1 / 2])


def test_none_has_no_path():
    plan = plan_of('none', 3)
    mask, weights = plan.draw(jax.random.key(0))
    assert plan.num_paths == 0 and mask.shape == (0, 3) and weights.shape == (0,)


@pytest.mark.parametrize('blocks', [2, 3, 5])
@pytest.mark.parametrize('weights', PATH_WEIGHTS)
def test_expected_loss_of_sampled_prefixes_is_that_of_all(blocks, weights):
    """By enumeration of every draw, for an arbitrary loss of each prefix."""
    losses = np.random.default_rng(0).uniform(size=blocks - 1)
    expected = np.dot(prefix_weights(weights, blocks), losses)
    for paths in range(1, blocks):
        total, probability = 0.0, 0.0
        for p, mask, path_weights in plan_of('prefix_sampled', blocks, paths, weights).outcomes():
            chosen = np.asarray(mask).sum(axis=1) - 1
            assert len(set(chosen.tolist())) == paths
            total += p * float(np.dot(path_weights, losses[chosen]))
            probability += p
        assert probability == pytest.approx(1)
        assert total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('paths', [1, 2])
def test_draws_are_the_enumerated_ones_and_equally_likely(paths):
    plan = plan_of('prefix_sampled', 4, paths)
    count = 3000
    masks, weights = jax.jit(jax.vmap(plan.draw))(jax.random.split(jax.random.key(0), count))
    outcomes = {
        tuple(sorted(np.asarray(mask).sum(1).tolist())): dict(
            zip(np.asarray(mask).sum(1).tolist(), np.asarray(weights).tolist(), strict=True)
        )
        for _, mask, weights in plan.outcomes()
    }
    seen = dict.fromkeys(outcomes, 0)
    for mask, weight in zip(np.asarray(masks), np.asarray(weights), strict=True):
        cuts = mask.sum(axis=1)
        assert all(row[:n].all() and not row[n:].any() for row, n in zip(mask, cuts, strict=True))
        key = tuple(sorted(cuts.tolist()))
        seen[key] += 1
        assert dict(zip(cuts.tolist(), weight.tolist(), strict=True)) == pytest.approx(outcomes[key])
    for times in seen.values():  # binomial, p = 1/3: five standard deviations
        assert abs(times - count / 3) < 5 * np.sqrt(count * 2 / 9)


def test_bad_plans_are_refused():
    with pytest.raises(ValueError, match='none, prefix, prefix_sampled'):
        plan_of('prefx', 3)
    with pytest.raises(ValueError, match='at least two blocks'):
        plan_of('prefix', 1)
    for paths in (0, 3):
        with pytest.raises(ValueError, match='1 to 2'):
            plan_of('prefix_sampled', 3, paths)
    with pytest.raises(ValueError, match='halving, uniform, mean'):
        prefix_weights('half', 3)
    assert set(PLANS) == {'none', 'prefix', 'prefix_sampled'}
