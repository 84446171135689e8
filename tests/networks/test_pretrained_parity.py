"""Weights of Hugging Face's PyTorch models, drawn at random, give the same logits and statistics here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.networks.registry import make_network
from bqat_jax.networks.torch_weights import NAME_RULES, import_state_dict, read_state_dict

torch = pytest.importorskip('torch', reason='PyTorch, an optional extra, is not installed')
transformers = pytest.importorskip('transformers', reason="Hugging Face's transformers are not installed")

NUM_CLASSES, BATCH = 7, 4
TOLERANCE = 1e-4  # of the largest logit


def resnet18():
    config = transformers.ResNetConfig(
        layer_type='basic', depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], num_labels=NUM_CLASSES
    )
    return transformers.ResNetForImageClassification(config)


def resnet50():
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=NUM_CLASSES))


def mobilenet_v2(tf_padding):
    # In these models 0.997 is the weight of the batch's statistics; here the momentum is that of what stays.
    config = transformers.MobileNetV2Config(tf_padding=tf_padding, classifier_dropout_prob=0.0, num_labels=NUM_CLASSES)
    return transformers.MobileNetV2ForImageClassification(config)


def vit_tiny():
    config = transformers.ViTConfig(
        hidden_size=192, num_attention_heads=3, intermediate_size=768, image_size=32, num_labels=NUM_CLASSES
    )
    return transformers.ViTForImageClassification(config)


MOBILENET = {'norm_epsilon': 0.001, 'norm_momentum': 1 - 0.997}
# PyTorch model, our name and options, size of the images.
CASES = {
    'resnet18': (resnet18, 'resnet', {'depth': 18}, 64),
    'resnet50': (resnet50, 'resnet', {'depth': 50}, 64),
    'mobilenet_v2_tf': (functools.partial(mobilenet_v2, True), 'mobilenet_v2', MOBILENET | {'padding': 'tf'}, 64),
    'mobilenet_v2_torch': (functools.partial(mobilenet_v2, False), 'mobilenet_v2', MOBILENET, 64),
    'vit_tiny': (vit_tiny, 'vit', {'size': 'tiny', 'norm_epsilon': 1e-12}, 32),
}


def randomise(model):
    """Draws every parameter and statistic so that none is zero or one, and signals neither vanish nor explode."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            gain = 2 if isinstance(module, torch.nn.Conv2d) else 1
            module.weight.normal_(0, (gain / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                module.bias.normal_(0, 0.1)
        elif isinstance(module, torch.nn.BatchNorm2d | torch.nn.LayerNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    for name, parameter in model.named_parameters():
        if name.endswith(('cls_token', 'position_embeddings')):
            parameter.normal_(0, 0.5)


@functools.cache
def made(case):
    """The PyTorch model with its weights, and images."""
    make, _, _, size = CASES[case]
    torch.manual_seed(0)
    with torch.no_grad():
        model = make()
        randomise(model)
    images = np.random.default_rng(0).normal(size=(BATCH, size, size, 3)).astype(np.float32)
    return model, images


@functools.cache
def our_network(case):
    _, name, options, size = CASES[case]
    network = make_network(name, NUM_CLASSES, 'stage', options)
    return network, jax.eval_shape(lambda: network.init(jax.random.key(0), (size, size, 3)))


def imported(case, file):
    _, template = our_network(case)
    return import_state_dict(read_state_dict(file).arrays, NAME_RULES[CASES[case][1]], template)


def our_output(case, variables, images, train):
    network, _ = our_network(case)
    options = {'xla_backend_optimization_level': 0}  # what runs once needs no fast code
    run = jax.jit(lambda variables, x: network.apply(variables, x, train=train), compiler_options=options)
    return run(variables, jnp.asarray(images))


def assert_same_logits(ours, expected):
    assert np.abs(expected - expected[:1]).max() > 0.01 * np.abs(expected).max()  # they depend on the image
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE * np.abs(expected).max(), rtol=0)


def statistics_with_biased_variance(before, after, norms, counts):
    """A state_dict after one step in training, with the running variances that Linen would have.

    PyTorch normalises with the biased variance of the batch but stores the unbiased one, n / (n - 1) times as large
    for n values of a channel; Linen, like TensorFlow, stores the biased one. With few values, as here in the last
    layers, that is a visible difference of the stored statistics; it is undone here, and it is the only one.
    """
    corrected = dict(after)
    for name, momentum in norms.items():
        key = f'{name}.running_var'
        of_batch = after[key] - (1 - momentum) * before[key]  # times the momentum
        corrected[key] = after[key] - of_batch / counts[name]
    return corrected


# Of these the others are variants.
SLOW = ('resnet50', 'mobilenet_v2_torch')
all_cases = pytest.mark.parametrize(
    'case', [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in CASES]
)


@all_cases
def test_logits_in_inference(case, tmp_path):
    model, images = made(case)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    with torch.no_grad():
        expected = model.eval()(torch.tensor(images.transpose(0, 3, 1, 2))).logits.numpy()
    logits, _ = our_output(case, imported(case, tmp_path / 'weights.pth'), images, train=False)
    assert_same_logits(logits, expected)


@all_cases
def test_logits_and_statistics_in_training(case, tmp_path):
    model, images = made(case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save(before, tmp_path / 'before.pth')
    norms, counts, hooks = {}, {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            norms[name] = module.momentum

            def count(module, inputs, output, name=name):
                counts[name] = inputs[0].numel() // inputs[0].shape[1]

            hooks.append(module.register_forward_hook(count))
    try:
        with torch.no_grad():
            expected = model.train()(torch.tensor(images.transpose(0, 3, 1, 2))).logits.numpy()
        after = statistics_with_biased_variance(before, model.state_dict(), norms, counts)
        torch.save(after, tmp_path / 'after.pth')
    finally:
        for hook in hooks:
            hook.remove()
        model.load_state_dict(before)
    logits, statistics = our_output(case, imported(case, tmp_path / 'before.pth'), images, train=True)
    assert_same_logits(logits, expected)
    expected_statistics = imported(case, tmp_path / 'after.pth')['batch_stats']
    assert bool(expected_statistics) == bool(norms)

    def assert_same(ours, theirs):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE * np.abs(theirs).max(), rtol=0)

    jax.tree.map(assert_same, statistics['batch_stats'], expected_statistics)


@pytest.mark.parametrize('case', ['mobilenet_v2_tf', 'vit_tiny'])
def test_the_file_that_the_library_saves(case, tmp_path):
    """A safetensors file, in which the names are those of the published files and not always the model's own."""
    model, _ = made(case)
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    jax.tree.map(
        np.testing.assert_array_equal,
        imported(case, tmp_path / 'model.safetensors'),
        imported(case, tmp_path / 'weights.pth'),
    )
