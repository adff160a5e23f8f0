"""The tutorials' blocks whose skip is concatenated with the branch."""

from collections.abc import Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fusedskip import functional
from fusedskip.modules import NORM_RELUS, apply_cat_norm, is_torchs
from fusedskip.remembered import plan_of
from fusedskip.tails import is_exactly, plan_chain, run_chain, run_steps
from fusedskip.tracing import leaf


def _keeps_all_but_channels(out: Tensor, x: Tensor) -> bool:
    return out.dim() == x.dim() and out.shape[:1] + out.shape[2:] == x.shape[:1] + x.shape[2:]


class SkipSequential(nn.Sequential):
    """`cat([x, layers(x)], dim=1)`: an `nn.Sequential` beside its own input.

    The result has the channels of the input and of the last layer, so what follows takes both.
    A batch norm and the ReLU after it are one operation, which as the last layers writes straight
    into its channels of the result. A strided convolution belongs behind:

        nn.Sequential(
            SkipSequential(
                nn.Conv2d(3, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 16, 3, padding=1)
            ),
            nn.Tanh(),
            nn.Conv2d(3 + 16, 16, 3, stride=2, padding=1),
        )

    Args:
        layers: modules, or one `OrderedDict` of them, as `nn.Sequential` takes them. They map
            `(N, C, *)` to `(N, C', *)`.

    Raises:
        ValueError: in forward, layers that change more than the channels.
    """

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        plan = plan_of(self, None, plan_chain, x)
        if plan is not None and plan.branch:
            steps, (norm, relu) = plan.branch[:-1], plan.branch[-1]
            if relu is not None or is_exactly(NORM_RELUS, norm):
                out = run_steps(steps, x)
                self._check_shape(out, x)
                # Not under autocast, which leaves x as it is.
                if out.dtype == x.dtype and not is_torchs(norm, out):
                    return apply_cat_norm(norm, out, x)
                return torch.cat([x, run_steps(plan.branch[-1:], out)], dim=1)
        out = super().forward(x) if plan is None else run_chain(plan, x)
        self._check_shape(out, x)
        return torch.cat([x, out], dim=1)

    def _check_shape(self, out: Tensor, x: Tensor) -> None:
        if not _keeps_all_but_channels(out, x):
            raise ValueError(
                f"SkipSequential: expected layers that keep all but the channels of the input, "
                f"shape {tuple(x.shape)}, got {tuple(out.shape)}; a stride cannot stand inside"
            )


class SkipConnectionBlockConcat(nn.Module):
    """`relu(concat_projection(cat([conv2(relu(conv1(x))), x], dim=1)))`; `x` is `(N, C, H, W)`.

    The 3x3 convolutions are padded and have `out_channels // 2` channels; the projection is 1x1.
    The tutorial's projection takes `out_channels` channels, which is what it is given only where
    `in_channels == out_channels - out_channels // 2`. Here it takes as many as there are; where the
    tutorial's runs, checkpoints of it load.

    The projection of a concatenation is the sum of two projections, so the concatenated tensor is
    never written, and its bias is left to the kernel of the sum.

    Args:
        in_channels, out_channels: of the block.

    Raises:
        ValueError: in forward, `x` has other dimensions, or branch and input differ in more than
            their channels, or are not what the projection takes.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        width = out_channels // 2
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.concat_projection = nn.Conv2d(width + in_channels, out_channels, kernel_size=1)

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"x: expected shape (N, C, H, W), got {tuple(x.shape)}")
        out, projection = self.conv2(self.relu(self.conv1(x))), self.concat_projection
        if not _keeps_all_but_channels(out, x):
            raise ValueError(
                f"SkipConnectionBlockConcat: expected convolutions that keep all but the channels "
                f"of the input, shape {tuple(x.shape)}, got {tuple(out.shape)}"
            )
        if (
            not (is_exactly(nn.Conv2d, projection) and is_exactly(nn.ReLU, self.relu))
            or projection.bias is None
            or projection.groups != 1
        ):
            return self.relu(projection(torch.cat([out, x], dim=1)))
        if out.shape[1] + x.shape[1] != projection.in_channels:
            raise ValueError(
                f"SkipConnectionBlockConcat: concat_projection takes {projection.in_channels} "
                f"channels, got shapes {tuple(out.shape)} and {tuple(x.shape)}"
            )
        of_out, of_x = projection.weight.tensor_split([out.shape[1]], dim=1)
        # Not matrix products, which MKL is slow at on an EPYC: forward and backward there take 0.98
        # of eager's time channels-last, 0.93 channels-first, and with products 1.21 and 0.97. On a
        # Xeon products were faster: 1.04 and 0.99, and 0.94 and 0.84.
        return functional.bias_add_relu(
            projection._conv_forward(out, of_out, None),
            projection._conv_forward(x, of_x, None),
            projection.bias,
        )


class SkipConnectionRNN(nn.Module):
    """A sequence, and behind it what an LSTM makes of it: `cat([x, skip], dim=1)`.

    `skip = linear(h_n)` is the last hidden state, as wide as a step of the input. The tutorial
    appends it to the LSTM's output, which is `hidden_size` wide: that fits only where
    `hidden_size == input_size`. It promises (1, 101, 10) for (1, 100, 10): that is the result here.
    No part of this is fused.

    Sequences of different lengths each end in their own `skip`, right behind their last step:

    - `block(x, lengths)`, padded: `skip` of sequence `i` is `out[i, lengths[i]]`, so the result is
      padded again, its lengths being `lengths + 1`. The padding of `x` has no influence on `skip`,
      and stands behind it as it was.
    - `block(packed)`: a `PackedSequence` of the sequences, each longer by one step.

    Args:
        input_size: width of a step, of the input and of the result.
        hidden_size: width of the LSTM's state.

    Raises:
        ValueError: in forward, `x` is not `(N, L, input_size)`, or a length is not in 1 to L.
        TypeError: in forward, lengths beside a `PackedSequence`, which has its own.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_size, hidden_size, batch_first=True)
        self.linear = nn.Linear(hidden_size, input_size)

    @overload
    def forward(self, x: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor: ...
    @overload
    def forward(self, x: PackedSequence, lengths: None = None) -> PackedSequence: ...
    @leaf
    def forward(
        self, x: Tensor | PackedSequence, lengths: Tensor | Sequence[int] | None = None
    ) -> Tensor | PackedSequence:
        """Append `skip` to every sequence.

        Args:
            x: `(N, L, input_size)`, or packed.
            lengths: `(N,)`, the steps of each padded sequence, in any order. A tensor on a GPU is
                copied to the CPU, which waits for the GPU.
        """
        if isinstance(x, PackedSequence):
            if lengths is not None:
                raise TypeError("lengths: expected None beside a PackedSequence, which has its own")
            padded, lengths = pad_packed_sequence(x, batch_first=True)
            sorted_by_caller = x.sorted_indices is None
            return pack_padded_sequence(
                _put_behind(padded, lengths, self._skip(x)),
                lengths + 1,
                batch_first=True,
                enforce_sorted=sorted_by_caller,
            )
        if x.dim() != 3 or x.shape[2] != self.lstm.input_size:
            raise ValueError(
                f"x: expected shape (N, L, {self.lstm.input_size}), got {tuple(x.shape)}"
            )
        if lengths is None:
            return torch.cat([x, self._skip(x).unsqueeze(1)], dim=1)
        lengths = torch.as_tensor(lengths, device="cpu")
        if (
            lengths.shape != x.shape[:1]
            or lengths.is_floating_point()
            or not bool(((lengths > 0) & (lengths <= x.shape[1])).all())
        ):
            raise ValueError(
                f"lengths: expected {x.shape[0]} whole numbers from 1 to {x.shape[1]} for x of "
                f"shape {tuple(x.shape)}, got {lengths.tolist()}"
            )
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return _put_behind(x, lengths, self._skip(packed))

    def _skip(self, x: Tensor | PackedSequence) -> Tensor:
        """`(N, input_size)`, from the state after the last step of each sequence."""
        _, (h_n, _) = self.lstm(x)
        skip: Tensor = self.linear(h_n[-1])
        return skip


def _put_behind(x: Tensor, lengths: Tensor, skip: Tensor) -> Tensor:
    """Padded sequences `(N, L + 1, C)`: those of `x`, each followed by its row of `skip`."""
    dtype = torch.promote_types(x.dtype, skip.dtype)  # as torch.cat does under autocast
    index = lengths.to(x.device, torch.long).view(-1, 1, 1).expand(-1, 1, x.shape[2])
    return F.pad(x, (0, 0, 0, 1)).to(dtype).scatter(1, index, skip.to(dtype).unsqueeze(1))
