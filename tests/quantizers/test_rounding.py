"""What every registered estimator must be: rounding in evaluation, finite gradients, and described by a text."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.errors import UserError
from bqat_jax.quantizers import LSQ
from bqat_jax.quantizers.estimators import ESTIMATORS, get_estimator
from bqat_jax.quantizers.rounding import EVALUATION, Context, Estimator, round_with_estimator
from bqat_jax.registry import Registry

VALUES = np.array(
    [-1e30, -2.5, -2.0, -1.5, -0.5, -0.49, -0.0, 0.0, 1e-30, 0.5, 0.50001, 1.0, 1.5, 2.5, 3.2, 1e6], np.float32
)
COTANGENT = np.random.default_rng(0).normal(size=VALUES.shape).astype(np.float32)
TEXTS = [
    *ESTIMATORS,
    'ewgs:delta=0.1',
    'ewgs:delta=0.1,domain=normalized',
    'soft_round:sharpness=1e-05,final_sharpness=20.0',
    'rdfs:amplitude=0.1,terms=3',
    'psgd:forward=full_precision',
]


def others(rule):
    """The same estimator with one option changed, for every option that is no text."""
    for field in dataclasses.fields(rule):
        value = getattr(rule, field.name)
        if not isinstance(value, str):
            changed = (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int) else 0.95 * value
            yield dataclasses.replace(rule, **{field.name: changed})


@pytest.mark.parametrize('text', TEXTS)
def test_evaluation_rounds_to_nearest_even(text):
    rounded = jax.jit(lambda v: get_estimator(text).round(v, EVALUATION))(VALUES)
    np.testing.assert_array_equal(rounded, np.rint(VALUES))
    assert rounded.dtype == np.float32


@pytest.mark.parametrize('text', TEXTS)
def test_training_has_finite_gradients_between_and_beyond_the_bounds(text):
    rule = get_estimator(text)
    lower, upper = (0, 1) if rule.sign_only else (-2, 3)

    @jax.jit
    def step(v, cotangent, context):
        y, pullback = jax.vjp(lambda v: round_with_estimator(rule, v, context, lower=lower, upper=upper), v)
        return y, pullback(cotangent)[0]

    for progress in (0.0, 0.5, 1.0):
        context = Context(jnp.float32(progress), jax.random.key(0), jnp.float32(0.5))
        y, gradient = (np.asarray(x) for x in step(VALUES, COTANGENT, context))
        assert np.isfinite(gradient).all() and y.min() >= lower and y.max() <= upper
        if rule.rounds_in_training:
            np.testing.assert_array_equal(y, np.rint(y))


@pytest.mark.parametrize('text', TEXTS)
def test_training_stays_near_the_value(text):
    """Whatever the forward pass of training is, it is at most one code away; on a code it is that code."""
    rule = get_estimator(text)
    v = np.linspace(-3, 3, 601, dtype=np.float32)
    context = Context(jnp.float32(0.5), jax.random.key(3), jnp.float32(0.5), -3, 3)
    rounded = np.asarray(jax.jit(lambda v: rule.round(v, context))(v))
    assert (np.abs(rounded - v) <= 1).all()
    if rule.rounds_in_training:
        np.testing.assert_array_equal(rounded, np.rint(rounded))
        np.testing.assert_array_equal(rounded[::100], v[::100])


def test_identity_passes_the_gradient_on():
    def loss(v):
        return jnp.sum(3.0 * round_with_estimator(get_estimator('identity'), v, lower=-8, upper=7))

    np.testing.assert_array_equal(jax.grad(loss)(jnp.asarray(VALUES[1:-1])), np.full(VALUES.size - 2, 3.0))


@dataclasses.dataclass(frozen=True)
class Odd(Estimator):
    """A rule with a mistake; NumPy's rules would broadcast a scalar."""

    rounded: Callable | None = None
    gradient: Callable | None = None

    def round(self, value, context):
        return jnp.round(value) if self.rounded is None else self.rounded(value)

    def backward(self, cotangent, value, rounded, context):
        return cotangent if self.gradient is None else self.gradient(cotangent)


@pytest.mark.parametrize(
    ('estimator', 'message'),
    [
        (Odd(gradient=jnp.sum), r'backward of the estimator .* returned the shape \(\) for an array of shape \(3,\)'),
        (Odd(gradient=lambda x: None), 'returned a NoneType'),
        (Odd(rounded=lambda x: 'x'), 'round of the estimator .* returned a str'),
        (Odd(rounded=jnp.max), r'returned the shape \(\)'),
    ],
)
def test_what_is_no_array_like_the_input_is_told(estimator, message):
    def loss(v):
        return jnp.sum(round_with_estimator(estimator, v, lower=-8, upper=7))

    with pytest.raises(UserError, match=message):
        jax.grad(loss)(jnp.ones(3))


@pytest.mark.parametrize('text', TEXTS)
def test_description_makes_the_same(text):
    rule = get_estimator(text)
    assert ESTIMATORS.describe(rule) == text
    for other in (rule, *others(rule)):
        description = ESTIMATORS.describe(other)
        made = ESTIMATORS.make(description)
        assert made == other and type(made) is type(other) and hash(made) == hash(other)
        assert (other == rule) == (description == text)


def test_spaces_and_defaults_in_a_text():
    assert get_estimator('ewgs: delta = 0.1 , domain=normalized') == get_estimator('ewgs:delta=0.1,domain=normalized')
    assert ESTIMATORS.describe(get_estimator('ewgs:delta=0.2')) == 'ewgs'
    assert ESTIMATORS.describe(get_estimator('rdfs:amplitude=0.1,terms=1')) == 'rdfs:amplitude=0.1'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('identiy', "'identiy'; there are: identity.*Did you mean 'identity'"),
        ('', "''"),
        ('ewgs:dleta=0.1', "'ewgs' has no option 'dleta'.*Did you mean 'delta'"),
        ('identity:delta=0.1', "'identity' has no option 'delta'; it has none"),
        ('ewgs:delta=much', "delta='much'.*'ewgs'"),
        ('ewgs:delta', r"delta=''.*\(with a value\)"),
        ('rdfs:terms=1.5', "terms='1.5'.*'rdfs'"),
        ('ewgs:delta=-0.1', 'ewgs:delta=-0.1: delta'),
        ('ewgs:delta=nan', "delta='nan' .* not understood"),
        ('ewgs:domain=complex', 'ewgs:domain=complex: domain'),
        ('dsq:alpha=1.0', 'dsq:alpha=1.0: alpha'),
        ('dsq:alpha=0.0', 'dsq:alpha=0.0: alpha'),
        ('soft_round:sharpness=0', 'soft_round:sharpness=0.0: sharpness'),
        ('soft_round:final_sharpness=-1', 'final_sharpness=-1.0: .*final_sharpness'),
        ('soft_round:final_sharpness=nan', "final_sharpness='nan' .* not understood"),
        ('stacked_sigmoid:sharpness=-1', 'stacked_sigmoid:sharpness=-1.0: sharpness'),
        ('rdfs:amplitude=0.3', 'rdfs:amplitude=0.3: .*amplitude < 0.2251'),
        ('rdfs:terms=0', 'rdfs:terms=0: terms'),
        ('psgd:scale=0', 'psgd:scale=0.0: scale'),
        ('psgd:epsilon=0', 'psgd:epsilon=0.0: .*epsilon'),
        ('psgd:forward=sideways', 'psgd:forward=sideways: forward'),
        ('reste:o_end=0.5', 'reste:o_end=0.5: o_end'),
        ('reste:floor=2', 'reste:floor=2.0: floor'),
        ('polynomial:degree=0', 'polynomial:degree=0: degree'),
    ],
)
def test_refuses_and_names_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        get_estimator(text)


@pytest.mark.parametrize(
    'text',
    [
        f'{name}:{field.name}=inf'
        for name in ESTIMATORS
        for field in dataclasses.fields(ESTIMATORS.get(name))
        if isinstance(field.default, float)
    ],
)
def test_an_infinite_option_is_refused_or_has_finite_gradients(text):
    """As 0 · ∞ would not be."""
    try:
        rule = get_estimator(text)
    except ValueError as error:
        assert text.partition(':')[0] in str(error)
        return
    v = np.linspace(0, 1, 11, dtype=np.float32)
    for progress in (0.0, 1.0):
        context = Context(jnp.float32(progress), jax.random.key(0), jnp.float32(0.5), 0, 1)
        gradient = rule.backward(jnp.ones_like(v), jnp.asarray(v), jnp.round(v), context)
        assert np.isfinite(gradient).all()


def test_a_taken_name_is_refused():
    kept = ESTIMATORS.get('identity')
    with pytest.raises(ValueError, match=r"'identity' is already.*another name"):

        @ESTIMATORS.register('identity')
        class Other(Estimator):
            def backward(self, cotangent, value, rounded, context):
                return cotangent

    assert ESTIMATORS.get('identity') is kept


@pytest.mark.parametrize('name', ['', 'a:b', 'a,b', 'a=b', 'a b'])
def test_a_name_that_no_text_could_hold_is_refused(name):
    with pytest.raises(ValueError, match='cannot name'):
        Registry('rule').register(name)


def test_a_class_of_ones_own():
    """It can be registered again from the same place, as in a notebook, and its gradient is used."""
    registry = Registry('rule')
    for factor in (2.0, 0.5):

        @registry.register('slope')
        class Slope(Estimator):
            """A derivative of 1 + strength · (value - rounded)."""

            strength: float = factor

            def backward(self, cotangent, value, rounded, context):
                return cotangent * (1 + self.strength * (value - rounded))

    assert list(registry) == ['slope'] and 'slope' not in ESTIMATORS
    assert registry.make('slope').strength == 0.5 and registry.make('slope') == Slope()
    rule = registry.make('slope:strength=0.25')
    assert rule.name == 'slope' and registry.describe(rule) == 'slope:strength=0.25'
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.strength = 1.0

    quantizer = LSQ(bits=3, estimator=rule)
    v, g = (np.random.default_rng(seed).normal(size=(16, 8)).astype(np.float32) for seed in (1, 2))
    step = np.float32(0.25)
    gradient = jax.jit(lambda v, g: jax.vjp(lambda v: quantizer.fake_quantize({'step_size': step}, v), v)[1](g)[0])
    units = v / step
    expected = np.where((units > -4) & (units < 3), g * (1 + 0.25 * (units - np.rint(units))), 0)
    np.testing.assert_allclose(gradient(v, g), expected, rtol=1e-5, atol=1e-6)
