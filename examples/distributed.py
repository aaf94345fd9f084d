"""Trains image_classification.py's network in several processes, each on its share of every batch:

    torchrun --nproc-per-node 2 examples/distributed.py [--fsdp] [options of image_classification.py]

DistributedDataParallel keeps the parameters whole in every process; --fsdp shards them.
"""

import argparse
import os

import torch
import torch.distributed as dist
from image_classification import CNN, History, load_data, parse_args, test, train
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import fastnn.nn as nn
import fastnn.optim as optim


def parallel(model: nn.Module, fsdp: bool) -> nn.Module:
    """The model, to be trained by all processes together."""
    if not fsdp:
        return DistributedDataParallel(model)
    for layers in model.children():
        fully_shard(layers)
    fully_shard(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--fsdp", action="store_true")
    own, rest = parser.parse_known_args()
    args = parse_args(rest)
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    torch.manual_seed(args.seed)  # the same initial weights everywhere
    train_set, test_set = load_data(args.data, args.image_size)
    sampler: DistributedSampler[tuple[torch.Tensor, int]] = DistributedSampler(train_set, seed=args.seed)
    loader = DataLoader(train_set, args.batch_size // dist.get_world_size(), sampler=sampler)

    model = CNN(args.image_size, len(train_set.classes)).to(args.device)
    if args.convert:
        import fastnn

        fastnn.convert(model)
    model = parallel(model, own.fsdp)
    optimizer = optim.Adam(model.parameters(), lr=args.lr)
    history = History()
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        history = train(model, loader, nn.CrossEntropyLoss(), optimizer, args.device, f"epoch {epoch + 1}")
    history.accuracy = test(model, DataLoader(test_set, args.batch_size), args.device)
    if dist.get_rank() == 0:
        print(f"accuracy on {len(test_set)} test images: {history.accuracy:.1%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
