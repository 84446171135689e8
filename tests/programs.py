"""Looks at traced programs."""

from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr


def operations(jaxpr):
    """The operations of a program with all its parts, in order, without marks: name and types of what each gives."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'name':  # marks a value, and compiles to nothing
            continue
        yield equation.primitive.name, tuple(str(variable.aval) for variable in equation.outvars)
        for part in jaxprs_in_params(equation.params):
            yield from operations(part)


def count_operations(jaxpr, name):
    """How often a primitive stands in a program, in all its parts."""
    return sum(primitive == name for primitive, _ in operations(jaxpr))


def without_dead_code(jaxpr):
    """The program without what its results do not depend on."""
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]
