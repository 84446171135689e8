"""What every registered quantizer must be: on its grid, the same as its codes say, and finite for any input."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bqat_jax.quantizers import LCQ, LSQ, N2UQ, QUANTIZERS, APoT, NuLSQ
from bqat_jax.quantizers.estimators import ESTIMATORS
from bqat_jax.quantizers.rounding import Context

# Most tests here are eager on purpose: JAX compiles an operation on arrays of one shape once for all quantizers, where
# jit would compile every quantizer of every number of bits anew. So all arrays have one shape.
SHAPE = (16, 8)
BITS = (1, 2, 3, 4, 8)
# batch_axis, signed, channel_axis
ROLES = {
    'weights': (None, True, None),
    'weights_channels': (None, True, -1),
    'activations_signed': (0, True, None),
    'activations': (0, False, None),
}
# The other tests' programs are not optimised; see conftest.py.
jit_as_a_run_does = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 3})
TRAINING = Context(jnp.float32(0.3), jax.random.key(1), jnp.float32(0.1))


def make(name, role, bits):
    """The quantizer, or None if it refuses."""
    batch_axis, signed, channel_axis = ROLES[role]
    cls = QUANTIZERS.get(name)
    if channel_axis is not None and not cls.per_channel:
        return None
    try:
        return cls(bits=bits, signed=signed, batch_axis=batch_axis, channel_axis=channel_axis)
    except ValueError:
        return None


def cases(choose):
    """Parameters of a test: of every quantizer in every role those that `choose` takes from what there is."""
    parameters = []
    for name in QUANTIZERS:
        for role in ROLES:
            known = [quantizer for bits in BITS if (quantizer := make(name, role, bits)) is not None]
            parameters += [
                pytest.param(x, id=f'{name}-{role}-{x.bits}') for x in (choose(role, known) if known else ())
            ]
    return parameters


def every(role, known):
    """Of tensors with one scale the fewest bits, 2, the most and one between; of the rest, computed alike, fewer."""
    bits = {'weights': (1, 2, 3, 8), 'activations': (1, 2, 4, 8), 'weights_channels': (1, 2, 8)}.get(role, (1, 2))
    return [quantizer for quantizer in known if quantizer.bits in bits]


def low(role, known):
    """2 bits, or the nearest that there is."""
    return [min(known, key=lambda quantizer: abs(quantizer.bits - 2))]


def low_with_parameters(role, known):
    return [quantizer for quantizer in low(role, known) if jax.eval_shape(quantizer.init, jnp.ones(SHAPE))]


def structures(role, known):
    """One of each that compiles to something else: signed activations are computed as weights are."""
    is_special_case = role == 'weights' and known[0].per_channel
    return [] if is_special_case or role == 'activations_signed' else low(role, known)


def high_structures(role, known):
    return known[-1:] if structures(role, known) else []


def one(role, known):
    """The role that the quantizer is mainly for."""
    return low(role, known) if role == ('weights' if known[0].not_for_activations else 'activations') else []


def low_and_high(role, known):
    high = known[-1:] if one(role, known) else []
    return {quantizer.bits: quantizer for quantizer in low(role, known) + high}.values()


def data(quantizer):
    """Normal numbers; where they cannot be negative, with the zeros of a ReLU."""
    v = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    v[::5, 1] = 0
    return jnp.asarray(v if quantizer.signed else np.maximum(v, 0))


COTANGENT = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE), jnp.float32)


@functools.cache
def initial(quantizer):
    return quantizer.init(data(quantizer))


def levels_of(quantizer, prepared):
    """What all codes stand for, one column for every column of v."""
    # Always 256 rows: the last ones repeat the largest code.
    codes = np.minimum(np.arange(256) + quantizer.lower, quantizer.upper)[:, None].repeat(SHAPE[1], axis=1)
    levels = quantizer.decode(prepared, jnp.asarray(codes, code_dtype(quantizer)))
    return np.asarray(levels)[: quantizer.upper - quantizer.lower + 1]


def code_dtype(quantizer):
    return jnp.int8 if quantizer.lower < 0 else jnp.uint8


@functools.cache
def hard_inputs(quantizer):
    """Zeros, exact levels and bounds and their neighbours, ties, the very large and the very small, in every column."""
    levels = levels_of(quantizer, quantizer.prepare(initial(quantizer), data(quantizer)))
    ties = (levels[1:] + levels[:-1]) / 2
    first, last = levels[0], levels[-1]
    row = np.ones(SHAPE[1], np.float32)
    rows = [0 * row, -0.0 * row, first, last, np.nextafter(first, -np.inf * row), np.nextafter(last, np.inf * row)]
    rows += [levels[len(levels) // 2], ties[0], ties[-1], ties[len(ties) // 2], 1.5 * first, 1.5 * last]
    rows += [1e30 * row, -1e30 * row, 1e-30 * row, -1e-30 * row]
    return jnp.asarray(np.stack(rows).astype(np.float32))


def gradients(quantizer, parameters, v, context=TRAINING):
    y, pullback = jax.vjp(lambda p, v: quantizer.fake_quantize(p, v, context), parameters, v)
    return y, *pullback(jnp.asarray(COTANGENT[: v.shape[0], : v.shape[1]]))


def reads_input(quantizer):
    """Whether a scale is read off v: a single huge number in it then makes all others zero."""
    return set(quantizer.prepare(initial(quantizer), data(quantizer))) != set(initial(quantizer))


def assert_finite(tree, what=''):
    for path, x in jax.tree.leaves_with_path(tree):
        assert np.isfinite(np.asarray(x, np.float32)).all(), f'{what}{jax.tree_util.keystr(path)}: {x}'


def assert_usable(quantizer, parameters):
    assert_finite(parameters)
    for name in set(quantizer.positive) & set(parameters):
        assert (np.asarray(parameters[name]) > 0).all(), name


@pytest.mark.parametrize('name', list(QUANTIZERS))
def test_is_defined_for_something(name):
    assert any(make(name, role, bits) for role in ROLES for bits in BITS)


@pytest.mark.parametrize('quantizer', cases(every))
def test_values_lie_on_the_grid(quantizer):
    parameters = initial(quantizer)
    assert_usable(quantizer, parameters)
    for v in (data(quantizer), hard_inputs(quantizer)):
        v16 = v.astype(jnp.bfloat16)
        decoded = quantizer.decode(quantizer.prepare(parameters, v16), quantizer.encode(parameters, v16), v16.dtype)
        y16 = quantizer.fake_quantize(parameters, v16)
        assert y16.dtype == v16.dtype
        np.testing.assert_array_equal(y16, decoded)

        prepared = quantizer.prepare(parameters, v)
        codes = quantizer.encode(parameters, v)
        assert codes.dtype == code_dtype(quantizer)
        codes = np.asarray(codes, np.int64)
        assert quantizer.lower <= codes.min() and codes.max() <= quantizer.upper
        levels = levels_of(quantizer, prepared)
        assert np.isfinite(levels).all() and (np.diff(levels, axis=0) >= 0).all()
        y = quantizer.fake_quantize(parameters, v)
        assert y.dtype == v.dtype and y.shape == v.shape
        np.testing.assert_array_equal(y, np.take_along_axis(levels, codes - quantizer.lower, axis=0))
        assert max(len(np.unique(column)) for column in np.asarray(y).T) <= quantizer.upper - quantizer.lower + 1
        lowest, highest = (np.broadcast_to(limit, (1, SHAPE[1])) for limit in quantizer.limits(prepared, v.ndim))
        np.testing.assert_array_equal(lowest, levels.min(0, keepdims=True))
        np.testing.assert_array_equal(highest, levels.max(0, keepdims=True))
        if quantizer.has_zero:
            assert (np.asarray(y)[np.asarray(v) == 0] == 0).all()


@pytest.mark.parametrize('quantizer', cases(every))
def test_is_idempotent_and_monotone(quantizer):
    parameters = initial(quantizer)
    for v in (data(quantizer), hard_inputs(quantizer)):
        if quantizer.is_idempotent:
            y = quantizer.fake_quantize(parameters, v)
            np.testing.assert_array_equal(quantizer.fake_quantize(parameters, y), y)
        if quantizer.channel_axis is None:
            ordered = np.sort(np.asarray(v), axis=None).reshape(SHAPE)
            y = np.asarray(quantizer.fake_quantize(parameters, jnp.asarray(ordered))).reshape(-1)
        else:
            y = np.asarray(quantizer.fake_quantize(parameters, jnp.asarray(np.sort(np.asarray(v), axis=0))))
        assert (np.diff(y, axis=0) >= 0).all()


@pytest.mark.parametrize(
    ('quantizer', 'dtype'),
    [pytest.param(*case.values, jnp.float32, id=f'{case.id}-float32') for case in cases(high_structures)]
    + [pytest.param(*case.values, jnp.bfloat16, id=f'{case.id}-bfloat16') for case in cases(one)],
)
def test_fake_quantize_is_decode_of_encode_bit_for_bit(quantizer, dtype):
    """Compiled with all optimisations, where the compiler is free to fuse the two differently."""
    parameters = initial(quantizer)
    fake = jit_as_a_run_does(quantizer.fake_quantize)

    @jit_as_a_run_does
    def round_trip(parameters, v):
        codes = quantizer.encode(parameters, v)
        return codes, quantizer.decode(quantizer.prepare(parameters, v), codes, dtype)

    for v in (data(quantizer).astype(dtype), hard_inputs(quantizer).astype(dtype)):
        y = fake(parameters, v)
        codes, decoded = round_trip(parameters, v)
        assert y.dtype == decoded.dtype == dtype and codes.dtype == code_dtype(quantizer)
        # assert_array_equal takes -0.0 for 0.0, the same number to every layer that follows, and NaN for NaN.
        assert_finite(y)
        np.testing.assert_array_equal(y, decoded)


EXTREMES = [jnp.asarray(np.outer(np.ones(SHAPE[0]), [x, -x] * 4), jnp.float32) for x in (0.0, 1e30, 1e-30)]


@pytest.mark.parametrize('quantizer', cases(low_and_high))
def test_gradients_are_finite(quantizer):
    parameters = initial(quantizer)
    for v in (data(quantizer), hard_inputs(quantizer), *EXTREMES):
        assert_finite(gradients(quantizer, parameters, v), f'{v[0, 0]} ')
    if not reads_input(quantizer):
        v = np.array(data(quantizer))
        v[3], v[4] = np.inf, -np.inf
        _, _, v_gradient = gradients(quantizer, parameters, jnp.asarray(v))
        assert_finite(np.asarray(v_gradient)[np.isfinite(v)], 'beside infinities ')


def poor_data(quantizer):
    """Data that say little about the scale; of the smallest shapes only those that mean something here."""
    rng = np.random.default_rng(2)
    heavy, normal = rng.standard_cauchy(SHAPE), rng.normal(size=SHAPE)
    single = np.zeros(SHAPE)
    single[3, 5] = -2
    arrays = {
        'zeros': np.zeros(SHAPE),
        'constant': np.full(SHAPE, 3.0),
        'negative constant': np.full(SHAPE, -3.0),
        'positive': np.abs(normal),
        'negative': -np.abs(normal),
        'heavy tails': heavy,
        'heavier tails': heavy**3,
        'one that is not zero': single,
        'tiny': normal * 1e-30,
        'far from zero': normal + 1e4,
    }
    if quantizer.channel_axis is None:  # of activations a batch of one
        arrays |= {f'one element, {x}': np.full((1, 1), x) for x in (0.0, 2.0, -2.0)}
    else:
        arrays |= {'one channel': normal[:, :1], 'one channel of zeros': np.zeros((SHAPE[0], 1))}
    return {what: jnp.asarray(v, jnp.float32) for what, v in arrays.items()}


@pytest.mark.parametrize('quantizer', cases(structures))
def test_starts_from_any_data(quantizer):
    init = jax.jit(quantizer.init)
    for what, v in poor_data(quantizer).items():
        parameters = init(v)
        assert_usable(quantizer, parameters)
        assert_finite(quantizer.fake_quantize(parameters, v), what)


@pytest.mark.parametrize('quantizer', cases(structures))
def test_transformations_agree(quantizer):
    """jit, grad, vmap, cond and an input shared by eight devices, all in one program, against none of them."""
    parameters, v = initial(quantizer), data(quantizer)
    stacked = np.stack([v, 2 * v])

    def step(parameters, v):
        return gradients(quantizer, parameters, v)

    expected = [step(parameters, jnp.asarray(x)) for x in stacked]
    zeros = jax.tree.map(lambda *x: jnp.zeros_like(jnp.stack(x)), *expected)
    mesh = Mesh(np.array(jax.devices()), ('data',))
    sharded = jax.device_put(stacked, NamedSharding(mesh, PartitionSpec(None, 'data')))
    assert len(sharded.sharding.device_set) == 8
    shared = jax.jit(lambda on, p, v: jax.lax.cond(on, jax.vmap(step, (None, 0)), lambda p, v: zeros, p, v))
    got = shared(True, parameters, sharded)
    for index, one in enumerate(expected):
        for wanted, result in zip(jax.tree.leaves(one), jax.tree.leaves(got), strict=True):
            np.testing.assert_allclose(result[index], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('quantizer', cases(low_with_parameters))
def test_updates_keep_parameters_usable(quantizer):
    parameters = initial(quantizer)
    rng = np.random.default_rng(6)
    # Of all sizes: from a thousandth of what parameters usually are to several times that.
    updates = {
        name: (rng.normal(size=(100, *x.shape)) * 10 ** rng.uniform(-3, 0.5, (100, *[1] * x.ndim))).astype(np.float32)
        for name, x in parameters.items()
    }

    @jax.jit
    def train(parameters, updates):
        def update(old, change):
            new = quantizer.constrain(jax.tree.map(jnp.add, old, change), old)
            return new, (old, new)

        return jax.lax.scan(update, parameters, updates)

    final, (before, after) = train(parameters, updates)
    assert set(final) == set(parameters)
    for name in parameters:
        old, new = np.asarray(before[name]), np.asarray(after[name])
        if not quantizer.is_learned:
            np.testing.assert_array_equal(new, old)
        else:
            assert (new != old).any()
        if name in quantizer.positive:
            assert (new > 0).all() and (new >= 0.5 * old).all()
    if quantizer.name == 'ewgs_range':
        assert (np.asarray(after['upper']) > np.asarray(after['lower'])).all()
    assert_usable(quantizer, final)
    assert_finite(quantizer.fake_quantize(final, data(quantizer)))


@pytest.mark.parametrize('name', list(QUANTIZERS))
@pytest.mark.parametrize('estimator', list(ESTIMATORS))
def test_estimators_fit_or_are_refused(name, estimator):
    """In evaluation all are the same; in training all have finite gradients."""
    rule = ESTIMATORS.make(estimator)
    for bits in (1, 2):
        for role in ('weights', 'activations'):
            plain = make(name, role, bits)
            if plain is None or (bits == 1 and not rule.sign_only and name != 'binary'):
                continue
            try:
                quantizer = dataclasses.replace(plain, estimator=rule)
            except ValueError as error:
                assert repr(estimator) in str(error)
                continue
            parameters, v = initial(plain), data(plain)
            np.testing.assert_array_equal(quantizer.fake_quantize(parameters, v), plain.fake_quantize(parameters, v))
            inputs = v if reads_input(plain) else hard_inputs(plain)
            y, *rest = gradients(quantizer, parameters, inputs)
            assert_finite((y, rest))
            if rule.rounds_in_training:
                levels = levels_of(quantizer, quantizer.prepare(parameters, inputs))
                assert all(np.isin(*columns).all() for columns in zip(np.asarray(y).T, levels.T, strict=True))


@pytest.mark.parametrize('name', list(QUANTIZERS))
def test_description_makes_the_same(name):
    for role, (batch_axis, signed, channel_axis) in ROLES.items():
        for bits in BITS:
            quantizer = make(name, role, bits)
            if quantizer is not None:
                fixed = {'bits': bits, 'signed': signed, 'batch_axis': batch_axis, 'channel_axis': channel_axis}
                assert QUANTIZERS.make(QUANTIZERS.describe(quantizer), **fixed) == quantizer


def test_options_of_a_description():
    quantizer = QUANTIZERS.make('lsq:narrow=true', bits=2)
    assert quantizer == LSQ(bits=2, narrow=True) and quantizer.lower == -1
    assert QUANTIZERS.describe(quantizer) == 'lsq:narrow=true'
    for text, named in {
        'lsqq': "'lsqq'.*Did you mean 'lsq'",
        'lsq:narow=true': "'narow'.*Did you mean 'narrow'",
        'lsq:narrow=1': "narrow='1'",
        'lsq:narrow': "narrow=''",
        'lsq:bits=3': "'bits'",
        'pact:narrow=true': "'narrow'; it has none",
    }.items():
        with pytest.raises(ValueError, match=named):
            QUANTIZERS.make(text, bits=2)


@functools.cache
def program(quantizer):
    @jax.jit
    def run(parameters, v):
        codes = jnp.arange(quantizer.lower, quantizer.upper + 1)
        return quantizer.fake_quantize(parameters, v), quantizer.decode(parameters, codes)

    return run


def floats(low, high):
    return st.floats(low, high, width=32)


def several(count, elements):
    return st.lists(elements, min_size=count, max_size=count).map(lambda x: np.array(x, np.float32))


SCALE = floats(2**-10, 2**10).map(np.float32)
WIDTH = floats(2**-4, 4)


@st.composite
def trained(draw, cls, signed):
    """A quantizer of activations with any parameters, and what it has to quantize, in ascending order."""
    quantizer = cls(bits=3, signed=signed, batch_axis=0)
    if cls is LSQ:
        parameters = {'step_size': draw(SCALE)}
    elif cls is APoT:
        parameters = {'clip_value': draw(SCALE)}
    elif cls is LCQ:
        parameters = {'clip_value': draw(SCALE), 'theta': draw(several(16, floats(-3, 3)))}
    elif cls is NuLSQ:
        parameters = {'step_sizes': draw(SCALE) * draw(several(3 if signed else 7, WIDTH))}
        if signed:
            parameters['negative_step_sizes'] = draw(SCALE) * draw(several(4, WIDTH))
    else:
        parameters = {
            'start': np.float32(draw(floats(-1, 1))),
            'widths': draw(several(7, WIDTH)),
            'input_scale': draw(SCALE),
            'output_scale': draw(SCALE),
        }
    unit = (
        1 / parameters['input_scale'] if cls is N2UQ else max(np.max(x) for k, x in parameters.items() if k != 'theta')
    )
    v = np.sort(unit * draw(several(16, floats(-12, 12))))
    return quantizer, parameters, v


@pytest.mark.parametrize(('cls', 'signed'), [*itertools.product([LSQ, APoT, LCQ, NuLSQ], [False, True]), (N2UQ, False)])
def test_any_parameters_quantize_to_the_grid(cls, signed):
    @settings(deadline=None, max_examples=50)
    @given(trained(cls, signed))
    def check(drawn):
        quantizer, parameters, v = drawn
        y, levels = (np.asarray(x) for x in program(quantizer)(parameters, v))
        assert (np.diff(levels) >= 0).all() and (np.diff(y) >= 0).all()
        assert np.isin(y, levels).all()
        assert (np.abs(y) <= np.abs(levels).max()).all()
        if cls in (LSQ, APoT, NuLSQ):  # their thresholds lie halfway
            inside = (v >= levels[0]) & (v <= levels[-1])
            above = np.clip(np.searchsorted(levels, v), 1, len(levels) - 1)
            gap = (levels[above] - levels[above - 1]).astype(np.float64)
            error = np.abs(y.astype(np.float64) - v)
            assert (error <= 0.5 * gap + 1e-6 * np.abs(levels).max())[inside].all()

    check()


@settings(deadline=None, max_examples=50)
@given(st.lists(floats(-1e3, 1e3), min_size=1, max_size=100), floats(2**-20, 1e3))
def test_constrain_keeps_steps_positive(updates, start):
    quantizer = LSQ(bits=2)
    old = {'step_size': jnp.float32(start)}
    for update in updates:
        new = quantizer.constrain({'step_size': old['step_size'] + jnp.float32(update)}, old)
        assert float(new['step_size']) > 0
        assert float(new['step_size']) >= 0.5 * float(old['step_size'])
        old = new


def test_constrain_leaves_ordinary_updates_alone():
    old, new = {'step_size': jnp.array([0.1, 0.2])}, {'step_size': jnp.array([0.06, 0.5])}
    np.testing.assert_array_equal(LSQ(bits=2, channel_axis=0).constrain(new, old)['step_size'], new['step_size'])


def test_number_of_features_leaves_the_batch_out():
    """With batch_axis the scale is that of one example, so it does not change with the batch size."""
    quantizer = LSQ(bits=2, signed=False, batch_axis=0)
    gradient_of = jax.jit(jax.grad(lambda p, v: jnp.mean(quantizer.fake_quantize(p, v), axis=0).sum()))
    for batch in (1, 7):
        v = jnp.full((batch, 3, 5), 100.0)  # all clipped: every element gives the largest code, 3
        gradient = gradient_of({'step_size': jnp.float32(1)}, v)
        np.testing.assert_allclose(gradient['step_size'], 15 * 3 / np.sqrt(15 * 3), rtol=1e-6)


@pytest.mark.parametrize('bits', [0, 1, 9, 2.0, '2'])
def test_refuses_bits_that_no_grid_has(bits):
    with pytest.raises(ValueError, match='bits'):
        LSQ(bits=bits)


def test_refuses_a_scale_per_example():
    with pytest.raises(ValueError, match='batch_axis'):
        LSQ(bits=2, channel_axis=0, batch_axis=0)


def test_initial_step_of_zeros_is_positive():
    v = jnp.zeros((4, 3)).at[:, 1].set(2.0)
    step = LSQ(bits=2, channel_axis=-1).init(v)['step_size']
    whole = LSQ(bits=2).init(v)['step_size']
    np.testing.assert_allclose(step, [whole, 4.0, whole])
    # Of zeros alone, as if mean|v| were 1.
    assert LSQ(bits=2).init(jnp.zeros(3))['step_size'] == 2.0
    assert LSQ(bits=2).init(jnp.full((1, 1), -3.0))['step_size'] == 6.0


@pytest.mark.parametrize('signed', [True, False])
def test_codes_are_those_of_numpy(signed):
    """Compiled or not, values next to a threshold included, the arithmetic is float32 of reciprocal and product."""
    quantizer = LSQ(bits=3, signed=signed, channel_axis=-1)
    v = np.random.default_rng(3).normal(size=(4096, 8)).astype(np.float32)
    step = np.random.default_rng(4).uniform(0.1, 0.7, 8).astype(np.float32)
    v[:400] = np.float32(0.5) * step * np.random.default_rng(5).integers(-9, 9, (400, 8)).astype(np.float32)
    expected = np.clip(np.rint(v * (np.float32(1) / step)), quantizer.lower, quantizer.upper)
    np.testing.assert_array_equal(jax.jit(quantizer.encode)({'step_size': step}, v), expected)


@pytest.mark.parametrize('quantizer', cases(every))
def test_what_is_clipped_lies_beyond_the_outermost_levels(quantizer):
    v, parameters = 3 * data(quantizer), initial(quantizer)
    clipped, codes = np.asarray(quantizer.clips(parameters, v)), np.asarray(quantizer.encode(parameters, v))
    assert clipped.shape == SHAPE and not clipped[(codes > quantizer.lower) & (codes < quantizer.upper)].any()
    if quantizer.is_idempotent:  # its levels are where its inputs are
        lowest, highest = quantizer.limits(quantizer.prepare(parameters, v), v.ndim)
        # At an end itself rounding decides.
        close = np.isclose(v, lowest, rtol=1e-5) | np.isclose(v, highest, rtol=1e-5)
        np.testing.assert_array_equal(clipped[~close], ((v < lowest) | (v > highest))[~close])
