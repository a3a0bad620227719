"""What scripts/benchmark compares with mnist-train, each as its own users would write it.

usage: python scripts/benchmarks/contestants.py bare|stock|example|keras RECIPE PRECISION EPOCHS [overrides, for bare]

Each says "ready" once its data is read, a line at each epoch's end, and its test accuracy at the end; after "ready" and
after each epoch it waits for a line.
"""

import logging
import os
import sys
import warnings

import numpy as np

warnings.filterwarnings("ignore")
ROOT = os.environ.get("MNIST_CNN_DATA", "data")


def ready():
    print("ready", flush=True)
    sys.stdin.readline()


def epoch_ended(epoch):
    print(f"epoch {epoch}", flush=True)
    sys.stdin.readline()  # until it is told to go on


def bare(recipe, precision, epochs, *overrides):
    """A plain PyTorch loop over the recipe's own tensors, network, optimizer and batch size."""
    import hydra
    import torch
    from omegaconf import OmegaConf
    from torch.nn import functional as F

    from mnist_cnn.config.data_settings import Data
    from mnist_cnn.config.settings import CONF
    from mnist_cnn.data.datamodule import MNISTDataModule
    from mnist_cnn.models.convnet import ConvNet
    from mnist_cnn.models.device import keep_memory

    keep_memory()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose("train", [f"experiment={recipe}", *overrides]), resolve=True)
    torch.manual_seed(1)
    config["data"].pop("_target_")
    data = MNISTDataModule(**Data.model_validate(config["data"]).model_dump(), seed=1)
    data.setup()
    network = ConvNet(config["architecture"], 10, data.mean, data.std)
    network.onednn = True
    optimizer = hydra.utils.instantiate(config["optimizer"])(network.parameters())
    images, labels = data.train
    mixed = {"device_type": "cpu", "dtype": torch.bfloat16, "enabled": precision != "32-true"}
    ready()
    for epoch in range(1, epochs + 1):
        network.train()
        for chosen in torch.randperm(len(labels)).split(config["data"]["batch_size"]):
            with torch.autocast(**mixed):
                loss = F.cross_entropy(network(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.no_grad(), torch.autocast(**mixed):
            for part in data.validation.images.split(100):
                network(part)
        epoch_ended(epoch)
    with torch.no_grad():
        right = sum(
            (network(i).argmax(1) == y).sum()
            for i, y in zip(data.test.images.split(100), data.test.labels.split(100), strict=True)
        )
    print("test accuracy", right.item() / len(data.test.labels), flush=True)


def stock(recipe, precision, epochs):
    """The usual Lightning habit: per-sample transforms in a DataLoader, and a log and a metric at each step."""
    import pytorch_lightning as pl
    import torch
    import torchmetrics
    import yaml
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, Subset
    from torchvision import transforms
    from torchvision.datasets import MNIST

    from mnist_cnn.config.settings import CONF

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    pl.seed_everything(1, verbose=False)
    specification = yaml.safe_load((CONF / "architecture" / f"{recipe}.yaml").read_text())
    settings = yaml.safe_load((CONF / "experiment" / f"{recipe}.yaml").read_text())

    def network():
        layers, channels = [], 1
        for block in specification["blocks"]:
            layers += [nn.Conv2d(channels, block["filters"], block["kernel"]), nn.ReLU()]
            layers += [nn.MaxPool2d(block["pool"])] if block.get("pool") else []
            layers += [nn.Dropout(block["dropout"])] if block.get("dropout") else []
            channels = block["filters"]
        layers.append(nn.Flatten())
        for dense in specification["dense"]:
            units, dropout = (dense["units"], dense["dropout"]) if isinstance(dense, dict) else (dense, 0)
            layers += [nn.LazyLinear(units), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
        return nn.Sequential(*layers, nn.LazyLinear(10))

    class Stock(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()
            self.network(torch.zeros(1, 1, 28, 28))
            self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=10)

        def training_step(self, batch, index):
            images, labels = batch
            logits = self.network(images)
            loss = F.cross_entropy(logits, labels)
            self.accuracy(logits, labels)
            self.log("train/loss", loss)
            self.log("train/accuracy", self.accuracy)
            return loss

        def validation_step(self, batch, index):
            self.log("val/accuracy", (self.network(batch[0]).argmax(1) == batch[1]).float().mean())

        def test_step(self, batch, index):
            self.log("test/accuracy", (self.network(batch[0]).argmax(1) == batch[1]).float().mean())

        def on_train_epoch_end(self):
            epoch_ended(self.current_epoch + 1)

        def configure_optimizers(self):
            kind = torch.optim.RMSprop if recipe == "conv32_64_64" else torch.optim.Adam
            return kind(self.parameters(), lr=1e-3)

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    train, test = (MNIST(ROOT, train=part, transform=transform) for part in (True, False))
    size = settings["data"]["batch_size"]
    validation = None
    if settings["data"]["validation"]:
        validation = DataLoader(Subset(train, range(54_000, 60_000)), size)
        train = Subset(train, range(54_000))
    loader = DataLoader(train, size, shuffle=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        precision=precision,
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    ready()
    model = Stock()
    trainer.fit(model, loader, validation)
    print("test accuracy", trainer.test(model, DataLoader(test, 1000), verbose=False)[0]["test/accuracy"], flush=True)


def example(recipe, precision, epochs):
    """The network and the loop of PyTorch's own MNIST example (pytorch/examples, mnist/main.py)."""
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import MNIST

    torch.manual_seed(1)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    train, test = (MNIST(ROOT, train=part, transform=transform) for part in (True, False))
    network = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10), nn.LogSoftmax(1),
    )  # fmt: skip
    optimizer = torch.optim.Adadelta(network.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
    ready()
    for epoch in range(1, epochs + 1):
        network.train()
        for images, labels in DataLoader(train, 64, shuffle=True):
            optimizer.zero_grad()
            F.nll_loss(network(images), labels).backward()
            optimizer.step()
        schedule.step()
        epoch_ended(epoch)
    network.eval()
    with torch.no_grad():
        right = sum((network(images).argmax(1) == labels).sum() for images, labels in DataLoader(test, 1000))
    print("test accuracy", right.item() / len(test), flush=True)


def keras(recipe, precision, epochs):
    """A tutorial as it was written, on Keras 3 and TensorFlow: its layers, its data in floats, its call of fit."""
    os.environ.update(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3")
    from keras import Input, Sequential, callbacks, layers, utils

    utils.set_random_seed(1)

    def read(name):
        offset = 8 if "labels" in name else 16
        return np.fromfile(f"{ROOT}/MNIST/raw/{name}", np.uint8)[offset:]

    def part(name):
        images = read(f"{name}-images-idx3-ubyte").reshape(-1, 28, 28, 1).astype("float32") / 255
        return images, utils.to_categorical(read(f"{name}-labels-idx1-ubyte"))

    conv, pool, dense = layers.Conv2D, layers.MaxPooling2D, layers.Dense
    stack, optimizer, batch, extra = {
        "conv30_70": (
            [conv(30, 5, activation="relu"), pool(), conv(70, 3, activation="relu"), pool(),
             layers.Flatten(), dense(100, activation="relu")],
            "adam", 200, {}),
        "conv32_32_dropout": (
            [conv(32, 3), layers.Activation("relu"), conv(32, 3), layers.Activation("relu"), pool(),
             layers.Dropout(0.25), layers.Flatten(), dense(128), layers.Activation("relu"), layers.Dropout(0.5)],
            "adam", 128, {"test": True}),
        "conv64_128": (
            [conv(64, 3, activation="relu"), pool(), conv(128, 3, activation="relu"), pool(),
             layers.Flatten(), dense(128, activation="relu")],
            "adam", 64, {"validation_split": 0.1}),
        "conv10": (
            [conv(10, 5, activation="relu"), pool(), layers.Flatten(), dense(100, activation="relu")],
            "adam", 200, {"test": True}),
        "conv32_64_64": (
            [conv(32, 3, activation="relu"), pool(), conv(64, 3, activation="relu"), pool(),
             conv(64, 3, activation="relu"), layers.Flatten(), dense(64, activation="relu")],
            "rmsprop", 64, {}),
    }[recipe]  # fmt: skip
    train, test = part("train"), part("t10k")
    model = Sequential([Input((28, 28, 1)), *stack, dense(10, activation="softmax")])
    model.compile(optimizer=optimizer, loss="categorical_crossentropy", metrics=["accuracy"])
    if extra.pop("test", False):
        extra["validation_data"] = test
    ready()
    told = callbacks.LambdaCallback(on_epoch_end=lambda epoch, _: epoch_ended(epoch + 1))
    model.fit(*train, batch_size=batch, epochs=epochs, verbose=0, callbacks=[told], **extra)
    print("test accuracy", model.evaluate(*test, verbose=0)[1], flush=True)


if __name__ == "__main__":
    name, recipe, precision, epochs, *overrides = sys.argv[1:]
    {"bare": bare, "stock": stock, "example": example, "keras": keras}[name](recipe, precision, int(epochs), *overrides)
