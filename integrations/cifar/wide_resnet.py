"""Wide residual networks for small images (Zagoruyko & Komodakis 2016): WRN-28-10 and its smaller relatives."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Batch norm, ReLU, convolution, twice, and a shortcut: by 1×1 convolution where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        same = stride == 1 and channels == width
        self.shortcut = None if same else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(y))))


class WideResNet(nn.Module):
    """WRN-depth-width: three stages of (depth − 4) / 6 blocks with 16, 32 and 64 times `width` channels.

    Images [B, 3, H, W] -> logits [B, classes]. Kernels start He-normal, as in the paper.
    """

    def __init__(self, depth: int = 28, width: int = 10, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"the depth of a WRN is 6 n + 4, such as 10, 16 or 28; found {depth}.")
        blocks = (depth - 4) // 6
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        channels, stages = 16, []
        for stage in range(3):
            stages.append(nn.Sequential())
            for block in range(blocks):
                stages[-1].append(Block(channels, 16 * width * 2**stage, stride=2 if stage and not block else 1))
                channels = 16 * width * 2**stage
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.stages(self.conv(x)))).mean((2, 3)))
