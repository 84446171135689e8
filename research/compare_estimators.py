"""Compares every gradient estimator in every quantizer, in short runs on the digits over several seeds.

Runs are plain QAT (no replacement, no distillation) of a narrow ResNet-8 from one full-precision partner. The first and
the last layer have 8 bits and LSQ. All other weights have the named quantizer and estimator at 2 bits, or at 1 bit if
one of them is for one bit. Activations have this quantizer and estimator at 2 bits if both are defined for activations,
and otherwise LSQ or the identity. The learning rate is shared and not tuned, so a low score may only mean that it does
not suit.

Command: python -m research.compare_estimators --workdir=runs/compare_estimators

Writes `results.json`, which a second call completes, and `table.md`.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from absl import app, flags, logging

from bqat_jax.blocks.block_network import other_collections
from bqat_jax.data.pipeline import Split
from bqat_jax.distributed.preemption import StopRequest
from bqat_jax.experiment.configuration import Config
from bqat_jax.experiment.experiment import Experiment
from bqat_jax.experiment.partner import Partner, find_partner, make_preprocessing, pretrain_partner
from bqat_jax.experiment.reading import load_data, load_split
from bqat_jax.experiment.setup import make_experiment
from bqat_jax.quantizers import ESTIMATORS, QUANTIZERS
from bqat_jax.replacement.block_replacement import BlockReplacement
from bqat_jax.replacement.objective import Objective
from bqat_jax.replacement.paths import Variables
from bqat_jax.replacement.plans import Plan
from bqat_jax.storage import read_json, write_json, write_text
from bqat_jax.training.optimizer import make_optimizer
from bqat_jax.training.spec import TrainSpec
from bqat_jax.training.state import init_state
from bqat_jax.training.step import evaluation_step, train_step
from bqat_jax.training.strengths import TraceSettings, make_measurement, mean_strengths
from bqat_jax.transform import prepare
from bqat_jax.transform.rules import assign_quantizers
from configs.digits import get_config

NO_TRAINING = 'calibrated, not trained'
# Steps between two measurements of the strength of `ewgs_trace`.
MEASURE_EVERY = 50
CALIBRATION_IMAGES = 256


def recipe() -> Config:
    """Returns the digits recipe with a narrower network, without validation split, replacement and distillation."""
    config = get_config()
    config.network.width = 8
    config.data.validation_fraction = 0.0
    config.replacement.plan, config.replacement.distillation = 'none', 0.0
    # The recipe's rate suits LSQ's scaled gradients; quantizers without that scaling diverge with it.
    config.optimizer.quantizers.learning_rate = 0.001
    return config


def settings_of(quantizer: str, estimator: str) -> dict[str, Any]:
    """Returns the settings of weights and activations for a cell of the table.

    Raises:
        ValueError: if quantizer and estimator do not go together.
    """
    sign_only = ESTIMATORS.get(estimator).sign_only
    bits = 1 if sign_only or 2 not in QUANTIZERS.get(quantizer).bits_signed else 2
    weights = {'name': quantizer, 'bits': bits, 'estimator': estimator}
    assign_quantizers(['layer'], weights, {'name': 'none', 'bits': 2, 'estimator': 'identity'}, ())
    for name in (quantizer, 'lsq'):
        for rule in (estimator, 'identity'):
            activations = {'name': name, 'bits': 2, 'estimator': rule, 'sign': 'unsigned'}
            try:
                assign_quantizers(['layer'], {'name': 'none', 'bits': 2, 'estimator': 'identity'}, activations, ())
            except ValueError:
                continue
            return {'weights': weights, 'activations': activations}
    raise AssertionError('LSQ with the identity is defined for activations.')


@dataclasses.dataclass(frozen=True)
class Bench:
    """The parts that all cells share.

    Attributes:
        config: the recipe.
        experiment: its experiment.
        partner: the trained partner.
        train: the training split, on the device.
        test: the test split, on the device.
    """

    config: Config
    experiment: Experiment
    partner: Partner
    train: Split
    test: Split


def make_bench(config: Config, workdir: Path, console: rich.console.Console) -> Bench:
    """Returns the parts that all cells share; trains the partner unless the workdir has it."""
    experiment = make_experiment(config, workdir, console)
    data = load_data(experiment)
    with StopRequest() as stop:
        partner = find_partner(experiment) or pretrain_partner(experiment, data, stop)
    return Bench(config, experiment, partner, data.train, load_split(experiment, experiment.data.images.test))


def run_cell(bench: Bench, cell: dict[str, Any], steps: int, seeds: int) -> list[float]:
    """Returns the test accuracy of every seed after `steps` steps."""
    experiment, network = bench.experiment, bench.experiment.network
    variables, batch_size = bench.partner.variables, experiment.data.batch_size
    train, test = bench.train.arrays, bench.test.arrays
    assert train is not None and test is not None  # both splits are on the device
    preprocessing = make_preprocessing(experiment, bench.partner.facts)
    calibration = preprocessing({'index': np.arange(CALIBRATION_IMAGES)}, train, None).inputs
    quantization, quantizers = prepare(
        network.as_function(variables, train=True),
        variables['params'],
        [calibration],
        weights=cell['weights'],
        activations={**cell['activations'], 'sign': 'auto'},
        rules=bench.config.quant.rules,
    )
    objective, plan = Objective(distillation=0.0), Plan('none', len(network.blocks))
    spec = TrainSpec(BlockReplacement(network, quantization, plan, objective), preprocessing, steps)
    optimizer, learning_rate = make_optimizer(experiment.training.optimizer, max(steps, 1))
    start = Variables(variables['params'], quantizers, other_collections(variables))
    # Seeds run one after another: under vmap, convolutions with different kernels are several times slower on a CPU.
    begin = jax.jit(lambda key: init_state(spec, key, start, optimizer))
    step = jax.jit(train_step(spec, optimizer, learning_rate), donate_argnums=(0,))
    evaluate = jax.jit(evaluation_step(spec))
    measure = make_measurement(spec, TraceSettings(batches=1), experiment.single)
    needs_strength = any(quantizer.estimator.needs_strength for _, _, quantizer in quantization.quantizers())
    everything = {'index': np.arange(len(test['label'])), 'mask': np.ones(len(test['label']), bool)}
    accuracies = []
    for seed in range(seeds):
        state = begin(jax.random.key(seed))
        rng = np.random.default_rng([experiment.seeds[0], seed])
        for number in range(steps):
            index = rng.choice(len(train['label']), batch_size, replace=False).astype(np.int32)
            if needs_strength and number and number % MEASURE_EVERY == 0:
                strengths = mean_strengths([measure(state, None, train, {'index': index}, jnp.int32(0))])
                state = dataclasses.replace(state, strengths=strengths)
            state, _ = step(state, None, train, {'index': index})
        counts = evaluate(state.params, state.collections, test, everything)
        accuracies.append(int(counts['correct']) / len(test['label']))
    return accuracies


def write_table(path: Path, results: dict[str, Any], seeds: int) -> None:
    """Writes the table of estimators (rows) by quantizers (columns): mean ± standard deviation in percent."""
    names = list(QUANTIZERS)
    lines = [f'| estimator | {" | ".join(names)} |', f'|---|{"---|" * len(names)}']
    for estimator in [NO_TRAINING, *ESTIMATORS]:
        cells = []
        for quantizer in names:
            top1 = results.get(f'{quantizer}/{estimator}')
            if top1 is None:
                cells.append('-')
            else:
                spread = statistics.stdev(top1) if len(set(top1)) > 1 else 0.0
                cells.append(f'{100 * statistics.mean(top1):.1f} ± {100 * spread:.1f}')
        lines.append(f'| {estimator} | {" | ".join(cells)} |')
    write_text(
        path,
        '\n'.join(lines) + f'\n\nTop-1 in percent on the test images, mean ± standard deviation of {seeds} seeds.\n',
    )


def main(argv: list[str]) -> None:
    """Runs the missing cells."""
    del argv
    logging.set_verbosity(logging.ERROR)
    workdir, steps, seeds = Path(flags.FLAGS.workdir), flags.FLAGS.steps, flags.FLAGS.seeds
    config = recipe()
    config.data.dir = flags.FLAGS.data_dir
    console = rich.console.Console()
    workdir.mkdir(parents=True, exist_ok=True)
    bench = make_bench(config, workdir, console)
    path = workdir / 'results.json'
    results = read_json(path) if path.exists() else {}
    for estimator in flags.FLAGS.estimators or [NO_TRAINING, *ESTIMATORS]:
        for quantizer in flags.FLAGS.quantizers or QUANTIZERS:
            name = f'{quantizer}/{estimator}'
            if name in results:
                continue
            try:
                cell = settings_of(quantizer, 'identity' if estimator == NO_TRAINING else estimator)
            except ValueError:
                continue  # they do not go together
            results[name] = run_cell(bench, cell, 0 if estimator == NO_TRAINING else steps, seeds)
            console.print(name, results[name])
            write_json(path, results)
            write_table(workdir / 'table.md', results, seeds)
            jax.clear_caches()


if __name__ == '__main__':
    flags.DEFINE_string('workdir', 'runs/compare_estimators', 'Folder of the results.')
    flags.DEFINE_string('data_dir', None, "Folder of the prepared digits; TensorFlow Datasets' default if not set.")
    flags.DEFINE_integer('steps', 150, 'Steps per run.', lower_bound=1)
    flags.DEFINE_integer('seeds', 3, 'Seeds per cell.', lower_bound=1)
    flags.DEFINE_list('estimators', None, 'Only these estimators.')
    flags.DEFINE_list('quantizers', None, 'Only these quantizers.')
    app.run(main)
