"""Trains a small spiking convolutional network on handwritten digits.

An ordinary PyTorch program: it knows nothing of the recorder. 1 797 real images of 8 x 8 pixels (scikit-learn's digits)
become spikes over four time steps, each pixel spiking with its brightness as probability. Prints one line of JSON at
the end.

    python demo/train.py
    optape record -o digits.optape -- python demo/train.py
"""

import argparse
import json
import time
from pathlib import Path

import numpy
import torch
from sklearn.datasets import load_digits
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn

TIME_STEPS = 4
CLASSES = 10
TEST_IMAGES = 360


class SpikingDigits(nn.Module):
    """Two convolutions and two linear layers with leaky neurons between them; the last layer's current, averaged over time, is
    the answer. One call is one time step."""

    def __init__(self, channels: int = 32, hidden: int = 128):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1)
        self.lif1 = leaky()
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.lif2 = leaky()
        self.pool = nn.AvgPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(2 * channels * 4 * 4, hidden)
        self.lif3 = leaky()
        self.fc2 = nn.Linear(hidden, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lif1(self.conv1(x))
        x = self.pool(self.lif2(self.conv2(x)))
        x = self.lif3(self.fc1(self.flatten(x)))
        return self.fc2(x)


def leaky() -> neuron.LIFNode:
    return neuron.LIFNode(tau=2.0, decay_input=False, v_threshold=0.5, surrogate_function=surrogate.Sigmoid(alpha=4.0), detach_reset=True)


def answer(network: nn.Module, spikes: torch.Tensor) -> torch.Tensor:
    """Runs all time steps of [time, batch, 1, 8, 8] and returns the mean output, [batch, 10]."""
    functional.reset_net(network)
    total = network(spikes[0])
    for step in range(1, TIME_STEPS):
        total = total + network(spikes[step])
    return total / TIME_STEPS


def encode(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Brightness to spikes: [batch, 1, 8, 8] in 0..1 becomes [time, batch, 1, 8, 8] of 0 and 1."""
    return (torch.rand(TIME_STEPS, *images.shape, generator=generator) < images).to(images.dtype)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All images and labels, in an order that is always the same."""
    data = load_digits()
    order = numpy.random.RandomState(0).permutation(len(data.images))
    images = torch.from_numpy(data.images[order]).to(torch.float32).unsqueeze(1) / 16
    return images, torch.from_numpy(data.target[order]).to(torch.int64)


def accuracy(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch: int, generator: torch.Generator) -> float:
    network.eval()
    right = 0
    with torch.no_grad(), torch.profiler.record_function("test"):
        for first in range(0, len(images), batch):
            spikes = encode(images[first : first + batch], generator)
            right += (answer(network, spikes).argmax(1) == labels[first : first + batch]).sum().item()
    return right / len(images)


def save(path: Path, network: nn.Module, images: torch.Tensor, labels: torch.Tensor, spikes: torch.Tensor) -> None:
    """Writes weights, all digits and one encoded batch as flat little-endian files, with `index.json` over them."""
    path.mkdir(parents=True, exist_ok=True)
    index = {}
    tensors = dict(network.state_dict(), images=images, labels=labels, batch=spikes)
    for name, tensor in tensors.items():
        values = tensor.detach().numpy()
        values = values.astype("<i8" if values.dtype.kind == "i" else "<f4")
        values.tofile(path / f"{name}.bin")
        index[name] = {"file": f"{name}.bin", "dtype": values.dtype.name, "shape": list(values.shape)}
    index["test_images"] = TEST_IMAGES
    (path / "index.json").write_text(json.dumps(index, indent=1) + "\n")


def load(path: Path) -> dict[str, torch.Tensor]:
    """What `save` wrote."""
    index = json.loads((path / "index.json").read_text())
    return {
        name: torch.from_numpy(numpy.fromfile(path / entry["file"], entry["dtype"]).reshape(entry["shape"]))
        for name, entry in index.items()
        if isinstance(entry, dict)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, metavar="DIR", help="write weights, digits and one batch for other programs")
    parser.add_argument("--one-batch", type=Path, metavar="DIR", help="run the saved batch forward with the saved weights, and nothing else")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    images, labels = digits()
    train_images, train_labels = images[TEST_IMAGES:], labels[TEST_IMAGES:]
    test_images, test_labels = images[:TEST_IMAGES], labels[:TEST_IMAGES]
    network = SpikingDigits()

    if options.one_batch:
        saved = load(options.one_batch)
        network.load_state_dict({name: saved[name] for name in network.state_dict()})
        network.eval()
        with torch.no_grad(), torch.profiler.record_function("batch"):
            outputs = answer(network, saved["batch"])
        print(json.dumps({"images": len(outputs), "sum": outputs.sum(dtype=torch.float64).item()}))
        return

    optimizer = torch.optim.Adam(network.parameters(), lr=options.learning_rate)
    started = time.monotonic()
    for epoch in range(options.epochs):
        network.train()
        total = 0.0
        order = torch.randperm(len(train_images), generator=generator)
        for first in range(0, len(order), options.batch_size):
            batch = order[first : first + options.batch_size]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(answer(network, encode(train_images[batch], generator)), train_labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch + 1}/{options.epochs}: loss {total / len(order):.4f}", flush=True)
    seconds = time.monotonic() - started
    reached = accuracy(network, test_images, test_labels, options.batch_size, generator)
    if options.save:
        save(options.save, network, images, labels, encode(test_images[: options.batch_size], generator))
    print(
        json.dumps(
            {
                "accuracy": reached,
                "epochs": options.epochs,
                "train_images": len(train_images) * options.epochs,
                "test_images": len(test_images),
                "train_seconds": round(seconds, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
