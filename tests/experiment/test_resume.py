"""Training survives being killed: real processes, real signals."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import KILLED_CACHE, ONE_DEVICE, ROOT
from tests.experiment.test_run import last_state

STEPS = 30
FLAGS = (
    '--config.report=false',
    '--config.network.width=4',
    '--config.replacement.plan=prefix_sampled',
    '--config.train.batch_size=32',
    f'--config.train.steps={STEPS}',
    '--config.train.log_every_steps=4',
    '--config.partner.steps=10',
    '--config.partner.optimizer.warmup_steps=2',
    '--config.checkpoint.every_steps=1',
)


@pytest.fixture(scope='module')
def command(digits_dir):
    """Runs main.py in a process of its own on one device; compiled programs are kept between processes."""
    environment = {
        **os.environ,
        'XLA_FLAGS': ONE_DEVICE,
        'JAX_COMPILATION_CACHE_DIR': KILLED_CACHE,
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }

    def start(workdir, *more):
        return subprocess.Popen(
            [sys.executable, 'main.py', f'--workdir={workdir}', f'--config.data.dir={digits_dir}', *FLAGS, *more],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return start


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_until(process, condition, patience=120):
    end = time.monotonic() + patience
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.002)


def newest(directory):
    if not directory.is_dir():
        return -1
    return max((int(path.name) for path in directory.iterdir() if path.name.isdigit()), default=-1)


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


# What keeps a state of its own, or draws: trackers, rounding, strengths.
TRACKED = (
    '--config.quant.oscillations.freezing=true',
    '--config.quant.oscillations.freezing_momentum=0.05',
    '--config.quant.activations.estimator=stochastic',
)
MEASURED = (
    '--config.quant.weights.estimator=ewgs_trace',
    '--config.quant.trace.every_steps=20',
    '--config.quant.trace.batches=1',
    '--config.quant.trace.iterations=2',
)


@pytest.mark.parametrize(
    ('more', 'often'),
    [
        pytest.param(TRACKED, False, marks=pytest.mark.slow),
        pytest.param(TRACKED, True, marks=pytest.mark.slow),
        pytest.param(MEASURED, True, marks=pytest.mark.slow),
    ],
    ids=['tracked', 'tracked, often', 'measured, often'],
)
def test_a_killed_run_ends_bit_for_bit_like_one_that_was_not(command, tmp_path, more, often):
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    print(f'moments of the kills: seed {seed}')
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    finish(command(whole, *more))

    if often:
        process = command(broken, *more)  # killed while the partner trains
        wait_until(process, lambda: newest(broken / 'partner' / 'checkpoints') >= rng.randrange(0, 5))
        kill(process)

        process = command(broken, *more)  # killed at a random moment of training
        wait_until(process, lambda: newest(broken / 'checkpoints') >= rng.randrange(1, 10))
        time.sleep(rng.uniform(0, 0.1))
        kill(process)

    process = command(broken, *more)  # killed while a checkpoint is being written
    before = newest(broken / 'checkpoints')
    wait_until(
        process,
        lambda: (
            newest(broken / 'checkpoints') > before
            and any('tmp' in path.name for path in (broken / 'checkpoints').iterdir())
        ),
    )
    kill(process)
    assert newest(broken / 'checkpoints') < STEPS

    if often:
        process = command(broken, *more)  # asked to stop
        before = newest(broken / 'checkpoints')
        wait_until(process, lambda: newest(broken / 'checkpoints') >= before + 2)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and 'Stopped by SIGTERM' in output, output
        assert not (broken / 'result.json').exists()

    output = finish(command(broken, *more))
    assert 'resumes after step' in output
    (step, state), (expected_step, expected) = last_state(broken), last_state(whole)
    assert step == expected_step == STEPS
    assert_bits_equal(state, expected)
    results = [json.loads((workdir / 'result.json').read_text()) for workdir in (broken, whole)]
    for key in ('top1', 'fp_top1', 'validation_top1', 'checkpoint_step'):
        assert results[0][key] == results[1][key]
    entries = [json.loads(line) for line in (broken / 'metrics.jsonl').read_text().splitlines()]
    logged = [entry['step'] for entry in entries if entry['phase'] == 'train' and 'loss' in entry]
    assert logged == sorted(set(logged))


@pytest.mark.slow
def test_sigterm_at_twenty_random_moments_loses_nothing(command, tmp_path):
    """While libraries load, programs compile, the partner trains, quantizers are calibrated, and all is evaluated."""
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    print(f'moments of the signals: seed {seed}')
    whole = tmp_path / 'whole'
    finish(command(whole))  # compiles
    began = time.monotonic()
    finish(command(tmp_path / 'timed'))
    length = time.monotonic() - began
    expected_step, expected = last_state(whole)
    signals = 0
    for number in itertools.count():
        workdir = tmp_path / f'run{number}'
        while not (workdir / 'result.json').exists():
            process = command(workdir)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, length))
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                signals += 1
            output, _ = process.communicate(timeout=120)
            # Before anything is begun there is nothing to save, and the signal ends the process as ever.
            assert process.returncode in (0, -signal.SIGTERM), output
            assert 'Traceback' not in output, output
        step, state = last_state(workdir)
        assert step == expected_step
        assert_bits_equal(state, expected)
        for key in ('top1', 'fp_top1', 'checkpoint_step'):
            got, wanted = (json.loads((run / 'result.json').read_text())[key] for run in (workdir, whole))
            assert got == wanted
        if signals >= 20:
            return


def assert_bits_equal(left, right, path=''):
    assert type(left) is type(right), path
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_bits_equal(left[key], right[key], f'{path}/{key}')
    elif isinstance(left, (list, tuple)):
        for number, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_bits_equal(a, b, f'{path}/{number}')
    elif left is not None:
        assert left.dtype == right.dtype and left.tobytes() == right.tobytes(), path
