r"""Train a fused ResNet over several processes, its batch norms synchronised.

On this machine's CPU, or its GPUs, one for each process:

    torchrun --nproc-per-node 2 examples/train_ddp.py

On many nodes, the same file over NCCL:

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \
        examples/train_ddp.py --epochs 20

The images are scikit-learn's digits (8x8 pixels, 10 classes), the network has one block a stage. A
network of torchvision's, timm's or transformers' blocks also needs `fusedskip.fuse(network)`.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import fusedskip
from fusedskip.blocks import BasicBlock, ResNet


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64, help="images a process")
    parser.add_argument("--images", type=int, default=1500, help="of the 1797, for training")
    args = parser.parse_args()

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16
    data = TensorDataset(images, torch.tensor(labels))
    train_set = torch.utils.data.Subset(data, range(args.images))
    sampler = DistributedSampler(train_set)
    loader = DataLoader(train_set, args.batch_size, sampler=sampler)

    torch.manual_seed(0)
    network = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10)
    network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)  # for 8x8 pixels
    network.maxpool = torch.nn.Identity()
    network = fusedskip.convert_sync_batchnorm(network)  # one batch over all processes
    network = network.to(device, memory_format=torch.channels_last)
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)

    for epoch in range(1, args.epochs + 1):
        sampler.set_epoch(epoch)
        model.train()
        for x, y in loader:
            x = x.to(device, memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy = evaluate(model, data, args.images, device)
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: loss {loss.item():.4f}, accuracy {accuracy:.1%}")

    dist.destroy_process_group()


@torch.no_grad()
def evaluate(model, data, first, device):
    """Accuracy on the images from `first` on; each process classifies its share."""
    model.eval()
    share = range(first + dist.get_rank(), len(data), dist.get_world_size())
    x, y = data[list(share)]
    counts = torch.tensor([(model(x.to(device)).argmax(1).cpu() == y).sum(), len(y)], device=device)
    dist.all_reduce(counts)
    return (counts[0] / counts[1]).item()


if __name__ == "__main__":
    main()
