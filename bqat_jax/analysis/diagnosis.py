"""The complete diagnosis of a network and its files, `diagnosis/step_N.json` and `diagnosis/step_N.png`."""

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from bqat_jax.analysis.measurement import (
    LOSSES,
    REFERENCES,
    DiagnosisSettings,
    make_feature_measurement,
    make_gradient_measurement,
    make_quantizer_measurement,
)
from bqat_jax.replacement.block_replacement import Batch
from bqat_jax.storage import Place, write_bytes, write_json
from bqat_jax.training.spec import TrainSpec
from bqat_jax.training.state import TrainState

DIRECTORY = 'diagnosis'
# Layer names are omitted from an axis above this number of layers.
MOST_NAMES = 30


def make_diagnosis(
    spec: TrainSpec, blocks: Mapping[str, str], settings: DiagnosisSettings
) -> Callable[[TrainState, Any, Sequence[Batch]], dict[str, Any]]:
    """Returns a function that diagnoses a network, without oscillations; see `make_oscillation_measurement`.

    Args:
        spec: the static parts of training.
        blocks: block name by layer path.
        settings: the amount of data.

    Returns:
        `diagnose(state, partner, batches)` for the state of one network, the partner's variables and
        `settings.batches` batches, prepared as in evaluation. It returns JSON.
    """
    gradients = make_gradient_measurement(spec, blocks, settings.samples)
    features, quantizers = make_feature_measurement(spec), make_quantizer_measurement(spec)

    def diagnose(state, partner, batches):
        return {
            'step': int(state.step),
            'blocks': dict(blocks),
            'gradients': gradients(state, partner, batches),
            'features': features(state, partner, batches),
            'quantizers': quantizers(state, batches),
            'settings': {**dataclasses.asdict(settings), 'batch_size': jax.tree.leaves(batches[0].targets)[0].shape[0]},
        }

    return diagnose


def write_diagnosis(directory: Place, diagnosis: Mapping[str, Any]) -> None:
    """Writes a diagnosis as `step_N.json` and `step_N.png` into a directory, which is created if necessary."""
    directory.mkdir(exist_ok=True)
    write_json(directory / f'step_{diagnosis["step"]}.json', diagnosis)
    draw(directory / f'step_{diagnosis["step"]}.png', diagnosis)


def draw(path: Place, diagnosis: Mapping[str, Any]) -> None:
    """Draws a diagnosis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout='constrained')
    panels = figure.subplots(2, 3)
    names = list(dict.fromkeys(diagnosis['blocks'].values()))
    lines = {f'{loss} to {reference}': (loss, reference) for loss in LOSSES for reference in REFERENCES}
    for panel, measure, title in (
        (panels[0, 0], 'cosine_to_', 'cosine of the gradient'),
        (panels[0, 1], 'relative_norm_to_', 'relative norm of the gradient'),
    ):
        for label, (loss, reference) in lines.items():
            of_blocks = diagnosis['gradients'][loss]['blocks']
            style = 'o-' if loss == 'full' else 'o--'
            color = 'tab:blue' if reference == REFERENCES[0] else 'tab:orange'
            values = [of_blocks[name][f'{measure}{reference}'] for name in names]
            panel.plot(names, values, style, color=color, label=label.replace('_', ' '))
        panel.set(title=title)
        panel.legend()
    for loss, style in zip(LOSSES, ('o--', 'o-'), strict=True):
        values = [diagnosis['gradients'][loss]['blocks'][name]['variance'] for name in names]
        panels[0, 2].plot(names, values, style, color='tab:blue', label=loss)
    panels[0, 2].set(title='variance of the gradient over batches, relative', yscale='log')
    panels[0, 2].legend()
    for measure, color in (('cka', 'tab:green'), ('relative_error', 'tab:red')):
        values = [one[measure] for one in diagnosis['features'].values()]
        panels[1, 0].plot(list(diagnosis['features']), values, 'o-', color=color, label=measure.replace('_', ' '))
    panels[1, 0].set(title="LP features against the partner's", ylim=(0, None))
    panels[1, 0].legend()
    layers = list(diagnosis['quantizers'])
    for role, color in (('weights', 'tab:blue'), ('activations', 'tab:orange')):
        for panel, measure in ((panels[1, 1], 'snr'), (panels[1, 2], 'clipped')):
            values = [diagnosis['quantizers'][layer].get(role, {}).get(measure, float('nan')) for layer in layers]
            panel.plot(range(len(layers)), values, 'o-', color=color, label=f'{role}, {measure}')
    if 'oscillating' in diagnosis:
        values = [diagnosis['oscillating'].get(layer, float('nan')) for layer in layers]
        panels[1, 2].plot(range(len(layers)), values, 'o-', color='tab:red', label='weights, oscillating')
    panels[1, 1].set(title='signal-to-noise ratio of quantization, dB')
    panels[1, 2].set(title='fraction of values', ylim=(0, None))
    for panel in (panels[1, 1], panels[1, 2]):
        panel.legend()
        if len(layers) <= MOST_NAMES:
            panel.set_xticks(range(len(layers)), layers, rotation=90, fontsize='small')
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    figure.suptitle(f'after step {diagnosis["step"]}')
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=110)
    figure.clear()  # else its arrays wait for a full garbage collection, which a large heap makes rare
    write_bytes(path, buffer.getvalue())
