# %% [markdown]
# # What convolution and pooling do, seen in a trained network
#
# After "Training Convolution model with Keras", told with mnist_cnn. `python 003_convolution_and_pooling.py` runs it
# all, `data=digits` after that takes scikit-learn's small digits in place of MNIST.

# %%
import sys

import numpy as np
from PIL import Image

from mnist_cnn import MNISTDataModule, train

words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]

# %% [markdown]
# ## Convolution by hand
#
# A picture of one upright stroke, and a kernel that looks for bright pixels with dark ones on their left. Each number
# of the output is the sum of nine products: large where the stroke begins, negative where it ends, nothing on even
# paper.

# %%
picture = np.zeros((6, 6), int)
picture[:, 2:4] = 1
kernel = np.array([[-1, 0, 1]] * 3)
output = np.array([[(picture[y : y + 3, x : x + 3] * kernel).sum() for x in range(4)] for y in range(4)])
print(picture, kernel, output, sep="\n\n")

# %% [markdown]
# ## ReLU and pooling by hand
#
# ReLU keeps what was found and drops the opposite of it. Pooling keeps the largest of each 2 × 2: a quarter of the
# numbers, and the stroke may move by a pixel without another result.

# %%
rectified = np.maximum(output, 0)
pooled = rectified.reshape(2, 2, 2, 2).max(axis=(1, 3))
print(rectified, pooled, sep="\n\n")

# %% [markdown]
# ## A network that finds its own kernels
#
# Ten kernels of 5 × 5, pooling, then *flatten*: 12 × 12 × 10 maps as one list of 1,440 numbers, and two dense layers
# as in a network without convolution. Nobody tells the kernels what to look for: training does.

# %%
run = train(["experiment=conv10", *words])

# %% [markdown]
# Red weights want ink, blue ones want paper. Some kernels have become detectors of edges in one direction.

# %%
Image.open(run.folder / "plots" / "first_weights.png")

# %% [markdown]
# The ten maps of one digit: dark where the kernel of that number has found what it looks for.

# %%
Image.open(run.folder / "plots" / "feature_maps_1.png")

# %% [markdown]
# The same numbers as an array, for a digit of your choice, and the digit with its probabilities.

# %%
data = MNISTDataModule("digits" if "data=digits" in words else "mnist")
data.setup()
digit = data.test.images[3, 0].numpy()
(maps,) = run.classifier.feature_maps(digit)
print(maps.shape, "maps; the strongest answer of each filter:", maps.max(axis=(1, 2)).round(1))

# %%
run.classifier.show(digit)

# %%
print(f"test accuracy {run.metrics['test/accuracy']:.2%}")
