"""Whole runs whose workdir and data lie in buckets: killed, stopped, refused, and without a network for a while."""

import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time

import fsspec
import jax
import numpy as np
import pytest

from bqat_jax.errors import UserError
from bqat_jax.experiment.checkpoints import Checkpoints
from bqat_jax.experiment.exporting import export_run
from bqat_jax.experiment.run import diagnose_run, evaluate_run, import_partner, summarize_network, train
from bqat_jax.storage import read_json, set_patience
from bqat_jax.storage.leases import FOLDER
from bqat_jax.sweeps.execution import run_sweep
from tests.conftest import KILLED_CACHE, ONE_DEVICE, ROOT
from tests.experiment.test_resume import FLAGS, STEPS, finish, kill, wait_until
from tests.experiment.test_run import last_state, shortened
from tests.storage.servers import environment, free_port

# What is left of a reading that failed complains when it is collected.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
CHECKPOINT = re.compile(r'checkpoints/(\d+)/commit_success\.txt')


def objects_in(folder):
    """Names of all objects below a folder."""
    system = fsspec.filesystem(str(folder).partition(':')[0])
    try:
        return sorted(name.partition('/')[2] for name in system.find(str(folder)))
    except FileNotFoundError:
        return []


def newest(folder, phase):
    """The step of the newest complete checkpoint; -1 without any."""
    time.sleep(0.1)
    prefix = {'pretrain': 'partner/checkpoints/', 'train': f'{folder.name}/checkpoints/'}[phase]
    return max((int(match[1]) for name in objects_in(folder) if prefix in name and (match := CHECKPOINT.search(name))),
               default=-1)  # fmt: skip


def lines_of(workdir):
    """(phase, step, names of metrics) of every line of metrics.jsonl."""
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [(line.pop('phase'), line.pop('step'), tuple(sorted(line))) for line in lines]


def assert_same(workdir, expected):
    """Two runs ended bit for bit equal, and neither recorded a line twice."""
    (step, state), (other_step, other) = last_state(workdir), last_state(expected)
    assert step == other_step
    jax.tree.map(np.testing.assert_array_equal, state, other)
    names = [(phase, step, 'loss' in metrics) for phase, step, metrics in lines_of(workdir)]
    assert names == [(phase, step, 'loss' in metrics) for phase, step, metrics in lines_of(expected)]
    assert len(set(names)) == len(names)


@pytest.fixture(scope='module')
def command(digits_dir):
    """Runs main.py in a process of its own on one device; compiled programs are kept between processes."""
    started = []
    common = [f'--config.data.dir={digits_dir}', *FLAGS, '--config.storage.lease_seconds=5']

    def start(workdir, *flags, **more):
        own = {
            'XLA_FLAGS': ONE_DEVICE,
            'JAX_COMPILATION_CACHE_DIR': KILLED_CACHE,
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        }
        started.append(subprocess.Popen(
            [sys.executable, 'main.py', f'--workdir={workdir}', *common, *flags],
            cwd=ROOT, env={**os.environ, **own, **more}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ))  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            kill(process)


@pytest.fixture(scope='module')
def local(command, tmp_path_factory):
    """A run in a local folder that was not interrupted."""
    workdir = tmp_path_factory.mktemp('local') / 'run'
    finish(command(workdir))
    return workdir


@pytest.fixture
def start(command, server, bucket):
    """Starts a run in a bucket."""
    return lambda workdir: command(workdir, **environment(server.scheme, server.url))


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_a_local_one(start, bucket, local):
    """At a random moment of each phase, and while a checkpoint is being sent."""
    kill_and_resume(start, bucket, local, kills=3)


@pytest.mark.slow
def test_a_run_that_is_killed_often_ends_as_a_local_one(start, bucket, local):
    kill_and_resume(start, bucket, local, kills=12)


def kill_and_resume(start, bucket, local, kills):
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    print(f'moments of the kills: seed {seed}')
    for number in range(kills):
        process = start(bucket)
        phase = 'pretrain' if number < kills // 3 else 'train'
        before = newest(bucket, phase)
        more = rng.randrange(1, max(2, 24 // kills))
        wait_until(process, lambda: newest(bucket, phase) >= before + more)  # noqa: B023
        if number % 3 == 1:  # while the next one is on its way
            next_one, known = f'/{before + more + 1}/', set(objects_in(bucket))
            wait_until(process, lambda: any(next_one in name for name in set(objects_in(bucket)) - known))  # noqa: B023
        else:
            time.sleep(rng.uniform(0, 0.2))
        kill(process)
    assert newest(bucket, 'train') < STEPS
    finish(start(bucket))
    assert_same(bucket, local)
    assert not [name for name in objects_in(bucket) if '/damaged/' in name or 'probe' in name]


@pytest.mark.slow
def test_a_second_run_is_refused_and_a_suspended_holder_stops_without_writing(start, bucket, local):
    first = start(bucket)
    wait_until(first, lambda: newest(bucket, 'train') >= 2)
    first.send_signal(signal.SIGSTOP)
    second = start(bucket)  # waits for five seconds, as the lease says, and takes over
    wait_until(second, lambda: len(objects_in(bucket / FOLDER)) == 1 and newest(bucket, 'train') >= 5)
    third = start(bucket)
    output, _ = third.communicate(timeout=120)
    assert third.returncode == 1 and 'is in use by another training process' in output
    first.send_signal(signal.SIGCONT)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 1 and 'another one has taken over its workdir' in output
    finish(second)
    assert_same(bucket, local)


def numbers_of(workdir):
    """The result and all metrics of a run, without times."""
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    times = {'seconds', 'examples_per_second'}
    entries = [*lines, read_json(workdir / 'result.json')]
    return [{name: x for name, x in entry.items() if name not in times} for entry in entries]


@pytest.mark.slow
def test_processes_share_a_workdir_there_and_go_on_after_a_kill(command, server, bucket, tmp_path):
    def run(workdir, number, port):
        devices = f'{ONE_DEVICE} --xla_force_host_platform_device_count=2'
        more = environment(server.scheme, server.url)
        return command(workdir, f'--config.distributed=127.0.0.1:{port},2,{number}', XLA_FLAGS=devices, **more)

    for workdir, kills in ((tmp_path / 'local', 0), (bucket, 1)):
        for attempt in range(kills + 1):
            port = free_port()
            processes = [run(workdir, number, port) for number in range(2)]
            if attempt < kills:
                wait_until(processes[0], lambda: newest(bucket, 'train') >= 5, patience=400)
                for process in processes:
                    kill(process)
        for process in processes:
            finish(process)
    # Their checkpoints are read by two processes alone; every number that the steps gave is here.
    assert numbers_of(bucket) == numbers_of(tmp_path / 'local')


@pytest.mark.slow
def test_a_run_is_told_to_stop_and_goes_on(start, bucket, local):
    process = start(bucket)
    wait_until(process, lambda: newest(bucket, 'train') >= 3)
    process.send_signal(signal.SIGTERM)
    assert 'Run the same command again to continue' in finish(process)
    finish(start(bucket))
    assert_same(bucket, local)


@pytest.fixture
def quick(digits_dir):
    """A config whose runs take seconds, in this process."""
    config = shortened(digits_dir)
    config.storage.lease_seconds = 5.0
    return config


@pytest.fixture(scope='module')
def quick_local(digits_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('quick') / 'run'
    train(shortened(digits_dir), workdir, name='digits')
    return workdir


@pytest.mark.slow
def test_everything_that_follows_training_works_there(quick, bucket, server, quick_local, tmp_path):
    """Data from the bucket too; then every mode, a sweep, and partner and weights that lie there."""
    config = quick.copy_and_resolve_references()
    config.data.dir = f'{server.scheme}://bucket/tfds'
    if server.scheme == 's3':
        config.data.cache_dir = str(tmp_path / 'cache')
    workdir = bucket / 'run'
    result = train(config, workdir, name='digits')
    assert_same(workdir, quick_local)
    assert evaluate_run(config, workdir)['top1'] == result['top1']
    with config.unlocked():
        config.diagnosis.oscillation_steps = 1
    for path in diagnose_run(config, workdir).values():
        assert path in [f'{server.scheme}://bucket/{name}' for name in objects_in(bucket)]
    assert summarize_network(config, workdir)['parameters']
    exported = export_run(config, workdir)
    assert f'{server.scheme}://' in exported['report'] and len(objects_in(workdir / 'export')) == 3
    config.partner.workdir = str(workdir)
    assert import_partner(config, bucket / 'imported', name='digits')['partner'] == f'workdir {workdir}'
    config.init.workdir = str(workdir)
    assert train(config, bucket / 'continued', name='digits')['init'] == str(workdir)


@pytest.mark.slow
def test_weights_plugins_and_sweeps_lie_there(quick, bucket, tmp_path, registries):
    safetensors = pytest.importorskip('safetensors.numpy')
    weights = tmp_path / 'weights.safetensors'
    safetensors.save_file({'x': np.zeros(3, np.float32)}, weights)
    (bucket / 'weights.safetensors').write_bytes(weights.read_bytes())
    quick.partner.torch_file = str(bucket / 'weights.safetensors')
    with pytest.raises(UserError, match=r"partner\.torch_file='(gs|s3)://bucket/.*weights\.safetensors'.*missing"):
        import_partner(quick, bucket / 'run', name='digits')
    quick.partner.torch_file = str(bucket / 'none.safetensors')
    with pytest.raises(UserError, match='there is no such file'):
        import_partner(quick, bucket / 'run', name='digits')
    quick.partner.torch_file = None
    (bucket / 'plugin.py').write_text(
        'from bqat_jax.quantizers.estimators import Identity\n'
        'from bqat_jax.quantizers import register_estimator\n'
        "@register_estimator('of_the_bucket')\nclass Own(Identity):\n    pass\n"
    )
    quick.plugins = str(bucket / 'plugin.py')
    quick.quant.weights.estimator = 'of_the_bucket'
    (bucket / 'sweep.py').write_text(
        'from bqat_jax.sweeps.definition import Sweep\n'
        'def get_sweep():\n'
        "    methods = {'plain': {'replacement.plan': 'none'}, 'prefix': {'replacement.plan': 'prefix'}}\n"
        "    return Sweep(methods=methods, seeds=(0,), baseline='plain')\n"
    )
    quick.sweep = str(bucket / 'sweep.py')
    with quick.unlocked():
        quick.train.steps = quick.partner.steps = 4
    told = run_sweep(quick, bucket / 'sweep', name='digits')
    assert told['runs'] == 2 and told['failed'] == 0
    names = [name.rpartition('/')[2] for name in objects_in(bucket / 'sweep')]
    assert {'sweep.json', 'sweep.csv', 'sweep.md', 'sweep.png', 'log.txt'} <= set(names)
    quick.plugins = str(bucket / 'none.py')
    with pytest.raises(UserError, match=r'plugins: there is no file .*none\.py'):
        train(quick, bucket / 'other', name='digits')


@contextlib.contextmanager
def failing(server, fault, after, seconds):
    """Within it requests fail for so many seconds, after so many were answered."""
    began = []

    def fail(method, path):
        if len(server.requests) < after:
            return None
        began.append(time.monotonic())
        return fault if began[-1] - began[0] < seconds else None

    server.requests.clear()
    server.fault = fail
    try:
        yield
    finally:
        server.fault = None
    assert len(began) > 1


@pytest.mark.slow_on('s3')
@pytest.mark.parametrize('fault', [503, *(pytest.param(fault, marks=pytest.mark.slow) for fault in ('drop', 1.0))])
def test_trouble_that_passes_costs_time_alone(quick, bucket, server, quick_local, fault):
    set_patience(60.0)
    with failing(server, fault, after=150, seconds=3):
        train(quick, bucket, name='digits')
    assert_same(bucket, quick_local)


@pytest.mark.slow_on('gs')
@pytest.mark.parametrize('fault', [403, *(pytest.param(fault, marks=pytest.mark.slow) for fault in (401, 503))])
def test_trouble_that_stays_ends_the_run_and_nothing_good_is_lost(quick, bucket, server, quick_local, fault):
    with failing(server, fault, after=200, seconds=1e9), pytest.raises(UserError) as told:
        train(quick, bucket, name='digits')
    assert 'the same command again' in str(told.value)
    before = [name for name in objects_in(bucket) if CHECKPOINT.search(name)]
    # A run that cannot read moves nothing away, and does not begin anew.
    reading = lambda method, path: 403 if method == 'GET' and 'checkpoints' in path and '/d/' in path else None  # noqa: E731
    server.fault = reading
    with contextlib.suppress(UserError):
        train(quick, bucket, name='digits')
    server.fault = None
    assert set(before) <= set(objects_in(bucket)) or newest(bucket, 'train') > 0
    assert not [name for name in objects_in(bucket) if '/damaged/' in name]
    train(quick, bucket, name='digits')
    assert_same(bucket, quick_local)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_told_from_one_that_may_not_be_read_and_a_copy_without_commit_files(
    quick, bucket, server
):
    run, copy, system = bucket / 'run', bucket / 'copy', fsspec.filesystem(server.scheme)
    train(quick, run, name='digits')
    for name in system.find(str(run)):
        if not name.endswith('commit_success.txt'):
            system.copy(name, name.replace('/run/', '/copy/', 1))
    before = [name for name in objects_in(copy) if FOLDER not in name]
    with pytest.raises(UserError, match=r'commit_success\.txt'):
        train(quick, copy, name='digits')
    assert set(before) <= set(objects_in(copy))

    (array,) = [name for name in system.find(f'{run}/checkpoints/12/state/d')][-1:]
    content = system.cat_file(array)
    with Checkpoints(run / 'checkpoints', has_scores=True, read_only=True) as checkpoints:
        assert checkpoints.latest_step == 12
    server.fault = lambda method, path: 403 if '12' in path and ('state%2Fd' in path or 'state/d' in path) else None
    with pytest.raises(UserError, match=r'may not be read|access is denied'):
        train(quick, run, name='digits')
    server.fault = None
    assert not [name for name in objects_in(run) if '/damaged/' in name]
    system.pipe_file(array, content[: len(content) // 2])
    train(quick, run, name='digits')
    assert [name for name in objects_in(run) if '/damaged/' in name]


STATE = {f'kernel {number}': jax.numpy.ones((17, number + 1)) for number in range(4)}
SHAPES = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE)


def fill(directory, *steps):
    with Checkpoints(directory, keep=3) as checkpoints:
        for step in steps:
            checkpoints.save(step, STATE, {'step': step})


def test_empty_objects_that_mark_folders_do_no_harm(bucket, server):
    """Consoles and other programs make them; one was taken for a checkpoint that was not finished, and all removed."""
    fill(bucket / 'checkpoints', 0, 4, 8)
    for folder in ('', 'checkpoints/', 'checkpoints/8/', 'checkpoints/8/state/'):
        fsspec.filesystem(server.scheme).pipe_file(f'{bucket}/{folder}', b'')
    with Checkpoints(bucket / 'checkpoints', keep=3) as checkpoints:
        assert checkpoints.restore_latest(SHAPES).step == 8
    assert {path.name for path in (bucket / 'checkpoints').iterdir()} == {'0', '4', '8'}


def test_several_checkpoints_without_commit_files_are_refused_and_one_was_broken_off(bucket, server):
    fill(bucket, 4, 8, 12)
    (bucket / '12' / 'commit_success.txt').unlink()
    (bucket / '12' / 'metrics' / 'metrics').write_text('')  # it was broken off: its score says nothing
    before = objects_in(bucket)
    (bucket / '8' / 'commit_success.txt').unlink()
    with pytest.raises(UserError, match='checkpoints 8, 12 without the file'):
        Checkpoints(bucket, keep=3)
    assert set(before) - set(objects_in(bucket)) == {f'{bucket.name}/8/commit_success.txt'}
    (bucket / '8' / 'commit_success.txt').write_text('')
    with Checkpoints(bucket, keep=3) as checkpoints:
        assert checkpoints.restore_latest(SHAPES).step == 8
    assert not (bucket.parent / 'damaged').exists()


@pytest.mark.parametrize('status', [400, 412, 416])
def test_answers_that_say_nothing_of_the_files_move_nothing(bucket, server, status):
    fill(bucket / 'checkpoints', 4, 8)
    wanted = ('8/state/d/', '8%2Fstate%2Fd%2F')
    server.fault = lambda method, path: status if method == 'GET' and any(part in path for part in wanted) else None
    with (
        Checkpoints(bucket / 'checkpoints', keep=3) as checkpoints,
        pytest.raises(UserError, match='Nothing was moved'),
    ):
        checkpoints.restore_latest(SHAPES)
    server.fault = None
    assert not (bucket / 'damaged').exists()
    with Checkpoints(bucket / 'checkpoints', keep=3) as checkpoints:
        assert checkpoints.restore_latest(SHAPES).step == 8


def test_requests_of_a_checkpoint(bucket, server):
    """No more than the first version made, 90 in S3 and 120 in Google Cloud Storage."""
    state = {f'kernel {number}': jax.numpy.ones((17, number + 1)) for number in range(100)}
    counts = []
    with Checkpoints(bucket, has_scores=True) as checkpoints:
        for step in range(6):
            server.requests.clear()
            checkpoints.save(step, state, {}, float(step % 2))
            checkpoints.wait()
            counts.append(len(server.requests))
    print(f'{server.scheme}: {counts} requests')
    # In some of them old ones are removed, which the stand-in for gs:// is asked for one by one.
    assert statistics.median(counts) <= {'gs': 120, 's3': 90}[server.scheme]
