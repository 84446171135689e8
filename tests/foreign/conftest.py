"""Code of strangers runs under JAX's own settings, not under the strict ones of this project's tests."""

import jax
import pytest


@pytest.fixture(autouse=True)
def own_settings():
    """The settings that JAX has by itself."""
    with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
        yield
