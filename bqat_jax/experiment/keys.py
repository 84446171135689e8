"""Every key of a config, with its default, its range and what it does: the one list of them.

From it come the base config, the check of every value, and `docs/configuration.md`:

    python -m bqat_jax.experiment.keys > docs/configuration.md
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

# Steps are counted in int32; seeds are the 32 bits that JAX's random keys take.
MOST_STEPS = 2**31 - 1
STEPS, SEED = f'[0, {MOST_STEPS}]', f'[0, {2**32 - 1}]'
COUNT, COUNT_OR_NONE = '[1, inf)', '[0, inf)'
NUMBER, POSITIVE, FRACTION = '[0, inf)', '(0, inf)', '[0, 1]'
NETWORK = 'network.'
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Unset:
    """The default of a key that may be unset: None, or a value of the type `kind`."""

    kind: type


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the config.

    Attributes:
        name: with dots, such as 'train.batch_size'.
        default: the value in the base config; its type is the key's.
        text: what the key does, in Markdown.
        range: of a number, or of each number of a tuple: an interval such as '[0, 1)'; '' where there is none.
        may_change: whether a run may be continued with another value, because results do not depend on it; for the
            mesh, only by the order of float32 sums.
    """

    name: str
    default: Any
    text: str
    range: str = ''
    may_change: bool = False

    @property
    def kind(self) -> type:
        """The type of the value."""
        return self.default.kind if isinstance(self.default, Unset) else type(self.default)

    @property
    def may_be_unset(self) -> bool:
        """Whether the value may be None."""
        return isinstance(self.default, Unset)


def _optimizer(section: str) -> tuple[Key, ...]:
    return (
        Key(f'{section}.name', 'sgd', '`sgd` or `adamw`; of the network and its quantizers'),
        Key(f'{section}.learning_rate', 0.1, 'peak learning rate; a cosine leads from it to 0', NUMBER),
        Key(f'{section}.momentum', 0.9, 'momentum of SGD; beta1 of AdamW', '[0, 1)'),
        Key(f'{section}.beta2', 0.999, 'beta2 of AdamW', '[0, 1)'),
        Key(f'{section}.nesterov', True, 'Nesterov momentum, of SGD'),
        Key(
            f'{section}.weight_decay',
            1e-4,
            'weight decay, on kernels alone: SGD adds it to the gradient, AdamW decouples it',
            NUMBER,
        ),
        Key(f'{section}.warmup_steps', Unset(int), 'steps in which the learning rate rises from 0', STEPS),
        Key(f'{section}.warmup_epochs', 0.0, 'the same in epochs', NUMBER),
        Key(f'{section}.clip_norm', 0.0, 'largest norm of the whole gradient; 0: any', NUMBER),
    )


KEYS: tuple[Key, ...] = (
    Key('seed', 0, 'seed of the run', SEED),
    Key(
        'task',
        'classification',
        'the [task](tasks.md), with options `language_model:ignore=-1`: its loss, and what checkpoints are selected by',
    ),
    Key(
        'plugins',
        Unset(str),
        'Python files that register estimators, quantizers, networks, .., separated by commas',
    ),
    Key('sweep', Unset(str), 'for `--mode=sweep`: the Python file that says what is compared'),
    Key(
        'sweep_minutes',
        Unset(float),
        'stop a sweep after so many minutes, with a checkpoint; the same command goes on: '
        '[research](research.md#sweeps-that-fit-a-lease)',
        POSITIVE,
        may_change=True,
    ),
    Key(
        'sweep_pack',
        Unset(str),
        'zip file that a sweep goes on from, if it is there, and that it leaves at every stop: '
        '[research](research.md#sweeps-that-fit-a-lease)',
        may_change=True,
    ),
    Key(
        'sweep_extend',
        2,
        'how often a sweep adds a choice beyond the edge of its grid, where the best one lies at it; 0: never',
        COUNT_OR_NONE,
        may_change=True,
    ),
    Key(
        'report',
        True,
        'write [`report.html`](report.md) at the end of a run and of a sweep; `--mode=report` writes it at any time',
        may_change=True,
    ),
    Key(
        'compilation_cache',
        Unset(str),
        'folder for compiled programs and [what was decoded](data.md#what-is-kept); a second start is quick',
        may_change=True,
    ),
    Key('profile', False, 'record a trace of some steps of each phase: [performance](performance.md)', may_change=True),
    Key('profile_steps', (11, 13), 'the first and the last of these steps, counted from 1', COUNT, may_change=True),
    Key(
        'distributed',
        'off',
        '`off`; `auto`; or `HOST:PORT,n,i` for process i of n, counted from 0: [pods](pods.md)',
        may_change=True,
    ),
    Key('data.name', 'digits', '`digits` or the name of a TensorFlow Datasets data set'),
    Key(
        'data.dir',
        Unset(str),
        "folder of prepared data sets; unset: TensorFlow Datasets' own, in the home folder",
        may_change=True,
    ),
    Key(
        'data.cache_dir',
        Unset(str),
        'local folder in which data sets of buckets, and [what was decoded](data.md#what-is-kept), are kept: '
        '[pods](pods.md); unset: `~/.cache/bqat_jax` for s3://, and gs:// is read directly',
        may_change=True,
    ),
    Key('data.cache_gb', 200.0, 'largest size of that folder; what was not used for longest goes', POSITIVE, True),
    Key('data.train_split', 'train', 'what is trained on: a split, or a slice such as `train[:80%]`'),
    Key('data.test_split', 'test', 'what is evaluated at the end: a split, or a slice'),
    Key(
        'data.validation_split',
        Unset(str),
        'what checkpoints are chosen on: a split, or a slice; unset: `data.validation_fraction`',
    ),
    Key('data.image_size', Unset(int), 'side of squares that are cut out of images; unset: all are one size', COUNT),
    Key(
        'data.on_device', True, 'the whole split lives on the device; batches are gathered in the step', may_change=True
    ),
    Key('data.skip_damaged', False, 'leave out examples that cannot be read, and count them', may_change=True),
    Key('data.workers', 0, 'processes that decode images where data is not on the device', COUNT_OR_NONE, True),
    Key('data.train_examples', Unset(int), 'take so many of the training images, the same in every run', COUNT),
    Key('data.validation_fraction', 0.0, 'part of the training images held out to choose checkpoints on', '[0, 1)'),
    Key(
        'data.value_range',
        Unset(tuple),
        'what becomes 0 and 1 of float images, such as `(-1.0, 1.0)`; unset: a sample of the training images says it',
        '(-inf, inf)',
    ),
    Key(
        'data.mean',
        (0.5,),
        'normalization: (pixel - mean) / std, in units of the largest pixel, one number for each channel',
        FRACTION,
    ),
    Key('data.std', (0.5,), 'see `data.mean`', '(0, 1]'),
    Key('data.crop_padding', 0, 'random crops after padding by so many pixels', COUNT_OR_NONE),
    Key('data.flip', False, 'random mirroring, left to right'),
    Key('data.color_jitter', 0.0, 'random brightness, contrast and saturation, each by a factor of 1 ± this', NUMBER),
    Key(
        f'{NETWORK}name',
        'cifar_resnet',
        'the network; another than `cifar_resnet` has other options, so a recipe for it sets `config.network` whole',
    ),
    Key(f'{NETWORK}depth', 20, 'layers: 6n + 2', COUNT),
    Key(f'{NETWORK}width', 16, 'channels of the first stage', COUNT),
    Key(f'{NETWORK}shortcut', 'A', '`A`: zeros for new channels; `B`: 1x1 convolutions where the shape changes'),
    Key(f'{NETWORK}preactivation', False, 'batch norm and ReLU before each convolution'),
    Key(f'{NETWORK}dtype', 'float32', '`float32` or `bfloat16`, of the computation; parameters are float32'),
    Key(f'{NETWORK}remat', False, 'blocks recompute their inside in the backward pass: less memory, more time'),
    Key(
        'quant.weights.name', 'lsq', '[quantizer](estimators.md) of weights, with options `lsq:narrow=true`; or `none`'
    ),
    Key('quant.weights.bits', 2, 'bits of weights', '[1, 32]'),
    Key('quant.weights.estimator', 'identity', '[estimator](estimators.md), with options `ewgs:delta=0.1`'),
    Key('quant.weights.granularity', 'auto', "`auto`, as the quantizer's paper has it; or `tensor`, `channel`"),
    Key('quant.weights.rescale', 'none', 'quantized weights scaled again (SAT): `none`, `constant` or `stddev`'),
    Key('quant.activations.name', 'lsq', '[quantizer](estimators.md) of the inputs of layers; or `none`'),
    Key('quant.activations.bits', 2, 'bits of inputs', '[1, 32]'),
    Key('quant.activations.estimator', 'identity', '[estimator](estimators.md) of inputs'),
    Key('quant.activations.sign', 'auto', '`auto`: as calibration finds; or `signed`, `unsigned`'),
    Key(
        'quant.rules',
        (
            {
                'layers': 'stem/conv',
                'weights': {'name': 'lsq', 'bits': 8, 'estimator': 'identity'},
                'activations': {'name': 'lsq', 'bits': 8, 'estimator': 'identity'},
            },
            {
                'layers': 'head/dense',
                'weights': {'name': 'lsq', 'bits': 8, 'estimator': 'identity'},
                'activations': {'name': 'lsq', 'bits': 8, 'estimator': 'identity'},
            },
        ),
        'settings of single layers: the first rule whose regular expression matches the layer counts',
    ),
    Key(
        'quant.allow_unquantized',
        0.1,
        'largest share of multiply-accumulates with weights that no quantizer reaches, as their layers are not known',
        FRACTION,
    ),
    Key('quant.calibration_batches', 4, 'batches that quantizers are calibrated on', COUNT),
    Key('quant.trace.every_steps', Unset(int), 'how often `ewgs_trace` measures its strength, after the start', COUNT),
    Key('quant.trace.every_epochs', 10.0, 'the same in epochs; at least one step', POSITIVE),
    Key('quant.trace.batches', 3, 'batches of one measurement', COUNT),
    Key('quant.trace.iterations', 50, 'random vectors for one batch, at most', '[2, inf)'),
    Key('quant.trace.tolerance', 1e-3, 'relative change of the mean at which no more are drawn', NUMBER),
    Key('quant.oscillations.dampening', 0.0, 'weight of the loss that dampens oscillations, at the end', NUMBER),
    Key('quant.oscillations.dampening_start', 0.25, 'fraction of training at which it begins to rise from 0', FRACTION),
    Key('quant.oscillations.dampening_aggregation', 'kernel_mean', '`kernel_mean` or `sum`'),
    Key('quant.oscillations.freezing', False, 'keep the code of a weight that oscillates too often'),
    Key('quant.oscillations.freezing_threshold', 0.01, 'frequency above which it does, at the end', FRACTION),
    Key('quant.oscillations.freezing_first_threshold', 0.1, 'the same at `freezing_start`', FRACTION),
    Key('quant.oscillations.freezing_start', 0.25, 'fraction of training before which none is frozen', FRACTION),
    Key('quant.oscillations.freezing_momentum', 0.001, 'of the moving averages', FRACTION),
    Key('quant.reestimation_batches', 0, 'batches to estimate batch-norm statistics on after training', COUNT_OR_NONE),
    Key(
        'replacement.plan',
        'prefix',
        'the [plan](method.md): `none`, `single`, `prefix`, `suffix`, `prefix_sampled`, `single_sampled`, `bernoulli`',
    ),
    Key('replacement.cut', 'stage', 'blocks: `stage`, `block`, or the parts behind which to cut, separated by commas'),
    Key('replacement.include_last', False, "prefixes: also the model of LP blocks alone, with the partner's head"),
    Key('replacement.paths', 1, 'MP models per step, of plans that draw them', COUNT),
    Key('replacement.seed', 0, "seed of these draws, apart from the run's", SEED),
    Key('replacement.probability', 'linear:start=0.5,end=1', 'schedule: of a block of `bernoulli` to be LP'),
    Key('replacement.weights', 'halving', 'of MP models: `halving`, `uniform`, `mean`, or one each: `0.25,0.5`'),
    Key('replacement.weights_schedule', 'constant', 'schedule: a factor of these weights'),
    Key(
        'replacement.cross_entropy',
        1.0,
        "weight of the task's loss, as the labels' cross entropy, on the LP network",
        NUMBER,
    ),
    Key('replacement.distillation', 1.0, 'weight of distillation from the FP partner to the LP network', NUMBER),
    Key('replacement.distillation_schedule', 'constant', 'schedule: a factor of it'),
    Key('replacement.path_cross_entropy', 1.0, "weight of the task's loss on MP paths", NUMBER),
    Key('replacement.path_distillation', 1.0, 'weight of distillation from the FP partner to MP paths', NUMBER),
    Key('replacement.path_teaching', 0.0, 'weight of distillation from MP paths to the LP network', NUMBER),
    Key('replacement.feature_matching', 0.0, 'weight of the distance of features at the ends of blocks', NUMBER),
    Key('replacement.temperature', 1.0, 'of distillation', POSITIVE),
    Key('train.steps', Unset(int), 'steps of training; they count where epochs are given too', STEPS),
    Key('train.epochs', 10.0, 'the same in epochs of the training split', NUMBER),
    Key('train.batch_size', 128, 'images per step, of all devices together', COUNT),
    Key('train.microbatches', 1, 'parts that a batch is run in, one after another: less memory', COUNT),
    Key('train.batch_norm_groups', 1, 'parts of these that batch norm normalizes apart', COUNT),
    Key('train.log_every_steps', 50, 'steps between two lines of metrics', COUNT, may_change=True),
    Key('train.replicas', 1, 'LP networks trained side by side, with the seeds `seed`, `seed + 1`, ...', COUNT),
    *_optimizer('optimizer'),
    Key('optimizer.quantizers.learning_rate', 0.01, "peak learning rate of the quantizers' parameters", NUMBER),
    Key('optimizer.quantizers.weight_decay', 0.0, 'their weight decay', NUMBER),
    Key('partner.steps', Unset(int), 'steps in which the FP partner is trained', STEPS),
    Key('partner.epochs', 10.0, 'the same in epochs', NUMBER),
    Key('partner.torch_file', Unset(str), 'PyTorch or safetensors file to take the partner from'),
    Key(
        'partner.torch_key',
        Unset(str),
        'entry of that file that holds the weights, such as `state.ema`; unset: found',
    ),
    Key('partner.new_head', False, 'take all but the classifier from that file, and train the partner from there'),
    Key('partner.workdir', Unset(str), 'workdir of another run to take the partner from'),
    *_optimizer('partner.optimizer'),
    Key(
        'init.workdir',
        Unset(str),
        'workdir of another run whose selected network the LP network starts from, with other bits if wanted; unset: '
        'from the partner',
    ),
    Key('init.quantizers', 'calibrate', '`calibrate`: anew, on that network; `keep`: as they were there'),
    Key('diagnosis.every_steps', Unset(int), 'steps between two diagnoses while training; unset: none', COUNT, True),
    Key('diagnosis.batches', 4, 'training batches that are measured', '[2, inf)', True),
    Key('diagnosis.samples', 8, 'draws of perturbed weights for the smoothed gradient', COUNT, True),
    Key('diagnosis.oscillation_steps', 50, 'steps, made for this alone, in which weights are watched', STEPS, True),
    Key(
        'export.formats',
        'packed,stablehlo',
        'for `--mode=export`: some of `packed`, `stablehlo`, `onnx`, `qcdq`, separated by commas: [deploy](deploy.md)',
        may_change=True,
    ),
    Key('export.batch', 0, 'examples that an exported program takes at once; 0: any number', COUNT_OR_NONE, True),
    Key('export.opset', 21, 'version of the ONNX operators', '[21, 25]', True),
    Key(
        'storage.patience',
        600.0,
        'seconds for which requests to a bucket that fail are repeated, before the run stops: [pods](pods.md)',
        NUMBER,
        may_change=True,
    ),
    Key(
        'storage.lease_seconds',
        60.0,
        'seconds after which a workdir in a bucket, whose run does not renew its lease, is taken over',
        '[1, inf)',
        may_change=True,
    ),
    Key('mesh.data', -1, 'devices that share a batch, times `mesh.fsdp`; -1: all', '[-1, inf)', True),
    Key('mesh.fsdp', 1, 'parts that large arrays are split into: parameters, optimizer state, partner', COUNT, True),
    Key(
        'mesh.rules',
        (),
        "axes that arrays are split along, the first match counts: `({'path': 'head/dense/kernel', 'axis': 1},)`; or "
        '`largest`, `none` as axis',
        may_change=True,
    ),
    Key('mesh.min_shard_elements', 4096, 'smaller arrays stay whole on every device', COUNT_OR_NONE, True),
    Key('checkpoint.every_steps', Unset(int), 'steps between two checkpoints', COUNT, True),
    Key('checkpoint.every_epochs', 1.0, 'the same in epochs; at least one step', POSITIVE, True),
    Key('checkpoint.keep', 2, 'newest checkpoints that are kept; the best is kept beside them', COUNT, True),
)
BY_NAME: Mapping[str, Key] = {key.name: key for key in KEYS}
# Ranges of what networks other than the base config's have; `config.network` holds options of one network.
NETWORK_RANGES = {
    'width_multiplier': POSITIVE,
    'patch_size': COUNT,
    'norm_epsilon': NUMBER,
    'norm_momentum': '[0, 1)',
}


def range_of(name: str) -> str:
    """Returns the range of a key's numbers: '' where there is none; every number must be finite all the same."""
    key = BY_NAME.get(name)
    return NETWORK_RANGES.get(name.removeprefix(NETWORK), '') if key is None else key.range


def is_within(value: float, interval: str) -> bool:
    """Returns whether a number is finite in float32 and lies in an interval such as '[0, 1)'; in any for ''."""
    if not abs(value) <= LARGEST_FLOAT32:
        return False
    if not interval:
        return True
    least, most = (float(end) for end in interval[1:-1].split(','))
    above = value > least if interval[0] == '(' else value >= least
    below = value < most if interval[-1] == ')' else value <= most
    return above and below


def in_words(interval: str) -> str:
    """Returns what a number of an interval must be: '[0, 1)' gives 'at least 0 and less than 1'; '' gives 'finite'."""
    least, most = (end.strip() for end in (interval or '(-inf, inf)')[1:-1].split(','))
    parts = []
    if least != '-inf':
        parts.append(f'{"more than" if interval[0] == "(" else "at least"} {least}')
    if most == 'inf':
        parts.append('finite')
    else:
        parts.append(f'{"less than" if interval[-1] == ")" else "at most"} {most}')
    return ' and '.join(parts)


def markdown() -> str:
    """Returns the page of all keys, docs/configuration.md."""
    return '\n'.join(_markdown_lines()) + '\n'


def _markdown_lines() -> Iterator[str]:
    yield '# Configuration'
    yield ''
    yield 'Every key of the config. Give it on the command line as `--config.KEY=VALUE`; `None` unsets a key whose'
    yield 'default is unset. Numbers must be finite. A duration is given in steps or in epochs of the training split;'
    yield 'where both are given the steps count. Keys marked ↻ may change when a run is continued in its workdir:'
    yield 'results do not depend on them. This page is made by `python -m bqat_jax.experiment.keys`.'
    section = None
    for key in KEYS:
        first, _, rest = key.name.partition('.')
        if (own := first if rest else '') != section:
            section = own
            yield from ('', f'## {f"`config.{section}`" if section else "The run"}', '')
            yield from ('| Key | Type | Range | Default | What it does |', '| --- | --- | --- | --- | --- |')
        mark = ' ↻' if key.may_change else ''
        shown = 'unset' if key.may_be_unset else _show(key)
        yield f'| `{key.name}`{mark} | {key.kind.__name__} | {_show_range(key.range)} | {shown} | {key.text} |'


def _show(key: Key) -> str:
    if key.name == 'quant.rules':
        return '8-bit LSQ for `stem/conv` and `head/dense`'
    return f'`{key.default}`'


def _show_range(interval: str) -> str:
    return '' if not interval else f'`{interval.replace("inf", "∞").replace("[-∞", "(-∞")}`'


if __name__ == '__main__':
    print(markdown(), end='')
