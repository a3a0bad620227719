"""What part of the processor's own rate training reaches."""

import statistics
import sys
import time

import torch
import yaml
from torch import nn
from torch.nn import functional as F

from benchmarks.turns import PRECISIONS, RECIPES, ROOT, TURNS
from mnist_cnn.models.convnet import ConvNet
from mnist_cnn.models.device import keep_memory
from mnist_cnn.training.optimizers import KerasAdam, KerasRMSprop

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def multiply_adds(network, image, training=True):
    """Of one digit: forward, and in training each gradient that is needed."""
    counts = []

    def hook(module, inputs, output):
        count = module.weight[0].numel() * output[0].numel()
        counts.append(count * ((3 if counts else 2) if training else 1))  # nobody needs the gradient of the pixels

    hooks = [m.register_forward_hook(hook) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    network.eval()(image)
    for handle in hooks:
        handle.remove()
    network.train()
    return sum(counts)


def rate(work, operations):
    """GFLOP/s of `work`, over 20 times."""
    for _ in range(5):
        work()
    start = time.perf_counter()
    for _ in range(20):
        work()
    return 20 * operations / (time.perf_counter() - start) / 1e9


def convolution(dtype):
    layer = nn.Conv2d(64, 128, 3).to(dtype, memory_format=torch.channels_last)
    x = torch.randn(64, 64, 13, 13).to(dtype, memory_format=torch.channels_last).requires_grad_()
    return rate(lambda: layer(x).sum().backward(), 2 * 3 * 64 * 128 * 64 * 9 * 121)


def product(dtype):
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    return rate(lambda: a @ b, 2 * 1024**3)


def training(network, batches, precision, optimizer=KerasAdam, device="cpu"):
    """Seconds that the steps take."""
    optimizer = optimizer(network.parameters())
    start = time.perf_counter()
    for images, labels in batches:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()
    return time.perf_counter() - start


def measured(recipe, precision, images, labels):
    specification = yaml.safe_load((ROOT / "conf" / "architecture" / f"{recipe}.yaml").read_text())
    size = yaml.safe_load((ROOT / "conf" / "experiment" / f"{recipe}.yaml").read_text())["data"]["batch_size"]
    network = ConvNet(specification)
    network.onednn = True
    operations = 2 * multiply_adds(network, images[:1])
    batches = list(zip(images.split(size), labels.split(size), strict=True))[: max(10, 4_000 // size)]
    work = sum(len(part) for part, _ in batches) * operations / 1e9
    training(network, batches, precision)
    rounds = [
        {
            "training": work / training(network, batches, precision),
            "convolution": convolution(DTYPES[precision]),
            "product": product(DTYPES[precision]),
        }
        for _ in range(TURNS)
    ]
    fraction = statistics.median(part["training"] / part["convolution"] for part in rounds)
    print("limits", recipe, precision, f"{fraction:.2f}", file=sys.stderr)
    return {
        "recipe": recipe, "precision": precision, "operations": operations, "rounds": rounds, "fraction": fraction
    }  # fmt: skip


def yardstick():
    """Seconds of an epoch of conv32_64_64 by a bare loop in float32, from 50 of its 938 steps: this machine's B."""
    network = ConvNet(yaml.safe_load((ROOT / "conf" / "architecture" / "conv32_64_64.yaml").read_text()))
    network.onednn = True
    images, labels = torch.randint(0, 256, (3_200, 1, 28, 28), dtype=torch.uint8), torch.randint(0, 10, (3_200,))
    batches = list(zip(images.split(64), labels.split(64), strict=True))
    training(network, batches[:10], "float32", KerasRMSprop)
    return training(network, batches, "float32", KerasRMSprop) * 938 / len(batches)


def limits():
    keep_memory()
    images, labels = torch.randint(0, 256, (20_000, 1, 28, 28), dtype=torch.uint8), torch.randint(0, 10, (20_000,))
    rows = [measured(recipe, precision, images, labels) for recipe in RECIPES for precision in PRECISIONS]
    table = [
        "| recipe | million multiply-adds a digit and step | precision | training, GFLOP/s | a convolution alone "
        "| a matrix product | fraction of the convolution's |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        rates = [statistics.median(part[key] for part in row["rounds"]) for key in row["rounds"][0]]
        table.append(
            f"| `{row['recipe']}` | {row['operations'] / 2e6:.2f} | {row['precision']} | "
            f"{' | '.join(f'{rate:.0f}' for rate in rates)} | {row['fraction']:.2f} |"
        )
    table += ["", "The convolution is `conv64_128`'s second, forward and backward; a matrix is 1,024 × 1,024."]
    return rows, table
