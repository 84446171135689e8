"""Every gradient estimator in every quantizer, in short runs on the digits, over several seeds.

Plain QAT (no replacement, no distillation) of a narrow ResNet-8 from one full-precision partner. First and last layer
have 8 bits and LSQ. All other weights have the quantizer and the estimator named, at 2 bits, or at 1 bit where the
quantizer or the estimator is for one bit. Activations have the same two at 2 bits where they are defined for
activations, and else LSQ or the identity. One learning rate for all, not tuned: a low number may mean that it does not
suit.

Command: python -m research.compare_estimators --workdir=runs/compare_estimators

Writes `results.json`, to which a further call adds what is missing, and `table.md`.
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

from bqat_jax.distributed.preemption import StopRequest
from bqat_jax.experiment.configuration import Config
from bqat_jax.experiment.experiment import Setting, make_setting
from bqat_jax.experiment.partner import obtain_partner
from bqat_jax.quantizers import QUANTIZERS
from bqat_jax.quantizers.estimators import ESTIMATORS
from bqat_jax.replacement.block_replacement import BlockReplacement
from bqat_jax.replacement.objective import Objective
from bqat_jax.replacement.plans import Plan
from bqat_jax.storage import read_json, write_json, write_text
from bqat_jax.training.optimizer import NETWORK, make_optimizer
from bqat_jax.training.optimizer import QUANTIZERS as QUANTIZER_PARAMETERS
from bqat_jax.training.step import Problem, evaluation_step, init_state, train_step
from bqat_jax.training.strengths import TraceSettings, make_measurement
from bqat_jax.transform import build_quantization, calibrate
from bqat_jax.transform.rules import assign_quantizers
from configs.digits import get_config

NO_TRAINING = 'calibrated, not trained'
# δ of `ewgs_trace` is measured anew after so many steps.
MEASURE_EVERY = 50
CALIBRATION_IMAGES = 256


def recipe() -> Config:
    """Returns the digits recipe, narrower and without what is not compared."""
    config = get_config()
    config.network.width = 8
    config.data.validation_fraction = 0.0
    config.replacement.plan, config.replacement.distillation = 'none', 0.0
    # Not the recipe's, which suits LSQ's scaled gradients: where a paper scales none, larger steps diverge.
    config.optimizer.quantizers.learning_rate = 0.001
    return config


def settings_of(quantizer: str, estimator: str) -> dict[str, Any]:
    """Returns the settings of weights and activations for a cell of the table.

    Raises:
        ValueError: if the two are not defined for each other.
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


def run_cell(setting: Setting, partner: Any, cell: dict[str, Any], steps: int, seeds: int) -> list[float]:
    """Returns the test accuracy of every seed after `steps` steps."""
    config, network = setting.config, setting.network
    arrays: Any = setting.train_split.arrays
    test: Any = setting.test_split.arrays
    how = setting.preprocessing(partner.facts['mean'], partner.facts['std'])
    images = (jnp.asarray(arrays['image'][:CALIBRATION_IMAGES], jnp.float32) / 255 - how.mean[0]) / how.std[0]

    def run(params, x):
        return network.apply({**partner.variables, 'params': params}, x, network.names, train=True)

    params = partner.variables['params']
    found = setting.found.quantizable
    layers = assign_quantizers(tuple(found), cell['weights'], cell['activations'], config.quant.rules)
    # All inputs but the first layer's follow a ReLU.
    quantization = build_quantization(found, layers, {path: path == 'stem/conv' for path in found})
    replacement = BlockReplacement(
        network, quantization, Plan('none', len(network.blocks)), Objective(distillation=0.0)
    )
    problem = Problem(replacement, how, steps)
    optimizer, learning_rate = make_optimizer(config.optimizer, max(steps, 1), 0)
    params = {NETWORK: params, QUANTIZER_PARAMETERS: calibrate(quantization, params, run, [images])}
    # Seeds one after another, by the same compiled programs: side by side, under vmap, convolutions of weights that
    # differ are several times slower on a CPU.
    begin = jax.jit(lambda key: init_state(problem, key, params, partner.variables['batch_stats'], optimizer))
    step = jax.jit(train_step(problem, optimizer, learning_rate), donate_argnums=(0,))
    evaluate = jax.jit(evaluation_step(problem))
    measure = make_measurement(problem, TraceSettings(batches=1), setting.single)
    needs_delta = any(quantizer.estimator.needs_delta for _, _, quantizer in quantization.quantizers())
    everything = {'index': np.arange(len(test['label'])), 'mask': np.ones(len(test['label']), bool)}
    found = []
    for seed in range(seeds):
        state = begin(jax.random.key(seed))
        rng = np.random.default_rng([config.seed, seed])
        for number in range(steps):
            index = rng.choice(len(arrays['label']), config.train.batch_size, replace=False).astype(np.int32)
            if needs_delta and number and number % MEASURE_EVERY == 0:
                deltas = measure(state, None, arrays, {'index': index}, jnp.int32(0))
                state = dataclasses.replace(state, deltas=deltas)
            state, _ = step(state, None, arrays, {'index': index})
        found.append(int(evaluate(state.params, state.batch_stats, test, everything)['correct']) / len(test['label']))
    return found


def write_table(path: Path, results: dict[str, Any], seeds: int) -> None:
    """Writes the table: estimators down, quantizers across, mean ± standard deviation in percent."""
    names = list(QUANTIZERS)
    lines = [f'| estimator | {" | ".join(names)} |', f'|---|{"---|" * len(names)}']
    for estimator in [NO_TRAINING, *ESTIMATORS]:
        cells = []
        for quantizer in names:
            found = results.get(f'{quantizer}/{estimator}')
            if found is None:
                cells.append('-')
            else:
                spread = statistics.stdev(found) if len(set(found)) > 1 else 0.0
                cells.append(f'{100 * statistics.mean(found):.1f} ± {100 * spread:.1f}')
        lines.append(f'| {estimator} | {" | ".join(cells)} |')
    write_text(
        path,
        '\n'.join(lines) + f'\n\nTop-1 in percent on the test images, mean ± standard deviation of {seeds} seeds.\n',
    )


def main(argv: list[str]) -> None:
    """Fills in what is missing, cell by cell."""
    del argv
    logging.set_verbosity(logging.ERROR)
    workdir, steps, seeds = Path(flags.FLAGS.workdir), flags.FLAGS.steps, flags.FLAGS.seeds
    config = recipe()
    config.data.dir = flags.FLAGS.data_dir
    console = rich.console.Console()
    workdir.mkdir(parents=True, exist_ok=True)
    setting = make_setting(config, workdir, console)
    with StopRequest() as stop:
        partner = obtain_partner(setting, stop)
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
                continue  # not defined for each other
            results[name] = run_cell(setting, partner, cell, 0 if estimator == NO_TRAINING else steps, seeds)
            console.print(name, results[name])
            write_json(path, results)
            write_table(workdir / 'table.md', results, seeds)
            jax.clear_caches()


if __name__ == '__main__':
    flags.DEFINE_string('workdir', 'runs/compare_estimators', 'Where results go.')
    flags.DEFINE_string('data_dir', None, "Where the digits are prepared; TensorFlow Datasets' default if not given.")
    flags.DEFINE_integer('steps', 150, 'Steps of every run.', lower_bound=1)
    flags.DEFINE_integer('seeds', 3, 'Seeds of every cell.', lower_bound=1)
    flags.DEFINE_list('estimators', None, 'Only these estimators.')
    flags.DEFINE_list('quantizers', None, 'Only these quantizers.')
    app.run(main)
