"""Configs: the keys there are, the argument after the colon, durations, and what may change when a run is resumed."""

import fnmatch
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import ml_collections
from ml_collections import config_dict

from bqat_jax.errors import UserError
from bqat_jax.registry import suggest

# An ml_collections.ConfigDict; type checkers cannot know its keys.
Config: TypeAlias = Any

# What may change between two runs in the same workdir, because the result does not depend on it, or, for the mesh, only
# by the order of float32 sums.
SAFE_TO_CHANGE = (
    'data.dir',
    'data.on_device',
    'data.workers',
    'data.skip_damaged',
    'checkpoint.*',
    'diagnosis.*',
    'distributed',
    'mesh.*',
    'compilation_cache',
    'profile',
    'profile_steps',
    'train.log_every_steps',
)

# The smallest value of numeric keys.
MINIMUM = {
    'seed': 0,
    'data.workers': 0,
    'data.crop_padding': 0,
    'data.color_jitter': 0,
    'train.batch_size': 1,
    'train.microbatches': 1,
    'train.batch_norm_groups': 1,
    'train.replicas': 1,
    'train.log_every_steps': 1,
    'checkpoint.keep': 1,
    'quant.calibration_batches': 1,
    'quant.reestimation_batches': 0,
    'replacement.seed': 0,
    'mesh.min_shard_elements': 0,
}


def base_config() -> Config:
    """Returns a config with every key there is; recipes set what differs.

    A duration is given in steps or, by the sibling key, in epochs of the training split; where both are given the
    steps count.
    """
    config: Config = ml_collections.ConfigDict()
    config.seed = 0
    config.plugins = config_dict.placeholder(str)  # your own estimators and quantizers: Python files, by commas
    config.sweep = config_dict.placeholder(str)  # for --mode=sweep: the file that says what is compared
    config.compilation_cache = config_dict.placeholder(str)  # a folder for compiled programs: a second start is quick
    config.profile = False  # record a trace of some steps of each phase: docs/performance.md
    config.profile_steps = (11, 13)  # the first and the last of them, counted from 1
    config.distributed = 'off'  # or 'auto', or 'HOST:PORT,n,i' for process i of n: docs/pods.md

    config.data = ml_collections.ConfigDict()
    config.data.name = 'digits'  # 'digits' or a TensorFlow Datasets name
    config.data.dir = config_dict.placeholder(str)  # where prepared datasets lie; TensorFlow Datasets' default if unset
    config.data.train_split = 'train'  # what is trained on: a split, or a slice such as 'train[:80%]'
    config.data.test_split = 'test'  # what is evaluated at the end
    config.data.image_size = config_dict.placeholder(
        int
    )  # squares of so many pixels are cut out; unset: all is one size
    config.data.on_device = True  # the whole dataset lives on the device; batches are gathered inside the step
    config.data.skip_damaged = False  # leave out what cannot be read, and count it, instead of stopping
    config.data.workers = 0  # processes that decode images, when the data is not on the device
    config.data.train_examples = config_dict.placeholder(int)  # so many of the training images, the same in every run
    config.data.validation_fraction = 0.0  # of the training split, held out for choosing the best checkpoint
    # What becomes 0 and 1 of float images, such as (-1.0, 1.0); unset: a sample of the training images says it.
    config.data.value_range = config_dict.placeholder(tuple)
    config.data.mean = (0.5,)  # normalisation: (pixel / largest pixel - mean) / std
    config.data.std = (0.5,)
    config.data.crop_padding = 0  # random crops after padding by so many pixels
    config.data.flip = False  # random mirroring
    config.data.color_jitter = 0.0  # random brightness, contrast and saturation, each by a factor of 1 ± so much

    config.network = ml_collections.ConfigDict()
    config.network.name = 'cifar_resnet'  # another network has other options: a recipe sets config.network whole
    config.network.depth = 20  # 6n + 2
    config.network.width = 16
    config.network.shortcut = 'A'  # or 'B': 1x1 convolutions where the shape changes
    config.network.preactivation = False  # batch norm and ReLU before each convolution
    config.network.dtype = 'float32'  # of the computation, or 'bfloat16'; parameters are float32
    config.network.remat = False  # blocks recompute their inside in the backward pass: less memory, more time

    config.quant = ml_collections.ConfigDict()
    config.quant.weights = ml_collections.ConfigDict()
    config.quant.weights.name = 'lsq'  # quantizers and estimators: docs/estimators.md; with options 'lsq:narrow=true'
    config.quant.weights.bits = 2
    config.quant.weights.estimator = 'identity'  # with options 'ewgs:delta=0.1,domain=normalized'
    config.quant.weights.granularity = 'auto'  # the quantizer's paper's; or 'tensor', 'channel'
    config.quant.weights.rescale = 'none'  # quantized weights scaled again (SAT): 'constant' or 'stddev'
    config.quant.activations = ml_collections.ConfigDict()
    config.quant.activations.name = 'lsq'
    config.quant.activations.bits = 2
    config.quant.activations.estimator = 'identity'
    config.quant.activations.sign = 'auto'  # or 'signed', 'unsigned'
    # The first rule that matches a layer wins; the field's custom is 8 bits for the first and the last layer.
    lsq8 = {'name': 'lsq', 'bits': 8, 'estimator': 'identity'}
    config.quant.rules = (
        {'layers': 'stem/conv', 'weights': dict(lsq8), 'activations': dict(lsq8)},
        {'layers': 'head/dense', 'weights': dict(lsq8), 'activations': dict(lsq8)},
    )
    config.quant.calibration_batches = 4
    config.quant.trace = ml_collections.ConfigDict()  # how the estimator 'ewgs_trace' measures its strength
    config.quant.trace.every_steps = config_dict.placeholder(int)
    config.quant.trace.every_epochs = 10.0  # never before the first step
    config.quant.trace.batches = 3
    config.quant.trace.iterations = 50  # random vectors at most, for one batch
    config.quant.trace.tolerance = 1e-3  # relative change of the mean at which no more are drawn
    config.quant.oscillations = ml_collections.ConfigDict()  # weights that jump between two codes
    config.quant.oscillations.dampening = 0.0  # weight of the loss that dampens them, at the end of training
    config.quant.oscillations.dampening_start = 0.25  # fraction of training
    config.quant.oscillations.dampening_aggregation = 'kernel_mean'  # or 'sum'
    config.quant.oscillations.freezing = False  # keep the code of a weight that oscillates too often
    config.quant.oscillations.freezing_threshold = 0.01  # frequency, at the end of training
    config.quant.oscillations.freezing_first_threshold = 0.1  # the same, at the beginning
    config.quant.oscillations.freezing_start = 0.25  # fraction of training at which the threshold begins to change
    config.quant.oscillations.freezing_momentum = 0.001  # of the moving averages
    config.quant.reestimation_batches = 0  # to estimate batch-norm statistics anew after training; 0 for none

    config.replacement = ml_collections.ConfigDict()  # the loss: docs/method.md; a schedule: 'linear:start=1,end=0'
    config.replacement.plan = 'prefix'  # 'none', 'single', 'suffix', 'prefix_sampled', 'single_sampled', 'bernoulli'
    config.replacement.cut = 'stage'  # or 'block', or the parts behind which to cut: 'stage1_block1,stage2_block3'
    config.replacement.include_last = False  # prefixes: also the model of LP blocks alone, with the partner's head
    config.replacement.paths = 1  # MP models per step of the plans that draw them
    config.replacement.seed = 0  # of those draws: apart from the run's, so that seeds side by side draw as if alone
    config.replacement.probability = 'linear:start=0.5,end=1'  # of a block of the plan 'bernoulli' to be LP
    config.replacement.weights = 'halving'  # of MP models; or 'uniform', 'mean', or one each: '0.25,0.5'
    config.replacement.weights_schedule = 'constant'  # a factor of them
    config.replacement.cross_entropy = 1.0  # weight of the labels' cross entropy on the LP network; 0: soft labels only
    config.replacement.distillation = 1.0  # weight of distillation from the FP partner to the LP network
    config.replacement.distillation_schedule = 'constant'  # a factor of it
    config.replacement.path_cross_entropy = 1.0  # weight of the labels' cross entropy on MP paths
    config.replacement.path_distillation = 1.0  # weight of distillation from the FP partner to MP paths
    config.replacement.path_teaching = 0.0  # weight of distillation from MP paths to the LP network
    config.replacement.feature_matching = 0.0  # weight of the distance of features at the ends of blocks
    config.replacement.temperature = 1.0

    config.train = ml_collections.ConfigDict()
    config.train.steps = config_dict.placeholder(int)
    config.train.epochs = 10.0
    config.train.batch_size = 128
    config.train.microbatches = 1  # parts that a batch is run in, one after another: less memory
    config.train.batch_norm_groups = 1  # parts of these normalised apart; the number of devices: each its own examples
    config.train.log_every_steps = 50
    config.train.replicas = 1  # low-precision networks trained side by side, with the seeds seed, seed + 1, ...

    config.optimizer = optimizer_config()

    config.partner = ml_collections.ConfigDict()
    config.partner.steps = config_dict.placeholder(int)
    config.partner.epochs = 10.0
    config.partner.torch_file = config_dict.placeholder(str)  # take the partner from a PyTorch state_dict
    config.partner.workdir = config_dict.placeholder(str)  # take the partner of an earlier run
    config.partner.optimizer = optimizer_config()
    del config.partner.optimizer.quantizers  # a full-precision network has none

    config.diagnosis = ml_collections.ConfigDict()  # --mode=diagnose, and while training
    config.diagnosis.every_steps = config_dict.placeholder(int)  # while training; unset: never
    config.diagnosis.batches = 4  # of training images
    config.diagnosis.samples = 8  # draws of perturbed weights for the smoothed gradient
    config.diagnosis.oscillation_steps = 50  # training steps, made for this alone, in which weights are watched

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1  # devices that share a batch, times fsdp; -1 for all
    config.mesh.fsdp = 1  # parts that large arrays are split into: parameters, optimizer state, partner
    # Which axis is split, the first match wins: ({'path': 'head/dense/kernel', 'axis': 1},); or 'largest', or 'none'.
    config.mesh.rules = ()
    config.mesh.min_shard_elements = 4096  # smaller arrays stay whole on every device

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every_steps = config_dict.placeholder(int)
    config.checkpoint.every_epochs = 1.0
    config.checkpoint.keep = 2  # the newest ones; the best is kept beside them
    return config


def optimizer_config() -> Config:
    """Returns the keys of one optimizer: SGD or AdamW, cosine decay with linear warm-up."""
    config: Config = ml_collections.ConfigDict()
    config.name = 'sgd'  # or 'adamw'; the quantizers' parameters have the same
    config.learning_rate = 0.1
    config.momentum = 0.9  # of AdamW: beta1
    config.beta2 = 0.999  # of AdamW
    config.nesterov = True  # of SGD
    config.weight_decay = 1e-4  # on kernels only; SGD adds it to the gradient, AdamW decouples it
    config.warmup_steps = config_dict.placeholder(int)
    config.warmup_epochs = 0.0
    config.clip_norm = 0.0  # of the whole gradient; 0 for none
    config.quantizers = ml_collections.ConfigDict()  # the quantizers' own parameters
    config.quantizers.learning_rate = 0.01
    config.quantizers.weight_decay = 0.0
    return config


def parse_argument(argument: str | None, **defaults: Any) -> Config:
    """Parses what stands after the colon of `--config=file.py:bits=2,plan=prefix`.

    Args:
        argument: 'key=value,key=value', or None.
        **defaults: the keys there are, with their values if not given; the type of a default is the type of its key.

    Raises:
        UserError: for a key that is not there, naming the nearest, or a value of another type.
    """
    values: Config = ml_collections.ConfigDict(defaults)
    for item in filter(None, (argument or '').split(',')):
        key, separator, text = item.partition('=')
        if key not in defaults:
            raise UserError(
                f'The config has no argument {key!r}; it takes: {", ".join(defaults)}.{suggest(key, defaults)}'
            )
        if not separator:
            raise UserError(f'The config argument {key!r} has no value; write {key}={defaults[key]}.')
        kind = type(defaults[key])
        try:
            values[key] = {'true': True, 'false': False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError) as error:
            raise UserError(f'The config argument {key}={text!r} is not of type {kind.__name__}.') from error
    return values


def duration(section: Config, name: str, epoch: float) -> int:
    """Returns a duration in steps: `section.<name>steps` if set, else `section.<name>epochs` times the steps per epoch.

    Args:
        section: part of the config.
        name: '' or a prefix such as 'warmup_'.
        epoch: steps per epoch.

    Raises:
        UserError: for a negative duration.
    """
    steps, epochs = section[f'{name}steps'], section[f'{name}epochs']
    result = round(epochs * epoch) if steps is None else steps
    if result < 0:
        raise UserError(f'{name}steps={steps}, {name}epochs={epochs}: a duration cannot be negative.')
    return result


def check_ranges(config: Config) -> None:
    """Checks numeric keys against `MINIMUM`, and the steps to trace.

    Raises:
        UserError: for a value out of range.
    """
    for key, minimum in MINIMUM.items():
        value = functools.reduce(lambda section, name: section[name], key.split('.'), config)
        if value < minimum:
            raise UserError(f'{key}={value}: it must be at least {minimum}.')
    steps = tuple(config.profile_steps)
    if len(steps) != 2 or not 1 <= steps[0] <= steps[1]:
        raise UserError(
            f'profile_steps={steps}: give the first and the last step to record, counted from 1, such as (11, 13).'
        )


def to_plain(value: Any) -> Any:
    """Returns a config as nested dicts, lists and numbers, as JSON holds it."""
    if isinstance(value, ml_collections.ConfigDict):
        return {key: to_plain(value[key]) for key in sorted(value.keys())}
    return json.loads(json.dumps(value))


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = '') -> list[str]:
    """Returns the dotted keys at which two plain configs differ, each as 'key: old -> new'."""
    changes = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += changed_keys(before, after, f'{prefix}{key}.')
        elif before != after or (key in old) != (key in new):
            changes.append(f'{prefix}{key}: {json.dumps(before)} -> {json.dumps(after)}')
    return changes


def check_resumable(old: Mapping[str, Any], new: Mapping[str, Any], workdir: Path) -> None:
    """Checks that a workdir made with config `old` can go on with config `new`.

    Raises:
        UserError: if a key differs that the result depends on; all such keys are named.
    """
    unsafe = [
        change
        for change in changed_keys(old, new)
        if not any(fnmatch.fnmatchcase(change.partition(':')[0], pattern) for pattern in SAFE_TO_CHANGE)
    ]
    if unsafe:
        listed = '\n  '.join(unsafe)
        raise UserError(
            f'{workdir} was made with a different config (there -> now):\n  {listed}\n'
            'Take another --workdir, or give the values it was made with. '
            f'These keys may change: {", ".join(SAFE_TO_CHANGE)}.'
        )
