import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.roofline import BY_XLA, PARTS, Ceilings, Convolution, convolutions_of, functions_of, report

ONE = Convolution((2, 6, 6, 3), (3, 3, 3, 5), (2, 2), ((1, 1), (1, 1)))


def test_convolutions_are_found_in_inner_programs_too():
    kernel = jnp.ones(ONE.kernel)
    program = jax.make_jaxpr(lambda x: jax.jit(ONE.run)(x, kernel) + ONE.run(x, kernel))(jnp.ones(ONE.images))
    assert list(convolutions_of(program.jaxpr)) == [ONE, ONE]


def test_a_convolution_with_groups_is_refused():
    def run(x):
        return jax.lax.conv_general_dilated(x, jnp.ones((3, 3, 1, 4)), (1, 1), 'SAME', feature_group_count=4,
                                            dimension_numbers=('NHWC', 'HWIO', 'NHWC'))  # fmt: skip

    with pytest.raises(ValueError, match='groups'):
        list(convolutions_of(jax.make_jaxpr(run)(jnp.ones((1, 4, 4, 4))).jaxpr))


def test_operations_and_bytes_are_those_of_the_sums():
    assert ONE.output == (2, 3, 3, 5)
    assert ONE.operations == 2 * (2 * 3 * 3 * 5) * (3 * 3 * 3)
    assert ONE.bytes == 4 * (2 * 6 * 6 * 3 + 3 * 3 * 3 * 5 + 2 * 3 * 3 * 5)


def test_both_kernel_gradients_are_the_same():
    passes = functions_of(ONE)
    assert set(passes) == {*PARTS, BY_XLA}
    np.testing.assert_allclose(passes['of kernels'](), passes[BY_XLA](), rtol=1e-5, atol=1e-5)
    assert passes['forward']().shape == ONE.output and passes['of inputs']().shape == ONE.images


def test_the_larger_bound_counts_and_parts_add_up():
    machine = Ceilings(operations=1e3, bytes=1e3)
    assert machine.bound(2e3, 1e3) == 2.0 and machine.bound(1e3, 3e3) == 3.0
    seconds = {'step': 40.0, **{(ONE, part): 2.0 for part in (*PARTS, BY_XLA)}}
    text = report({ONE: 4}, seconds, 12 * ONE.bytes + 5e3, machine)
    rows = {cells[1].strip(): cells for cells in (line.split('|') for line in text.splitlines()) if len(cells) > 6}
    bound = ONE.operations  # in ms at 1000 operations a second
    assert [int(float(rows[f'convolutions: {part}'][6])) for part in PARTS] == [8000] * 3
    assert rows['the rest'][5].strip() == '5000' and rows['the rest'][6].strip() == '16000'
    assert rows['the step'][5].strip() == f'{12 * bound + 5000:.0f}'
