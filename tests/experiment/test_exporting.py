"""A finished run is exported with what it is evaluated with; what cannot be exported is refused in words."""

import json

import numpy as np
import pytest

from bqat_jax.errors import UserError
from bqat_jax.experiment.export_report import FILES
from bqat_jax.experiment.exporting import export_run
from bqat_jax.experiment.run import evaluate_run, train
from bqat_jax.export import load
from tests.experiment.test_run import shortened


@pytest.fixture(scope='module')
def finished(digits_dir, tmp_path_factory):
    """A finished run of two seeds whose batch statistics are estimated anew: its config and workdir."""
    config = shortened(digits_dir)
    config.replacement.plan, config.replacement.distillation = 'none', 0.0
    config.train.replicas, config.quant.reestimation_batches, config.mesh.data = 2, 2, 1
    workdir = tmp_path_factory.mktemp('export')
    train(config, workdir, name='digits')
    return config, workdir


@pytest.mark.slow
def test_every_format_is_written_and_run(finished, capsys):
    pytest.importorskip('onnxruntime')
    config, workdir = finished
    with config.unlocked():
        config.export.formats = 'packed, stablehlo,onnx,qcdq'
    files = export_run(config, workdir)
    report = json.loads((workdir / 'export' / 'report.json').read_text())
    assert list(report['formats']) == list(FILES)
    evaluated = evaluate_run(config, workdir)['top1_by_seed']['0']
    assert report['fake_quantized']['top1'] == pytest.approx(evaluated, abs=1 / 360)
    for name, facts in report['formats'].items():
        path = workdir / 'export' / facts['file']
        assert files[name] == str(path) and path.stat().st_size == facts['bytes']
        assert facts['examples'] == 360 and facts['of_float32'] == facts['bytes'] / report['bytes_float32']
        if facts['codes_differ'] == 0:
            assert facts['answers_differ'] == 0 and facts['top1'] == report['fake_quantized']['top1']
        assert facts['relative_difference'] < (1e-4 if name == 'qcdq' else 1e-5)
        assert facts['examples_per_second'] > 0
    assert report['layers'] == {'integer': 8}
    table = capsys.readouterr().out
    for word in ('fake-quantized', 'answers differ', 'counted on 360 test examples', *FILES):
        assert word in table
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    logits = [np.asarray(load(files[name])(images)) for name in FILES]
    for other in logits[1:3]:
        np.testing.assert_allclose(other, logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ('formats', 'message'),
    [
        (
            'packt',
            r"'packt' is not a format; there are packed, stablehlo, onnx, qcdq\. Did you mean 'packed'",
        ),
        (' ,', 'it names no format'),
    ],
)
def test_formats_that_there_are_not_are_refused(finished, formats, message):
    config, workdir = finished
    with config.unlocked():
        config.export.formats = formats
    with pytest.raises(UserError, match=message):
        export_run(config, workdir)


def test_what_a_format_cannot_say_is_refused_before_anything_is_written(finished, monkeypatch):
    config, workdir = finished

    def refuse(frozen):
        raise ValueError('The layer stem/conv cannot be written as QCDQ.')

    monkeypatch.setattr('bqat_jax.experiment.exporting.check_qcdq', refuse)
    monkeypatch.setattr('bqat_jax.experiment.exporting.DIRECTORY', 'elsewhere')
    with config.unlocked():
        config.export.formats = 'packed,qcdq'
    with pytest.raises(UserError, match='The layer stem/conv cannot be written as QCDQ'):
        export_run(config, workdir)
    assert not (workdir / 'elsewhere').exists()


def test_a_run_that_has_not_finished_is_refused(digits_dir, tmp_path, finished):
    config, workdir = finished
    with config.unlocked():
        config.export.formats = 'packed'
    result = workdir / 'result.json'
    content = result.read_bytes()
    result.unlink()
    try:
        with pytest.raises(UserError, match='holds a run that has not finished: there is no result'):
            export_run(config, workdir)
    finally:
        result.write_bytes(content)
    with pytest.raises(UserError, match='train first'):
        export_run(shortened(digits_dir), tmp_path)


def test_several_processes_are_refused(finished, monkeypatch):
    config, workdir = finished
    monkeypatch.setattr('jax.process_count', lambda: 2)
    with pytest.raises(UserError, match='--mode=export runs in one process'):
        export_run(config, workdir)
