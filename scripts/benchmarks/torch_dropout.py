"""mnist-train with torch's own nn.Dropout in place of ours, for `scripts/benchmark dropout`.

usage: python scripts/benchmarks/torch_dropout.py [overrides]
"""

from torch import nn

import mnist_cnn.train
from mnist_cnn.models import convnet


class TorchDropout(nn.Dropout):
    def forward(self, x):
        return super().forward(x.to_dense() if x.is_mkldnn else x)


convnet.Dropout = TorchDropout

if __name__ == "__main__":
    mnist_cnn.train.main()
