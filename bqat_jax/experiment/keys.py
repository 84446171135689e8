"""All keys of a config with default, range and description.

The base config, the check of values and `docs/configuration.md` are made from this list:

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
        range: interval of the number, or of each number of a tuple, such as '[0, 1)'; '' for none.
        may_change: whether a run may resume with another value, because results do not depend on it, or, for the mesh,
            only through the order of float32 sums.
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
        Key(f'{section}.name', 'sgd', '`sgd` or `adamw`, for the network and its quantizers'),
        Key(f'{section}.learning_rate', 0.1, 'peak learning rate, with cosine decay to 0', NUMBER),
        Key(f'{section}.momentum', 0.9, 'momentum of SGD; beta1 of AdamW', '[0, 1)'),
        Key(f'{section}.beta2', 0.999, 'beta2 of AdamW', '[0, 1)'),
        Key(f'{section}.nesterov', True, 'whether SGD uses Nesterov momentum'),
        Key(
            f'{section}.weight_decay',
            1e-4,
            'weight decay of kernels only: SGD adds it to the gradient, AdamW decouples it',
            NUMBER,
        ),
        Key(f'{section}.warmup_steps', Unset(int), 'steps of linear warm-up from 0', STEPS),
        Key(f'{section}.warmup_epochs', 0.0, 'warm-up in epochs', NUMBER),
        Key(f'{section}.clip_norm', 0.0, 'gradients are clipped to this global norm; 0: not clipped', NUMBER),
    )


KEYS: tuple[Key, ...] = (
    Key('seed', 0, 'seed of the run', SEED),
    Key(
        'task',
        'classification',
        'the [task](tasks.md), with options `language_model:ignore=-1`: its loss and the score of checkpoints',
    ),
    Key(
        'plugins',
        Unset(str),
        'Python files that register estimators, quantizers, networks and more, separated by commas',
    ),
    Key('sweep', Unset(str), 'for `--mode=sweep`: the Python file that defines the comparison'),
    Key(
        'sweep_minutes',
        Unset(float),
        'minutes after which a sweep stops with a checkpoint; the same command resumes it: '
        '[research](research.md#run-it-in-parts)',
        POSITIVE,
        may_change=True,
    ),
    Key(
        'sweep_pack',
        Unset(str),
        'zip file that a sweep resumes from, if it exists, and writes at every stop: '
        '[research](research.md#run-it-in-parts)',
        may_change=True,
    ),
    Key(
        'sweep_extend',
        2,
        'how often a sweep extends its grid when the best choice is at the edge; 0: never',
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
        'folder for compiled programs and [decoded data](data.md#the-cache-of-decoded-data); later starts are fast',
        may_change=True,
    ),
    Key('profile', False, 'record a trace of some steps of each phase: [performance](performance.md)', may_change=True),
    Key(
        'profile_steps',
        (11, 13),
        'the first and the last step that `profile` records, counted from 1',
        COUNT,
        may_change=True,
    ),
    Key(
        'distributed',
        'off',
        '`off`; `auto`; or `HOST:PORT,n,i` for process i of n, counted from 0: [pods](pods.md)',
        may_change=True,
    ),
    Key('data.name', 'digits', '`digits`, or the name of a data set of TensorFlow Datasets'),
    Key(
        'data.dir',
        Unset(str),
        "folder of prepared data sets; unset: TensorFlow Datasets' own, in the home folder",
        may_change=True,
    ),
    Key(
        'data.cache_dir',
        Unset(str),
        'local folder that caches data sets of buckets and [decoded data](data.md#the-cache-of-decoded-data): '
        '[pods](pods.md); unset: `~/.cache/bqat_jax` for s3://; gs:// is read directly',
        may_change=True,
    ),
    Key(
        'data.cache_gb', 200.0, 'largest size of that folder; the least recently used files are removed', POSITIVE, True
    ),
    Key('data.train_split', 'train', 'split to train on, or a slice such as `train[:80%]`'),
    Key('data.test_split', 'test', 'split to evaluate at the end, or a slice'),
    Key(
        'data.validation_split',
        Unset(str),
        'split to select checkpoints on, or a slice; unset: see `data.validation_fraction`',
    ),
    Key('data.image_size', Unset(int), 'crop size in pixels; unset if all images have one size', COUNT),
    Key(
        'data.on_device', True, 'keep complete splits on the device; batches are gathered in the step', may_change=True
    ),
    Key('data.skip_damaged', False, 'skip and count examples that cannot be read', may_change=True),
    Key('data.workers', 0, 'processes that decode images if data is not on the device', COUNT_OR_NONE, True),
    Key('data.train_examples', Unset(int), 'size of a fixed subset of the training images; unset: all', COUNT),
    Key('data.validation_fraction', 0.0, 'fraction of the training images held out to select checkpoints on', '[0, 1)'),
    Key(
        'data.value_range',
        Unset(tuple),
        'values of float images that map to 0 and 1, such as `(-1.0, 1.0)`; unset: inferred from training images',
        '(-inf, inf)',
    ),
    Key(
        'data.mean',
        (0.5,),
        'normalization: (pixel - mean) / std, in units of the largest pixel, one number per channel',
        FRACTION,
    ),
    Key('data.std', (0.5,), 'see `data.mean`', '(0, 1]'),
    Key('data.crop_padding', 0, 'padding in pixels before random crops; 0: no crops', COUNT_OR_NONE),
    Key('data.flip', False, 'random horizontal flips'),
    Key('data.color_jitter', 0.0, 'random brightness, contrast and saturation, each by a factor of 1 ± this', NUMBER),
    Key(
        f'{NETWORK}name',
        'cifar_resnet',
        'the network; options depend on it, so a recipe for another network replaces `config.network`',
    ),
    Key(f'{NETWORK}depth', 20, 'layers: 6n + 2', COUNT),
    Key(f'{NETWORK}width', 16, 'channels of the first stage', COUNT),
    Key(f'{NETWORK}shortcut', 'A', '`A`: zeros for new channels; `B`: 1x1 convolutions where the shape changes'),
    Key(f'{NETWORK}preactivation', False, 'batch norm and ReLU before each convolution'),
    Key(f'{NETWORK}dtype', 'float32', 'dtype of the computation: `float32` or `bfloat16`; parameters are float32'),
    Key(f'{NETWORK}remat', False, 'recompute blocks in the backward pass: less memory, more time'),
    Key(
        'quant.weights.name', 'lsq', '[quantizer](estimators.md) of weights, with options `lsq:narrow=true`; or `none`'
    ),
    Key('quant.weights.bits', 2, 'bits of weights', '[1, 32]'),
    Key('quant.weights.estimator', 'identity', '[estimator](estimators.md), with options `ewgs:delta=0.1`'),
    Key('quant.weights.granularity', 'auto', "`tensor`, `channel`, or `auto` for that of the quantizer's paper"),
    Key('quant.weights.rescale', 'none', 'rescaling of quantized weights (SAT): `none`, `constant` or `stddev`'),
    Key('quant.activations.name', 'lsq', '[quantizer](estimators.md) of the inputs of layers; or `none`'),
    Key('quant.activations.bits', 2, 'bits of inputs', '[1, 32]'),
    Key('quant.activations.estimator', 'identity', '[estimator](estimators.md) of inputs'),
    Key('quant.activations.sign', 'auto', '`signed`, `unsigned`, or `auto` to determine it by calibration'),
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
        'settings of single layers: the first rule whose regular expression matches the layer applies',
    ),
    Key(
        'quant.allow_unquantized',
        0.1,
        'largest allowed share of multiply-accumulates with weights in layers of unknown types, which no quantizer '
        'reaches',
        FRACTION,
    ),
    Key('quant.calibration_batches', 4, 'batches that quantizers are calibrated on', COUNT),
    Key('quant.trace.every_steps', Unset(int), 'steps between two measurements of the strength of `ewgs_trace`', COUNT),
    Key('quant.trace.every_epochs', 10.0, 'that interval in epochs; at least one step', POSITIVE),
    Key('quant.trace.batches', 3, 'batches of one measurement', COUNT),
    Key('quant.trace.iterations', 50, 'largest number of random vectors per batch', '[2, inf)'),
    Key('quant.trace.tolerance', 1e-3, 'relative change of the mean at which drawing stops', NUMBER),
    Key('quant.oscillations.dampening', 0.0, 'final weight of the loss that dampens oscillations', NUMBER),
    Key(
        'quant.oscillations.dampening_start',
        0.25,
        'fraction of training at which that weight starts to rise from 0',
        FRACTION,
    ),
    Key('quant.oscillations.dampening_aggregation', 'kernel_mean', '`kernel_mean` or `sum`'),
    Key('quant.oscillations.freezing', False, 'freeze the code of a weight that oscillates too often'),
    Key('quant.oscillations.freezing_threshold', 0.01, 'final frequency above which a weight is frozen', FRACTION),
    Key('quant.oscillations.freezing_first_threshold', 0.1, 'that frequency at `freezing_start`', FRACTION),
    Key('quant.oscillations.freezing_start', 0.25, 'fraction of training at which freezing starts', FRACTION),
    Key('quant.oscillations.freezing_momentum', 0.001, 'momentum of the moving averages', FRACTION),
    Key(
        'quant.reestimation_batches', 0, 'batches to re-estimate batch-norm statistics on after training', COUNT_OR_NONE
    ),
    Key(
        'replacement.plan',
        'prefix',
        'the [plan](method.md): `none`, `single`, `prefix`, `suffix`, `prefix_sampled`, `single_sampled`, `bernoulli`',
    ),
    Key('replacement.cut', 'stage', 'blocks: `stage`, `block`, or the parts after which to split, separated by commas'),
    Key('replacement.include_last', False, "for prefixes: also use the model of all LP blocks with the partner's head"),
    Key('replacement.paths', 1, 'MP models per step, for plans that draw them', COUNT),
    Key('replacement.seed', 0, "seed of these draws, independent of the run's", SEED),
    Key(
        'replacement.probability',
        'linear:start=0.5,end=1',
        'schedule of the probability that a block of `bernoulli` is LP',
    ),
    Key('replacement.weights', 'halving', 'weights of MP models: `halving`, `uniform`, `mean`, or a list: `0.25,0.5`'),
    Key('replacement.weights_schedule', 'constant', 'schedule of a factor of these weights'),
    Key(
        'replacement.cross_entropy',
        1.0,
        "weight of the task's loss, such as cross entropy, on the LP network",
        NUMBER,
    ),
    Key('replacement.distillation', 1.0, 'weight of distillation from the FP partner to the LP network', NUMBER),
    Key('replacement.distillation_schedule', 'constant', 'schedule of a factor of that weight'),
    Key('replacement.path_cross_entropy', 1.0, "weight of the task's loss on MP paths", NUMBER),
    Key('replacement.path_distillation', 1.0, 'weight of distillation from the FP partner to MP paths', NUMBER),
    Key('replacement.path_teaching', 0.0, 'weight of distillation from MP paths to the LP network', NUMBER),
    Key('replacement.feature_matching', 0.0, 'weight of the distance between features at the ends of blocks', NUMBER),
    Key('replacement.temperature', 1.0, 'temperature of distillation', POSITIVE),
    Key('train.steps', Unset(int), 'training steps; take precedence over epochs', STEPS),
    Key('train.epochs', 10.0, 'training epochs', NUMBER),
    Key('train.batch_size', 128, 'images per step over all devices', COUNT),
    Key('train.microbatches', 1, 'parts that a batch is split into and run in sequence: less memory', COUNT),
    Key('train.batch_norm_groups', 1, 'groups of a microbatch that batch norm normalizes separately', COUNT),
    Key('train.log_every_steps', 50, 'steps between two lines of metrics', COUNT, may_change=True),
    Key('train.replicas', 1, 'LP networks trained in parallel, with the seeds `seed`, `seed + 1`, ...', COUNT),
    *_optimizer('optimizer'),
    Key('optimizer.quantizers.learning_rate', 0.01, "peak learning rate of the quantizers' parameters", NUMBER),
    Key('optimizer.quantizers.weight_decay', 0.0, 'their weight decay', NUMBER),
    Key('partner.steps', Unset(int), 'training steps of the FP partner; take precedence over epochs', STEPS),
    Key('partner.epochs', 10.0, 'training epochs of the FP partner', NUMBER),
    Key('partner.torch_file', Unset(str), 'PyTorch or safetensors file to load the partner from'),
    Key(
        'partner.torch_key',
        Unset(str),
        'entry of that file with the weights, such as `state.ema`; unset: found automatically',
    ),
    Key('partner.new_head', False, 'load all but the classifier from that file and train the partner from there'),
    Key('partner.workdir', Unset(str), 'workdir of another run to load the partner from'),
    *_optimizer('partner.optimizer'),
    Key(
        'init.workdir',
        Unset(str),
        'workdir of another run whose selected checkpoint the LP network starts from; bits may differ; unset: the '
        'partner',
    ),
    Key('init.quantizers', 'calibrate', '`calibrate` them on that network, or `keep` those of that run'),
    Key('diagnosis.every_steps', Unset(int), 'steps between two diagnoses during training; unset: none', COUNT, True),
    Key('diagnosis.batches', 4, 'training batches per diagnosis', '[2, inf)', True),
    Key('diagnosis.samples', 8, 'samples of perturbed weights for the smoothed gradient', COUNT, True),
    Key('diagnosis.oscillation_steps', 50, 'extra steps in which oscillations are tracked', STEPS, True),
    Key(
        'export.formats',
        'packed,stablehlo',
        'for `--mode=export`: `packed`, `stablehlo`, `onnx`, `qcdq`, separated by commas: [deploy](deploy.md)',
        may_change=True,
    ),
    Key('export.batch', 0, 'batch size of an exported program; 0: any', COUNT_OR_NONE, True),
    Key('export.opset', 21, 'version of the ONNX operators', '[21, 25]', True),
    Key(
        'storage.patience',
        600.0,
        'seconds for which failing requests to a bucket are retried before the run stops: [pods](pods.md)',
        NUMBER,
        may_change=True,
    ),
    Key(
        'storage.lease_seconds',
        60.0,
        'seconds after which another run may use a workdir in a bucket if its lease is not renewed',
        '[1, inf)',
        may_change=True,
    ),
    Key(
        'mesh.data',
        -1,
        '`mesh.data` times `mesh.fsdp` devices share a batch; -1: all devices',
        '[-1, inf)',
        True,
    ),
    Key('mesh.fsdp', 1, 'shards of large arrays: parameters, optimizer state, partner', COUNT, True),
    Key(
        'mesh.rules',
        (),
        "axes to shard arrays along; the first match applies: `({'path': 'head/dense/kernel', 'axis': 1},)`; an axis "
        'may be `largest` or `none`',
        may_change=True,
    ),
    Key('mesh.min_shard_elements', 4096, 'smaller arrays are replicated', COUNT_OR_NONE, True),
    Key('checkpoint.every_steps', Unset(int), 'steps between two checkpoints', COUNT, True),
    Key('checkpoint.every_epochs', 1.0, 'that interval in epochs; at least one step', POSITIVE, True),
    Key('checkpoint.keep', 2, 'number of newest checkpoints kept in addition to the best', COUNT, True),
)
BY_NAME: Mapping[str, Key] = {key.name: key for key in KEYS}
# Ranges of options that the base config's network does not have.
NETWORK_RANGES = {
    'width_multiplier': POSITIVE,
    'patch_size': COUNT,
    'norm_epsilon': NUMBER,
    'norm_momentum': '[0, 1)',
}


def range_of(name: str) -> str:
    """Returns the range of a key's numbers, or '' for none; every number must be finite in any case."""
    key = BY_NAME.get(name)
    return NETWORK_RANGES.get(name.removeprefix(NETWORK), '') if key is None else key.range


def is_within(value: float, interval: str) -> bool:
    """Returns whether a number is finite in float32 and lies in an interval such as '[0, 1)'; '' is unbounded."""
    if not abs(value) <= LARGEST_FLOAT32:
        return False
    if not interval:
        return True
    least, most = (float(end) for end in interval[1:-1].split(','))
    above = value > least if interval[0] == '(' else value >= least
    below = value < most if interval[-1] == ')' else value <= most
    return above and below


def in_words(interval: str) -> str:
    """Describes an interval: '[0, 1)' gives 'at least 0 and less than 1', and '' gives 'finite'."""
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
    yield 'All keys of the config. Set one on the command line with `--config.KEY=VALUE`; `None` unsets a key whose'
    yield 'default is unset. Numbers must be finite. Durations are in steps or in epochs of the training split; steps'
    yield 'take precedence. Keys marked ↻ may change when a run resumes in its workdir: results do not depend on'
    yield 'them. This page is made by `python -m bqat_jax.experiment.keys`.'
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
