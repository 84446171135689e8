"""Several real processes on this machine, which talk to each other over loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from bqat_jax.distributed.processes import differences_between, initialize
from bqat_jax.errors import UserError
from tests.conftest import ONE_DEVICE, ROOT

STEPS = 12
SLOW = pytest.mark.slow
FLAGS = (
    '--config.report=false',
    '--config.network.width=4',
    '--config.data.on_device=false',
    '--config.replacement.plan=prefix_sampled',
    '--config.quant.weights.bits=8',
    '--config.quant.activations.bits=8',
    '--config.train.batch_size=32',
    f'--config.train.steps={STEPS}',
    '--config.train.log_every_steps=1',
    '--config.partner.steps=6',
    '--config.partner.optimizer.warmup_steps=2',
    '--config.checkpoint.every_steps=2',
    '--config.mesh.min_shard_elements=0',
)


@pytest.fixture(scope='module')
def start(digits_dir, tmp_path_factory):
    """Starts main.py in `count` processes that share `devices` devices, and returns them; {number} is the process's."""
    cache = str(tmp_path_factory.mktemp('cache'))
    started = []

    def run(workdir, count, *more, devices=4):
        flags = f'{ONE_DEVICE} --xla_force_host_platform_device_count={devices // count}'
        environment = {**os.environ, 'XLA_FLAGS': flags, 'JAX_COMPILATION_CACHE_DIR': cache}
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        processes = []
        for number in range(count):
            distributed = [f'--config.distributed=127.0.0.1:{port},{count},{number}'] if count > 1 else []
            own, flags_of_all = str(workdir).format(number=number), [flag.format(number=number) for flag in more]
            command = [sys.executable, 'main.py', f'--workdir={own}', f'--config.data.dir={digits_dir}']
            with (workdir.parent / f'{workdir.name}.{count}.{number}.log').open('w') as log:
                processes.append(
                    subprocess.Popen(
                        [*command, *FLAGS, *distributed, *flags_of_all],
                        cwd=ROOT,
                        env=environment,
                        stdout=log,
                        stderr=log,
                    )
                )
        started.extend(processes)
        return processes

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def finish(processes, workdir, patience=400):
    """Waits for processes, which must end well; returns what the first one said."""
    end = time.monotonic() + patience
    codes = [process.wait(max(1, end - time.monotonic())) for process in processes]
    logs = [
        (workdir.parent / f'{workdir.name}.{len(processes)}.{number}.log').read_text()
        for number in range(len(processes))
    ]
    assert codes == [0] * len(codes), '\n'.join(log[-3000:] for log in logs)
    return logs[0]


def losses(workdir, phase):
    entries = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return {entry['step']: entry['loss'] for entry in entries if entry['phase'] == phase and 'loss' in entry}


def assert_same_run(workdir, expected):
    for phase, count, tolerance in (('pretrain', 6, 1e-4), ('train', STEPS, 2e-2)):
        got, wanted = losses(workdir, phase), losses(expected, phase)
        assert sorted(got) == sorted(wanted) == list(range(1, count + 1))
        steps = list(wanted)
        np.testing.assert_allclose([got[s] for s in steps], [wanted[s] for s in steps], rtol=tolerance, err_msg=phase)
    results = [json.loads((directory / 'result.json').read_text()) for directory in (workdir, expected)]
    for key in ('examples_evaluated', 'checkpoint_step', 'steps'):
        assert results[0][key] == results[1][key]
    for key in ('top1', 'fp_top1'):
        assert results[0][key] == pytest.approx(results[1][key], abs=0.02)


@pytest.fixture(scope='module')
def alone(start, tmp_path_factory):
    """The run of a single process with as many devices."""
    workdir = tmp_path_factory.mktemp('alone') / 'run'
    finish(start(workdir, 1), workdir)
    return workdir


def newest(workdir):
    directory = workdir / 'checkpoints'
    return max((int(path.name) for path in directory.glob('[0-9]*') if path.name.isdigit()), default=-1)


def wait_for_step(processes, workdir, step, patience=300):
    end = time.monotonic() + patience
    while newest(workdir) < step:
        assert all(process.poll() is None for process in processes) and time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ('count', 'more'),
    [
        pytest.param(2, (), marks=pytest.mark.slow),
        pytest.param(2, ('--config.data.on_device=true',), marks=pytest.mark.slow),
        pytest.param(4, ('--config.mesh.fsdp=2',), marks=pytest.mark.slow),
    ],
    ids=['two', 'two, data on the devices', 'four, fsdp=2'],
)
def test_several_processes_train_as_one_does(start, alone, tmp_path, count, more):
    finish(start(tmp_path / 'run', count, *more), tmp_path / 'run')
    assert_same_run(tmp_path / 'run', alone)
    assert (tmp_path / 'run' / 'sharding_train.json').exists() == ('--config.mesh.fsdp=2' in more)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_processes_after_a_kill_and_after_sigterm(start, alone, tmp_path):
    """Four processes, of which one is killed; then two, of which one is told to stop; then one."""
    workdir = tmp_path / 'run'
    processes = start(workdir, 4)
    wait_for_step(processes, workdir, 2)
    processes[2].kill()
    for process in processes:  # the others cannot go on; a scheduler would end them
        process.kill()
        process.wait()
    reached = newest(workdir)
    assert reached < STEPS

    processes = start(workdir, 2)
    wait_for_step(processes, workdir, reached + 2)
    processes[1].send_signal(signal.SIGTERM)
    output = finish(processes, workdir)
    assert 'Stopped by SIGTERM after step' in output and 'resumes after step' in output
    assert not (workdir / 'result.json').exists()

    assert 'resumes after step' in finish(start(workdir, 1, '--config.mesh.fsdp=2'), workdir)
    assert_same_run(workdir, alone)


@pytest.mark.parametrize(
    ('flags', 'differences'),
    [
        (
            ('--config.optimizer.learning_rate=0.0{number}1', '--config.seed={number}'),
            ('optimizer.learning_rate: 0.001 in process 0; 0.011 in process 1', 'seed: 0 in process 0; 1 in process 1'),
        ),
        pytest.param(('--config.plugins={{folder}}/{number}/mine.py',), ('text of the plugin mine.py',), marks=SLOW),
        pytest.param(('--config.network.name=resnet{number}',), ('network.name: "resnet0"',), marks=SLOW),
    ],
    ids=['config', 'plugin', 'network'],
)
def test_processes_that_do_not_agree_are_told_before_anything_is_computed(start, tmp_path, flags, differences):
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / 'mine.py').write_text(f'x = {number}')
    flags = [flag.replace('{{folder}}', str(tmp_path)) for flag in flags]
    for number, process in enumerate(start(tmp_path / 'run', 2, *flags)):
        assert process.wait(200) == 1
        log = (tmp_path / f'run.2.{number}.log').read_text()
        assert 'The processes of this run do not agree' in log and 'Traceback' not in log
        for difference in differences:
            assert difference in log
    assert not (tmp_path / 'run').exists()


def test_differences_are_told_by_name_and_process():
    facts = [{'a': 1, 'b': 2}, {'a': 1, 'b': 3}, {'a': 1, 'b': 2, 'c': [4]}]
    assert differences_between(facts) == [
        'b: 2 in processes 0, 2; 3 in process 1',
        'c: absent in processes 0, 1; [4] in process 2',
    ]
    assert differences_between([facts[0], facts[0]]) == []


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_told(start, tmp_path):
    processes = start(tmp_path / 'run{number}', 2)
    for number, process in enumerate(processes):
        assert process.wait(120) == 1
        assert '1 of 2 processes do not see' in (tmp_path / f'run{{number}}.2.{number}.log').read_text()


@pytest.mark.parametrize(
    'text',
    [
        'on',
        'host:port,2,0',
        'host:0,2,0',
        'host:99999,2,0',
        ':1,2,0',
        'host,2,0',
        'host:1,2,2',
        'host:1,2',
        'host:1,two,0',
    ],
)
def test_what_says_no_processes_is_refused(text):
    with pytest.raises(UserError, match='HOST:PORT,n,i'):
        initialize(text)
