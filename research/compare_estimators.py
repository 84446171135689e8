"""Every gradient estimator in every quantizer, in short runs on the digits, over several seeds in one program.

Plain QAT (no replacement, no distillation) of a narrow ResNet-8 from one full-precision partner. First and last layer
have 8 bits and LSQ. All other weights have the quantizer and the estimator named, at 2 bits, or at 1 bit where the
quantizer or the estimator is for one bit. Activations have the same two at 2 bits where they are defined for
activations, and else LSQ or the identity. One learning rate for all, not tuned: a low number may mean that it does not suit.

Command: python -m research.compare_estimators --workdir=runs/compare_estimators

Writes `results.json`, to which a further call adds what is missing, and `table.md`.
"""

import operator
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from absl import app, flags, logging

from bqat_jax.configuration import Config
from bqat_jax.files import read_json, write_json, write_text
from bqat_jax.quantization.estimators import ESTIMATORS
from bqat_jax.quantization.quantizers import QUANTIZERS
from bqat_jax.quantization.rules import assign_quantizers
from bqat_jax.quantization.transform import build_quantization, calibrate, find_layers
from bqat_jax.replacement.objective import Objective
from bqat_jax.replacement.plans import Plan
from bqat_jax.training.curvature import TraceSettings, make_measurement
from bqat_jax.training.optimizer import NETWORK, make_optimizer
from bqat_jax.training.optimizer import QUANTIZERS as QUANTIZER_PARAMETERS
from bqat_jax.training.partner import obtain_partner
from bqat_jax.training.setting import Setting, make_setting
from bqat_jax.training.signals import StopRequest
from bqat_jax.training.step import Problem, evaluation_step, init_state, train_step
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
    arrays, test = setting.train_split.arrays, setting.test_split.arrays
    how = setting.preprocessing(partner.facts['mean'], partner.facts['std'])
    images = (jnp.asarray(arrays['image'][:CALIBRATION_IMAGES], jnp.float32) / 255 - how.mean[0]) / how.std[0]

    def run(params, x):
        return network.apply({**partner.variables, 'params': params}, x, network.names, train=True)

    params = partner.variables['params']
    paths = find_layers(run, params, images)
    layers = assign_quantizers(paths, cell['weights'], cell['activations'], config.quant.rules)
    # All inputs but the first layer's follow a ReLU.
    quantization = build_quantization(layers, {path: path == paths[0] for path in paths})
    problem = Problem(network, quantization, Plan('none', ()), Objective(distillation=0.0), how, steps)
    optimizer, schedule = make_optimizer(config.optimizer, max(steps, 1), 0)
    params = {NETWORK: params, QUANTIZER_PARAMETERS: calibrate(quantization, params, run, [images])}
    step = train_step(problem, optimizer, schedule)

    @jax.jit
    @jax.vmap
    def begin(key):
        return init_state(problem, key, params, partner.variables['batch_stats'], optimizer)

    @jax.jit
    @jax.vmap
    def train(state, batches):
        return jax.lax.scan(
            lambda state, index: (step(state, None, arrays, {'index': index})[0], None), state, batches
        )[0]

    @jax.jit
    @jax.vmap
    def correct(state):
        batch = {'index': jnp.arange(len(test['label'])), 'mask': jnp.ones(len(test['label']), bool)}
        return evaluation_step(problem)(state.params, state.batch_stats, test, batch)['correct']

    orders = []
    for seed in range(seeds):
        rng = np.random.default_rng([config.seed, seed])
        epochs = -(-steps * config.train.batch_size // len(arrays['label']))
        order = np.concatenate([rng.permutation(len(arrays['label'])) for _ in range(max(epochs, 1))])
        orders.append(order[: steps * config.train.batch_size].reshape(steps, config.train.batch_size))
    batches = np.stack(orders).astype(np.int32)
    states = begin(jax.vmap(jax.random.key)(jnp.arange(seeds, dtype=jnp.uint32)))
    needs_delta = any(quantizer.estimator.needs_delta for _, _, quantizer in quantization.quantizers())
    every = MEASURE_EVERY if needs_delta else max(steps, 1)
    for start in range(0, steps, every):
        if start:
            measure = make_measurement(problem, TraceSettings(batches=1), setting.mesh)
            found = []
            for seed in range(seeds):
                state = jax.tree.map(operator.itemgetter(seed), states)
                found.append(measure(state, None, arrays, {'index': batches[seed, start]}, jnp.int32(0)))
            states = states.replace(deltas=jax.tree.map(lambda *values: jnp.stack(values), *found))
        states = train(states, batches[:, start : start + every])
    return [int(count) / len(test['label']) for count in correct(states)]


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
