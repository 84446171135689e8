"""The summary of a network: layers, quantizers, parameters, operations and sizes."""

import math
from collections.abc import Mapping
from typing import Any

import rich.box
import rich.console
import rich.table
from flax import traverse_util

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.quantizers.estimators import ESTIMATORS, IDENTITY
from bqat_jax.replacement.network_layers import blocks_of_layers, network_unquantized_share
from bqat_jax.transform import Layers, count_macs
from bqat_jax.transform.operations import NO_LAYER
from bqat_jax.transform.rules import LayerSettings, QuantizerSettings

FULL_PRECISION_BITS = 32
# Width of a table that is not printed to a terminal.
TABLE_WIDTH = 140


def summarize(
    network: BlockNetwork, variables: Any, layers: Layers, settings: Mapping[str, LayerSettings]
) -> dict[str, Any]:
    """Returns the summary of a network as JSON; the network is only traced.

    Each entry of 'layers' has 'path', 'block', 'kind', 'kernel' (its shape), 'weights' and 'activations' (quantizer and
    bits, or None), 'parameters', 'macs' (multiply-accumulate operations for one image) and 'bitops': MACs × bits of the
    weights × bits of the input, 32 for full precision (Baskin et al., arXiv 1804.10969, section 4.1). 'totals' includes
    what is not in quantizable layers: parameters of batch norms, products within attention. Sizes are bytes of
    parameters at the bits of the weights' quantizers, without quantizer parameters. 'not_quantizable' has the path of
    every other weight and why it is not quantized, 'not_quantizable_share' their share of the multiply-accumulates with
    weights.

    Args:
        network: the network, with known inputs.
        variables: its variables, or their shapes.
        layers: layers from `find_layers`.
        settings: settings from `assign_quantizers`.
    """

    def run(variables, x):
        return network.apply(variables, x, train=False)[0]

    blocks = blocks_of_layers(network, variables, layers)
    macs = count_macs(run, variables, network.batch_of(1))
    flat: Any = traverse_util.flatten_dict(variables['params'], sep='/')
    rows, saved_bits = [], 0
    for path, layer in layers.quantizable.items():
        own = settings[path]
        weight_bits, input_bits = _bits(own.weights), _bits(own.activations)
        kernel = (*layer.stack, *layer.kernel)
        saved_bits += math.prod(kernel) * (FULL_PRECISION_BITS - weight_bits)
        rows.append(
            {
                'path': path,
                'block': blocks[path],
                'kind': layer.kind,
                'kernel': list(kernel),
                'weights': _describe(own.weights),
                'activations': _describe(own.activations),
                'parameters': sum(math.prod(x.shape) for name, x in flat.items() if name.rpartition('/')[0] == path),
                'macs': macs.get(path, 0),
                'bitops': macs.get(path, 0) * weight_bits * input_bits,
            }
        )
    parameters = sum(math.prod(x.shape) for x in flat.values())
    full_bits = parameters * FULL_PRECISION_BITS
    totals = {
        'parameters': parameters,
        'macs': sum(macs.values()),
        'bitops': sum(row['bitops'] for row in rows) + macs.get(NO_LAYER, 0) * FULL_PRECISION_BITS**2,
        'bitops_full_precision': sum(macs.values()) * FULL_PRECISION_BITS**2,
        'bytes_full_precision': full_bits // 8,
        'bytes': -(-(full_bits - saved_bits) // 8),
    }
    return {
        'layers': rows,
        'totals': totals,
        'not_quantizable': dict(layers.others),
        'not_quantizable_share': network_unquantized_share(network, variables, layers),
    }


def print_summary(console: rich.console.Console, title: str, summary: dict[str, Any]) -> None:
    """Prints a summary as a table."""
    if not console.is_terminal:
        console = rich.console.Console(width=TABLE_WIDTH, file=console.file, markup=False)
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD)
    for name in ('layer', 'block', 'kernel', 'weights', 'input'):
        table.add_column(name, overflow='fold')
    for name in ('parameters', 'MACs', 'BitOPs'):
        table.add_column(name, justify='right')
    for row in summary['layers']:
        table.add_row(
            row['path'],
            row['block'],
            f'{row["kind"]} {"x".join(map(str, row["kernel"]))}',
            row['weights'] or 'full precision',
            row['activations'] or 'full precision',
            *(_short(row[name]) for name in ('parameters', 'macs', 'bitops')),
        )
    totals = summary['totals']
    rest = {name: totals[name] - sum(row[name] for row in summary['layers']) for name in ('macs', 'bitops')}
    if rest['macs']:
        what = 'products outside of layers, as in attention'
        table.add_row('', '', what, *['full precision'] * 2, '', *(_short(rest[name]) for name in ('macs', 'bitops')))
    table.add_section()
    table.add_row('all', '', '', '', '', *(_short(totals[name]) for name in ('parameters', 'macs', 'bitops')))
    console.print(table)
    console.print(
        f'Size: {_short(totals["bytes_full_precision"])}B in full precision, {_short(totals["bytes"])}B quantized; '
        f'BitOPs: {totals["bitops"] / max(totals["bitops_full_precision"], 1):.2%} of full precision.'
    )
    share = summary['not_quantizable_share']
    if share > 0:
        console.print(f'No quantizer reaches {share:.2%} of the multiply-accumulates with weights.', soft_wrap=True)
    for path, reason in summary['not_quantizable'].items():
        console.print(f'Not quantized: {path}: {reason}.', soft_wrap=True)


def _bits(settings: QuantizerSettings | None) -> int:
    return FULL_PRECISION_BITS if settings is None else settings.bits


def _describe(settings: QuantizerSettings | None) -> str | None:
    if settings is None:
        return None
    estimator = '' if settings.estimator == ESTIMATORS.describe(IDENTITY) else f', {settings.estimator}'
    return f'{settings.name} {settings.bits} bits{estimator}'


def _short(number: int) -> str:
    for unit, size in (('G', 10**9), ('M', 10**6), ('k', 10**3)):
        if number >= size:
            return f'{number / size:.2f} {unit}'
    return f'{number} '
