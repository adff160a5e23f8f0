"""The tutorials' blocks from torch.nn alone, with whatever kept them from running put right."""

import torch
from torch import nn


class ResidualBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1)
            if in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(out)) + self.shortcut(x)).relu()


class PlainResidualBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1)
            if in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, x):
        return self.conv2(self.relu(self.conv1(x))) + self.shortcut(x)


class SkipConnection(nn.Module):
    def __init__(self, in_channels=3, hidden_channels=6):
        super().__init__()
        self.conv_layer1 = nn.Conv2d(in_channels, hidden_channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv_layer2 = nn.Conv2d(hidden_channels, in_channels, 3, padding=1)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.conv_layer1(x))
        return x + self.relu2(self.conv_layer2(out))


class SkipConnectionBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip_projection = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        out = self.conv2(self.relu(self.conv1(x)))
        return self.relu(out + self.skip_projection(x))


class SkipConnectionBlockConcat(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        half = out_channels // 2
        self.conv1 = nn.Conv2d(in_channels, half, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(half, half, 3, padding=1)
        self.concat_projection = nn.Conv2d(half + in_channels, out_channels, 1)

    def forward(self, x):
        out = self.conv2(self.relu(self.conv1(x)))
        return self.relu(self.concat_projection(torch.cat([out, x], dim=1)))


class SkipSequential(nn.Sequential):
    def forward(self, x):
        return torch.cat([x, super().forward(x)], dim=1)


class SkipConnectionRNN(nn.Module):
    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.lstm = nn.LSTM(input_size, hidden_size, batch_first=True)
        self.linear = nn.Linear(hidden_size, input_size)

    def forward(self, x):
        out, _ = self.lstm(x)
        skip = self.linear(out[:, -1, :])
        return torch.cat([x, skip.unsqueeze(1)], dim=1)
