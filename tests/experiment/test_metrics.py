import io
import json

import rich.console

from bqat_jax.experiment.metrics import Recorder, Recording
from bqat_jax.storage import Hold


def record(workdir, phase, start, steps, total=10, terminal=False):
    console = rich.console.Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with Recorder(Recording(workdir, Hold(), console), phase, start, total) as recorder:
        for step in steps:
            recorder.record(step, {'loss': 1.0 / max(step, 1), 'examples_per_second': 100.0})
    return console.file.getvalue()


def read(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_one_object_per_step_and_events_beside_them(tmp_path):
    shown = record(tmp_path, 'train', 0, [5, 10])
    assert read(tmp_path)[1] == {'phase': 'train', 'step': 10, 'loss': 0.1, 'examples_per_second': 100.0}
    assert list((tmp_path / 'tensorboard' / 'train').glob('events*'))
    assert shown.splitlines()[0].startswith('train 5/10  loss 0.2  100 examples/s  left ')
    assert shown.splitlines()[1].endswith('left 0 s')


def test_a_terminal_gets_a_bar(tmp_path):
    shown = record(tmp_path, 'train', 0, [5, 10], terminal=True)
    assert '10/10' in shown and 'loss 0.1' in shown


def test_what_is_done_again_is_recorded_once(tmp_path):
    record(tmp_path, 'pretrain', 0, [5, 10])
    record(tmp_path, 'train', 0, [2, 4, 6])
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"phase": "train", "step": 4, "mean_delta": 0.5}\n')
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"phase": "train", "st')  # killed while writing
    record(tmp_path, 'train', 4, [6, 8])
    assert not any('mean_delta' in entry for entry in read(tmp_path))  # measured again before step 5
    assert [(entry['phase'], entry['step']) for entry in read(tmp_path)] == [
        ('pretrain', 5), ('pretrain', 10), ('train', 2), ('train', 4), ('train', 6), ('train', 8),
    ]  # fmt: skip


def test_nothing_is_recorded_twice_where_the_first_step_was_not_saved(tmp_path):
    """A kill between a line of step 0 and its checkpoint: the phase begins anew, and so do its lines."""
    record(tmp_path, 'pretrain', None, [0, 5])
    record(tmp_path, 'train', None, [0])
    record(tmp_path, 'train', None, [0])
    record(tmp_path, 'train', 0, [5])
    assert [(line['phase'], line['step']) for line in read(tmp_path)] == [
        ('pretrain', 0),
        ('pretrain', 5),
        ('train', 0),
        ('train', 5),
    ]


def test_lines_that_are_none_of_ours_are_left_out(tmp_path):
    (tmp_path / 'metrics.jsonl').write_bytes(b'5\n{}\n[]\n\xff\xfe\n{"phase": "train", "step": 1, "loss": 2.0}\n')
    record(tmp_path, 'train', 1, [2])
    assert [line['step'] for line in read(tmp_path)] == [1, 2]
