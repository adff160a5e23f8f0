"""The tutorial's block of an LSTM, whose last state ends the sequence."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, pad_sequence, unpack_sequence

from fusedskip import blocks

from . import eager_blocks
from .support import assert_trains_alike

LENGTHS = (4, 7, 1, 7)


@pytest.fixture
def block():
    return blocks.SkipConnectionRNN(5, 8).double()


@pytest.fixture
def sequences():
    return [torch.randn(length, 5).double() for length in LENGTHS]


def test_tutorials_shape():
    block = blocks.SkipConnectionRNN(input_size=10, hidden_size=20)
    assert block(torch.randn(1, 100, 10)).shape == (1, 101, 10)


def test_trains_as_its_twin():
    pair = [module.SkipConnectionRNN(5, 8) for module in (blocks, eager_blocks)]
    assert_trains_alike(*pair, (3, 9, 5))


def test_padding_has_no_influence(block, sequences):
    """Each sequence of a batch as it would be alone, its skip right behind its last step."""
    alone = [block(sequence.unsqueeze(0)).squeeze(0) for sequence in sequences]
    for padding in (0.0, float("nan")):
        x = pad_sequence(sequences, batch_first=True, padding_value=padding)
        for lengths in (LENGTHS, torch.tensor(LENGTHS)):
            out = block(x, lengths)
            assert out.shape == (4, 8, 5)
            for row, want, length in zip(out, alone, LENGTHS, strict=True):
                torch.testing.assert_close(row[: length + 1], want)


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed(block, sequences, enforce_sorted):
    if enforce_sorted:
        sequences.sort(key=len, reverse=True)
    out = block(pack_sequence(sequences, enforce_sorted))
    for got, sequence in zip(unpack_sequence(out), sequences, strict=True):
        torch.testing.assert_close(got, block(sequence.unsqueeze(0)).squeeze(0))


def test_gradients_of_padded_and_packed(block, sequences):
    """Those of the sequences one by one."""

    def gradients(run):
        leaves = [s.clone().requires_grad_() for s in sequences]
        block.zero_grad()
        total = sum(out.square().sum() for out in run(leaves))
        return torch.autograd.grad(total, [*leaves, *block.parameters()])

    def padded(leaves):
        out = block(pad_sequence(leaves, batch_first=True), LENGTHS)
        return [row[: n + 1] for row, n in zip(out, LENGTHS, strict=True)]

    want = gradients(lambda leaves: [block(leaf.unsqueeze(0)) for leaf in leaves])
    packed = gradients(lambda ls: unpack_sequence(block(pack_sequence(ls, False))))
    for got in (gradients(padded), packed):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_under_autocast(block, sequences):
    """The LSTM gives bf16, and the sequences stay what they are, as torch.cat has it."""
    block.float()
    x = torch.randn(2, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        whole = block(x)
        for lengths in (torch.tensor([4, 4]), torch.tensor([4, 4], dtype=torch.uint8)):
            padded = block(x, lengths)
            assert padded.dtype == whole.dtype == torch.float32
            torch.testing.assert_close(padded, whole, rtol=1e-2, atol=1e-2)


def test_errors(block, sequences):
    x = torch.randn(2, 4, 5).double()
    with pytest.raises(ValueError, match=r"x: expected shape \(N, L, 5\), got \(2, 4, 6\)"):
        block(torch.randn(2, 4, 6).double())
    with pytest.raises(ValueError, match=r"x: expected shape \(N, L, 5\), got \(4, 5\)"):
        block(x[0])
    for lengths in ([4], [0, 4], [5, 4], [2.5, 4]):
        with pytest.raises(ValueError, match="expected 2 whole numbers from 1 to 4"):
            block(x, lengths)
    with pytest.raises(TypeError, match="lengths: expected None beside a PackedSequence"):
        block(pack_sequence(sequences, False), LENGTHS)
