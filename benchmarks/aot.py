"""Compiles the training step of a recipe for a TPU topology on a machine that has no TPU, and reports what came of it.

Nothing runs and no data is read: it shows that a step compiles, is split as the config says, and fits, not how fast it
is.

Command: python -m benchmarks.aot --config=configs/imagenet_resnet50.py:bits=2 --topology=v5e:16x16 \
    --batch_per_device=128 --config.mesh.fsdp=16

It needs libtpu, which `pip install "jax[tpu]"` brings, best in an environment of its own. With --topology=local the
step is compiled for the devices that are there, and libtpu is not needed.
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

import jax
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from ml_collections import config_flags

from benchmarks.problem import make_bench, peak_bytes
from bqat_jax.configuration import Config
from bqat_jax.errors import UserError

LOCAL = 'local'
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
BYTES = {'pred': 1, 's4': 1, 'u4': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2}
BYTES |= {'s32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8}


def devices_of(topology: str) -> Sequence[Any]:
    """Returns the devices of a topology, such as 'v5e:16x16', or those of this machine for 'local'.

    Raises:
        UserError: if libtpu is not installed, or knows no such topology.
    """
    if topology == LOCAL:
        return jax.devices()
    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    except Exception as error:  # of many kinds
        raise UserError(
            f'--topology={topology}: {error}. It needs libtpu (pip install "jax[tpu]") and a topology that it knows, '
            'such as v5e:2x2, v5e:16x16 or v5p:8x8x16; --topology=local takes the devices of this machine.'
        ) from error


def collectives_of(text: str) -> dict[str, dict[str, int]]:
    """Returns, for every kind of collective in a compiled program's text, how many there are and the bytes they give.

    Bytes are those of the results on one device. A collective in a branch or a loop counts once.
    """
    found: dict[str, dict[str, int]] = collections.defaultdict(lambda: {'count': 0, 'bytes': 0})
    kinds = '|'.join(COLLECTIVES)
    for shapes, kind, start in re.findall(rf'= ([^=\n]*?) ({kinds})(-start)?\(', text):
        sizes = [
            BYTES[dtype] * int(np.prod([int(size) for size in dims.split(',') if size]))
            for dtype, dims in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', shapes)
            if dtype in BYTES
        ]
        # What an asynchronous one begins with holds its operands too: the results are the larger half, or the same.
        total = (
            max(sum(sizes[: len(sizes) // 2]), sum(sizes[len(sizes) // 2 :]))
            if start and len(sizes) > 1
            else sum(sizes)
        )
        found[kind]['count'] += 1
        found[kind]['bytes'] += total
    return dict(found)


def report(config: Config, topology: str, batch_per_device: int) -> dict[str, Any]:
    """Compiles a config's step for a topology and returns what was found, as JSON.

    Raises:
        UserError: for a config or a topology that cannot work.
    """
    devices = devices_of(topology)
    if batch_per_device:
        config.train.batch_size = batch_per_device * len(devices)
    bench = make_bench(config, devices, with_arrays=False)
    began = time.monotonic()
    compiled = bench.step.lower(bench.state, bench.partner, None, bench.batch).compile()
    seconds, setting = time.monotonic() - began, bench.setting
    cost, text = compiled.cost_analysis(), compiled.as_text()
    collectives = collectives_of(text)
    flops = cost['flops']
    return {
        'topology': topology,
        'devices': len(devices),
        'data': setting.mesh.shape['data'],
        'fsdp': setting.mesh.shape['fsdp'],
        'network': dict(config.network),
        'plan': config.replacement.plan,
        'batch_per_device': config.train.batch_size // setting.mesh.devices.size,
        'compile_seconds': round(seconds, 1),
        'peak_bytes': peak_bytes(compiled),
        'argument_bytes': compiled.memory_analysis().argument_size_in_bytes,
        'flops': flops,
        'bytes_accessed': cost.get('bytes accessed'),
        'collectives': collectives,
        'collective_bytes': sum(one['bytes'] for one in collectives.values()),
        'flops_per_collective_byte': flops / max(1, sum(one['bytes'] for one in collectives.values())),
        'conditionals': len(re.findall(r' conditional\(', text)),
        'paths': bench.phase.problem.replacement.plan.num_paths,
    }


def main(argv: list[str]) -> None:
    """Prints the report as JSON, and appends it to a file as a line."""
    del argv
    try:
        found = report(flags.FLAGS.config, flags.FLAGS.topology, flags.FLAGS.batch_per_device)
    except UserError as error:
        sys.exit(f'Error: {error}')
    print(json.dumps(found, indent=2))
    if flags.FLAGS.append:
        with Path(flags.FLAGS.append).open('a', encoding='utf-8') as file:
            file.write(json.dumps(found) + '\n')


if __name__ == '__main__':
    logging.getLogger('absl').setLevel(logging.ERROR)
    config_flags.DEFINE_config_file('config', 'configs/imagenet_resnet50.py', 'Recipe, with arguments after a colon.')
    flags.DEFINE_string('topology', 'v5e:2x2', "Such as v5e:16x16, or 'local' for the devices of this machine.")
    flags.DEFINE_integer(
        'batch_per_device', 0, "Images for each device; the config's batch is split if 0.", lower_bound=0
    )
    flags.DEFINE_string('append', None, 'A file to which the report is added as a line of JSON.')
    app.run(main)
