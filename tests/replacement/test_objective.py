import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.replacement.objective import Objective, cross_entropy, distillation_loss

LABELS = jnp.array([0, 2, 1])
Z_Q, Z_F, Z_1, Z_2 = (jax.random.normal(jax.random.key(i), (3, 4)) * 3 for i in range(4))


def softmax(z):
    z = np.asarray(z, np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def paper_ce(z):
    return -np.mean(np.log(softmax(z)[np.arange(3), np.asarray(LABELS)]))


def paper_kl(teacher, z, t):
    p, q = softmax(np.asarray(teacher) / t), softmax(np.asarray(z) / t)
    return t**2 * np.mean((p * np.log(p / q)).sum(-1))


@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_the_whole_formula_in_float64(temperature):
    a, b, w = 0.7, 0.3, (0.25, 0.5)
    loss, terms = Objective(a, b, temperature)(LABELS, Z_Q, Z_F, jnp.stack([Z_1, Z_2]), jnp.array(w))
    expected = paper_ce(Z_Q) + a * paper_kl(Z_F, Z_Q, temperature)
    for weight, z in zip(w, (Z_1, Z_2), strict=True):
        expected += weight * (b * paper_ce(z) + a * paper_kl(Z_F, z, temperature))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(terms['loss/path2_distillation'], paper_kl(Z_F, Z_2, temperature), rtol=1e-5)
    np.testing.assert_allclose(terms['loss/path1_cross_entropy'], paper_ce(Z_1), rtol=1e-5)
    np.testing.assert_allclose(terms['loss/cross_entropy'], paper_ce(Z_Q), rtol=1e-5)
    np.testing.assert_allclose(terms['loss/distillation'], paper_kl(Z_F, Z_Q, temperature), rtol=1e-5)


def test_without_paths_and_distillation_it_is_the_cross_entropy():
    objective = Objective(distillation=0.0)
    assert not objective.needs_teacher
    loss, terms = objective(LABELS, Z_Q, None, None, jnp.zeros(0))
    np.testing.assert_array_equal(loss, cross_entropy(Z_Q, LABELS))
    assert set(terms) == {'loss', 'loss/cross_entropy'}


def test_distillation_vanishes_only_at_the_teacher_and_is_float32():
    assert abs(float(distillation_loss(Z_F, Z_F, 2.0))) < 1e-6
    assert float(distillation_loss(Z_F, Z_Q, 2.0)) > 0
    assert distillation_loss(Z_F.astype(jnp.bfloat16), Z_Q.astype(jnp.bfloat16), 2.0).dtype == jnp.float32


@pytest.mark.parametrize('values', [{'temperature': 0.0}, {'distillation': -1.0}, {'path_cross_entropy': -0.1}])
def test_bad_constants_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Objective(**values)
