r"""Rules from PyTorch names to our parameters, for each family of networks and the libraries that publish weights.

A rule is (pattern of a PyTorch name, our path); the first pattern that matches the full name applies. In a path, \1 is
the pattern's first group and {\1+1} is that number plus one: PyTorch numbers blocks from 0, we from 1. A rule with
several paths splits its array along the first axis.
"""

from bqat_jax.networks.mobilenet_v2 import STAGES as MOBILENET_STAGES

Rule = tuple[str, str | tuple[str, ...]]

_SCALE = (('weight', 'params', 'scale'), ('bias', 'params', 'bias'))
_STATISTICS = (('running_mean', 'batch_stats', 'mean'), ('running_var', 'batch_stats', 'var'))
_DENSE = (('weight', 'params', 'kernel'), ('bias', 'params', 'bias'))


def _rules(torch_name: str, path: str, endings: tuple[tuple[str, str, str], ...]) -> list[Rule]:
    return [(rf'{torch_name}\.{ending}', f'{collection}/{path}/{name}') for ending, collection, name in endings]


def _conv(torch_name: str, path: str) -> list[Rule]:
    return _rules(torch_name, path, _DENSE[:1])


def _dense(torch_name: str, path: str) -> list[Rule]:
    return _rules(torch_name, path, _DENSE)


def _layer_norm(torch_name: str, path: str) -> list[Rule]:
    return _rules(torch_name, path, _SCALE)


def _batch_norm(torch_name: str, path: str) -> list[Rule]:
    return _rules(torch_name, path, _SCALE + _STATISTICS)


def _conv_norm(torch_conv: str, torch_norm: str, path: str) -> list[Rule]:
    """Returns the rules of a `ConvNorm`, or of a convolution and its norm with these names."""
    return _conv(torch_conv, f'{path}/conv') + _batch_norm(torch_norm, f'{path}/norm')


def _hf_conv_norm(torch_name: str, path: str) -> list[Rule]:
    """Returns the rules of a convolution and its norm with Hugging Face's names."""
    return _conv_norm(rf'{torch_name}\.convolution', rf'{torch_name}\.normalization', path)


# akamaster/pytorch_resnet_cifar10 and similar networks.
_BLOCK, _BLOCK_PATH = r'layer(\d+)\.(\d+)\.', r'stage\1_block{\2+1}'
CIFAR_RESNET_RULES = (
    *_conv_norm('conv1', 'bn1', 'stem'),
    *_conv(rf'{_BLOCK}conv(\d)', rf'{_BLOCK_PATH}/conv\3'),
    *_batch_norm(rf'{_BLOCK}bn(\d)', rf'{_BLOCK_PATH}/norm\3'),
    *_conv(rf'{_BLOCK}(?:shortcut|downsample)\.0', f'{_BLOCK_PATH}/shortcut_conv'),
    *_batch_norm(rf'{_BLOCK}(?:shortcut|downsample)\.1', f'{_BLOCK_PATH}/shortcut_norm'),
    *_dense('(?:linear|fc)', 'head/dense'),
)

_HF_BLOCK, _HF_BLOCK_PATH = r'resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.', r'stage{\1+1}_block{\2+1}'
RESNET_RULES = (
    # torchvision and timm
    *_conv_norm('conv1', 'bn1', 'stem'),
    *_conv(rf'{_BLOCK}conv(\d)', rf'{_BLOCK_PATH}/conv\3'),
    *_batch_norm(rf'{_BLOCK}bn(\d)', rf'{_BLOCK_PATH}/norm\3'),
    *_conv(rf'{_BLOCK}downsample\.0', f'{_BLOCK_PATH}/shortcut_conv'),
    *_batch_norm(rf'{_BLOCK}downsample\.1', f'{_BLOCK_PATH}/shortcut_norm'),
    *_dense('fc', 'head/dense'),
    # Hugging Face's ResNetForImageClassification
    *_hf_conv_norm(r'resnet\.embedder\.embedder', 'stem'),
    *_conv(rf'{_HF_BLOCK}layer\.(\d+)\.convolution', rf'{_HF_BLOCK_PATH}/conv{{\3+1}}'),
    *_batch_norm(rf'{_HF_BLOCK}layer\.(\d+)\.normalization', rf'{_HF_BLOCK_PATH}/norm{{\3+1}}'),
    *_conv(rf'{_HF_BLOCK}shortcut\.convolution', f'{_HF_BLOCK_PATH}/shortcut_conv'),
    *_batch_norm(rf'{_HF_BLOCK}shortcut\.normalization', f'{_HF_BLOCK_PATH}/shortcut_norm'),
    *_dense(r'classifier\.1', 'head/dense'),
)


def _mobilenet_v2_block(stage: int, block: int, index: int) -> list[Rule]:
    """Returns the rules of one inverted residual, number `index` of all; indices start at 0."""
    first = index == 0
    path = f'stage{stage + 1}_block{block + 1}'
    parts = ('depthwise', 'project') if first else ('expand', 'depthwise', 'project')
    timm = rf'blocks\.{stage}\.{block}\.'
    timm_convs = ('conv_dw', 'conv_pw') if first else ('conv_pw', 'conv_dw', 'conv_pwl')
    face = r'mobilenet_v2\.conv_stem\.' if first else rf'mobilenet_v2\.layer\.{index - 1}\.'
    face_parts = {'expand': 'expand_1x1', 'depthwise': 'conv_3x3', 'project': 'reduce_1x1'}
    rules = []
    for number, part in enumerate(parts):
        vision = rf'features\.{index + 1}\.conv\.'
        # In torchvision, each other convolution forms a Sequential with its norm; projection and norm do not.
        pair = (f'{number}', f'{number + 1}') if part == 'project' else (rf'{number}\.0', rf'{number}\.1')
        rules += _conv_norm(vision + pair[0], vision + pair[1], f'{path}/{part}')
        rules += _conv_norm(timm + timm_convs[number], f'{timm}bn{number + 1}', f'{path}/{part}')
        rules += _hf_conv_norm(face + face_parts[part], f'{path}/{part}')
    return rules


_MOBILENET_BLOCKS = [(stage, block) for stage, (_, _, size, _) in enumerate(MOBILENET_STAGES) for block in range(size)]
# torchvision, timm and Hugging Face's MobileNetV2ForImageClassification, in this order.
MOBILENET_V2_RULES = (
    *_conv_norm(r'features\.0\.0', r'features\.0\.1', 'stem'),
    *_conv_norm('conv_stem', 'bn1', 'stem'),
    *_hf_conv_norm(r'mobilenet_v2\.conv_stem\.first_conv', 'stem'),
    *(rule for index, place in enumerate(_MOBILENET_BLOCKS) for rule in _mobilenet_v2_block(*place, index)),
    *_conv_norm(r'features\.18\.0', r'features\.18\.1', 'head/last'),
    *_conv_norm('conv_head', 'bn2', 'head/last'),
    *_hf_conv_norm(r'mobilenet_v2\.conv_1x1', 'head/last'),
    *_dense(r'classifier(?:\.1)?', 'head/dense'),
)


def _fused(torch_weight: str, torch_bias: str, path: str) -> list[Rule]:
    """Returns the rules of a fused matrix for query, key and value."""
    parts = ('query', 'key', 'value')
    return [
        (torch_weight, tuple(f'params/{path}/{part}/kernel' for part in parts)),
        (torch_bias, tuple(f'params/{path}/{part}/bias' for part in parts)),
    ]


def _vit_blocks(start: str, path: str, layers: dict[str, str]) -> list[Rule]:
    """Returns the rules of all blocks; `layers` maps our layer names to PyTorch's without the prefix `start`."""
    rules = []
    for name, torch_name in layers.items():
        make = _layer_norm if name.startswith('norm') else _dense
        rules += make(start + torch_name, f'{path}/{name}')
    return rules


_TIMM_BLOCK, _VISION_BLOCK = r'blocks\.(\d+)\.', r'encoder\.layers\.encoder_layer_(\d+)\.'
_VISION_ATTENTION, _VIT_PATH = rf'{_VISION_BLOCK}self_attention\.in_proj_', r'block{\1+1}'
VIT_RULES = (
    # timm and DeiT
    ('cls_token', 'params/stem/class_token'),
    ('pos_embed', 'params/stem/positions'),
    *_dense(r'patch_embed\.proj', 'stem/patch_embed'),
    *_fused(rf'{_TIMM_BLOCK}attn\.qkv\.weight', rf'{_TIMM_BLOCK}attn\.qkv\.bias', _VIT_PATH),
    *_vit_blocks(
        _TIMM_BLOCK,
        _VIT_PATH,
        {'norm1': 'norm1', 'norm2': 'norm2', 'out': r'attn\.proj', 'fc1': r'mlp\.fc1', 'fc2': r'mlp\.fc2'},
    ),
    *_layer_norm('norm', 'head/norm'),
    *_dense('head', 'head/dense'),
    # torchvision; before release 0.12, the MLP's layers were called linear_1 and linear_2
    ('class_token', 'params/stem/class_token'),
    (r'encoder\.pos_embedding', 'params/stem/positions'),
    *_dense('conv_proj', 'stem/patch_embed'),
    *_fused(f'{_VISION_ATTENTION}weight', f'{_VISION_ATTENTION}bias', _VIT_PATH),
    *_vit_blocks(
        _VISION_BLOCK,
        _VIT_PATH,
        {
            'norm1': 'ln_1',
            'norm2': 'ln_2',
            'out': r'self_attention\.out_proj',
            'fc1': r'mlp\.(?:0|linear_1)',
            'fc2': r'mlp\.(?:3|linear_2)',
        },
    ),
    *_layer_norm(r'encoder\.ln', 'head/norm'),
    *_dense(r'heads\.head', 'head/dense'),
    # Hugging Face's ViTForImageClassification: names in its files, and names inside release 5
    (r'vit\.embeddings\.cls_token', 'params/stem/class_token'),
    (r'vit\.embeddings\.position_embeddings', 'params/stem/positions'),
    *_dense(r'vit\.embeddings\.patch_embeddings\.projection', 'stem/patch_embed'),
    *_vit_blocks(
        r'vit\.encoder\.layer\.(\d+)\.',
        _VIT_PATH,
        {
            'norm1': 'layernorm_before',
            'norm2': 'layernorm_after',
            'query': r'attention\.attention\.query',
            'key': r'attention\.attention\.key',
            'value': r'attention\.attention\.value',
            'out': r'attention\.output\.dense',
            'fc1': r'intermediate\.dense',
            'fc2': r'output\.dense',
        },
    ),
    *_vit_blocks(
        r'vit\.layers\.(\d+)\.',
        _VIT_PATH,
        {
            'norm1': 'layernorm_before',
            'norm2': 'layernorm_after',
            'query': r'attention\.q_proj',
            'key': r'attention\.k_proj',
            'value': r'attention\.v_proj',
            'out': r'attention\.o_proj',
            'fc1': r'mlp\.fc1',
            'fc2': r'mlp\.fc2',
        },
    ),
    *_layer_norm(r'vit\.layernorm', 'head/norm'),
    *_dense('classifier', 'head/dense'),
)

# A Sequential `features` of convolution, batch norm and ReLU, with a pool after every second ReLU, and `classifier`, as
# in torchvision's VGG networks with batch norm. Convolutions must not have a bias.
_VGG_CONVS = {'stem': 0, 'stage1_block2': 3, 'stage2_block1': 7, 'stage2_block2': 10}
_VGG_CONVS |= {'stage3_block1': 14, 'stage3_block2': 17}
VGG_SMALL_RULES = (
    *(
        rule
        for path, index in _VGG_CONVS.items()
        for rule in _conv_norm(rf'features\.{index}', rf'features\.{index + 1}', path)
    ),
    *_dense('classifier', 'head/dense'),
)

NAME_RULES: dict[str, tuple[Rule, ...]] = {
    'cifar_resnet': CIFAR_RESNET_RULES,
    'mobilenet_v2': MOBILENET_V2_RULES,
    'resnet': RESNET_RULES,
    'vgg_small': VGG_SMALL_RULES,
    'vit': VIT_RULES,
}
