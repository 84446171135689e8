"""Training switches of modules: arguments and fields, recognized by name, that select training or evaluation."""

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn

# `call(module, inputs, train)` runs a bound module.
Call = Callable[[Any, Any, bool], Any]
# Names of switches that are True in training, and of switches that are True in evaluation.
TRAIN_NAMES = ('train', 'training', 'is_training', 'is_train', 'is_trained', 'train_mode', 'do_train')
EVALUATE_NAMES = (
    'deterministic',
    'use_running_average',
    'evaluate',
    'eval',
    'is_eval',
    'evaluation',
    'eval_mode',
    'inference',
    'is_inference',
)
# Modules that behave differently in training and in evaluation.
SWITCHED = (nn.BatchNorm, nn.Dropout)


def switch_names(names: Any) -> dict[str, bool]:
    """Returns the training switches among `names`, with their values in training."""
    return {name: name in TRAIN_NAMES for name in names if name in TRAIN_NAMES or name in EVALUATE_NAMES}


def find_fields(module: nn.Module) -> dict[str, bool]:
    """Returns the fields of a module that are training switches, with their values in training."""
    arguments = inspect.signature(type(module).__call__).parameters  # `nn.merge_param` accepts only one of the two.
    fields = [name for name in type(module).__dataclass_fields__ if name not in ('parent', 'name', *arguments)]
    return switch_names(fields)


def has_switch(module: nn.Module) -> bool:
    """Returns whether a module has an argument or a field that is a training switch."""
    return bool(find_fields(module) or switch_names(inspect.signature(type(module).__call__).parameters))


def make_call(module: nn.Module) -> Call:
    """Returns a function that calls a bound module with its inputs and sets all arguments that are training switches.

    A tuple of inputs is passed as positional arguments, a dict as keyword arguments.
    """
    names = switch_names(inspect.signature(type(module).__call__).parameters)

    def call(module: Any, inputs: Any, train: bool) -> Any:
        switch = {name: train == value for name, value in names.items()}
        if isinstance(inputs, dict):
            return module(**inputs, **switch)
        if isinstance(inputs, tuple):
            return module(*inputs, **switch)
        return module(inputs, **switch)

    return call


def switch_module(module: nn.Module, train: bool) -> nn.Module:
    """Returns the module with its switch fields set to training or evaluation."""
    fields: dict[str, Any] = {name: train == value for name, value in find_fields(module).items()}
    return module.clone(**fields) if fields else module
