"""Files of PyTorch weights as people have them: which entry is taken, and what each file that is none is called."""

import argparse
import gzip
import io
import itertools
import pickle
import re
import sys
import tarfile
import warnings
import zipfile

import numpy as np
import pytest

from bqat_jax.errors import UserError
from bqat_jax.networks.torch_files import INNER_KEYS, read_state_dict

torch = pytest.importorskip('torch', reason='PyTorch, an optional extra, is not installed')

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3) / 4 - 0.5


def weights(offset=0.0):
    return {'fc.weight': torch.tensor(VALUES + np.float32(offset)), 'fc.bias': torch.zeros(2)}


def saved(tmp_path, content, name='weights.pth', **options):
    torch.save(content, tmp_path / name, **options)
    return tmp_path / name


def message_of(file, key=None):
    with pytest.raises(UserError) as error:
        read_state_dict(file, key)
    text = str(error.value)
    assert text.startswith('partner.torch_file=') and '\n' not in text and len(text) < 700
    return text


def wrapped(value, keys):
    for key in reversed(keys):
        value = {key: value, 'epoch': 3}
    return value


@pytest.mark.parametrize(
    'keys', [(), *((key,) for key in INNER_KEYS), ('model', 'state_dict'), ('ema', 'model', 'state_dict')], ids='.'.join
)
def test_the_state_dict_is_found_where_programs_keep_it(tmp_path, keys):
    read = read_state_dict(saved(tmp_path, wrapped(weights(), keys)))
    np.testing.assert_array_equal(read.arrays['fc.weight'], VALUES)
    assert read.arrays.keys() == weights().keys() and read.entry == '.'.join(keys)
    assert read.describe() == (f', its entry {read.entry!r}' if keys else '')


@pytest.mark.parametrize(('first', 'second'), list(itertools.pairwise(INNER_KEYS)))
def test_of_several_the_order_decides_and_the_others_are_named(tmp_path, first, second):
    file = saved(tmp_path, {second: weights(1), 'epoch': 3, first: weights()})
    read = read_state_dict(file)
    np.testing.assert_array_equal(read.arrays['fc.weight'], VALUES)
    assert read.describe() == f', its entry {first!r} (not {second!r})'
    chosen = read_state_dict(file, second)
    np.testing.assert_array_equal(chosen.arrays['fc.weight'], VALUES + 1)
    assert chosen.entry == second


def test_an_entry_without_tensors_is_not_taken_for_weights(tmp_path):
    file = saved(tmp_path, {'state_dict': {}, 'model': {'depth': 20}, 'net': {'state_dict': weights()}})
    assert read_state_dict(file).entry == 'net.state_dict'


def test_a_key_chooses_among_nested_entries_even_with_dots_in_their_names(tmp_path):
    file = saved(tmp_path, {'runs': {'best.ema': {'model': weights(2)}}, 'model': weights()})
    read = read_state_dict(file, 'runs.best.ema')
    np.testing.assert_array_equal(read.arrays['fc.weight'], VALUES + 2)
    assert read.entry == 'runs.best.ema.model'


def test_an_unknown_key_lists_what_the_file_has(tmp_path):
    file = saved(tmp_path, {'model': weights(), 'model_ema': {'inner': weights()}, 'epoch': 3})
    text = message_of(file, 'model_emma.inner')
    for part in ["partner.torch_key='model_emma.inner'", '"model" (2 tensors)', '"model_ema" (dict)', '"epoch" (int)']:
        assert part in text
    assert '"model_ema.inner" (2 tensors)' in text and "Did you mean 'model_ema.inner'" in text
    assert 'has 2 tensors at the top level' in message_of(saved(tmp_path, weights()), 'model')


def test_weights_under_an_unknown_entry_are_told_with_the_key_that_takes_them(tmp_path):
    file = saved(tmp_path, {'generator': weights(), 'epoch': 3})
    text = message_of(file)
    assert 'no state_dict' in text and '"generator" (2 tensors)' in text and 'partner.torch_key' in text
    assert read_state_dict(file, 'generator').arrays.keys() == weights().keys()
    assert "partner.torch_key='epoch'" in message_of(file, 'epoch')


def test_a_dict_that_holds_itself_comes_to_an_end(tmp_path):
    content = weights()
    content['model'] = content
    assert 'next to tensors' in message_of(saved(tmp_path, content))


def test_metadata_beside_weights_is_left_out_and_told(tmp_path):
    read = read_state_dict(saved(tmp_path, {**weights(), 'epoch': 3, 'arch': 'resnet20', 'sizes': [1, 2]}))
    assert read.arrays.keys() == weights().keys()
    assert read.describe() == ', without epoch (int), arch (str), sizes (list)'


@pytest.mark.parametrize('inner', [{'momentum': torch.zeros(2)}, [torch.zeros(2)]], ids=['dict', 'list'])
def test_tensors_in_an_entry_beside_weights_are_not_passed_over(tmp_path, inner):
    assert 'optimizer hold tensors' in message_of(saved(tmp_path, {**weights(), 'optimizer': inner}))


def test_parameters_that_require_gradients_are_read(tmp_path):
    layer = torch.nn.Linear(3, 2)
    read = read_state_dict(saved(tmp_path, dict(layer.named_parameters())))
    np.testing.assert_array_equal(read.arrays['weight'], layer.weight.detach().numpy())


FLOATS = ['float64', 'float16', 'bfloat16', 'float8_e4m3fn', 'float8_e5m2', 'float8_e4m3fnuz', 'float8_e5m2fnuz']


@pytest.mark.parametrize('dtype', [*FLOATS, 'float8_e8m0fnu'])
@pytest.mark.parametrize('kind', ['torch', 'safetensors'])
def test_every_float_comes_exactly(tmp_path, monkeypatch, kind, dtype):
    """Of 8 bits every code there is; of more, values that float32 holds. PyTorch's own conversion is the witness."""
    if dtype.startswith('float8'):
        tensor = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))
    else:
        tensor = torch.tensor([0.0, -0.5, 3.140625, 2.0**-14, 1000.0]).to(getattr(torch, dtype))
    if kind == 'torch':
        file = saved(tmp_path, {'w': tensor})
    else:
        save_file = pytest.importorskip('safetensors.torch', reason='safetensors is not installed').save_file
        file = tmp_path / 'weights.safetensors'
        save_file({'w': tensor}, file)
        monkeypatch.setitem(sys.modules, 'torch', None)  # it is read without
    array = read_state_dict(file).arrays['w']
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, tensor.float().numpy())


def odd_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of formats that PyTorch itself is about to leave
        return {
            'quantized': (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), r'qint8: .*dequantize\(\)'),
            'sparse': (torch.eye(2).to_sparse(), r'float32: sparse; call to_dense\(\)'),
            'sparse_rows': (torch.eye(2).to_sparse_csr(), r'float32: sparse; call to_dense\(\)'),
            'nested': (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), 'float32: nested'),
            'meta': (torch.ones(2, device='meta'), r'float32: on the meta device, without values'),
        }


@pytest.mark.parametrize('kind', ['quantized', 'sparse', 'sparse_rows', 'nested', 'meta'])
def test_a_tensor_that_no_array_can_stand_for_is_named_with_its_dtype(tmp_path, kind):
    tensor, told = odd_tensors()[kind]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        file = saved(tmp_path, {**weights(), 'odd.weight': tensor})
    assert re.search(rf'odd\.weight \(torch\.{told}', message_of(file))


def test_packed_safetensors_are_named_with_their_dtype(tmp_path):
    safetensors = pytest.importorskip('safetensors', reason='safetensors is not installed')
    header = b'{"w":{"dtype":"F4","shape":[2,2],"data_offsets":[0,2]}}'
    file = tmp_path / 'weights.safetensors'
    file.write_bytes(len(header).to_bytes(8, 'little') + header + b'\x12\x34')
    assert safetensors.deserialize(file.read_bytes())[0][1]['dtype'] == 'F4'
    assert 'w (F4)' in message_of(file)


def test_content_and_not_the_name_says_what_a_file_is(tmp_path):
    save_file = pytest.importorskip('safetensors.torch', reason='safetensors is not installed').save_file
    save_file(weights(), tmp_path / 'weights.pt')
    saved(tmp_path, weights(), 'weights.safetensors')
    for name in ('weights.pt', 'weights.safetensors'):
        np.testing.assert_array_equal(read_state_dict(tmp_path / name).arrays['fc.weight'], VALUES)


@pytest.mark.parametrize('length', [0x7B, 0x80, 0x4B50, 0x3C])
def test_a_safetensors_file_is_one_whatever_its_length_looks_like(tmp_path, length):
    """The first bytes are a length, and may be those of JSON, a pickle, a zip or HTML."""
    pytest.importorskip('safetensors', reason='safetensors is not installed')
    header = b'{"w":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'.ljust(length)
    file = tmp_path / 'weights.safetensors'
    file.write_bytes(len(header).to_bytes(8, 'little') + header + np.float32(7).tobytes())
    assert read_state_dict(file).arrays['w'] == 7


def test_the_format_before_zip_is_read(tmp_path):
    file = saved(tmp_path, {'model': weights()}, _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(read_state_dict(file).arrays['fc.weight'], VALUES)


def zip_of(**files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w') as archive:
        for name, content in files.items():
            archive.writestr(name.replace('__', '/'), content)
    return stream.getvalue()


def tar_of(*names):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode='w') as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    return stream.getvalue()


def torch_bytes(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


LARGE = {'w': torch.zeros(1000)}
# What a file holds, and what is told of it.
NO_WEIGHTS = {
    'empty': (b'', 'is empty'),
    'zip': (zip_of(readme='hello'), 'a zip that torch.save did not write: it holds readme'),
    'empty_zip': (zip_of(), 'it holds nothing'),
    'torchscript': (zip_of(**{'net__data.pkl': '', 'net__constants.pkl': ''}), 'TorchScript program'),
    'cut_zip': (torch_bytes(LARGE)[:2000], 'a zip, as torch.save writes, but damaged or truncated'),
    'cut_old_format': (torch_bytes(LARGE, _use_new_zipfile_serialization=False)[:1000], 'could not be read as PyTorch'),
    'cut_pickle': (torch_bytes(LARGE, _use_new_zipfile_serialization=False)[:20], 'could not be read'),
    'old_tar': (tar_of('sys_info', 'pickle', 'storages', 'tensors'), 'tar format of the first releases of PyTorch'),
    'tar': (tar_of('model.pth'), 'a tar archive, which holds model.pth. Unpack it'),
    'pickle': (pickle.dumps({'w': 1}), 'a pickle, but not one of torch.save'),
    'namespace': (torch_bytes({'model': LARGE, 'args': argparse.Namespace()}), 'an object argparse.Namespace'),
    'numpy_scalar': (torch_bytes({'model': LARGE, 'top1': np.float64(1)}), 'an object numpy'),
    'whole_model': (torch_bytes(torch.nn.Linear(2, 2)), 'torch.nn.modules.linear.Linear, perhaps a complete model'),
    'list': (torch_bytes([torch.zeros(2)]), 'no state_dict'),
    'tensor': (torch_bytes(torch.zeros(2)), 'no state_dict'),
    'no_entries': (torch_bytes({}), 'It has no entries at all. Save the model'),
    'gzip': (gzip.compress(torch_bytes(LARGE)), 'compressed by gzip'),
    'html': (b'\n<!DOCTYPE html><html>Not found</html>', 'HTML'),
    'json': (b'{"weight_map": {}}', 'JSON'),
    'lfs': (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'Git LFS'),
    'hdf5': (b'\x89HDF\r\n\x1a\n', 'HDF5'),
    'zeros': (bytes(4096), 'something else'),
    'text': (b'hello', "something else (it begins with b'hello')"),
}


@pytest.mark.parametrize('case', NO_WEIGHTS)
@pytest.mark.parametrize('name', ['weights.pth', 'weights.safetensors'])
def test_a_file_that_is_no_weights_is_told_in_one_sentence_of_ours(tmp_path, case, name):
    content, told = NO_WEIGHTS[case]
    (tmp_path / name).write_bytes(content)
    assert told in message_of(tmp_path / name)


@pytest.mark.parametrize('cut', [9, 40, -3])
def test_safetensors_that_are_cut_off(tmp_path, cut):
    save_file = pytest.importorskip('safetensors.torch', reason='safetensors is not installed').save_file
    save_file(weights(), tmp_path / 'whole')
    (tmp_path / 'cut.safetensors').write_bytes((tmp_path / 'whole').read_bytes()[:cut])
    assert 'could not be read as safetensors' in message_of(tmp_path / 'cut.safetensors')


def test_a_directory_and_a_missing_file(tmp_path):
    assert 'is a directory. Give a file of weights' in message_of(tmp_path)
    saved(tmp_path, weights())
    assert 'Give a file in it: weights.pth' in message_of(tmp_path)
    assert 'no such file' in message_of(tmp_path / 'absent.pth')


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ('ran',))


@pytest.mark.parametrize('zipped', [False, True])
def test_a_file_cannot_run_code(tmp_path, capsys, zipped):
    file = saved(tmp_path, {'state_dict': Evil()}, _use_new_zipfile_serialization=zipped)
    assert 'could run code' in message_of(file)
    assert 'ran' not in capsys.readouterr().out


@pytest.mark.parametrize('package', ['torch', 'safetensors'])
def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, package):
    content = torch_bytes(weights()) if package == 'torch' else b'\x02' + bytes(7) + b'{}'
    (tmp_path / 'weights').write_bytes(content)
    monkeypatch.setitem(sys.modules, package, None)
    assert f'pip install {package}' in message_of(tmp_path / 'weights')
