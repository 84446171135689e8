"""Sweeps that stop at a deadline, and go on elsewhere from a pack; what a pack may hold."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest

from bqat_jax.distributed.preemption import Stopped
from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import to_plain
from bqat_jax.storage import write_json
from bqat_jax.sweeps import packing
from bqat_jax.sweeps.packing import MANIFEST, unpack, write_pack
from tests.conftest import ONE_DEVICE, ROOT
from tests.sweeps.conftest import run

CHECKPOINT = ('_CHECKPOINT_METADATA', 'state/d/0f04bd27', 'state/ocdbt.process_0/manifest.ocdbt', 'state/_METADATA')


def write_checkpoint(folder, step, score=None):
    for name in CHECKPOINT:
        path = folder / str(step) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{step} {name}')
    if score is not None:
        (folder / str(step) / 'metrics').mkdir()
        write_json(folder / str(step) / 'metrics' / 'metrics', {'score': score})


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture
def workdir(tmp_path):
    """A sweep with its partner, a finished run, a failed one, and one under way."""
    workdir = tmp_path / 'there'
    setting = workdir / 'W2A2'
    for name in ('partner_of_all', 'partner/seed 0', 'partner/seed 1', 'partner/choices/learning_rate-0.1/seed 10'):
        folder = setting / name
        folder.mkdir(parents=True)
        write_json(folder / 'config.json', {'partner': {'workdir': f'{setting}/partner_of_all'}, 'seed': 0})
        write_json(folder / 'environment.json', {})
        (folder / 'log.txt').write_text('long')
        if name != 'partner_of_all':
            write_checkpoint(folder / 'partner' / 'final', 0)
            write_json(folder / 'partner' / 'partner.json', {'source': 'workdir'})
            for step, score in ((40, 0.9), (80, 0.7), (120, 0.8)):
                write_checkpoint(folder / 'checkpoints', step, score)
    write_checkpoint(setting / 'partner_of_all' / 'partner' / 'final', 0)
    write_checkpoint(setting / 'partner_of_all' / 'partner' / 'checkpoints', 7)
    write_json(setting / 'partner_of_all' / 'partner' / 'partner.json', {'source': 'trained'})
    write_json(setting / 'partner' / 'choices' / 'learning_rate-0.1' / 'seed 10' / 'result.json', {'top1': 0.5})
    write_json(setting / 'partner' / 'seed 0' / 'error.json', {'error': 'NaN'})
    (setting / 'partner' / 'seed 1' / 'quantizers.json').write_text('{}')
    write_json(workdir / 'sweep.json', {'settings': {}})
    (workdir / 'compiled').mkdir()
    (workdir / 'compiled' / 'program').write_text('large')
    return workdir


def test_a_pack_holds_results_and_what_resuming_needs(workdir, tmp_path):
    write_pack(tmp_path / 'sweep.zip', workdir)
    here = tmp_path / 'here'
    here.mkdir()
    assert unpack(tmp_path / 'sweep.zip', here) == len(files_in(here))
    under_way, checkpoints = 'W2A2/partner/seed 1', 'W2A2/partner/seed 1/checkpoints'
    best = [*(f'{checkpoints}/40/{name}' for name in CHECKPOINT), f'{checkpoints}/40/metrics/metrics']
    newest = [*(f'{checkpoints}/120/{name}' for name in CHECKPOINT), f'{checkpoints}/120/metrics/metrics']
    partner = [f'W2A2/partner_of_all/partner/final/0/{name}' for name in CHECKPOINT]
    expected = {'sweep.json', *best, *newest, *partner, 'W2A2/partner_of_all/partner/partner.json'}
    expected |= {f'{under_way}/quantizers.json', 'W2A2/partner/seed 0/error.json'}
    expected |= {'W2A2/partner/choices/learning_rate-0.1/seed 10/result.json'}
    folders = ('partner_of_all', 'partner/seed 0', 'partner/seed 1', 'partner/choices/learning_rate-0.1/seed 10')
    expected |= {f'W2A2/{one}/{name}' for one in folders for name in ('config.json', 'environment.json')}
    assert set(files_in(here)) == expected
    # The partner is where the sweep is now.
    moved = json.loads((here / under_way / 'config.json').read_text())
    assert moved['partner']['workdir'] == f'{here}/W2A2/partner_of_all'
    assert unpack(tmp_path / 'sweep.zip', here) == 0
    write_pack(tmp_path / 'again.zip', here)
    with zipfile.ZipFile(tmp_path / 'again.zip') as again, zipfile.ZipFile(tmp_path / 'sweep.zip') as first:
        assert again.namelist() == first.namelist()


def test_what_was_begun_here_stays_and_a_result_completes_it(workdir, tmp_path):
    write_pack(tmp_path / 'sweep.zip', workdir)
    begun = tmp_path / 'here' / 'W2A2' / 'partner'
    for name in ('seed 0', 'seed 1'):
        (begun / name).mkdir(parents=True)
        write_json(begun / name / 'config.json', {'own': True})
    write_checkpoint(begun / 'seed 1' / 'checkpoints', 10)
    unpack(tmp_path / 'sweep.zip', tmp_path / 'here')
    assert json.loads((begun / 'seed 0' / 'config.json').read_text()) == {'own': True}
    assert (begun / 'seed 0' / 'error.json').exists()
    assert [path.name for path in (begun / 'seed 1' / 'checkpoints').iterdir()] == ['10']


@pytest.mark.parametrize(
    'name',
    [
        '/etc/config.json',
        '../a/config.json',
        'a/../../config.json',
        'a/..',
        'a\\config.json',
        'config.json',
        'a/.hidden/config.json',
        'a/run.py',
        'a/checkpoints/1/../../x',
        'a/checkpoints/1/.x',
        'a/checkpoints/newest/x',
        'a/config.json/',
        'a/config.json\n',
    ],
)
def test_names_that_do_not_belong_in_a_pack_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / 'bad.zip', 'w') as archive:
        archive.writestr(MANIFEST, json.dumps({'version': 1, 'workdir': '/w'}))
        archive.writestr('a/seed 0/result.json', '{}')
        archive.writestr(zipfile.ZipInfo(name), '{}')
    (tmp_path / 'here').mkdir()
    with pytest.raises(UserError, match=r'sweep_pack=.*not the name of a file of a sweep.*Use a file'):
        unpack(tmp_path / 'bad.zip', tmp_path / 'here')
    assert not list((tmp_path / 'here').iterdir())


def test_other_files_are_refused(workdir, tmp_path, monkeypatch):
    pack = tmp_path / 'sweep.zip'

    def refused(match):
        with pytest.raises(UserError, match=match):
            unpack(pack, tmp_path / 'here')

    pack.write_bytes(b'no zip')
    refused('not a readable zip file')
    with zipfile.ZipFile(pack, 'w') as archive:
        link = zipfile.ZipInfo('a/seed 0/config.json')
        link.external_attr = 0o120777 << 16
        archive.writestr(link, '/etc/passwd')
    refused('not a regular file')
    with zipfile.ZipFile(pack, 'w') as archive:
        archive.writestr('a/seed 0/result.json', '{}')
    refused('no pack.json')
    with zipfile.ZipFile(pack, 'w') as archive:
        archive.writestr(MANIFEST, json.dumps({'version': 2, 'workdir': '/w'}))
    refused('version 2, and this program reads version 1')
    with zipfile.ZipFile(pack, 'w') as archive:
        archive.writestr(MANIFEST, json.dumps({'version': 1, 'workdir': '/w'}))
        archive.writestr('a/seed 0/config.json', '[]')
    refused('not a config')
    write_pack(pack, workdir)
    content = pack.read_bytes()
    pack.write_bytes(content[: len(content) // 2] + b'\0' * 40 + content[len(content) // 2 + 40 :])
    refused('sweep_pack=')
    pack.write_bytes(content)
    monkeypatch.setattr(packing, 'MOST_BYTES', 100)
    refused('files would take')
    with pytest.raises(UserError, match='too many for a pack'):
        write_pack(tmp_path / 'other.zip', workdir)
    assert not (tmp_path / 'here').exists() and not (tmp_path / 'other.zip').exists()


def test_a_sweep_stops_at_its_deadline_and_goes_on_elsewhere(config, training, tmp_path, monkeypatch):
    """The partner takes no time here; then a run stops in its middle; then another machine makes the rest."""
    pack = tmp_path / 'packs' / 'sweep.zip'
    config.sweep_pack, config.sweep_minutes = str(pack), 1e-9
    with pytest.raises(Stopped, match=r'Stopped by sweep_minutes=1e-09 before the partner of W2A2\..*sweep\.zip holds'):
        run(config, tmp_path / 'first')
    assert not training.ran and pack.is_file()
    config.sweep_minutes = 10.0
    assert run_until(9, config, training, tmp_path / 'first', monkeypatch) == {'sweep_minutes=10'}
    before = list(training.ran)
    assert len(before) == 9
    config.sweep_minutes = None
    result = run(config, tmp_path / 'second')
    assert len(training.ran) == len(set(training.ran)) == 28 and training.ran[:9] == before
    assert result['pack'] == str(pack)
    count = len(training.ran)
    assert run(config, tmp_path / 'third')['failed'] == 0 and len(training.ran) == count
    text = [(tmp_path / name / 'sweep.json').read_text() for name in ('second', 'third')]
    assert text[0] == text[1]
    # No run depends on these keys.
    of_run = json.loads((tmp_path / 'second' / 'W2A2' / 'plain' / 'seed 0' / 'config.json').read_text())
    assert of_run['sweep_pack'] is None and of_run['sweep_minutes'] is None


def run_until(count, config, training, workdir, monkeypatch):
    """Runs a sweep that stops within a run, as training does; returns the names of its deadlines."""
    from bqat_jax.sweeps import execution

    names = set()

    def train(own, workdir, *, deadline, **options):
        names.add(deadline.name)
        if len(training.ran) >= count:
            write_json(workdir / 'config.json', to_plain(own))
            raise Stopped('Stopped by sweep_minutes=10 after step 3.')
        return training.train(own, workdir, deadline=deadline, **options)

    with monkeypatch.context() as patch:
        patch.setattr(execution, 'train', train)
        with pytest.raises(Stopped, match='after step 3'):
            run(config, workdir)
    return names


@pytest.mark.slow
def test_a_real_sweep_goes_on_from_its_pack_as_if_never_stopped(digits_dir, tmp_path):
    """Stopped within a run by SIGTERM, as by a deadline; the rest is made in another workdir, from the pack."""
    (tmp_path / 'sweep.py').write_text(
        'from bqat_jax.sweeps import Sweep\n\n'
        "def get_sweep():\n    return Sweep({'plain': {'replacement.distillation': 0.0}}, range(2), 'plain')\n"
    )
    command = [sys.executable, 'main.py', '--mode=sweep', f'--config.sweep={tmp_path}/sweep.py']
    command += [f'--config.data.dir={digits_dir}', '--config.replacement.plan=none', '--config.report=false']
    command += ['--config.network.width=4', '--config.partner.steps=2', '--config.partner.optimizer.warmup_steps=0']
    command += ['--config.train.steps=60', '--config.checkpoint.every_steps=5', '--config.train.batch_size=16']
    # The last checkpoint is taken: the one that a stop saves would be scored too, and could be the best.
    command += ['--config.quant.calibration_batches=1', '--config.data.validation_fraction=0.0']
    start = functools.partial(subprocess.Popen, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def sweep(name, *flags, stops=False):
        environment = {**os.environ, 'XLA_FLAGS': ONE_DEVICE}
        process = start([*command, f'--workdir={tmp_path}/{name}', *flags], env=environment)
        end = time.monotonic() + 300
        while stops and not (tmp_path / name / 'all' / 'plain' / 'seed 1' / 'checkpoints' / '10').exists():
            assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
            time.sleep(0.01)
        if stops:
            process.send_signal(signal.SIGTERM)
        output = process.communicate()[0]
        assert process.returncode == 0 and ('Stopped by SIGTERM' in output) == stops, output

    def results(name):
        rows = json.loads((tmp_path / name / 'sweep.json').read_text())['settings']['all']['plain']['by_seed']
        return {seed: (row['top1'], row['checkpoint_step']) for seed, row in rows.items()}

    sweep('whole')
    sweep('first', f'--config.sweep_pack={tmp_path}/sweep.zip', stops=True)
    assert (tmp_path / 'sweep.zip').stat().st_size < 2**21
    sweep('second', f'--config.sweep_pack={tmp_path}/sweep.zip')
    assert 'resumes after step' in (tmp_path / 'second' / 'all' / 'plain' / 'seed 1' / 'log.txt').read_text()
    assert results('second') == results('whole')
