"""A program with marks in it, which runs recorded and unrecorded; with an argument, also through torch.compile with fullgraph."""

import sys

import torch

import optape


@optape.range("measure")
def measure(layer, images):
    return layer(images)


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4)
    images = torch.rand(32, 6)

    def forward(x):
        with optape.stage("inner"), optape.range("inner"):
            optape.watch(x, "inner")
            y = layer(x)
        optape.step(samples=1)
        return y

    if len(sys.argv) > 1:
        forward = torch.compile(forward, fullgraph=True, backend="eager")
    for _ in range(3):
        with optape.stage("testing"):
            measure(layer, images)
        optape.watch(images, "images")
        optape.step(samples=32)
        if len(sys.argv) > 1:
            forward(images)
    recording = optape.start("ignored.optape")
    print(repr(recording), repr(optape.stop()))
    torch.erf(images)
    print("done")


if __name__ == "__main__":
    main()
