import time

import jax
import numpy as np
import pytest

from bqat_jax.networks.cifar_resnet import cifar_resnet
from bqat_jax.networks.name_rules import CIFAR_RESNET_RULES
from bqat_jax.networks.registry import make_network
from bqat_jax.networks.torch_weights import NAME_RULES, WeightsMismatch, import_state_dict, read_state_dict
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
TEMPLATE = jax.eval_shape(lambda: NETWORK.init(jax.random.key(0), (9, 9, 3)))
VIT_TEMPLATE = published.template_of('vit')


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
    variables = import_state_dict(read_state_dict(tmp_path / 'weights.th').arrays, CIFAR_RESNET_RULES, TEMPLATE)
    x = np.random.default_rng(0).normal(size=(4, size, size, 3)).astype(np.float32)
    torch_model.train(train)
    with torch.no_grad():
        expected = torch_model(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
    got, _ = jax.jit(lambda variables, x: NETWORK.apply(variables, x, train=train))(variables, x)
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
    got, _ = jax.jit(lambda variables, x: network.apply(variables, x, train=train))(variables, x)
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


# Prefixes of wrappers, and the entries that the state_dict lies in.
WRAPPINGS = [
    ('', ()),
    ('module.', ('state_dict',)),
    ('_orig_mod.', ('model',)),
    ('module._orig_mod.', ('model_state_dict',)),
    ('_orig_mod.module.', ('ema',)),
    ('model.', ('state_dict', 'model')),
    ('backbone.', ('net',)),
    ('module.model.backbone.', ('state_dict_ema',)),
]


def test_every_family_has_published_names():
    assert {name for name, _, _ in published.PUBLISHED.values()} == set(NAME_RULES)


def files():
    """Every published file in one wrapping, every wrapping of one file; all pairs before a release."""
    for number, case in enumerate(published.PUBLISHED):
        for place, wrapping in enumerate(WRAPPINGS):
            is_default = number % len(WRAPPINGS) == place or case == 'vgg_small'
            yield pytest.param(case, *wrapping, marks=[] if is_default else [pytest.mark.slow])


@pytest.mark.parametrize(('case', 'prefix', 'keys'), list(files()))
def test_every_published_file_is_imported_bit_for_bit_however_it_is_wrapped(tmp_path, case, prefix, keys):
    """With batch norm's counters and that of an averaged model."""
    name, options, names = published.PUBLISHED[case]
    template = published.template_of(name, tuple(options.items()))
    variables = published.draw_variables(template)
    content = {prefix + one: torch.tensor(array) for one, array in published.exported(names, variables).items()}
    for one in [one for one in content if one.endswith('running_var')]:
        content[one.replace('running_var', 'num_batches_tracked')] = torch.tensor(5)
    content['n_averaged'] = torch.tensor(7)
    for key in reversed(keys):
        content = {'epoch': 3, key: content}
    torch.save(content, tmp_path / 'weights.pth')
    read = read_state_dict(tmp_path / 'weights.pth')
    assert read.entry == '.'.join(keys)
    jax.tree.map(np.testing.assert_array_equal, import_state_dict(read.arrays, NAME_RULES[name], template), variables)


def test_the_average_of_pytorch_is_read(torch_model, tmp_path):
    """`AveragedModel` itself says how it calls its entries."""
    averaged = torch.optim.swa_utils.AveragedModel(torch_model)
    assert 'n_averaged' in averaged.state_dict()
    torch.save({'ema': averaged.state_dict()}, tmp_path / 'weights.pth')
    read = read_state_dict(tmp_path / 'weights.pth')
    variables = import_state_dict(read.arrays, CIFAR_RESNET_RULES, TEMPLATE)
    plain = {name: value.numpy() for name, value in torch_model.state_dict().items()}
    expected = import_state_dict(plain, CIFAR_RESNET_RULES, TEMPLATE)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


def arrays_of(model):
    return {name: value.clone().numpy() for name, value in model.state_dict().items()}


def mismatch(arrays, rules=CIFAR_RESNET_RULES, template=TEMPLATE):
    with pytest.raises(WeightsMismatch) as error:
        import_state_dict(arrays, rules, template)
    return error.value


def test_a_fused_array_that_does_not_divide_is_misshapen():
    error = mismatch({'blocks.0.attn.qkv.bias': np.zeros(577, np.float32)}, NAME_RULES['vit'], VIT_TEMPLATE)
    assert 'misshapen: blocks.0.attn.qkv.bias gives params/block1/query/bias (193,)' in str(error)


def test_two_arrays_for_one_of_ours_are_told(torch_model):
    arrays = arrays_of(torch_model)
    arrays['fc.bias'] = arrays['linear.bias']
    assert [str(one) for one in mismatch(arrays).differences] == [
        'twice: fc.bias and another name both give params/head/dense/bias'
    ]


@pytest.mark.parametrize(
    ('name', 'change', 'told'),
    [
        (
            'bn1.bias',
            lambda x: np.where(np.arange(4) == 2, np.float32(np.nan), x),
            'not finite: bn1.bias has 1 NaN or infinite of 4 values',
        ),
        ('bn1.bias', lambda x: x / 0, 'not finite: bn1.bias has 4 NaN'),
        ('layer2.0.bn1.running_var', lambda x: x - 3, 'negative: layer2.0.bn1.running_var is a variance'),
        ('linear.weight', lambda x: (x * 100).astype(np.int8), 'not floating point: linear.weight is int8'),
        ('linear.weight', lambda x: x.astype(np.complex64), 'not floating point: linear.weight is complex64'),
        ('linear.weight', lambda x: x > 0, 'not floating point: linear.weight is bool'),
        ('conv1.weight', lambda x: x[:, :1], 'misshapen: conv1.weight gives params/stem/conv/kernel (3, 3, 1, 4)'),
    ],
)
def test_values_that_cannot_be_are_told_by_name(torch_model, name, change, told):
    arrays = arrays_of(torch_model)
    with np.errstate(divide='ignore', invalid='ignore'):
        arrays[name] = change(arrays[name])
    error = mismatch(arrays)
    assert len(error.differences) == 1 and told in str(error) and 'differences: 1 ' in str(error)


@pytest.mark.parametrize('name', ['bn1.running_mean', 'bn1.weight', 'linear.bias'])
def test_what_may_be_negative_is_taken(torch_model, name):
    arrays = arrays_of(torch_model)
    arrays[name] = np.full_like(arrays[name], -1)
    import_state_dict(arrays, CIFAR_RESNET_RULES, TEMPLATE)


def test_a_variance_of_zero_is_taken(torch_model):
    """Of a channel that is always zero."""
    arrays = arrays_of(torch_model)
    arrays['bn1.running_var'] = np.zeros(4, np.float32)
    variables = import_state_dict(arrays, CIFAR_RESNET_RULES, TEMPLATE)
    assert not variables['batch_stats']['stem']['norm']['var'].any()


def test_what_does_not_fit_is_counted_and_the_whole_list_is_carried(torch_model):
    arrays = arrays_of(torch_model)
    for name in [name for name in arrays if name.startswith('layer3')]:
        arrays[name.replace('bn', 'norm_')] = arrays.pop(name)
    error = mismatch(arrays)
    kinds = [one.kind for one in error.differences]
    renamed = 8  # two norms of four arrays each; counters are no part of it
    assert kinds.count('unexpected') == kinds.count('missing') == renamed
    assert len(kinds) == 2 * renamed
    text = str(error)
    assert '(16 differences: 8 unexpected, 8 missing)' in text and 'unexpected: and 4 more' in text
    assert len(text.splitlines()) < 12
    assert error.report().count('\n') == 16 and 'missing: batch_stats/stage3_block1/norm2/var (16,)' in error.report()


def test_an_unexpected_name_comes_with_the_nearest_that_is_missing(torch_model):
    arrays = arrays_of(torch_model)
    arrays['layer1.0.conv_1.weight'] = arrays.pop('layer1.0.conv1.weight')
    arrays['criterion.margin'] = np.zeros(3, np.float32)
    near = {one.name: one.near for one in mismatch(arrays).differences if one.kind == 'unexpected'}
    assert near == {'layer1.0.conv_1.weight': 'layer1.0.conv1.weight', 'criterion.margin': ''}


def test_another_network_is_told_quickly():
    """The largest tables: comparing all names with all would take minutes."""
    arrays = {f'trunk.{number}.attention.{part}.weight': np.zeros(1) for number in range(200) for part in 'qkv'}
    start = time.monotonic()
    mismatch(arrays, NAME_RULES['mobilenet_v2'], published.template_of('mobilenet_v2'))
    assert time.monotonic() - start < 30


def test_paths_can_be_left_out(torch_model):
    head = {'params/head/dense/kernel', 'params/head/dense/bias'}
    arrays = arrays_of(torch_model)
    expected = import_state_dict(arrays, CIFAR_RESNET_RULES, TEMPLATE)
    del expected['params']['head']
    arrays['linear.weight'] = np.zeros((7, 16), np.float32)  # of another number of classes, or not there
    del arrays['linear.bias']
    imported = import_state_dict(arrays, CIFAR_RESNET_RULES, TEMPLATE, without=head)
    jax.tree.map(np.testing.assert_array_equal, imported, expected)
