import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.replacement.schedules import SCHEDULES, get_schedule


@pytest.mark.parametrize('name', list(SCHEDULES))
def test_goes_from_one_end_to_the_other_all_the_way(name):
    schedule = get_schedule('constant:value=0.25' if name == 'constant' else f'{name}:start=0.75,end=0.25')
    values = np.array([schedule.at(jnp.float32(t)) for t in np.linspace(0, 1, 21)])
    assert values.dtype == np.float32
    np.testing.assert_allclose([values[0], values[-1]], schedule.ends, rtol=1e-6)
    assert (np.diff(values) <= 0).all()


def test_formulas():
    t = np.linspace(0, 1, 7)
    linear, cosine = get_schedule('linear:start=1,end=3'), get_schedule('cosine:start=1,end=3')
    np.testing.assert_allclose([linear.at(x) for x in t], 1 + 2 * t, rtol=1e-6)
    np.testing.assert_allclose([cosine.at(x) for x in t], 2 - np.cos(np.pi * t), rtol=1e-6)


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'linear'"):
        get_schedule('liner')
    with pytest.raises(ValueError, match='no option'):
        get_schedule('constant:start=1')
