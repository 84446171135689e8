"""A packed file holds the whole network, is the same whenever it is written, and can be read without this project."""

import json
import math
import struct

import numpy as np
import pytest

from bqat_jax.export import logits_function, read_checkpoint, write_checkpoint
from bqat_jax.export.checkpoint import KEY, digest_of, to_bytes
from tests.export.networks import everything, of_family, of_two


@pytest.fixture
def path(tmp_path):
    pytest.importorskip('safetensors')
    return tmp_path / 'model.safetensors'


@pytest.mark.parametrize(
    'make',
    [
        pytest.param(lambda: of_family('cifar_resnet'), id='cifar_resnet'),
        pytest.param(lambda: everything('lsq', 'lsq_plus', 3, 2), marks=pytest.mark.slow, id='every layer'),
    ],
)
def test_a_network_comes_back(make, path):
    quantized = make()
    write_checkpoint(path, quantized.frozen)
    back = read_checkpoint(path)
    assert to_bytes(back) == path.read_bytes() == to_bytes(quantized.frozen)
    assert back.inputs == quantized.frozen.inputs
    expected = logits_function(quantized.frozen, quantized.network)(quantized.inputs)
    np.testing.assert_array_equal(logits_function(back, quantized.network)(quantized.inputs), expected)
    assert [x.name for x in path.parent.iterdir()] == [path.name]  # nothing else is left


def read_by_hand(content):
    """The file as docs/file_formats.md describes it, in plain Python and NumPy: (facts, arrays)."""
    (size,) = struct.unpack('<Q', content[:8])
    header = json.loads(content[8 : 8 + size])
    facts = json.loads(header.pop('__metadata__')['bqat_jax'])
    kinds = {'U8': np.uint8, 'F32': np.float32}
    arrays = {}
    for name, entry in header.items():
        start, stop = (8 + size + offset for offset in entry['data_offsets'])
        arrays[name] = np.frombuffer(content[start:stop], kinds[entry['dtype']]).reshape(entry['shape'])
    return facts, arrays


def kernel_by_hand(facts, arrays, path):
    """The values of a layer's kernel; code number k has the bits k·b to k·b + b - 1, the lowest first."""
    own, prefix = facts['layers'][path]['weights'], f'layers/{path}/weights/'
    bits, count = own['bits'], math.prod(own['shape'])
    whole = int.from_bytes(arrays[f'{prefix}codes'].tobytes(), 'little')
    codes = np.array([(whole >> (bits * k)) % 2**bits + own['lower'] for k in range(count)]).reshape(own['shape'])
    value = codes.astype(np.float32) + arrays[f'{prefix}shift']
    for number in range(own['scales']):
        value = value * arrays[f'{prefix}scale{number}']
    return value


def test_a_reader_in_another_language_needs_numpy_alone():
    quantized = of_family('cifar_resnet')
    facts, arrays = read_by_hand(to_bytes(quantized.frozen))
    for path, layer in quantized.frozen.layers.items():
        np.testing.assert_array_equal(kernel_by_hand(facts, arrays, path), layer.weights.values())
    # A layer by hand: codes of its input, sums, one product, the bias.
    head, prefix = facts['layers']['head/dense'], 'layers/head/dense/inputs/'
    x = np.random.default_rng(0).normal(size=(3, head['weights']['shape'][0])).astype(np.float32)
    own = head['inputs']
    codes = np.clip(np.round(x * arrays[f'{prefix}inverse_step']), own['lower'], own['upper'])
    kernel, step = kernel_by_hand(facts, arrays, 'head/dense'), arrays[f'{prefix}scale0']
    expected = (codes * step) @ kernel + arrays['floats/head/dense/bias']
    weight_codes = np.round(kernel / arrays['layers/head/dense/weights/scale0'])
    sums = codes.astype(np.int64) @ weight_codes.astype(np.int64)
    got = sums * arrays['layers/head/dense/rescale'] + arrays['floats/head/dense/bias']
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_codes_take_their_bits_and_no_more():
    frozen = of_family('cifar_resnet').frozen
    _, arrays = read_by_hand(to_bytes(frozen))
    codes = sum(x.nbytes for name, x in arrays.items() if name.endswith('/weights/codes'))
    assert codes == sum(
        -(-layer.weights.codes.size * layer.weights.decoding.bits // 8) for layer in frozen.layers.values()
    )
    assert frozen.ideal_size < len(to_bytes(frozen))


def rewritten(path, change, is_signed=True):
    """A file whose facts are changed, and its digest too."""
    from safetensors.numpy import load_file, save

    arrays, facts = load_file(path), change(read_by_hand(path.read_bytes())[0])
    if is_signed:
        del facts['sha256']
        facts['sha256'] = digest_of(facts, arrays)
    path.write_bytes(save(arrays, metadata={KEY: json.dumps(facts)}))


def test_what_cannot_be_read_is_refused_in_words(path):
    write_checkpoint(path, of_family('cifar_resnet').frozen)
    whole = path.read_bytes()
    rewritten(path, lambda facts: {**facts, 'format_version': '1.7'})
    assert read_checkpoint(path).network is None  # a newer minor version adds, and changes nothing
    rewritten(path, lambda facts: {**facts, 'format_version': '2.0'})
    with pytest.raises(ValueError, match=r"the format version '2\.0', and this reader knows 1\.x. Read it with"):
        read_checkpoint(path)
    path.write_bytes(whole)
    stem = {'stem/conv': read_by_hand(whole)[0]['layers']['stem/conv']}
    lies = {
        'KeyError': {'layers': {'none': stem['stem/conv']}},
        'the mode of stem/conv': {'layers': {'stem/conv': {**stem['stem/conv'], 'mode': 'fast'}}},
        'is damaged: AttributeError': {'layers': 3},
    }
    for own, (name, value) in (('weights', ('lower', -200)), ('weights', ('lower', 2.5)), ('inputs', ('upper', 1000))):
        changed = {**stem['stem/conv'], own: {**stem['stem/conv'][own], name: value}}
        lies[f'est code of .*stem/conv is {value}'] = {'layers': {'stem/conv': changed}}
    for message, change in lies.items():
        path.write_bytes(whole)
        rewritten(path, lambda facts: {**facts, **change})  # noqa: B023
        with pytest.raises(ValueError, match=message):
            read_checkpoint(path)
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    with pytest.raises(ValueError, match='its checksum does not match its content'):
        read_checkpoint(path)
    path.write_bytes(whole)
    rewritten(path, lambda facts: {**facts, 'normalization': {'mean': [0.1], 'std': [0.1]}}, is_signed=False)
    with pytest.raises(ValueError, match='its checksum does not match its content'):
        read_checkpoint(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match='is not a safetensors file, or is damaged'):
        read_checkpoint(path)
    path.write_bytes(b'')
    with pytest.raises(ValueError, match='is not a safetensors file, or is damaged'):
        read_checkpoint(path)
    from safetensors.numpy import save

    path.write_bytes(save({'x': np.zeros(3, np.float32)}))
    with pytest.raises(ValueError, match="holds no exported network: its metadata has no key 'bqat_jax'"):
        read_checkpoint(path)


def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch):
    write_checkpoint(path, of_family('cifar_resnet').frozen)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('os.fsync', fail)
    with pytest.raises(OSError, match='No space left'):
        write_checkpoint(path, of_two(16, ('lsq', 2), ('lsq_plus', 3)).frozen)
    assert path.read_bytes() == before
    assert [x.name for x in path.parent.iterdir()] == [path.name]
