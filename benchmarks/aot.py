"""Compiles the training step of a recipe for a TPU topology on a machine without a TPU, and reports memory and traffic.

Nothing runs and no data is read: this shows that a step compiles, is sharded as configured, and fits, but not its
speed.

Command: python -m benchmarks.aot --config=configs/imagenet_resnet50.py:bits=2 --topology=v5e:16x16 \
    --batch_per_device=128 --config.mesh.fsdp=16

It needs libtpu, from `pip install "jax[tpu]"`, best in a separate environment. With --topology=local the step is
compiled for the devices of this machine, without libtpu.
"""

import collections
import json
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before JAX is imported: libtpu must not look for a TPU.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
os.environ.setdefault('TPU_WORKER_ID', '0')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # no TPU is used, so several processes may compile at once

import jax
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from ml_collections import config_flags

from benchmarks.bench import make_bench, peak_bytes
from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import Config

LOCAL = 'local'
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
BYTES = {'pred': 1, 's4': 1, 'u4': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2}
BYTES |= {'s32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8}


def devices_of(topology: str) -> Sequence[Any]:
    """Returns the devices of a topology, such as 'v5e:16x16', or those of this machine for 'local'.

    Raises:
        UserError: if libtpu is not installed, or does not know the topology.
    """
    if topology == LOCAL:
        return jax.devices()
    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    except Exception as error:  # JAX raises many kinds
        raise UserError(
            f'--topology={topology}: {error}. It needs libtpu (pip install "jax[tpu]") and a topology that it knows, '
            'such as v5e:2x2, v5e:16x16 or v5p:8x8x16; --topology=local uses the devices of this machine.'
        ) from error


def collectives_of(text: str) -> dict[str, dict[str, int]]:
    """Returns the number and the bytes of every kind of collective in a compiled program's text.

    Bytes are those of the complete arrays on one device: the results of an all-reduce or an all-gather, the operand of
    a reduce-scatter. XLA for TPUs repeats a collective that overlaps with other work; repetitions, known by their
    channel, are counted once. An all-reduce of which every device keeps a part is counted as a reduce-scatter, and a
    collective in a branch or a loop once.
    """
    collectives: dict[str, dict[str, int]] = collections.defaultdict(lambda: {'count': 0, 'bytes': 0})
    seen, computation = set(), ''
    pattern = re.compile(rf' = (.*?) ({"|".join(COLLECTIVES)})(-start)?\((.*)')
    for line in text.splitlines():
        if line.endswith('{'):
            computation = line.split()[0]
        match = pattern.search(line)
        if match is None:
            continue
        shapes, kind, start, rest = match.groups()
        channel, sizes = re.search(r'channel_id=(\d+)', rest), _sizes(shapes)
        if channel:  # a pass may reuse the number of a channel for another collective
            repeated = (channel[1], kind, *sizes) in seen
            seen.add((channel[1], kind, *sizes))
            if repeated:
                continue
        if start and kind != 'all-reduce':  # their shapes are those of operands, then results
            sizes = sizes[len(sizes) // 2 :] if kind == 'all-gather' else sizes[: len(sizes) // 2]
        elif kind == 'reduce-scatter':
            sizes = [size * _group_size(rest) for size in sizes]
        if 'all-reduce-scatter' in computation:
            kind = 'reduce-scatter'
        collectives[kind]['count'] += 1
        collectives[kind]['bytes'] += sum(sizes)
    return dict(collectives)


def _sizes(shapes: str) -> list[int]:
    """Bytes of the arrays whose shapes are in a text, which may have layouts and XLA's comments."""
    plain = re.sub(r'/\*.*?\*/|\{[^}]*\}', '', shapes)
    return [
        BYTES[dtype] * int(np.prod([int(size) for size in dims.split(',') if size]))
        for dtype, dims in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', plain)
        if dtype in BYTES
    ]


def _group_size(attributes: str) -> int:
    """The number of devices in a group of a collective, from `replica_groups={{0,1},{2,3}}` or `[2,2]<=[4]`."""
    listed = re.search(r'replica_groups=\{\{([\d,]+)\}', attributes)
    if listed:
        return listed[1].count(',') + 1
    shaped = re.search(r'replica_groups=\[\d+,(\d+)\]', attributes)
    return int(shaped[1]) if shaped else 1


def sent_bytes(collectives: dict[str, dict[str, int]]) -> int:
    """Returns the bytes that a device sends in a step on rings, without the factor (n - 1) / n for n devices.

    An all-reduce sends its array twice: to sum it, and to distribute the sums.
    """
    return sum((2 if kind == 'all-reduce' else 1) * one['bytes'] for kind, one in collectives.items())


def report(config: Config, topology: str, batch_per_device: int) -> dict[str, Any]:
    """Compiles a config's step for a topology and returns a report as JSON.

    Raises:
        UserError: for a config or a topology that cannot work.
    """
    devices = devices_of(topology)
    if batch_per_device:
        config.train.batch_size = batch_per_device * len(devices)
    bench = make_bench(config, devices, with_arrays=False)
    began = time.monotonic()
    compiled = bench.step.lower(bench.state, bench.partner, None, bench.batch).compile()
    seconds, experiment = time.monotonic() - began, bench.experiment
    cost, text = compiled.cost_analysis(), compiled.as_text()
    collectives = collectives_of(text)
    flops = cost['flops']
    return {
        'topology': topology,
        'devices': len(devices),
        'data': experiment.placement.mesh.shape['data'],
        'fsdp': experiment.placement.mesh.shape['fsdp'],
        'network': dict(config.network),
        'plan': config.replacement.plan,
        'batch_per_device': config.train.batch_size // experiment.placement.mesh.devices.size,
        'compile_seconds': round(seconds, 1),
        'peak_bytes': peak_bytes(compiled),
        'argument_bytes': compiled.memory_analysis().argument_size_in_bytes,
        'flops': flops,
        'bytes_accessed': cost.get('bytes accessed'),
        'collectives': collectives,
        'sent_bytes': sent_bytes(collectives),
        'flops_per_sent_byte': flops / max(1, sent_bytes(collectives)),
        'conditionals': len(re.findall(r' conditional\(', text)),
        'paths': bench.phase.spec.replacement.plan.num_paths,
    }


def table(reports: Sequence[dict[str, Any]]) -> str:
    """Returns reports as a Markdown table, in their order."""
    kinds = ('all-reduce', 'all-gather', 'reduce-scatter')
    lines = [
        '| network | topology | devices | data x fsdp | plan | compile s | peak GiB | arguments MiB | Tflop '
        '| all-reduce MB | all-gather MB | reduce-scatter MB | kflop / sent byte | branches |',
        '|' + '---|' * 14,
    ]
    for one in reports:
        network = one['network']
        cells = [
            f'{network["name"]} {network.get("depth", network.get("size", ""))}',
            one['topology'],
            one['devices'],
            f'{one["data"]} x {one["fsdp"]}',
            one['plan'],
            f'{one["compile_seconds"]:.0f}',
            f'{one["peak_bytes"] / 2**30:.2f}',
            f'{one["argument_bytes"] / 2**20:.0f}',
            f'{one["flops"] / 1e12:.2f}',
            *(
                f'{one["collectives"][kind]["bytes"] / 1e6:.1f} ({one["collectives"][kind]["count"]})'
                if kind in one['collectives']
                else '-'
                for kind in kinds
            ),
            f'{one["flops_per_sent_byte"] / 1e3:.0f}',
            one['conditionals'],
        ]
        lines.append(f'| {" | ".join(map(str, cells))} |')
    return '\n'.join(lines)


def main(argv: list[str]) -> None:
    """Prints the report as JSON and appends it to a file; or prints such a file as a table."""
    del argv
    if flags.FLAGS.table:
        print(table([json.loads(line) for line in Path(flags.FLAGS.table).read_text(encoding='utf-8').splitlines()]))
        return
    try:
        facts = report(flags.FLAGS.config, flags.FLAGS.topology, flags.FLAGS.batch_per_device)
    except UserError as error:
        sys.exit(f'Error: {error}')
    print(json.dumps(facts, indent=2))
    if flags.FLAGS.append:
        with Path(flags.FLAGS.append).open('a', encoding='utf-8') as file:
            file.write(json.dumps(facts) + '\n')


if __name__ == '__main__':
    logging.getLogger('absl').setLevel(logging.ERROR)
    config_flags.DEFINE_config_file('config', 'configs/imagenet_resnet50.py', 'Recipe, with arguments after a colon.')
    flags.DEFINE_string('topology', 'v5e:2x2', "Such as v5e:16x16, or 'local' for the devices of this machine.")
    flags.DEFINE_integer('batch_per_device', 0, "Images per device; the config's batch is split if 0.", lower_bound=0)
    flags.DEFINE_string('append', None, 'File to which the report is appended as a line of JSON.')
    flags.DEFINE_string('table', None, 'File of reports to print as a table; nothing is compiled.')
    app.run(main)
