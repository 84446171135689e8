import importlib.util
import json
import subprocess
import sys

import jax
import pytest

from benchmarks.aot import collectives_of, devices_of, report, sent_bytes, table
from benchmarks.bench import described_images
from bqat_jax.errors import UserError
from tests.conftest import ROOT
from tests.experiment.test_configuration import load_recipe


def config(plan, fsdp=1):
    result = load_recipe(ROOT / 'configs' / 'digits.py').get_config()
    result.network.width = 4
    result.mesh.fsdp, result.mesh.min_shard_elements = fsdp, 0
    result.replacement.plan = plan
    return result


def test_collectives_are_counted_with_their_bytes():
    text = """
      %a = f32[4,2]{1,0} all-reduce(%x), channel_id=1, replica_groups={}
      %b = (bf16[8]{0}, /*index=1*/f32[]) all-reduce-start(%x, %y), channel_id=2
      %c = (f32[2]{0:T(128)}, f32[16]{0:T(8,128)S(1)}) all-gather-start(%x), channel_id=3, dimensions={0}
      %d = f32[16]{0} all-gather-done(%c)
      %e = s32[] add(%x, %all-reduce.1)
      %f = f32[2] reduce-scatter(%x), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
      %g = f32[2] reduce-scatter(%x), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}
    """
    collectives = collectives_of(text)
    assert collectives == {
        'all-reduce': {'count': 2, 'bytes': 32 + 16 + 4},
        'all-gather': {'count': 1, 'bytes': 64},
        'reduce-scatter': {'count': 2, 'bytes': 2 * 4 * 8},
    }
    assert sent_bytes(collectives) == 2 * 52 + 64 + 64


def test_what_a_tpu_program_repeats_counts_once():
    text = """
    %all-reduce-scatter.4 (input_0: f32[3,32]) -> f32[3,16] {
      %all-reduce.9 = f32[3,32]{1,0:T(8,128)} all-reduce(%input_0), channel_id=7
    }
    %fused_computation.1 (p: bf16[4]) -> bf16[8] {
      %all-gather.1 = bf16[8]{0} all-gather(%p), channel_id=8
    }
    %fused_computation.2 (p: bf16[4]) -> bf16[8] {
      %all-gather.2 = bf16[8]{0} all-gather(%p), channel_id=8
    }
    """
    assert collectives_of(text) == {
        'reduce-scatter': {'count': 1, 'bytes': 4 * 96},
        'all-gather': {'count': 1, 'bytes': 16},
    }


@pytest.mark.parametrize(('plan', 'fsdp'), [('none', 1), pytest.param('prefix_sampled', 4, marks=pytest.mark.slow)])
def test_a_step_for_the_devices_of_this_machine(plan, fsdp):
    facts = report(config(plan, fsdp), 'local', 8)
    assert (facts['devices'], facts['data'], facts['fsdp']) == (8, 8 // fsdp, fsdp)
    assert facts['batch_per_device'] == 8 and facts['flops'] > 0
    assert facts['collectives']['all-reduce']['count'] > 0
    assert ('all-gather' in facts['collectives']) == (fsdp > 1)
    assert (facts['conditionals'] > 0) == (plan == 'prefix_sampled')
    rows = table([json.loads(json.dumps(facts))]).splitlines()
    assert len({row.count('|') for row in rows}) == 1 and plan in rows[-1]


@pytest.mark.slow
def test_split_arguments_take_less_of_a_device():
    whole, split = (report(config('none', fsdp), 'local', 8)['argument_bytes'] for fsdp in (1, 8))
    assert split < whole / 4


def test_what_is_not_known_is_told():
    with pytest.raises(UserError, match='must be one of'):
        described_images('mnist')
    if importlib.util.find_spec('libtpu') is None:
        with pytest.raises(UserError, match='libtpu'):
            devices_of('v5e:2x2')


def test_a_step_for_a_tpu(tmp_path):
    pytest.importorskip('libtpu', reason='libtpu (pip install "jax[tpu]") is not installed')
    command = [
        '--config=configs/cifar10_resnet20.py:plan=prefix_sampled',
        '--topology=v5e:2x2',
        '--batch_per_device=16',
    ]
    subprocess.run(
        [sys.executable, '-m', 'benchmarks.aot', *command, f'--append={tmp_path}/facts.json'],
        cwd=ROOT, check=True, timeout=900,
    )  # fmt: skip
    facts = json.loads((tmp_path / 'facts.json').read_text())
    assert facts['devices'] == 4 and facts['conditionals'] > 0 and facts['peak_bytes'] > 0
    assert facts['collectives']['all-reduce']['count'] > 0
    assert jax.default_backend() == 'cpu'
