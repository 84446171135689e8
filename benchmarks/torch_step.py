"""A training step of a CIFAR ResNet in PyTorch, with LSQ as an autograd function, and channels_last.

LSQ follows its paper (arXiv 1902.08153): v̂ = round(clip(v/s, -Q_N, Q_P))·s, the gradient of v inside the clip bounds,
the step size's gradient (section 2.1) times 1/√(N·Q_P). As in our recipes N excludes the batch, and the first and the
last layer have 8 bits.
"""

import math
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]


class FakeQuantize(torch.autograd.Function):
    """LSQ's quantizer of one tensor with one step size."""

    @staticmethod
    def forward(ctx: Any, v: torch.Tensor, step: torch.Tensor, low: int, high: int, scale: float) -> torch.Tensor:
        """Returns v̂."""
        scaled = v / step
        rounded = torch.round(torch.clamp(scaled, low, high))
        ctx.save_for_backward(scaled, rounded)
        ctx.constants = low, high, scale
        return rounded * step

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        """Returns the gradients of v and step."""
        (cotangent,) = cotangents
        scaled, rounded = ctx.saved_tensors
        low, high, scale = ctx.constants
        inside = (scaled >= low) & (scaled <= high)
        of_step = torch.where(inside, rounded - scaled, rounded)
        return cotangent * inside, (cotangent * of_step).sum() * scale, None, None, None


class Quantizer(nn.Module):
    """A quantizer whose step size is initialised from the first tensor."""

    def __init__(self, bits: int, *, signed: bool, has_batch: bool):
        super().__init__()
        self.low, self.high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        self.has_batch = has_batch
        self.step = nn.Parameter(torch.ones(()))
        self.is_set = False

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        """Returns the tensor fake-quantized."""
        if not self.is_set:
            self.step.data.copy_(2 * v.detach().abs().mean() / math.sqrt(self.high))
            self.is_set = True
        count = v[0].numel() if self.has_batch else v.numel()
        fake_quantize: Any = FakeQuantize.apply  # PyTorch declares no type for it
        return fake_quantize(v, self.step, self.low, self.high, 1 / math.sqrt(count * self.high))


class Layer(nn.Module):
    """A convolution or dense layer with quantized weights and inputs, or in full precision for 0 bits."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, bits: int, *, signed: bool):
        super().__init__()
        self.layer = layer
        self.weights = Quantizer(bits, signed=True, has_batch=False) if bits else nn.Identity()
        self.inputs = Quantizer(bits, signed=signed, has_batch=True) if bits else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the layer."""
        x, weight, layer = self.inputs(x), self.weights(self.layer.weight), self.layer
        if isinstance(layer, nn.Linear):
            return functional.linear(x, weight, layer.bias)
        return functional.conv2d(x, weight, None, layer.stride, layer.padding)


class Block(nn.Module):
    """A residual block with shortcut A."""

    def __init__(self, inputs: int, features: int, stride: int, bits: int):
        super().__init__()
        self.stride, self.missing = stride, features - inputs
        self.conv1 = Layer(nn.Conv2d(inputs, features, 3, stride, 1, bias=False), bits, signed=False)
        self.norm1 = nn.BatchNorm2d(features)
        self.conv2 = Layer(nn.Conv2d(features, features, 3, 1, 1, bias=False), bits, signed=False)
        self.norm2 = nn.BatchNorm2d(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the block."""
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.stride != 1 or self.missing:
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2))
        return functional.relu(y + x)


def cifar_resnet(depth: int, width: int, bits: int) -> nn.Module:
    """Returns a ResNet of depth 6n + 2 for 32x32 images in 10 classes, with `bits` bits, or full precision for 0."""
    outer = 8 if bits else 0
    layers: list[nn.Module] = [
        Layer(nn.Conv2d(3, width, 3, 1, 1, bias=False), outer, signed=True),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    inputs = width
    for stage in range(3):
        for number in range((depth - 2) // 6):
            features = width * 2**stage
            layers.append(Block(inputs, features, 2 if stage and not number else 1, bits))
            inputs = features
    head = Layer(nn.Linear(inputs, 10), outer, signed=False)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


class Step:
    """A training step, on the GPU if PyTorch has one; called with a number of steps."""

    def __init__(self, depth: int, width: int, bits: int, batch_size: int):
        torch.manual_seed(0)
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        network: Any = cifar_resnet(depth, width, bits)  # `to` is declared without its memory format
        self.network = network.to(device, memory_format=torch.channels_last)
        self.images = torch.randn(batch_size, 3, 32, 32).to(device, memory_format=torch.channels_last)
        self.labels = torch.randint(0, 10, (batch_size,)).to(device)
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.01, 0.9, weight_decay=1e-4, nesterov=True)

    def compile(self) -> None:
        """Makes PyTorch compile the network at its next call, on a GPU with CUDA graphs."""
        self(1)  # step sizes are set from the first batch
        self.network = torch.compile(self.network, mode='reduce-overhead' if self.images.is_cuda else 'default')

    def __call__(self, count: int) -> float:
        """Makes `count` steps and returns the last loss."""
        loss = torch.zeros(())
        for _ in range(count):
            self.optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(self.network(self.images), self.labels)
            loss.backward()
            self.optimizer.step()
        return float(loss.detach())
