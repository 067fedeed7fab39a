"""A job for two processes: the gradients of a batch that they share are those of one process.

torchrun --nproc-per-node=2 sharing.py ddp|fsdp
"""

import sys

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rolldiff import Decoder, TokenGrid, Training


def build():
    torch.manual_seed(0)
    decoder = Decoder.build(
        image_size=8,
        channels=1,
        patch=2,
        width=32,
        depth=2,
        heads=2,
        condition=TokenGrid(2, 2, channels=3),
        training=Training((1, 4), drop_cond=0.5),
    )
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return decoder


def batch(count=4):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1
    return image, torch.randn(count, 2, 2, 3, generator=generator)


def backward(decoder, part, rank):
    image, cond = (whole[part] for whole in batch())
    decoder(image, cond, generator=torch.Generator().manual_seed(rank)).backward()


def main(kind):
    distributed.init_process_group("gloo")
    rank, shares = distributed.get_rank(), (slice(0, 2), slice(2, 4))
    decoder = build()
    if kind == "ddp":
        wrapped = DistributedDataParallel(decoder)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in decoder.backbone.blocks:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(decoder, mesh=mesh)
    backward(wrapped, shares[rank], rank)
    found = {
        name: p.grad.full_tensor() if kind == "fsdp" else p.grad
        for name, p in decoder.named_parameters()
    }
    plain = build()
    for number, part in enumerate(shares):
        backward(plain, part, number)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad / 2, msg=name)
    print("the same gradients", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
