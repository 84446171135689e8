import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.replacement.losses import cross_entropy, distillation_loss
from bqat_jax.replacement.objective import WEIGHTS, Objective
from bqat_jax.replacement.paths import Outputs
from bqat_jax.replacement.schedules import get_schedule

LABELS = jnp.array([0, 2, 1])
NO_TEACHER = Outputs(None)
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
    loss, terms = Objective(distillation=a, path_cross_entropy=b, path_distillation=a, temperature=temperature)(
        LABELS, Outputs(Z_Q), Outputs(Z_F), jnp.stack([Z_1, Z_2]), jnp.array(w)
    )
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
    assert not objective.needs_teacher(0) and objective.needs_teacher(1)
    loss, terms = objective(LABELS, Outputs(Z_Q), NO_TEACHER, [], jnp.zeros(0))
    np.testing.assert_array_equal(loss, cross_entropy(Z_Q, LABELS))
    assert set(terms) == {'loss', 'loss/cross_entropy'}


def test_distillation_vanishes_only_at_the_teacher_and_is_float32():
    assert abs(float(distillation_loss(Z_F, Z_F, 2.0))) < 1e-6
    assert float(distillation_loss(Z_F, Z_Q, 2.0)) > 0
    assert distillation_loss(Z_F.astype(jnp.bfloat16), Z_Q.astype(jnp.bfloat16), 2.0).dtype == jnp.float32


def test_every_option_in_float64():
    e, a, b, c, d, f, t, w = 0.5, 0.7, 0.3, 0.9, 0.4, 2.0, 3.0, (0.25, 0.5)
    h, g = ([jax.random.normal(jax.random.key(i), (3, 5)) for i in numbers] for numbers in ((10, 11), (12, 13)))
    objective = Objective(e, a, b, c, d, f, t, get_schedule('linear:start=2,end=0'))
    loss, _ = objective(LABELS, Outputs(Z_Q, h), Outputs(Z_F, g), jnp.stack([Z_1, Z_2]), jnp.array(w), progress=0.25)
    expected = e * paper_ce(Z_Q) + 1.5 * a * paper_kl(Z_F, Z_Q, t)
    for weight, z in zip(w, (Z_1, Z_2), strict=True):
        expected += weight * (b * paper_ce(z) + c * paper_kl(Z_F, z, t) + d * paper_kl(z, Z_Q, t))
    pairs = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in zip(h, g, strict=True)]
    expected += f * np.mean([np.sum((x - y) ** 2) / np.sum(y**2) for x, y in pairs])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_soft_labels_alone_do_not_read_the_labels():
    objective = Objective(cross_entropy=0.0, path_cross_entropy=0.0)
    arguments = (Outputs(Z_Q), Outputs(Z_F), jnp.stack([Z_1]), jnp.ones(1))
    losses = [objective(labels, *arguments)[0] for labels in (LABELS, (LABELS + 1) % 4)]
    assert losses[0] == losses[1] > 0


def test_paths_teach_and_do_not_learn_from_it():
    objective = Objective(0.0, 0.0, 0.0, 0.0, path_teaching=1.0)

    def loss(logits, paths):
        return objective(LABELS, Outputs(logits), NO_TEACHER, paths, jnp.ones(1))[0]

    of_network, of_paths = jax.grad(loss, argnums=(0, 1))(Z_Q, jnp.stack([Z_1]))
    assert float(jnp.abs(of_network).max()) > 0 and float(jnp.abs(of_paths).max()) == 0


def test_a_loss_that_trains_no_head_is_told():
    silent = Objective(cross_entropy=0.0, distillation=0.0)
    teaching = Objective(cross_entropy=0.0, distillation=0.0, path_teaching=1.0)
    teaching.check_trains_network(1)
    for objective, num_paths in ((silent, 3), (teaching, 0)):
        with pytest.raises(ValueError, match='no term of the low-precision network'):
            objective.check_trains_network(num_paths)


BAD = [{'temperature': 0.0}, {'distillation_schedule': get_schedule('constant:value=-1')}]
BAD += [{name: -0.1} for name in WEIGHTS]


@pytest.mark.parametrize('values', BAD)
def test_bad_constants_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Objective(**values)
