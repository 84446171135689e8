"""The names of parameters and statistics in published PyTorch files, written down from the libraries' own models.

Each function gives PyTorch name to our path, or to several paths for an array that holds several of ours.
"""

import functools

import jax
import numpy as np
from flax import traverse_util

from bqat_jax.networks.registry import make_network

BATCH_NORM = {
    'weight': 'params/{}/scale',
    'bias': 'params/{}/bias',
    'running_mean': 'batch_stats/{}/mean',
    'running_var': 'batch_stats/{}/var',
}
LAYER_NORM = {'weight': 'params/{}/scale', 'bias': 'params/{}/bias'}
DENSE = {'weight': 'params/{}/kernel', 'bias': 'params/{}/bias'}
CONV = {'weight': 'params/{}/kernel'}


def expand(layers):
    """Every array of layers {PyTorch name: (kind, our path)}."""
    return {
        f'{name}.{ending}': path.format(ours) for name, (kind, ours) in layers.items() for ending, path in kind.items()
    }


def torchvision_resnet(sizes, convs):
    """Also timm's names."""
    layers = {'conv1': (CONV, 'stem/conv'), 'bn1': (BATCH_NORM, 'stem/norm'), 'fc': (DENSE, 'head/dense')}
    for stage, size in enumerate(sizes, 1):
        for block in range(size):
            theirs, ours = f'layer{stage}.{block}', f'stage{stage}_block{block + 1}'
            for number in range(1, convs + 1):
                layers[f'{theirs}.conv{number}'] = CONV, f'{ours}/conv{number}'
                layers[f'{theirs}.bn{number}'] = BATCH_NORM, f'{ours}/norm{number}'
            if block == 0 and (stage > 1 or convs == 3):
                layers[f'{theirs}.downsample.0'] = CONV, f'{ours}/shortcut_conv'
                layers[f'{theirs}.downsample.1'] = BATCH_NORM, f'{ours}/shortcut_norm'
    return expand(layers)


def akamaster_resnet(size):
    """Of depth 6 * size + 2, with option-B shortcuts."""
    layers = {'conv1': (CONV, 'stem/conv'), 'bn1': (BATCH_NORM, 'stem/norm'), 'linear': (DENSE, 'head/dense')}
    for stage in (1, 2, 3):
        for block in range(size):
            theirs, ours = f'layer{stage}.{block}', f'stage{stage}_block{block + 1}'
            for number in (1, 2):
                layers[f'{theirs}.conv{number}'] = CONV, f'{ours}/conv{number}'
                layers[f'{theirs}.bn{number}'] = BATCH_NORM, f'{ours}/norm{number}'
            if block == 0 and stage > 1:
                layers[f'{theirs}.shortcut.0'] = CONV, f'{ours}/shortcut_conv'
                layers[f'{theirs}.shortcut.1'] = BATCH_NORM, f'{ours}/shortcut_norm'
    return expand(layers)


MOBILENET_SIZES = (1, 2, 3, 4, 3, 3, 1)


def torchvision_mobilenet_v2():
    pairs = {
        ('features.0.0', 'features.0.1'): 'stem',
        ('features.1.conv.0.0', 'features.1.conv.0.1'): 'stage1_block1/depthwise',
        ('features.1.conv.1', 'features.1.conv.2'): 'stage1_block1/project',
        ('features.18.0', 'features.18.1'): 'head/last',
    }
    index = 2
    for stage, size in enumerate(MOBILENET_SIZES[1:], 2):
        for block in range(1, size + 1):
            start, ours = f'features.{index}.conv', f'stage{stage}_block{block}'
            pairs[f'{start}.0.0', f'{start}.0.1'] = f'{ours}/expand'
            pairs[f'{start}.1.0', f'{start}.1.1'] = f'{ours}/depthwise'
            pairs[f'{start}.2', f'{start}.3'] = f'{ours}/project'
            index += 1
    return _mobilenet(pairs, 'classifier.1')


def timm_mobilenet_v2():
    pairs = {
        ('conv_stem', 'bn1'): 'stem',
        ('blocks.0.0.conv_dw', 'blocks.0.0.bn1'): 'stage1_block1/depthwise',
        ('blocks.0.0.conv_pw', 'blocks.0.0.bn2'): 'stage1_block1/project',
        ('conv_head', 'bn2'): 'head/last',
    }
    for stage, size in enumerate(MOBILENET_SIZES[1:], 1):
        for block in range(size):
            start, ours = f'blocks.{stage}.{block}', f'stage{stage + 1}_block{block + 1}'
            pairs[f'{start}.conv_pw', f'{start}.bn1'] = f'{ours}/expand'
            pairs[f'{start}.conv_dw', f'{start}.bn2'] = f'{ours}/depthwise'
            pairs[f'{start}.conv_pwl', f'{start}.bn3'] = f'{ours}/project'
    return _mobilenet(pairs, 'classifier')


def _mobilenet(pairs, classifier):
    layers = {classifier: (DENSE, 'head/dense')}
    for (conv, norm), ours in pairs.items():
        layers[conv] = CONV, f'{ours}/conv'
        layers[norm] = BATCH_NORM, f'{ours}/norm'
    return expand(layers)


def fused(block, kind):
    """Paths of query, key and value of one block."""
    return tuple(f'params/{block}/{part}/{kind}' for part in ('query', 'key', 'value'))


def timm_vit():
    """Also DeiT's names."""
    names = {'cls_token': 'params/stem/class_token', 'pos_embed': 'params/stem/positions'}
    layers = {
        'patch_embed.proj': (DENSE, 'stem/patch_embed'),
        'norm': (LAYER_NORM, 'head/norm'),
        'head': (DENSE, 'head/dense'),
    }
    for index in range(12):
        theirs, ours = f'blocks.{index}', f'block{index + 1}'
        names[f'{theirs}.attn.qkv.weight'] = fused(ours, 'kernel')
        names[f'{theirs}.attn.qkv.bias'] = fused(ours, 'bias')
        layers[f'{theirs}.attn.proj'] = DENSE, f'{ours}/out'
        for name in ('norm1', 'norm2'):
            layers[f'{theirs}.{name}'] = LAYER_NORM, f'{ours}/{name}'
        for name in ('fc1', 'fc2'):
            layers[f'{theirs}.mlp.{name}'] = DENSE, f'{ours}/{name}'
    return names | expand(layers)


def torchvision_vit(mlp=('0', '3')):
    """Before release 0.12 the MLP's layers were called linear_1 and linear_2."""
    names = {'class_token': 'params/stem/class_token', 'encoder.pos_embedding': 'params/stem/positions'}
    layers = {
        'conv_proj': (DENSE, 'stem/patch_embed'),
        'encoder.ln': (LAYER_NORM, 'head/norm'),
        'heads.head': (DENSE, 'head/dense'),
    }
    for index in range(12):
        theirs, ours = f'encoder.layers.encoder_layer_{index}', f'block{index + 1}'
        names[f'{theirs}.self_attention.in_proj_weight'] = fused(ours, 'kernel')
        names[f'{theirs}.self_attention.in_proj_bias'] = fused(ours, 'bias')
        layers[f'{theirs}.self_attention.out_proj'] = DENSE, f'{ours}/out'
        layers[f'{theirs}.ln_1'] = LAYER_NORM, f'{ours}/norm1'
        layers[f'{theirs}.ln_2'] = LAYER_NORM, f'{ours}/norm2'
        for name, number in zip(('fc1', 'fc2'), mlp, strict=True):
            layers[f'{theirs}.mlp.{number}'] = DENSE, f'{ours}/{name}'
    return names | expand(layers)


def hugging_face_vit_file():
    """As in the published files; the model's own names differ since release 5 of transformers."""
    names = {
        'vit.embeddings.cls_token': 'params/stem/class_token',
        'vit.embeddings.position_embeddings': 'params/stem/positions',
    }
    layers = {
        'vit.embeddings.patch_embeddings.projection': (DENSE, 'stem/patch_embed'),
        'vit.layernorm': (LAYER_NORM, 'head/norm'),
        'classifier': (DENSE, 'head/dense'),
    }
    for index in range(12):
        theirs, ours = f'vit.encoder.layer.{index}', f'block{index + 1}'
        layers[f'{theirs}.layernorm_before'] = LAYER_NORM, f'{ours}/norm1'
        layers[f'{theirs}.layernorm_after'] = LAYER_NORM, f'{ours}/norm2'
        for name in ('query', 'key', 'value'):
            layers[f'{theirs}.attention.attention.{name}'] = DENSE, f'{ours}/{name}'
        layers[f'{theirs}.attention.output.dense'] = DENSE, f'{ours}/out'
        layers[f'{theirs}.intermediate.dense'] = DENSE, f'{ours}/fc1'
        layers[f'{theirs}.output.dense'] = DENSE, f'{ours}/fc2'
    return names | expand(layers)


def vgg_small():
    """A Sequential of convolution, batch norm and ReLU, a pool behind every second; torchvision's VGG names."""
    places = {'stem': 0, 'stage1_block2': 3, 'stage2_block1': 7, 'stage2_block2': 10, 'stage3_block1': 14}
    layers = {'classifier': (DENSE, 'head/dense')}
    for ours, index in {**places, 'stage3_block2': 17}.items():
        layers[f'features.{index}'] = CONV, f'{ours}/conv'
        layers[f'features.{index + 1}'] = BATCH_NORM, f'{ours}/norm'
    return expand(layers)


# Name of a network, its options and the names of a library's file.
PUBLISHED = {
    'akamaster_resnet20': ('cifar_resnet', {'depth': 20, 'width': 2, 'shortcut': 'B'}, akamaster_resnet(3)),
    'torchvision_resnet18': ('resnet', {'depth': 18, 'width': 2}, torchvision_resnet((2, 2, 2, 2), 2)),
    'torchvision_resnet34': ('resnet', {'depth': 34, 'width': 2}, torchvision_resnet((3, 4, 6, 3), 2)),
    'torchvision_resnet50': ('resnet', {'depth': 50, 'width': 2}, torchvision_resnet((3, 4, 6, 3), 3)),
    'torchvision_resnet101': ('resnet', {'depth': 101, 'width': 2}, torchvision_resnet((3, 4, 23, 3), 3)),
    'torchvision_mobilenet_v2': ('mobilenet_v2', {}, torchvision_mobilenet_v2()),
    'timm_mobilenet_v2': ('mobilenet_v2', {}, timm_mobilenet_v2()),
    'timm_vit': ('vit', {}, timm_vit()),
    'torchvision_vit': ('vit', {}, torchvision_vit()),
    'old_torchvision_vit': ('vit', {}, torchvision_vit(('linear_1', 'linear_2'))),
    'hugging_face_vit_file': ('vit', {}, hugging_face_vit_file()),
    'vgg_small': ('vgg_small', {'width': 2}, vgg_small()),
}


@functools.cache
def template_of(name, options=()):
    """The shapes of a network's variables; its options are pairs."""
    network = make_network(name, 10, 'stage', dict(options))
    return jax.eval_shape(lambda: network.init(jax.random.key(0), (32, 32, 3)))


def draw_variables(template):
    """Random values for every variable, variances positive."""
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        values = generator.normal(size=leaf.shape).astype(np.float32)
        return np.abs(values) if path[-1].key == 'var' else values

    return jax.tree_util.tree_map_with_path(draw, template)


def to_torch(path, array):
    """An array in PyTorch's layout."""
    if not path.endswith('/kernel'):
        return array
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T)


def exported(names, variables):
    """The arrays of our variables under PyTorch's names."""
    flat = traverse_util.flatten_dict(variables, sep='/')
    arrays = {}
    for torch_name, paths in names.items():
        parts = [to_torch(path, flat[path]) for path in ([paths] if isinstance(paths, str) else paths)]
        arrays[torch_name] = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return arrays
