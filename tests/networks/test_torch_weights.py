import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.errors import UserError
from bqat_jax.networks.cifar_resnet import CifarResNet
from bqat_jax.networks.torch_weights import CIFAR_RESNET_RULES, import_state_dict, read_state_dict

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


NETWORK = CifarResNet(8, 10, width=4, shortcut='B').cut('stage')
TEMPLATE = NETWORK.init(jax.random.key(0), (9, 9, 3))


@pytest.fixture
def torch_model():
    torch.manual_seed(0)
    model = TorchResNet()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
    return model


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


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ('ran',))


def test_a_file_cannot_run_code(tmp_path, capsys):
    torch.save({'state_dict': Evil()}, tmp_path / 'evil.th')
    with pytest.raises(UserError, match='could not be read'):
        read_state_dict(tmp_path / 'evil.th')
    assert 'ran' not in capsys.readouterr().out
