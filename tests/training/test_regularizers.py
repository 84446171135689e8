import dataclasses

import jax
import numpy as np
import pytest

from bqat_jax.quantizers import LSQ, SAWB
from bqat_jax.training.regularizers import Regularizers
from bqat_jax.transform import KernelLayout, Layer

LAYER = Layer('Dense', (6, 4), (), KernelLayout((0, 1)), jax.ShapeDtypeStruct((2, 6), 'float32'))


def test_schedules_rise_by_a_cosine_from_their_start():
    regularizers = Regularizers(dampening=0.1, freezing=True)
    for progress in (0.0, 0.1, 0.25, 0.5, 0.625, 1.0):
        risen = (1 - np.cos(np.pi * max(progress - 0.25, 0) / 0.75)) / 2
        now = np.float32(progress)
        np.testing.assert_allclose(regularizers.dampening_weight(now), 0.1 * risen, atol=1e-7)
        threshold = 0.1 + (0.01 - 0.1) * risen if progress >= 0.25 else np.inf  # nothing freezes before the start
        np.testing.assert_allclose(regularizers.threshold(now), threshold, rtol=1e-5)
    assert float(Regularizers(freezing=True, freezing_start=0.0).threshold(np.float32(0))) == np.float32(0.1)


def test_weights_whose_scale_is_read_off_them_are_not_frozen():
    Regularizers(freezing=True).check('conv', LSQ(bits=2), LAYER)
    Regularizers(freezing=True).check('conv', SAWB(bits=8), LAYER)  # so many bits are not tracked
    Regularizers(dampening=0.1).check('conv', SAWB(bits=2), LAYER)
    with pytest.raises(ValueError, match='layer conv cannot be frozen'):
        Regularizers(freezing=True).check('conv', SAWB(bits=2), LAYER)
    stacked = dataclasses.replace(LAYER, stack=(3,))
    Regularizers().check('conv', LSQ(bits=2), stacked)
    for regularizers in (Regularizers(freezing=True), Regularizers(dampening=0.1)):
        with pytest.raises(ValueError, match='stacked'):
            regularizers.check('conv', LSQ(bits=2), stacked)


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('dampening', -0.1),
        ('dampening_start', 1.5),
        ('freezing_momentum', 2.0),
        ('dampening', np.nan),
        ('freezing_threshold', np.inf),
        ('dampening_aggregation', 'mean'),
    ],
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f'quant.oscillations.{name}'):
        Regularizers(**{name: value})
