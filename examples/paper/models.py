"""The convolutional models of the NeMo paper and earlier ones, for images of 32x32, as models of `transformers`.

- `vgg16`: 13 convolutions of 3x3 with batch norm, five poolings, two hidden linear layers of 512 units.
- `resnet18`: a stem of 3x3 without pooling, four stages of two basic blocks.
- `simcnn`: 13 convolutions of 3x3 with batch norm and ReLU, four poolings, so that the first of two hidden linear
  layers reads 2x2 positions of each channel.
- `rescnn`: 12 convolutions with batch norm: four stages of one convolution and a pair of them, the pairs of the last
  three stages with a residual connection, and the mean over positions.

VGG16 and ResNet18 are as usual for this image size. SimCNN and ResCNN are our own, with the layer counts that
CNNSplitter (arXiv 2209.06116) gives; `width` is the number of channels of the first stage, 64 there and here.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

ARCHITECTURES = ("vgg16", "resnet18", "simcnn", "rescnn")


class PaperCNNConfig(PreTrainedConfig):
    """Architecture and width; `hidden` is the width of the hidden linear layers as a multiple of `width`."""

    model_type = "paper_cnn"
    architecture: str = "vgg16"
    width: int = 64
    hidden: int = 8
    dropout: float = 0.0
    image_size: int = 32
    num_channels: int = 3


def convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    """A convolution of 3x3, its norm and ReLU."""
    return [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


class Residual(nn.Module):
    """Two convolutions whose result is added to what they read, or to a projection of it."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(*convolution(inputs, outputs, stride), *convolution(outputs, outputs)[:2])
        projection = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Sequential(*(projection if stride > 1 or inputs != outputs else []))
        self.activation = nn.ReLU()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps (batch, inputs, height, width) to (batch, outputs, ...)."""
        return self.activation(self.body(hidden_states) + self.shortcut(hidden_states))


def plain_chain(config: PaperCNNConfig, stages: tuple[tuple[int, ...], ...], poolings: int) -> tuple[nn.Module, int]:
    """Stages of convolutions, each of the first `poolings` followed by a pooling; also the width of the result."""
    layers, before = [], config.num_channels
    for index, stage in enumerate(stages):
        for multiple in stage:
            layers.extend(convolution(before, before := multiple * config.width))
        if index < poolings:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten()), before * (config.image_size // 2**poolings) ** 2


def residual_18(config: PaperCNNConfig) -> tuple[nn.Module, int]:
    """ResNet18 for small images."""
    widths = [multiple * config.width for multiple in (1, 1, 2, 4, 8)]
    layers = convolution(config.num_channels, config.width)
    for index, (inputs, outputs) in enumerate(pairwise(widths)):
        layers += [Residual(inputs, outputs, stride=1 if index == 0 else 2), Residual(outputs, outputs)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), widths[-1]


def residual_12(config: PaperCNNConfig) -> tuple[nn.Module, int]:
    """ResCNN."""
    widths = [config.num_channels, *(multiple * config.width for multiple in (1, 2, 4, 8))]
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(widths)):
        pair = [*convolution(outputs, outputs), *convolution(outputs, outputs)]
        layers += convolution(inputs, outputs) + (pair if index == 0 else [Residual(outputs, outputs)])
        layers.append(nn.MaxPool2d(2) if index < 3 else nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*layers, nn.Flatten()), widths[-1]


class PaperCNNForImageClassification(PreTrainedModel):
    """One of `ARCHITECTURES` with a linear head."""

    config_class = PaperCNNConfig
    main_input_name = "pixel_values"

    def __init__(self, config: PaperCNNConfig) -> None:
        super().__init__(config)
        if config.architecture not in ARCHITECTURES:
            raise ValueError(f"Got architecture={config.architecture!r}; expected one of {ARCHITECTURES}.")
        hidden = [config.hidden * config.width] * 2
        if config.architecture == "vgg16":
            stages = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))
            self.features, width = plain_chain(config, stages, poolings=5)
        elif config.architecture == "simcnn":
            stages = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))
            self.features, width = plain_chain(config, stages, poolings=4)
        else:
            build = residual_18 if config.architecture == "resnet18" else residual_12
            (self.features, width), hidden = build(config), []
        linear = [
            layer
            for inputs, outputs in pairwise([width, *hidden])
            for layer in (nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(config.dropout))
        ]
        self.hidden = nn.Sequential(*linear)
        self.classifier = nn.Linear(hidden[-1] if hidden else width, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool = True
    ) -> ImageClassifierOutput:
        """Maps images (batch, channels, height, width) to logits; labels (batch,) add the loss."""
        logits = self.classifier(self.hidden(self.features(pixel_values)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(PaperCNNConfig.model_type, PaperCNNConfig)  # a file names the class; this says where it is
AutoModelForImageClassification.register(PaperCNNConfig, PaperCNNForImageClassification)
