"""A diagnosis as files: `diagnosis/step_N.json` and `diagnosis/step_N.png` in the workdir."""

import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bqat_jax.analysis.measurement import (
    LOSSES,
    REFERENCES,
    measure_features,
    measure_gradients,
    measure_oscillations,
    measure_quantizers,
)
from bqat_jax.data.augmentation import normalize
from bqat_jax.data.pipeline import get_examples
from bqat_jax.distributed.processes import is_first, put_batch
from bqat_jax.distributed.sharding import over_batch
from bqat_jax.experiment.configuration import Config
from bqat_jax.experiment.experiment import Setting, blocks_of_layers
from bqat_jax.storage import write_bytes, write_json
from bqat_jax.training.optimizer import make_optimizer
from bqat_jax.training.step import Problem, TrainState, make_train_step

DIRECTORY = 'diagnosis'
# Number of this use of randomness; see `Setting.key`.
DIAGNOSIS = 5
# Of layers on an axis.
MOST_NAMES = 30
# Steps of a schedule that is meant to stay where it begins.
ENDLESS = 10**9


def diagnose(setting: Setting, problem: Problem, partner: Any, optimizer: Config, state: TrainState) -> dict[str, Any]:
    """Measures a network at one moment of its training; writes and returns what was found.

    Oscillations are watched during steps that are made for it alone, at half the peak learning rate: the rate in the
    middle of a cosine decay. At the end of training, where it is zero, nothing would move.

    Args:
        setting: of the run.
        problem: what is trained.
        partner: the partner's variables.
        optimizer: the config of the phase's optimizer.
        state: of one network; it stays as it is.
    """
    settings, step, split = setting.diagnosis, int(state.step), setting.train_split
    how = problem.preprocessing

    @jax.jit
    def prepare(batch, arrays):
        images, labels = get_examples(batch, arrays)
        return normalize(images, how.mean, how.std), labels

    def read(start, stop, *, random_crops):
        batches = split.training_batches(
            setting.data_seed(DIAGNOSIS), setting.config.train.batch_size, start, stop, random_crops=random_crops
        )
        return (put_batch(batch, over_batch(setting.mesh)) for batch in batches)

    batches = [prepare(batch, split.arrays) for batch in read(0, settings.batches, random_crops=False)]
    blocks = blocks_of_layers(setting.network, setting.abstract_variables, setting.images.image_shape)
    found: dict[str, Any] = {
        'step': step,
        'blocks': blocks,
        'gradients': measure_gradients(problem, state, partner, batches, blocks, settings.samples),
        'features': measure_features(problem, state, partner, batches),
        'quantizers': measure_quantizers(problem, state, batches),
    }
    if settings.oscillation_steps:
        rule, learning_rate = make_optimizer(_constant(optimizer), ENDLESS, 0)
        train = make_train_step(problem, rule, learning_rate, setting.single)
        # A copy: the step takes its state over. The optimizer's moving averages begin anew.
        copy = jax.tree.map(jnp.copy, state)
        copy = copy.replace(opt_state=rule.init(copy.params))
        moving = read(settings.batches, settings.batches + settings.oscillation_steps, random_crops=True)
        found['oscillating'] = measure_oscillations(problem, train, copy, partner, split.arrays, moving)
    found['settings'] = {
        'batches': settings.batches,
        'batch_size': setting.config.train.batch_size,
        'samples': settings.samples,
        'oscillation_steps': settings.oscillation_steps,
    }
    if is_first():
        directory = setting.workdir / DIRECTORY
        directory.mkdir(exist_ok=True)
        write_json(directory / f'step_{step}.json', found)
        draw(directory / f'step_{step}.png', found)
    return found


def _constant(optimizer: Config) -> Config:
    """The optimizer at half its peak learning rates, which stay."""
    optimizer = optimizer.copy_and_resolve_references()
    optimizer.learning_rate /= 2
    optimizer.quantizers.learning_rate /= 2
    return optimizer


def draw(path: Path, found: dict[str, Any]) -> None:
    """Draws a diagnosis."""
    import matplotlib

    matplotlib.use('agg')  # no screen is needed
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(15, 8), layout='constrained')
    names = list(dict.fromkeys(found['blocks'].values()))
    lines = {f'{loss} to {reference}': (loss, reference) for loss in LOSSES for reference in REFERENCES}
    for panel, measure, title in (
        (panels[0, 0], 'cosine_to_', 'cosine of the gradient'),
        (panels[0, 1], 'relative_norm_to_', 'relative norm of the gradient'),
    ):
        for label, (loss, reference) in lines.items():
            of_blocks = found['gradients'][loss]['blocks']
            style = 'o-' if loss == 'full' else 'o--'
            color = 'tab:blue' if reference == REFERENCES[0] else 'tab:orange'
            values = [of_blocks[name][f'{measure}{reference}'] for name in names]
            panel.plot(names, values, style, color=color, label=label.replace('_', ' '))
        panel.set(title=title)
        panel.legend()
    for loss, style in zip(LOSSES, ('o--', 'o-'), strict=True):
        values = [found['gradients'][loss]['blocks'][name]['variance'] for name in names]
        panels[0, 2].plot(names, values, style, color='tab:blue', label=loss)
    panels[0, 2].set(title='variance of the gradient over batches, relative', yscale='log')
    panels[0, 2].legend()
    for measure, color in (('cka', 'tab:green'), ('relative_error', 'tab:red')):
        values = [one[measure] for one in found['features'].values()]
        panels[1, 0].plot(list(found['features']), values, 'o-', color=color, label=measure.replace('_', ' '))
    panels[1, 0].set(title="LP features against the partner's", ylim=(0, None))
    panels[1, 0].legend()
    layers = list(found['quantizers'])
    for role, color in (('weights', 'tab:blue'), ('activations', 'tab:orange')):
        for panel, measure in ((panels[1, 1], 'snr'), (panels[1, 2], 'clipped')):
            values = [found['quantizers'][layer].get(role, {}).get(measure, float('nan')) for layer in layers]
            panel.plot(range(len(layers)), values, 'o-', color=color, label=f'{role}, {measure}')
    if 'oscillating' in found:
        values = [found['oscillating'].get(layer, float('nan')) for layer in layers]
        panels[1, 2].plot(range(len(layers)), values, 'o-', color='tab:red', label='weights, oscillating')
    panels[1, 1].set(title='signal-to-noise ratio of quantization, dB')
    panels[1, 2].set(title='fraction of values', ylim=(0, None))
    for panel in (panels[1, 1], panels[1, 2]):
        panel.legend()
        if len(layers) <= MOST_NAMES:
            panel.set_xticks(range(len(layers)), layers, rotation=90, fontsize='small')
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    figure.suptitle(f'after step {found["step"]}')
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=110)
    pyplot.close(figure)
    write_bytes(path, buffer.getvalue())
