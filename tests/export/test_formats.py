"""Files in every format run where this project is not, and give the frozen network's answers."""

import dataclasses
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.export import Frozen, export_stablehlo, load, logits_function, write_checkpoint
from bqat_jax.export.__main__ import find_images, main
from bqat_jax.export.onnx import export_onnx
from bqat_jax.export.watching import Watch
from tests.conftest import ONE_DEVICE
from tests.export.networks import everything, of_family, of_stranger, of_two
from tests.export.test_inference import check

# Programs for a process of their own, in which the project cannot be imported.
ALONE = """
import sys
sys.modules['bqat_jax'] = None
import numpy as np
path, inputs, outputs = sys.argv[1:]
given = np.load(inputs)
"""
RUNS = {
    'stablehlo': """
        import jax
        import jax.export
        with open(path, 'rb') as file:
            got = jax.export.deserialize(bytearray(file.read())).call(given)
    """,
    'onnx': """
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.{level}
        session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
        assert 'jax' not in sys.modules
        (got,) = session.run(None, {{'input': given}})
    """,
}


def run_alone(program, path, inputs, tmp_path):
    """What a program in a process of its own computes."""
    np.save(tmp_path / 'in.npy', inputs)
    text = f'{ALONE}{textwrap.dedent(program)}\nnp.save(outputs, got)\n'
    command = [sys.executable, '-c', text, str(path), str(tmp_path / 'in.npy'), str(tmp_path / 'out.npy')]
    environment = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ONE_DEVICE, 'PATH': '/usr/bin'}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(tmp_path / 'out.npy')


@pytest.fixture(params=['cifar_resnet', pytest.param('everything', marks=pytest.mark.slow)])
def quantized(request):
    return of_family(request.param) if request.param != 'everything' else everything('lsq', 'lsq_plus', 3, 2)


def expected_of(quantized):
    return logits_function(quantized.frozen, quantized.network)(quantized.inputs)


def test_stablehlo_runs_without_the_project(quantized, tmp_path):
    path = tmp_path / 'model.stablehlo'
    path.write_bytes(export_stablehlo(quantized.frozen, quantized.network))
    got = run_alone(RUNS['stablehlo'], path, quantized.inputs, tmp_path)
    np.testing.assert_allclose(got, expected_of(quantized), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('level', ['ORT_ENABLE_ALL', 'ORT_DISABLE_ALL'])
@pytest.mark.parametrize('opset', [21, 25])
def test_onnx_runs_without_the_project_and_without_jax(quantized, level, opset, tmp_path):
    pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    path = tmp_path / 'model.onnx'
    path.write_bytes(export_onnx(quantized.frozen, quantized.network, opset=opset).SerializeToString())
    got = run_alone(RUNS['onnx'].format(level=level), path, quantized.inputs, tmp_path)
    np.testing.assert_allclose(got, expected_of(quantized), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('batch', [0, 2])
@pytest.mark.parametrize('name', ['cifar_resnet', pytest.param('decoder', marks=pytest.mark.slow)])
def test_programs_for_any_or_one_number_of_examples_give_the_same(name, batch, tmp_path):
    quantized = of_family(name)
    inputs, expected = quantized.inputs[:2], expected_of(quantized)[:2]
    path = tmp_path / 'model.stablehlo'
    path.write_bytes(export_stablehlo(quantized.frozen, quantized.network, batch=batch))
    program = load(path)
    assert program.batch == (batch or None) and program.inputs == quantized.frozen.inputs
    np.testing.assert_allclose(program(inputs), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match='The network takes a batch of ShapeDtypeStruct'):
        program(np.zeros((2, 3), np.float32))
    if batch:
        with pytest.raises(ValueError, match='takes 2 examples at once, and these are'):
            program(quantized.inputs)
    pytest.importorskip('onnxruntime')
    path = tmp_path / 'model.onnx'
    path.write_bytes(export_onnx(quantized.frozen, quantized.network, batch=batch).SerializeToString())
    np.testing.assert_allclose(load(path)(np.asarray(inputs)), expected, rtol=1e-5, atol=1e-5)


def test_one_program_runs_on_all_platforms():
    quantized = of_family('cifar_resnet')
    content = export_stablehlo(quantized.frozen, quantized.network)
    assert jax.export.deserialize(bytearray(content)).platforms == ('cpu', 'cuda', 'tpu')
    assert b'.py' not in content and b'bqat_jax' not in content  # no file names of the machine that exported it


@pytest.mark.parametrize('name', ['cifar_resnet', 'decoder'])
def test_qcdq_gives_the_answers_of_the_network(name):
    onnxruntime = pytest.importorskip('onnxruntime')
    quantized = of_family(name)
    watch = Watch()
    model = export_onnx(quantized.frozen, quantized.network, qcdq=True, watch=watch)
    kinds = [node.op_type for node in model.graph.node]
    with_inputs = [layer for layer in quantized.frozen.layers.values() if layer.inputs is not None]
    assert kinds.count('QuantizeLinear') >= len(with_inputs) and 'Clip' in kinds
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
    names = [x.name for x in session.get_outputs()]
    got = dict(zip(names, session.run(names, {'input': np.asarray(quantized.inputs)}), strict=True))
    np.testing.assert_allclose(got['output'], expected_of(quantized), rtol=1e-4, atol=1e-4)
    assert {watch.path_of(label) for label in names if '@' in label} == {
        path for path, layer in quantized.frozen.layers.items() if layer.inputs is not None
    }


def test_what_qcdq_cannot_say_is_refused_by_name():
    pytest.importorskip('onnx')
    for settings in ((('lsq', 2), ('lsq_plus', 3)), (('statsq', 2), ('ewgs_range', 2))):
        quantized, reason = of_two(16, *settings, is_signed=True), 'its input has an offset'
        with pytest.raises(ValueError, match=f'The layer first cannot be written as QCDQ: {reason}. Export it to onnx'):
            export_onnx(quantized.frozen, quantized.network, qcdq=True)


def test_an_opset_that_is_not_known_is_refused():
    pytest.importorskip('onnx')
    quantized = of_family('cifar_resnet')
    with pytest.raises(ValueError, match='opset=20: ONNX export writes opsets 21 to 25'):
        export_onnx(quantized.frozen, quantized.network, opset=20)


@pytest.mark.slow
def test_trees_of_inputs_go_through_every_format(tmp_path):
    """Tokens and their lengths, through the loops of a recurrent network, which answers as its fake-quantized one."""
    with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
        quantized = of_stranger('bilstm')
        check(quantized)
        expected = expected_of(quantized)
        path = tmp_path / 'model.stablehlo'
        path.write_bytes(export_stablehlo(quantized.frozen, quantized.network))
        np.testing.assert_allclose(load(path)(quantized.inputs), expected, rtol=1e-5, atol=1e-5)
        packed = tmp_path / 'model.safetensors'
        write_checkpoint(packed, quantized.frozen)
        with pytest.raises(ValueError, match=r'a module of your own\. Pass its BlockNetwork'):
            load(packed)
        got = load(packed, quantized.network)(quantized.inputs)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        onnxruntime = pytest.importorskip('onnxruntime')
        model = export_onnx(quantized.frozen, quantized.network).SerializeToString()
        session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
        leaves = map(np.asarray, jax.tree.leaves(quantized.inputs))
        feeds = {x.name: value for x, value in zip(session.get_inputs(), leaves, strict=True)}
        np.testing.assert_allclose(session.run(None, feeds)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_network_that_does_not_fit_is_refused(tmp_path):
    quantized, other = of_family('cifar_resnet'), of_two(16, ('lsq', 2), ('lsq_plus', 3))
    with pytest.raises(TypeError, match='network is a '):
        logits_function(quantized.frozen, quantized.network.module)
    with pytest.raises(ValueError, match='is not this one: the network has parameters that the exported one lacks'):
        logits_function(quantized.frozen, other.network)
    path = tmp_path / 'model.safetensors'
    layers = dict(quantized.frozen.layers)
    del layers['stem/conv']
    write_checkpoint(path, dataclasses.replace(quantized.frozen, layers=layers))
    with pytest.raises(ValueError, match='has parameters that the exported one lacks: stem/conv/kernel'):
        load(path, quantized.network)
    with pytest.raises(ValueError, match=r'ends with \.safetensors'):
        write_checkpoint(tmp_path / 'model.bin', quantized.frozen)
    (tmp_path / 'model.onnx').write_bytes(b'')
    with pytest.raises(ValueError, match='network and arithmetic are for packed files'):
        load(tmp_path / 'model.onnx', arithmetic='int8')
    with pytest.raises(FileNotFoundError, match='it is a folder'):
        load(tmp_path)


def test_files_that_are_none_are_refused_in_words(tmp_path):
    with pytest.raises(FileNotFoundError, match='There is no file'):
        load(tmp_path / 'model.onnx')
    for name, reason in {
        'model.pt': 'exported networks have one of the suffixes .safetensors, .stablehlo, .onnx',
        'model.stablehlo': 'is damaged, or not a program that JAX',
        'model.onnx': 'is not a model that onnxruntime runs',
    }.items():
        if name.endswith('onnx'):
            pytest.importorskip('onnxruntime')
        (tmp_path / name).write_bytes(b'nothing of the kind')
        with pytest.raises(ValueError, match=reason):
            load(tmp_path / name)


def test_without_onnx_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)
    quantized = of_family('cifar_resnet')
    with pytest.raises(ImportError, match='pip install onnx onnxruntime'):
        export_onnx(quantized.frozen, quantized.network)


def test_images_from_files_are_classified(tmp_path, capsys):
    Image = pytest.importorskip('PIL.Image')
    quantized = of_uint8()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f'{number}.png')
    Image.fromarray(np.tile(pixels[0], (5, 7, 1))).save(tmp_path / 'photo.jpeg')
    (tmp_path / 'notes.txt').write_text('no image')
    assert [x.name for x in find_images([str(tmp_path)])] == ['0.png', '1.png', 'photo.jpeg']
    expected = np.asarray(logits_function(quantized.frozen, quantized.network)(pixels)).argmax(-1)
    for batch in (0, 3):
        path = tmp_path / 'model.stablehlo'
        path.write_bytes(export_stablehlo(quantized.frozen, quantized.network, batch=batch))
        main([str(path), f'--images={tmp_path / "0.png"},{tmp_path}'])
        lines = capsys.readouterr().out.splitlines()
        classes = [line.rpartition(': class ')[2].split()[0] for line in lines]
        assert classes[:3] == [str(expected[0]), str(expected[0]), str(expected[1])] and len(lines) == 4
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / 'deep.png')
    with pytest.raises(SystemExit, match='has more than 8 bits a pixel'):
        main([str(path), '--images', str(tmp_path / 'deep.png')])
    (tmp_path / 'broken.png').write_bytes(b'no image')
    with pytest.raises(SystemExit, match='is not an image that Pillow can read'):
        main([str(path), '--images', str(tmp_path / 'broken.png')])
    with pytest.raises(SystemExit, match='there is no PNG or JPEG file at'):
        main([str(path), f'--images={tmp_path / "missing.png"}'])
    with pytest.raises(SystemExit, match='Error: There is no file'):
        main([str(tmp_path / 'missing.onnx'), f'--images={tmp_path}'])


def test_only_networks_of_images_classify_images(tmp_path):
    Image = pytest.importorskip('PIL.Image')
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / 'a.png')
    path = tmp_path / 'model.stablehlo'
    path.write_bytes(export_stablehlo(of_family('decoder').frozen, of_family('decoder').network))
    with pytest.raises(SystemExit, match='not images of 8 bits'):
        main([str(path), f'--images={tmp_path}'])


def of_uint8():
    """A network of the first family that takes pixels as they are stored."""
    from bqat_jax.export import Normalization

    quantized = of_family('cifar_resnet')
    frozen: Frozen = dataclasses.replace(
        quantized.frozen,
        normalization=Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)),
        inputs=jax.ShapeDtypeStruct((8, 8, 3), np.uint8),
    )
    return quantized._replace(frozen=frozen)


def test_pixels_are_normalised_inside():
    from bqat_jax.data.augmentation import normalize

    quantized = of_uint8()
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8))
    normalization = quantized.frozen.normalization
    normalized = normalize(pixels, normalization.mean, normalization.std)
    np.testing.assert_allclose(normalization.values(np.asarray(pixels)), normalized, rtol=1e-6, atol=1e-6)
    own = of_family('cifar_resnet')
    expected = logits_function(own.frozen, own.network)(normalization.values(np.asarray(pixels)))
    np.testing.assert_array_equal(logits_function(quantized.frozen, quantized.network)(pixels), expected)
