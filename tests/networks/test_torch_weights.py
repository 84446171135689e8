import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from bqat_jax.errors import UserError
from bqat_jax.networks.cifar_resnet import cifar_resnet
from bqat_jax.networks.name_rules import CIFAR_RESNET_RULES
from bqat_jax.networks.registry import make_network
from bqat_jax.networks.torch_weights import NAME_RULES, import_state_dict, read_state_dict
from tests.networks import published_names as published

torch = pytest.importorskip('torch', reason='PyTorch, an optional extra, is not installed')


class TorchBlock(torch.nn.Module):
    """A residual block as PyTorch users write it."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(outputs)
        self.conv2 = torch.nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(outputs)
        self.shortcut = torch.nn.Sequential()
        if stride != 1:
            self.shortcut = torch.nn.Sequential(
                torch.nn.Conv2d(inputs, outputs, 1, stride, bias=False), torch.nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class TorchResNet(torch.nn.Module):
    """ResNet-8 with option-B shortcuts."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(4)
        self.layer1 = torch.nn.Sequential(TorchBlock(4, 4, 1))
        self.layer2 = torch.nn.Sequential(TorchBlock(4, 8, 2))
        self.layer3 = torch.nn.Sequential(TorchBlock(8, 16, 2))
        self.linear = torch.nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


NETWORK = cifar_resnet(10, depth=8, width=4, shortcut='B')
TEMPLATE = NETWORK.init(jax.random.key(0), (9, 9, 3))


def randomise_norms(model):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
    return model


@pytest.fixture
def torch_model():
    torch.manual_seed(0)
    return randomise_norms(TorchResNet())


@pytest.mark.parametrize('size', [8, 9])
@pytest.mark.parametrize('train', [False, True])
def test_gives_the_same_logits_as_pytorch(torch_model, tmp_path, size, train):
    torch.save(
        {'state_dict': {f'module.{k}': v for k, v in torch_model.state_dict().items()}},
        tmp_path / 'weights.th',
    )
    variables = import_state_dict(read_state_dict(tmp_path / 'weights.th'), CIFAR_RESNET_RULES, TEMPLATE)
    x = np.random.default_rng(0).normal(size=(4, size, size, 3)).astype(np.float32)
    torch_model.train(train)
    with torch.no_grad():
        expected = torch_model(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
    got, _ = NETWORK.apply(variables, jnp.asarray(x), NETWORK.names, train=train)
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize('train', [False, True])
def test_a_plain_sequential_is_vgg_small(train):
    torch.manual_seed(0)
    layers, inputs = [], 3
    for outputs in (4, 8, 16):
        for channels in ((inputs, outputs), (outputs, outputs)):
            layers += [torch.nn.Conv2d(*channels, 3, padding=1, bias=False), torch.nn.BatchNorm2d(outputs)]
            layers += [torch.nn.ReLU()]
        layers += [torch.nn.MaxPool2d(2)]
        inputs = outputs
    model = torch.nn.Sequential()
    model.features, model.flatten = torch.nn.Sequential(*layers), torch.nn.Flatten()
    model.classifier = torch.nn.Linear(16 * 2 * 3, 10)
    randomise_norms(model).train(train)
    network = make_network('vgg_small', 10, 'stage', {'width': 4})
    template = jax.eval_shape(lambda: network.init(jax.random.key(0), (16, 24, 3)))
    arrays = {name: value.clone().numpy() for name, value in model.state_dict().items()}
    variables = import_state_dict(arrays, NAME_RULES['vgg_small'], template)
    x = np.random.default_rng(0).normal(size=(4, 16, 24, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
    got, _ = network.apply(variables, jnp.asarray(x), network.names, train=train)
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


# Name of a network, its options and the names of a library's file.
PUBLISHED = {
    'torchvision_resnet18': ('resnet', {'depth': 18, 'width': 2}, published.torchvision_resnet((2, 2, 2, 2), 2)),
    'torchvision_resnet34': ('resnet', {'depth': 34, 'width': 2}, published.torchvision_resnet((3, 4, 6, 3), 2)),
    'torchvision_resnet50': ('resnet', {'depth': 50, 'width': 2}, published.torchvision_resnet((3, 4, 6, 3), 3)),
    'torchvision_resnet101': ('resnet', {'depth': 101, 'width': 2}, published.torchvision_resnet((3, 4, 23, 3), 3)),
    'torchvision_mobilenet_v2': ('mobilenet_v2', {}, published.torchvision_mobilenet_v2()),
    'timm_mobilenet_v2': ('mobilenet_v2', {}, published.timm_mobilenet_v2()),
    'timm_vit': ('vit', {}, published.timm_vit()),
    'torchvision_vit': ('vit', {}, published.torchvision_vit()),
    'old_torchvision_vit': ('vit', {}, published.torchvision_vit(('linear_1', 'linear_2'))),
    'hugging_face_vit_file': ('vit', {}, published.hugging_face_vit_file()),
    'vgg_small': ('vgg_small', {'width': 2}, published.vgg_small()),
}


def to_torch(path, array):
    if not path.endswith('/kernel'):
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


@pytest.mark.parametrize('case', PUBLISHED)
def test_every_name_of_a_published_file_is_known(case):
    """Of a file without the counters `num_batches_tracked`, which not every one has."""
    name, options, names = PUBLISHED[case]
    network = make_network(name, 10, 'stage', options)
    template = jax.eval_shape(lambda: network.init(jax.random.key(0), (32, 32, 3)))
    generator = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), template)
    flat = traverse_util.flatten_dict(variables, sep='/')
    arrays = {}
    for torch_name, paths in names.items():
        parts = [to_torch(path, flat[path]) for path in ([paths] if isinstance(paths, str) else paths)]
        arrays[torch_name] = np.concatenate(parts) if len(parts) > 1 else parts[0]
    jax.tree.map(np.testing.assert_array_equal, import_state_dict(arrays, NAME_RULES[name], template), variables)


def test_a_fused_array_that_does_not_divide_is_misshapen():
    network = make_network('vit', 10, 'stage', {})
    template = jax.eval_shape(lambda: network.init(jax.random.key(0), (32, 32, 3)))
    with pytest.raises(
        UserError, match=r'misshapen: blocks\.0\.attn\.qkv\.bias gives params/block1/query/bias \(193,\)'
    ):
        import_state_dict({'blocks.0.attn.qkv.bias': np.zeros(577, np.float32)}, NAME_RULES['vit'], template)


def test_two_arrays_for_one_of_ours_are_told(torch_model):
    arrays = {name: value.numpy() for name, value in torch_model.state_dict().items()}
    arrays['fc.bias'] = arrays['linear.bias']
    with pytest.raises(UserError, match=r'twice: fc\.bias gives params/head/dense/bias'):
        import_state_dict(arrays, CIFAR_RESNET_RULES, TEMPLATE)


@pytest.mark.parametrize('key', [None, 'state_dict', 'model'])
def test_a_state_dict_is_found_where_programs_keep_it(torch_model, tmp_path, key):
    arrays = torch_model.state_dict()
    torch.save(arrays if key is None else {key: arrays, 'epoch': 3}, tmp_path / 'weights.pth')
    read = read_state_dict(tmp_path / 'weights.pth')
    assert read.keys() == arrays.keys()
    np.testing.assert_array_equal(read['conv1.weight'], arrays['conv1.weight'].numpy())


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_safetensors_are_read_without_pytorch(torch_model, tmp_path, monkeypatch, dtype):
    save_file = pytest.importorskip('safetensors.torch', reason='safetensors is not installed').save_file
    arrays = {name: value.to(getattr(torch, dtype)) for name, value in torch_model.state_dict().items()}
    save_file(arrays, tmp_path / 'weights.safetensors')
    monkeypatch.setitem(sys.modules, 'torch', None)
    read = read_state_dict(tmp_path / 'weights.safetensors')
    assert read.keys() == arrays.keys()
    for name, array in read.items():
        np.testing.assert_array_equal(array, arrays[name].float().numpy())
        assert array.dtype == np.float32


@pytest.mark.parametrize(('package', 'file'), [('torch', 'weights.pth'), ('safetensors', 'weights.safetensors')])
def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, package, file):
    (tmp_path / file).write_bytes(b'')
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f'pip install {package}'):
        read_state_dict(tmp_path / file)


def test_what_does_not_fit_is_listed_whole(torch_model):
    arrays = {name: value.numpy() for name, value in torch_model.state_dict().items()}
    del arrays['linear.bias']
    arrays['extra.weight'] = np.zeros(3)
    arrays['conv1.weight'] = np.zeros((4, 1, 3, 3), np.float32)
    arrays['bn1.bias'] = np.full(4, np.nan, np.float32)
    with pytest.raises(UserError) as error:
        import_state_dict(arrays, CIFAR_RESNET_RULES, TEMPLATE)
    parts = ['4 differences', 'missing: params/head/dense/bias', 'unexpected: extra.weight']
    for part in [*parts, 'misshapen: conv1.weight', 'not finite: bn1.bias']:
        assert part in str(error.value)


def test_files_that_are_no_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match='no such file'):
        read_state_dict(tmp_path / 'absent.th')
    (tmp_path / 'text.th').write_text('hello')
    with pytest.raises(UserError, match='could not be read'):
        read_state_dict(tmp_path / 'text.th')
    torch.save([1, 2], tmp_path / 'list.th')
    with pytest.raises(UserError, match='no state_dict'):
        read_state_dict(tmp_path / 'list.th')
    pytest.importorskip('safetensors', reason='safetensors is not installed')
    (tmp_path / 'text.safetensors').write_text('hello')
    with pytest.raises(UserError, match='could not be read as safetensors'):
        read_state_dict(tmp_path / 'text.safetensors')


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ('ran',))


def test_a_file_cannot_run_code(tmp_path, capsys):
    torch.save({'state_dict': Evil()}, tmp_path / 'evil.th')
    with pytest.raises(UserError, match='could not be read'):
        read_state_dict(tmp_path / 'evil.th')
    assert 'ran' not in capsys.readouterr().out
