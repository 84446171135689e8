"""What is measured for a report, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.analysis.measures import linear_cka
from bqat_jax.quantizers import LSQ, APoT, Binary
from bqat_jax.report import measuring
from bqat_jax.report.measuring import (
    BINS,
    BINS_BESIDE,
    BINS_INSIDE,
    compare_features,
    count_codes,
    count_places,
    look_at_quantizers,
)
from tests.analysis.test_diagnosis import BATCHES
from tests.training.test_step import NETWORK, VARIABLES, in_full_precision, make_spec

GENERATOR = np.random.default_rng(0)
X, Y = GENERATOR.normal(size=(30, 12)), GENERATOR.normal(size=(30, 7))
X += 2 * Y[:, :1]


def cka(x, y):
    """The formula with cross-covariances, in float64."""
    x, y = x - x.mean(0), y - y.mean(0)
    return np.sum((y.T @ x) ** 2) / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)


def measured(x, y):
    return float(linear_cka(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)))


def test_cka_is_the_papers():
    assert measured(X, Y) == pytest.approx(cka(X, Y), rel=1e-4)
    assert 0 < measured(X, Y) < 1 and measured(X, Y) == pytest.approx(measured(Y, X), rel=1e-5)


def test_cka_sees_no_rotation_scale_or_shift_and_sees_other_linear_maps():
    rotation = np.linalg.qr(GENERATOR.normal(size=(12, 12)))[0]
    assert measured(-3 * X @ rotation + 5, Y) == pytest.approx(measured(X, Y), rel=1e-4)
    assert measured(X @ np.diag([100.0] + [1.0] * 11), Y) != pytest.approx(measured(X, Y), rel=1e-2)


@pytest.mark.parametrize('quantizer', [LSQ(bits=2), LSQ(bits=4, channel_axis=-1), Binary(bits=1), APoT(bits=3)])
def test_every_weight_has_one_code(quantizer):
    weights = jax.random.normal(jax.random.key(0), (3, 3, 8, 16))
    parameters = quantizer.init(weights)
    histogram = np.asarray(count_codes(quantizer, parameters, weights))
    codes = np.asarray(quantizer.encode(parameters, weights), np.int64)
    assert histogram.sum() == weights.size and len(histogram) == quantizer.upper - quantizer.lower + 1
    for place, count in enumerate(histogram):
        assert count == np.sum(codes == quantizer.lower + place)


def test_inputs_lie_within_their_clip_range_or_beside_it():
    quantizer = LSQ(bits=2, signed=False, batch_axis=0)
    parameters = {'step_size': jnp.float32(1.0)}  # levels 0 to 3
    x = jnp.asarray([[0.0, 0.01, 1.5, 3.0, 3.01, -0.01, 100.0, -100.0, jnp.inf, -jnp.inf, jnp.nan]])
    histogram = np.asarray(count_places(quantizer, parameters, x))
    assert histogram.sum() == 10 and len(histogram) == BINS  # all but NaN
    inside = histogram[BINS_BESIDE : BINS_BESIDE + BINS_INSIDE]
    assert inside.sum() == 4 and inside[0] == 2 and inside[16] == 1 and inside[-1] == 1
    assert histogram[0] == 2 and histogram[BINS_BESIDE - 1] == 1  # far below, just below
    assert histogram[-1] == 2 and histogram[BINS_BESIDE + BINS_INSIDE] == 1
    clipped = np.asarray(quantizer.clips(parameters, x[:, :-1]))
    assert clipped.sum() == histogram.sum() - inside.sum()


def test_of_many_inputs_every_channel_is_seen_alike(monkeypatch):
    monkeypatch.setattr(measuring, 'MOST_BINNED', 64)
    quantizer = LSQ(bits=2, signed=False, batch_axis=0)
    x = jnp.broadcast_to(jnp.arange(16) / 16 * 3, (16, 4, 4, 16))  # a value for each channel
    histogram = np.asarray(count_places(quantizer, {'step_size': jnp.float32(1.0)}, x))
    assert 48 <= histogram.sum() <= 64
    assert np.count_nonzero(histogram) == 16 and histogram.max() - histogram[histogram > 0].min() <= 1


def test_a_network_is_looked_at_layer_by_layer():
    spec, quantizers = make_spec('none', bits=2)
    variables = spec_variables(quantizers)
    looks = look_at_quantizers(spec.replacement, variables, BATCHES[0].inputs)
    assert list(looks) == list(spec.replacement.quantization.layers)
    for path, roles in looks.items():
        *scopes, layer = path.split('/')
        kernel = VARIABLES['params']
        for scope in (*scopes, layer, 'kernel'):
            kernel = kernel[scope]
        assert roles['weights'].histogram.sum() == kernel.size
        assert roles['activations'].histogram.sum() > 0 and 0 <= roles['activations'].clipped <= 1
    images = np.asarray(BATCHES[0].inputs, np.float64)
    step = float(quantizers['stem/conv']['activations']['step_size'])
    look = looks['stem/conv']['activations']
    assert look.histogram.sum() == images.size
    beside = (images / step < -2) | (images / step > 1)
    assert look.clipped == pytest.approx(beside.mean(), abs=1e-6) or look.bits != 2


def spec_variables(quantizers):
    from bqat_jax.blocks.block_network import other_collections
    from bqat_jax.replacement.paths import Variables

    return Variables(VARIABLES['params'], quantizers, other_collections(VARIABLES))


def test_blocks_are_compared_with_the_partners():
    spec = in_full_precision(make_spec('none')[0])
    matrix = compare_features(spec.replacement, spec_variables({}), VARIABLES, BATCHES[0].inputs)
    assert matrix is not None and matrix.shape == (len(NETWORK.blocks),) * 2
    np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-4)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-4)
    assert compare_features(spec.replacement, spec_variables({}), None, BATCHES[0].inputs) is None
