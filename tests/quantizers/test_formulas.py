"""The papers' formulas in float64 NumPy, element by element, against every estimator and every quantizer."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.quantizers import QUANTIZERS
from bqat_jax.quantizers.estimators import ESTIMATORS, get_estimator
from bqat_jax.quantizers.rounding import Context, round_with_estimator

SHAPE = (4, 8, 8)
ROWS, CHANNELS = 32, 8


class Where(NamedTuple):
    low: int
    high: int
    progress: float = 1.0
    delta: float = 0.0


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def centred(x):
    return x - np.floor(x) - 0.5


def ewgs(g, x, q, at, delta=0.2, domain='integer'):
    codes = 1 if domain == 'integer' else at.high - at.low
    return g * (1 + delta * np.sign(g) * (x / codes - q / codes))


def dsq(g, x, q, at, alpha=0.2):
    k = np.log(2 / alpha - 1)
    return g * 0.5 * k / np.tanh(k / 2) / np.cosh(k * centred(x)) ** 2


def soft_round(g, x, q, at, sharpness=2.0, final_sharpness=2.0):
    a = sharpness + (final_sharpness - sharpness) * at.progress
    return g * a / np.cosh(a * centred(x)) ** 2 / (2 * np.tanh(a / 2))


def stacked_sigmoid(g, x, q, at, sharpness=4.0):
    s = sigmoid(-sharpness * centred(x))
    return -g * sharpness * s * (1 - s) / (1 - 2 * sigmoid(sharpness / 2))


def rdfs(g, x, q, at, amplitude=0.21, terms=1):
    m = np.arange(terms)
    waves = (-1.0) ** m / (2 * m + 1) * np.cos((2 * m + 1) * np.pi * (x + q)[..., None])
    c = amplitude * np.sqrt(2) * np.pi * waves.sum(-1)
    return g * (1 - c) / (1 + c)


def mad(g, x, q, at):
    # An exact bound counts as beyond, which only shows where the bound is zero.
    between = (x > at.low) & (x < at.high)
    return np.where(between, g, g * np.abs(np.clip(x, at.low, at.high)) / np.maximum(np.abs(x), 1e-9))


def psgd(g, x, q, at, scale=4.0, epsilon=0.01, forward='round'):
    return g * scale * (np.abs(x - np.rint(x)) + epsilon)


def reste(g, x, q, at, o_end=3.0, threshold=1.5, floor=0.1):
    o = 1 + (1 - np.cos(np.pi / 2 * at.progress)) * (o_end - 1)
    size = np.maximum(np.abs(2 * (x - at.low) - 1), 1e-9)
    slope = np.where(size > floor, size ** ((1 - o) / o) / o, floor ** (1 / o) / floor)
    return g * np.where(size > threshold, 0, slope)


def piecewise(g, x, q, at):
    u = 2 * (x - at.low) - 1
    return g * np.where((u >= -1) & (u < 0), 2 + 2 * u, np.where((u >= 0) & (u < 1), 2 - 2 * u, 0))


def polynomial(g, x, q, at, degree=2):
    size = np.abs(2 * (x - at.low) - 1)
    return g * np.where(size <= 1, (1 + 1 / degree) * (1 - size**degree), 0)


def identity(g, x, q, at):
    return g


def ewgs_trace(g, x, q, at):
    return ewgs(g, x, q, at, at.delta, 'normalized')


# dx by the cotangent g, the value x, what it is rounded to and the rest that a rule depends on.
SMOOTH = (dsq, soft_round, stacked_sigmoid, reste, piecewise, polynomial)
RULES = {rule.__name__: rule for rule in (identity, ewgs, ewgs_trace, rdfs, mad, psgd, *SMOOTH)}
RULES |= {'stochastic': identity, 'noise': identity}
SIGN_ONLY = ('reste', 'piecewise', 'polynomial')
RULE_CASES = [(name, *((-1, 0) if name in SIGN_ONLY else (-4, 3))) for name in RULES] + [
    ('ewgs:delta=0.5,domain=normalized', 0, 15),
    ('dsq:alpha=0.4', 0, 3),
    ('soft_round:sharpness=1.0,final_sharpness=6.0', 0, 3),
    ('rdfs:amplitude=0.15,terms=3', -4, 3),
    ('mad', 0, 3),
    ('psgd:forward=full_precision', -4, 3),
    ('reste:o_end=2.0', 0, 1),
    ('piecewise', 0, 1),
    ('polynomial:degree=3', 0, 1),
]


def rule_of(text, at):
    """The transcription of what a text such as 'ewgs:delta=0.1' names."""
    name, _, given = text.partition(':')
    options = dict(item.split('=') for item in given.split(',') if item)
    numbers = {k: x if k in ('domain', 'forward') else (int if k == 'terms' else float)(x) for k, x in options.items()}
    return lambda g, x, q: RULES[name](g, x, q, at, **numbers)


def positions(low, high):
    """Integers, ties, bounds, what lies beyond them and values between."""
    between = np.random.default_rng(0).uniform(low - 2, high + 2, 150)
    return np.concatenate([np.arange(4 * low - 8, 4 * high + 9) / 4, between]).astype(np.float32)


@functools.cache
def pulled_back(text, low, high):
    """Jitted (x, g, context) -> rounded, gradient."""
    estimator = get_estimator(text)

    def run(x, g, context):
        y, pull = jax.vjp(lambda x: round_with_estimator(estimator, x, context, lower=low, upper=high), x)
        return y, pull(g)[0]

    return jax.jit(run)


@pytest.mark.parametrize(('text', 'low', 'high'), RULE_CASES)
def test_backward_rule(text, low, high):
    x = positions(low, high)
    g = np.random.default_rng(1).normal(size=x.size).astype(np.float32)
    at, wide = x.astype(np.float64), g.astype(np.float64)
    for progress, delta in ((0.0, None), (0.4, None), (1.0, 0.7 if text == 'ewgs_trace' else None)):
        context = Context(jnp.float32(progress), strengths=delta and jnp.float32(delta))
        y, got = pulled_back(text, low, high)(x, g, context)
        np.testing.assert_array_equal(y, np.clip(np.rint(x), low, high))
        expected = rule_of(text, Where(low, high, progress, delta or 0.0))(wide, at, np.rint(at))
        if not text.startswith((*SIGN_ONLY, 'mad')):
            expected = np.where((at > low) & (at < high), expected, 0)
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize('text', ['stochastic', 'noise', 'psgd:forward=full_precision'])
def test_rounding_with_a_key(text):
    low, high = -4, 3
    x = np.array([-4, -3.75, -2.5, -1.3, -0.25, 0, 0.1, 0.5, 1.9, 2.49], np.float32)
    many = np.broadcast_to(x, (4000, x.size))
    y, got = pulled_back(text, low - 1, high)(many, np.ones_like(many), Context(key=jax.random.key(0)))
    y = np.asarray(y, np.float64)
    if text == 'stochastic':
        assert ((y == np.floor(x)) | (y == np.ceil(x))).all()
        deviation = np.sqrt((x - np.floor(x)) * (np.ceil(x) - x))
    else:
        assert (np.abs(y - x) <= (0.5 + 1e-6) * (text == 'noise')).all()
        deviation = 1 / np.sqrt(12)
    assert (np.abs(y.mean(0) - x) <= 5 * deviation / np.sqrt(len(many)) + 1e-6).all()
    expected = rule_of(text, Where(low - 1, high))(np.ones(x.size), x.astype(np.float64), np.rint(x))
    np.testing.assert_allclose(got, np.broadcast_to(expected, many.shape), rtol=1e-5)


def test_gradient_of_a_step_sees_the_noise_of_the_forward_pass():
    step, v = np.float32(0.25), np.random.default_rng(0).uniform(-0.7, 0.4, SHAPE).astype(np.float32)
    quantizer = QUANTIZERS.make('lsq', bits=3, estimator=get_estimator('noise'))

    @jax.jit
    def run(p):
        y, pull = jax.vjp(lambda p: quantizer.fake_quantize(p, v, Context(key=jax.random.key(3))), p)
        return y, pull(jnp.ones(SHAPE))[0]['step_size']

    y, got = run({'step_size': step})
    np.testing.assert_allclose(got, (np.float64(y) / step - v / step).sum() / np.sqrt(v.size * 3), rtol=1e-4)


SOFT = {
    'dsq': lambda x: np.floor(x) + 0.5 + np.tanh(np.log(2 / 0.2 - 1) * centred(x)) / (1 - 0.2) / 2,
    'soft_round': lambda x: np.floor(x) + 0.5 + np.tanh(2 * centred(x)) / (2 * np.tanh(1)),
    'stacked_sigmoid': lambda x: np.floor(x) + (sigmoid(4 * centred(x)) - sigmoid(-2)) / (sigmoid(2) - sigmoid(-2)),
    # Approximations F(2x + 1) of the sign, brought to the codes -1 and 0.
    'piecewise': lambda x: ((2 * (2 * x + 1) - np.sign(2 * x + 1) * (2 * x + 1) ** 2) - 1) / 2,
    'polynomial': lambda x: (1.5 * ((2 * x + 1) - (2 * x + 1) ** 3 / 3) - 1) / 2,
    'reste': lambda x: (np.cbrt(2 * x + 1) - 1) / 2,
}


@pytest.mark.parametrize('name', SOFT)
def test_rule_is_the_derivative_of_its_soft_function(name):
    low, high = (-1, 0) if name in SIGN_ONLY else (-4, 3)
    x = positions(low, high)
    _, got = pulled_back(name, low, high)(x, np.ones_like(x), Context(jnp.float32(1)))
    chosen = (x > low) & (x < high) & (np.abs(x - np.rint(x)) > 1e-3) & ((name != 'reste') | (np.abs(2 * x + 1) > 0.11))
    x = np.float64(x[chosen])
    slope = (SOFT[name](x + 1e-6) - SOFT[name](x - 1e-6)) / 2e-6
    np.testing.assert_allclose(np.asarray(got)[chosen], slope, rtol=2e-5, atol=1e-6)


def test_rules_that_are_the_same():
    k = math.log(2 / 0.3 - 1)
    for one, other, low, high in (
        ('dsq:alpha=0.3', f'soft_round:sharpness={k},final_sharpness={k}', -4, 3),
        ('polynomial:degree=1', 'piecewise', -1, 0),
        ('rdfs:amplitude=0', 'identity', -4, 3),
    ):
        x = positions(low, high)
        got = [pulled_back(text, low, high)(x, np.ones_like(x), Context(jnp.float32(0.3)))[1] for text in (one, other)]
        np.testing.assert_allclose(*got, rtol=2e-5)


@pytest.mark.parametrize('name', ['lsq', 'lsq_plus', 'nulsq', 'apot'])
def test_steps_and_levels_learn_from_rdfs_as_from_the_identity(name):
    """The authors' code changes the gradient of what is rounded, and keeps LSQ's for the step."""
    v, cotangent = jax.random.normal(jax.random.key(0), (40,)), jax.random.normal(jax.random.key(1), (40,))

    def gradients(estimator):
        quantizer = Case(name, 'w', 3, estimator=estimator).quantizer()
        _, pull = jax.vjp(lambda parameters, v: quantizer.fake_quantize(parameters, v), quantizer.init(v), v)
        return pull(cotangent)

    identity, theirs, ours = (gradients(text) for text in ('identity', 'rdfs', 'rdfs:lsq_step=false'))
    jax.tree.map(np.testing.assert_array_equal, theirs[0], identity[0])
    assert not np.allclose(theirs[1], identity[1]) and not np.allclose(
        *(jax.tree.leaves(one[0])[0] for one in (ours, identity))
    )
    np.testing.assert_array_equal(theirs[1], ours[1])


@pytest.mark.parametrize('terms', [1, 2, 3, 4])
def test_rdfs_allows_positive_gradients_alone(terms):
    m, phase = np.arange(terms), np.linspace(0, np.pi, 20001)[:, None]
    largest = np.abs(((-1.0) ** m / (2 * m + 1) * np.cos((2 * m + 1) * phase)).sum(-1)).max()
    limit = 1 / (np.sqrt(2) * np.pi * largest)
    with pytest.raises(ValueError, match='negative'):
        get_estimator(f'rdfs:terms={terms},amplitude={1.001 * limit}')
    estimator = get_estimator(f'rdfs:terms={terms},amplitude={0.999 * limit}')
    x = jnp.linspace(-2, 2, 20001)
    gradient = jax.jit(lambda x: estimator.backward(jnp.ones_like(x), x, jnp.round(x), Context()))(x)
    assert float(gradient.min()) > 0
    assert bool(jnp.isfinite(gradient).all())


# A quantizer's transcription gives parameters, an input and the formula (parameters, v, g, rule) -> y, dv, gradients of
# the parameters, in which rule(g, x, q) is the gradient that the estimator lets through the rounding of x to q.


class Case(NamedTuple):
    name: str
    kind: str  # w: weights; a: unsigned, s: signed activations
    bits: int
    per_channel: bool = False
    estimator: str = 'identity'
    options: str = ''
    plain: bool = False  # without the points at which a derivative is a convention

    @property
    def weights(self):
        return self.kind == 'w'

    @property
    def signed(self):
        return self.kind != 'a'

    @property
    def count(self):
        """N: elements that share a scale, of one example."""
        return np.prod(SHAPE if self.weights else SHAPE[1:]) // (CHANNELS if self.per_channel else 1)

    @property
    def top(self):
        """Q_P."""
        return 2 ** (self.bits - self.signed) - 1

    def quantizer(self):
        estimator, axis = get_estimator(self.estimator), -1 if self.per_channel else None
        fixed = {'signed': self.signed, 'channel_axis': axis, 'batch_axis': None if self.weights else 0}
        return QUANTIZERS.make(self.name + self.options, bits=self.bits, estimator=estimator, **fixed)

    def total(self, x):
        return x.sum((0, 1)) if self.per_channel else x.sum()

    def mean(self, x):
        return x.mean((0, 1)) if self.per_channel else x.mean()

    def scales(self, scale):
        """Powers of two times `scale`, so that what is exact in the integer domain is exact in the input's."""
        return scale * 2.0 ** (np.arange(CHANNELS) % 4 - 1) if self.per_channel else np.float64(scale)

    def place(self, special, random):
        """The random values, with special ones in the first rows of every channel."""
        rows = [] if self.plain else [[x] * CHANNELS for x in special]
        return np.concatenate([np.array(rows).reshape(-1, CHANNELS), random[len(rows) :]]).reshape(SHAPE)

    def units(self, rng, low, high):
        """Integer-domain values: all that is special about bounds and ties, and multiples of 1/64."""
        random = np.round(((low + high) / 2 + rng.normal(size=(ROWS, CHANNELS)) * (high - low + 1) / 3) * 64) / 64
        ties = [-0.5, 0.5, -1.5, 1.5, 2.5, low - 0.5, low + 0.5, high - 0.5, high + 0.5]
        return self.place([0, 1, -1, low, high, low - 3, high + 4, *ties], random)

    def weights_of_mean(self, rng, special):
        """Weights whose mean magnitude is a power of two exactly, and that hold `special` multiples of it."""
        x = rng.integers(1, 64, (ROWS - 2 * len(special), CHANNELS)) / 64
        x[-1] += ROWS - 2 * np.sum(special) - x.sum(0)
        assert (x[-1] > 0).all()
        rows = [[x] * CHANNELS for x in (*special, *np.negative(special))]
        return np.concatenate([rows, x * rng.choice([-1, 1], x.shape)]).reshape(SHAPE) * self.scales(0.5)


def lsq(case, rng):
    low = -(2 ** (case.bits - 1)) + (case.options == ':narrow=true') if case.signed else 0

    def formula(p, v, g, rule):
        s = p['step_size']
        u = v / s
        code = np.rint(np.clip(u, low, case.top))
        passed = np.where((u > low) & (u < case.top), rule(g, u, code), 0)
        return s * code, passed, {'step_size': case.total(g * code - passed * u) / np.sqrt(case.count * case.top)}

    steps = case.scales(0.25)
    return {'step_size': steps}, steps * case.units(rng, low, case.top), formula


def calibrated(case, rng):
    parameters, v, formula = lsq(case, rng)
    return parameters, v, lambda p, *rest: (*formula(p, *rest)[:2], {'step_size': 0 * p['step_size']})


def lsq_plus(case, rng):
    n = 2**case.bits - 1

    def formula(p, v, g, rule):
        s, b = p['step_size'], p['offset']
        u = (v - b) / s
        code = np.rint(np.clip(u, 0, n))
        passed = np.where((u > 0) & (u < n), rule(g, u, code), 0)
        ds, db = case.total(g * code - passed * u), case.total(g - passed)
        scale = 1 / np.sqrt(case.count * n)
        return s * code + b, passed, {'step_size': ds * scale, 'offset': db * scale}

    steps, offset = case.scales(0.25), case.scales(-0.375)
    learned = {'step_size': steps, 'offset': offset}, steps * case.units(rng, 0, n) + offset, formula
    return lsq(case, rng) if case.weights else learned


def pact(case, rng):
    n, low = case.top, -case.top if case.signed else 0

    def formula(p, v, g, rule):
        a = p['clip_value']
        u = v * n / a
        code = np.rint(np.clip(v, low * a / n, a) * n / a)
        passed = np.where((u >= low) & (u <= n), rule(g, u, code), 0)
        da = np.where(v >= a, g, np.where(case.signed & (v <= -a), -g, 0))
        if case.name == 'pact_plus':
            da = np.where((u > low) & (u < n), (g * code - passed * u) / n, da)
        return code * a / n, passed, {'clip_value': da.sum()}

    return {'clip_value': np.float64(n / 4)}, case.units(rng, low, n) / 4, formula


def ewgs_range(case, rng):
    n, factor, half = 2**case.bits - 1, 1 + case.signed, case.signed / 2

    def formula(p, v, g, rule):
        low, high, c = p['lower'], p['upper'], p['output_scale']
        x = np.clip((v - low) / (high - low), 0, 1)
        xq = np.rint(n * x) / n
        passed = np.where((v >= low) & (v <= high), c * factor * rule(g, n * x, n * xq), 0)
        ends = {'lower': (v - high) / (high - low) ** 2, 'upper': (low - v) / (high - low) ** 2}
        y = factor * (xq - half)
        return (
            c * y,
            passed / (high - low),
            {k: (passed * d).sum() for k, d in ends.items()} | {'output_scale': (g * y).sum()},
        )

    low, high = (-0.75, 1.25) if case.signed else (0.125, 2.125)
    v = case.place([low, high, low - 1, high + 1, 0], rng.normal(size=(ROWS, CHANNELS)) + (low + high) / 2)
    return {'lower': np.float64(low), 'upper': np.float64(high), 'output_scale': np.float64(0.7)}, v, formula


def dorefa(case, rng):
    n = 2**case.bits - 1

    def formula(p, v, g, rule):
        if not case.weights:
            code = np.rint(n * np.clip(v, 0, 1))
            return code / n, np.where((v >= 0) & (v <= 1), rule(g, n * v, code), 0), {}
        if case.bits == 1:
            return np.where(v >= 0, 1, -1) * np.abs(v).mean(), g, {}
        t = np.tanh(v)
        largest = np.abs(t).max()
        r = n * (t / (2 * largest) + 0.5)
        passed = rule(g, r, np.rint(r)) / largest
        dt = passed - np.where(np.abs(t) == largest, np.sign(t) * (passed * t).sum() / largest, 0)
        return 2 * np.rint(r) / n - 1, dt * (1 - t**2), {}

    random = rng.normal(size=(ROWS, CHANNELS))
    return {}, case.place([0], random) if case.weights else case.place([0, 1, -1, 2], random + 0.5), formula


SAWB_TABLE = {2: (3.12, -2.064), 3: (7.509, -6.892), 4: (12.68, -12.80), 5: (17.74, -18.64), 8: (31.76, -35.04)}


def sawb(case, rng):
    def formula(p, v, g, rule):
        c1, c2 = SAWB_TABLE[case.bits]
        a = np.broadcast_to(c1 * np.sqrt(case.mean(v**2)) + c2 * case.mean(np.abs(v)), CHANNELS)
        levels = np.linspace(-a, a, 2**case.bits)
        return levels[np.abs(v - levels[:, None, None]).argmin(0), np.arange(CHANNELS)], g, {}

    return {}, rng.normal(size=SHAPE) * case.scales(1), formula


def statsq(case, rng):
    def formula(p, v, g, rule):
        a, n = 2 * case.mean(np.abs(v)), 2 ** (case.bits - 1)
        # The authors clip at 1 - 1e-6, to stay in the range of codes; here the codes do.
        code = np.clip(np.rint(np.clip(v / a, -1, 1) * n - 0.5), -n, n - 1)
        return a * (code + 0.5) / n, g, {}

    return {}, case.weights_of_mean(rng, [0, 0.25, 0.5, 1, 2, 2.5, 3]), formula


def absmean_ternary(case, rng):
    def formula(p, v, g, rule):
        scale = max(np.abs(v).mean(), 1e-5)
        return scale * np.clip(np.rint(v / scale), -1, 1), g, {}

    return {}, case.weights_of_mean(rng, [0, 0.5, 1, 1.5, 2, 3]), formula


def binary(case, rng):
    def formula(p, v, g, rule):
        a = case.mean(np.abs(v)) if case.weights else p['scale']
        sign = np.where(v >= 0, 1, -1) if case.signed else np.rint(np.clip(v / a, 0, 1))
        passed = rule(g, (v / a - 1) / 2, (sign - 1) / 2)
        if case.estimator not in SIGN_ONLY:  # those hold beyond the clip
            passed = np.where((v >= -a * case.signed) & (v <= a), passed, 0)
        if case.weights:
            return a * sign, passed + case.total(g * sign) * sign / case.count, {}
        return a * sign, passed, {'scale': case.total(g * sign) / np.sqrt(case.count)}

    scale = case.scales(0.5)
    if case.weights:
        return {}, case.weights_of_mean(rng, [0, 0.5, 1, 2.5, 3]), formula
    return {'scale': scale}, scale * case.units(rng, -1, 1), formula


def sums(*terms):
    """All the sums of one number from each term."""
    return np.unique(functools.reduce(np.add.outer, [np.array(term) for term in terms]))


# The paper's terms, of two bits each; where bits are odd one term has a single bit.
APOT_SUMS = {
    1: sums([0, 1]),
    2: sums([0, 1 / 2, 1 / 4, 1 / 8]),
    3: sums([0, 1 / 2, 1 / 4, 1 / 16], [0, 1 / 8]),
    4: sums([0, 1 / 2, 1 / 8, 1 / 32], [0, 1 / 4, 1 / 16, 1 / 64]),
    5: sums([0, 1 / 2, 1 / 8, 1 / 64], [0, 1 / 4, 1 / 16, 1 / 128], [0, 1 / 32]),
}


def apot_levels(case):
    magnitudes = APOT_SUMS[case.bits - case.signed] / APOT_SUMS[case.bits - case.signed].max()
    return np.concatenate([-magnitudes[:0:-1], magnitudes]) if case.signed else magnitudes


def normalized(case, v):
    """Values whose mean and deviation are taken out, where they are weights; and the deviation."""
    return ((v - v.mean()) / v.std(), v.std()) if case.weights else (v, 1)


def apot(case, rng):
    levels = apot_levels(case)

    def formula(p, v, g, rule):
        alpha, (x, deviation) = p['clip_value'], normalized(case, v)
        u = np.clip(x / alpha, levels[0], 1)
        below = np.clip(np.searchsorted(levels, u, side='right') - 1, 0, levels.size - 2)
        part = (u - levels[below]) / (levels[below + 1] - levels[below])
        code = below + ((part > 0.5) | ((part == 0.5) & (below % 2 == 1)))
        passed = np.where((x >= levels[0] * alpha) & (x <= alpha), rule(g, below + part, code), 0)
        dalpha = g * levels[code] - passed * u
        return deviation * alpha * levels[code], passed, {'clip_value': (deviation * dalpha).sum()}

    special = [] if case.weights else [0, 2, -2, 0.25, 0.75, 1.5, 3, -3]
    random = rng.normal(size=(ROWS, CHANNELS)) * 2
    return {'clip_value': np.float64(1.25 if case.weights else 2)}, case.place(special, random), formula


def nulsq(case, rng):
    def half(steps, x, g, rule):
        """y, dy/dx and the steps' gradients for magnitudes x >= 0."""
        ends, number = np.cumsum(steps), np.arange(steps.size)
        j = np.minimum(np.searchsorted(ends, x, side='right'), steps.size - 1)
        start, inside = (ends - steps)[j], x <= ends[-1]
        u = np.where(inside, (x - start) / steps[j], 1)
        passed = np.where(inside, rule(g, j + u, j + np.rint(u)), 0)
        own = (g - passed)[..., None] * (number < j[..., None])
        own += (g * np.rint(u) - passed * u)[..., None] * (number == j[..., None])
        return start + steps[j] * np.rint(u), passed, own

    def formula(p, v, g, rule):
        # The authors divide by the number of steps on the same side of zero.
        scale = (2 if case.weights else 1) / np.sqrt(case.count * (case.top if case.weights else 2**case.bits - 1))
        scale_below = 2 / np.sqrt(case.count * 2 ** (case.bits - 1)) if case.weights else scale
        y, dv, own = half(p['step_sizes'], np.maximum(v, 0), g, rule)
        up = v >= 0
        gradients = {'step_sizes': scale * (own * up[..., None]).sum((0, 1, 2))}
        if not case.signed:
            return y * up, dv * up, gradients
        y_below, dv_below, own = half(p['negative_step_sizes'], np.maximum(-v, 0), -g, rule)
        gradients['negative_step_sizes'] = scale_below * (own * ~up[..., None]).sum((0, 1, 2))
        return np.where(up, y, -y_below), np.where(up, dv, -dv_below), gradients

    steps = rng.integers(20, 60, case.top + case.signed * 2 ** (case.bits - 1)) / 64
    above, below = steps[: case.top], steps[case.top :]
    high, low = above.sum(), -below.sum()
    random = rng.normal(size=(ROWS, CHANNELS)) * (high - low) / 3 + (high + low) / 2
    parameters = {'step_sizes': above} | ({'negative_step_sizes': below} if case.signed else {})
    return parameters, case.place([0, -0.0, low, high, low - 1, high + 1, above[0]], random), formula


def overlaps(x):
    """What of each of 16 intervals lies below x, so that f(x) is the sum of slopes · overlaps."""
    return np.clip(16 * x[..., None] - np.arange(16), 0, 1) / 16


def lcq(case, rng):
    # Nothing to compand at 2 bits: the paper's weights are ternary and uniform.
    n, learned = case.top, not (case.weights and case.bits == 2)

    def formula(p, v, g, rule):
        alpha, (x, deviation) = p['clip_value'], normalized(case, v)
        share = np.exp(p['theta']) / np.exp(p['theta']).sum()
        u, sign, inside = np.minimum(np.abs(x) / alpha, 1), np.sign(x), np.abs(x) < alpha
        position = n * (overlaps(u) @ (16 * share))
        z = np.interp(np.rint(position) / n, np.cumsum([0, *share]), np.arange(17) / 16)
        passed = np.where(inside, rule(g, sign * position, sign * np.rint(position)), 0)
        # f(f⁻¹(q)) = q gives the derivative of f⁻¹(q) by the slopes, and by q, 1 / slope.
        dz = passed[..., None] * overlaps(u) - g[..., None] * overlaps(z)
        slope = 16 * share[np.minimum((16 * z + 1e-9).astype(int), 15)]
        dslopes = 16 * share * (alpha * deviation * (sign * inside / slope)[..., None] * dz).sum((0, 1, 2))
        gradients = {
            'clip_value': (deviation * (g * sign * z - passed * x / alpha)).sum(),
            'theta': learned * (dslopes - share * dslopes.sum()),
        }
        return deviation * alpha * sign * z, passed, gradients

    parameters = {'clip_value': np.float64(2), 'theta': rng.normal(size=16) * 0.5 * learned}
    random = rng.normal(size=(ROWS, CHANNELS)) * 1.5
    if case.kind == 'a':
        return parameters, case.place([0, 2, 3], np.abs(random)), formula
    return parameters, case.place([0, 2, -2, 3, -3] * (not case.weights), random), formula


def n2uq(case, rng):
    n = 2**case.bits - 1
    bound = n / 2 ** (case.bits - 1)

    def weights_formula(p, v, g, rule):
        c = bound * case.mean(np.abs(v))
        u = n * (np.clip(v / c, -1, 1) + 1) / 2
        return c * 2 / n * (np.rint(u) - n / 2), np.where(np.abs(v) <= c, rule(g, u, np.rint(u)), 0), {}

    def formula(p, v, g, rule):
        widths, x, number, distance = p['widths'], p['input_scale'] * v, np.arange(n), p['output_scale'] * 2 / n
        edges = p['start'] + np.cumsum([0, *widths])
        i = np.clip(np.searchsorted(edges, x, side='right') - 1, 0, n - 1)
        part = (x - edges[i]) / widths[i]
        position = np.clip(i + part, 0, n)
        code, inside = np.rint(position), (x > edges[0]) & (x <= edges[-1])
        # Along the piecewise linear map, whose slope is D / a_i.
        slope = distance * np.where(inside, rule(g, position, code), 0) / widths[i]
        along = (number < i[..., None]) + part[..., None] * (number == i[..., None])
        gradients = {
            'widths': -(slope[..., None] * along).sum((0, 1, 2)),
            'start': -slope.sum(),
            'input_scale': (slope * v).sum(),
            'output_scale': (g * 2 / n * code).sum(),
        }
        return distance * code, slope * p['input_scale'], gradients

    if case.weights:
        special = [0.25, bound, 0.5, 2.5, 3] + [0] * (case.bits > 1)  # at 1 bit zero has a test of its own
        return {}, case.weights_of_mean(rng, special), weights_formula
    widths = np.ones(1) if case.bits == 1 else rng.integers(20, 60, n) / 64
    numbers = {'start': np.float64(0.125), 'input_scale': np.float64(2), 'output_scale': np.float64(0.75)}
    end = (0.125 + widths.sum()) / 2
    v = case.place([0, 0.0625, end, end + 1], np.abs(rng.normal(size=(ROWS, CHANNELS))) * end / 1.5)
    return {'widths': widths, **numbers}, v, formula


LEARNED = (lsq, lsq_plus, pact, ewgs_range, apot, nulsq, lcq, n2uq)
PAPERS = {paper.__name__: paper for paper in (*LEARNED, dorefa, sawb, statsq, absmean_ternary, binary)}
PAPERS |= {'pact_plus': pact, 'minmax': calibrated, 'octav': calibrated}
# Kind of tensor and bits, where c and d are weights and unsigned activations with a scale per channel.
COMPARED = {
    'lsq': 'w2 w3 w8 c4 a1 a4 a8 s3 d2 c3/ewgs a4/ewgs w3/soft_round',
    'lsq:narrow=true': 'w2',
    'lsq_plus': 'c4 a1 a8 s2 d4 a3/ewgs',
    'pact': 'w2 w4 a1 a2 a8 s3',
    'pact_plus': 'w3 a2 a4 a3/ewgs',
    'ewgs_range': 'w1 w2 a1 a8 s3 w2/ewgs a3/ewgs:delta=0.5,domain=normalized',
    'dorefa': 'w1 w2 w4 w8 a1 a2 a4',
    'sawb': 'w2 w3 w5 w8 c4',
    'statsq': 'w1 w2 w3 c1 c4',
    'absmean_ternary': 'w2',
    'binary': 'w1 c1 a1 s1 d1 w1/reste s1/piecewise',
    'minmax': 'w4 c8 a3',
    'octav': 'w3 a4',
    'apot': 'w2 w4 a1 a3 s3 w3/ewgs',
    'nulsq': 'w2 w4 a1 a3 s3/ewgs',
    'lcq': 'w2 w4 a1 a4 s3 w3/ewgs',
    'n2uq': 'w1 w3 c2 a1 a4 a2/ewgs',
}
CASES = [(name, tensor) for name, tensors in COMPARED.items() for tensor in tensors.split()]


def case_of(name, tensor):
    name, _, options = name.partition(':')
    kind, bits, estimator = tensor[0], int(tensor[1]), tensor[3:] or 'identity'
    return Case(name, {'c': 'w', 'd': 'a'}.get(kind, kind), bits, kind in 'cd', estimator, options and f':{options}')


def transcribed(case):
    """Parameters, input and cotangent in float32, and what the formula makes of them in float64."""
    rng = np.random.default_rng(case.bits)
    parameters, v, formula = PAPERS[case.name](case, rng)
    parameters = {name: np.float32(x) for name, x in parameters.items()}
    v, g = np.float32(v), np.float32(rng.normal(size=SHAPE))
    rule = rule_of(case.estimator, Where(-1, 0) if case.name == 'binary' else Where(0, 2**case.bits - 1))
    wide = {name: np.float64(x) for name, x in parameters.items()}
    return parameters, v, g, formula(wide, np.float64(v), np.float64(g), rule)


@pytest.mark.parametrize(('name', 'tensor'), CASES)
def test_quantizer(name, tensor):
    case = case_of(name, tensor)
    parameters, v, g, (y, dv, gradients) = transcribed(case)

    @jax.jit
    def run(parameters, v, g):
        y, pull = jax.vjp(case.quantizer().fake_quantize, parameters, v)
        return {'y': y}, *pull(g)

    got_y, got_gradients, got_dv = run(parameters, v, g)
    got, expected = got_y | got_gradients | {'dv': got_dv}, {'y': y, 'dv': dv} | gradients
    assert set(got) == set(expected)
    differences = {
        what: (int((difference > limit).sum()), float(difference.max()))
        for what, x in expected.items()
        if ((difference := np.abs(np.float64(got[what]) - x)) > (limit := 2e-5 * max(np.abs(x).max(), 0.1))).any()
    }
    assert not differences, 'how many differ, by how much at most'


@pytest.mark.parametrize('name', ['ewgs_range', 'n2uq'])
def test_zero_at_one_bit_is_a_tie(name):
    # A tie, which goes to the even code: sign(0) = 1.
    parameters = {'lower': jnp.float32(-1), 'upper': jnp.float32(1), 'output_scale': jnp.float32(1)}
    v = jnp.array([0.0, 1.0, -1.0, 2.0])
    y = case_of(name, 'w1').quantizer().fake_quantize(parameters if name == 'ewgs_range' else {}, v)
    np.testing.assert_allclose(y, [1, 1, -1, 1], rtol=1e-6)


def test_nothing_is_left_out():
    for registry, formulas in ((ESTIMATORS, RULES), (QUANTIZERS, PAPERS)):
        assert {name for name in registry if registry.get(name).__module__.startswith('bqat_jax.')} == set(formulas)
    assert {name.partition(':')[0] for name in COMPARED} == set(PAPERS)
    assert {name for name in RULES if ESTIMATORS.get(name).sign_only} == set(SIGN_ONLY)


@pytest.mark.parametrize('bits', [2, 3, 4, 5])
def test_apot_levels(bits):
    if bits == 3:
        np.testing.assert_allclose(apot_levels(Case('apot', 'a', 3)), [0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1])
    for kind in 'aw':
        expected = apot_levels(Case('apot', kind, bits))
        quantizer = Case('apot', kind, bits).quantizer()
        prepared = {name: np.float32(1) for name in ('clip_value', 'mean', 'deviation')}
        codes = np.arange(quantizer.lower, quantizer.upper + 1)
        assert expected.size == 2**bits - (kind == 'w')
        np.testing.assert_allclose(jax.jit(quantizer.decode)(prepared, codes), expected, rtol=1e-6)


def test_initial_scales():
    rng = np.random.default_rng(0)
    w = np.float32(rng.normal(size=SHAPE) * 0.3 + 0.05)
    x = np.abs(w) + np.float32(0.01)
    size, deviation, mean = np.abs(w).mean((0, 1)), w.std((0, 1)), w.mean((0, 1))
    low, high = -3 * w.std(), 3 * x.std() / np.sqrt(1 - 2 / np.pi)
    t = np.clip((w - low) / (-2 * low), 0, 1), np.clip((x - x.min()) / (high - x.min()), 0, 1)
    sizes = np.abs(2 * np.rint(7 * t[0]) / 7 - 1).mean(), (np.rint(7 * t[1]) / 7).mean()
    expected = {
        ('lsq', 'w3'): {'step_size': 2 * np.abs(w).mean() / np.sqrt(3)},
        ('lsq', 'c3'): {'step_size': 2 * size / np.sqrt(3)},
        ('lsq', 'a3'): {'step_size': 2 * x.mean() / np.sqrt(7)},
        ('lsq_plus', 'c3'): {'step_size': np.maximum(np.abs(mean - 3 * deviation), np.abs(mean + 3 * deviation)) / 4},
        ('ewgs_range', 'w3'): {'lower': low, 'upper': -low, 'output_scale': np.abs(w).mean() / sizes[0]},
        ('ewgs_range', 'a3'): {'lower': x.min(), 'upper': high, 'output_scale': x.mean() / sizes[1]},
        ('binary', 's1'): {'scale': np.abs(w).mean()},
        ('binary', 'a1'): {'scale': 2 * x.mean()},
        ('minmax', 'w3'): {'step_size': max(w.max() / 3, w.min() / -4)},
        ('minmax', 'a3'): {'step_size': x.max() / 7},
        ('apot', 'w3'): {'clip_value': 3},
    }
    for (name, tensor), parameters in expected.items():
        case = case_of(name, tensor)
        got = jax.jit(case.quantizer().init)(x if case.kind == 'a' else w)
        assert set(got) == set(parameters)
        for what, value in parameters.items():
            np.testing.assert_allclose(got[what], value, rtol=1e-5, err_msg=f'{name} {tensor} {what}')


@pytest.mark.parametrize(('bits', 'constant'), [(2, 0.6508), (3, 0.3534), (4, 0.1932)])
def test_nulsq_starts_from_the_tabulated_constants(bits, constant):
    x = np.float32(np.random.default_rng(0).normal(size=SHAPE))
    steps = Case('nulsq', 'a', bits).quantizer().init(jnp.abs(x))['step_sizes']
    np.testing.assert_allclose(steps, np.full(2**bits - 1, constant * np.sqrt(2 * (x**2).mean())), rtol=1e-3)
    z, candidates = np.linspace(-6, 6, 2401)[:, None], np.linspace(0.05, 1.5, 1451)
    codes = np.clip(np.rint(z / candidates), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    best = candidates[(np.exp(-(z**2) / 2) * (z - candidates * codes) ** 2).sum(0).argmin()]
    for steps in Case('nulsq', 'w', bits).quantizer().init(jnp.asarray(x)).values():
        np.testing.assert_allclose(steps, np.full(len(steps), best * x.std()), rtol=2e-3)


@pytest.mark.parametrize('tensor', ['w2', 'w4', 'c4', 'a3', 'd8'])
def test_octav_clip_has_the_least_error_of_its_model(tensor):
    case = case_of('octav', tensor)
    x = np.random.default_rng(0).laplace(size=(16, 64, CHANNELS))
    x = np.float32(np.abs(x) if case.kind == 'a' else x)
    steps = np.broadcast_to(jax.jit(case.quantizer().init)(x)['step_size'], CHANNELS)
    noise = 4.0**-case.bits / 3 if case.signed else 1 / (12 * (2**case.bits - 1) ** 2)

    def error(s):
        size = np.abs(np.float64(x))
        each = np.where(size > s, (s - size) ** 2, noise * s**2 * (size > 0))
        return each.sum((0, 1)) if case.per_channel else each.sum()

    reached = error(np.float64(steps) * (2 ** (case.bits - 1) if case.signed else case.top))
    assert (reached <= 1.005 * np.min([error(s) for s in np.linspace(0.5, 12, 400)], axis=0)).all()


def test_lsq_plus_starts_near_the_least_error():
    x = np.float64(np.random.default_rng(0).gamma(2, size=SHAPE) - 0.5).astype(np.float32)
    got = Case('lsq_plus', 's', 3).quantizer().init(jnp.asarray(x))

    def error(s, b):
        return ((np.clip(np.rint((x - b) / s), 0, 7) * s + b - x) ** 2).sum()

    least = min(error(s, b) for s in np.linspace(0.2, 1.2, 60) for b in np.linspace(-1, 0.5, 30))
    assert error(*(np.float64(got[k]) for k in ('step_size', 'offset'))) <= 1.1 * least


@pytest.mark.parametrize(
    ('name', 'tensor'),
    [
        *[('pact', 'a4'), ('pact_plus', 'a4'), ('dorefa', 'w3'), ('dorefa', 'a3'), ('ewgs_range', 'w3'), ('lcq', 's4')],
        *[('ewgs_range', 'a3'), ('apot', 'w3'), ('apot', 'a4'), ('lcq', 'w3'), ('lcq', 'a3'), ('n2uq', 'a3')],
    ],
)
def test_autograd_of_the_forward_formula_agrees(name, tensor):
    torch = pytest.importorskip('torch', reason='PyTorch, the second witness, is not installed')
    case = case_of(name, tensor)._replace(plain=True)
    parameters, v, g, (y, dv, gradients) = transcribed(case)
    p = {k: torch.tensor(np.float64(x), requires_grad=True) for k, x in parameters.items()}
    v, n = torch.tensor(np.float64(v), requires_grad=True), 2**case.bits - 1

    def straight(x, y=None):
        return x + ((x.round() if y is None else y) - x).detach()

    def compress(u, slopes):
        return (16 * u[..., None] - torch.arange(16)).clamp(0, 1) @ slopes / 16

    def expand(q, slopes):
        starts = torch.cat([torch.zeros(1), slopes.cumsum(0)[:-1]]) / 16
        i = torch.searchsorted(starts.detach(), q.detach(), right=True) - 1
        return i / 16 + (q - starts[i]) / slopes[i]

    x, scale = v, 1
    if name in ('apot', 'lcq') and case.weights:
        scale = v.std(correction=0).detach()
        x = (v - v.mean().detach()) / scale
    if name in ('pact', 'pact_plus'):
        a = p['clip_value']
        clipped = 0.5 * (v.abs() - (v - a).abs() + a)
        witness = straight(clipped * n / a) * a / n
        if name == 'pact':
            witness = straight(clipped, witness)
    elif name == 'dorefa':
        t = v.tanh()
        r = t / (2 * t.abs().max()) + 0.5 if case.weights else v.clamp(0, 1)
        witness = straight(n * r) / n * (1 + case.weights) - int(case.weights)
    elif name == 'ewgs_range':
        q = straight(n * ((v - p['lower']) / (p['upper'] - p['lower'])).clamp(0, 1)) / n
        witness = p['output_scale'] * (2 * (q - 0.5) if case.signed else q)
    elif name == 'apot':
        levels = torch.tensor(apot_levels(case))
        u = (x / p['clip_value']).clamp(float(levels[0]), 1)
        witness = scale * p['clip_value'] * straight(u, levels[(u[..., None] - levels).abs().argmin(-1)])
    elif name == 'lcq':
        alpha, slopes, n = p['clip_value'], 16 * p['theta'].softmax(0), case.top
        u = (x.abs() / alpha).clamp(max=1)
        # θ sees f and its inverse, x and α one rounding.
        q = straight(n * compress(u.detach(), slopes)) / n
        z = torch.where(u < 1, expand(q, slopes), 1.0)
        witness = scale * x.sign() * alpha * (z + (u - u.detach()))
    else:
        edges = p['start'] + torch.cat([torch.zeros(1), p['widths'].cumsum(0)])
        x = p['input_scale'] * v
        position = sum(((x - start) / width).clamp(0, 1) for start, width in zip(edges, p['widths'], strict=False))
        witness = p['output_scale'] * 2 / n * straight(position)
    witness.backward(torch.tensor(np.float64(g)))
    np.testing.assert_allclose(witness.detach(), y, atol=1e-9)
    np.testing.assert_allclose(v.grad, dv, atol=1e-9)
    for k, x in p.items():
        np.testing.assert_allclose(x.grad, gradients[k], rtol=1e-7, atol=1e-9)
