"""Counts operations in traced programs."""

from jax.extend.core import jaxprs_in_params


def count_operations(jaxpr, name):
    """How often a primitive stands in a program, in all its parts."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == name
        count += sum(count_operations(part, name) for part in jaxprs_in_params(equation.params))
    return count
