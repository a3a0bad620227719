# %% [markdown]
# # Why convolution? A dense network beside a convolutional one
#
# After "Convolutional Neural Network - MNIST", told with mnist_cnn. `python 004_mlp_beside_cnn.py` runs it all,
# `data=digits` after that takes scikit-learn's small digits in place of MNIST.

# %%
import sys
from pathlib import Path

from PIL import Image

from mnist_cnn import MNISTDataModule, train
from mnist_cnn.inference.plots import learning_curves, save

words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]

# %% [markdown]
# ## Two networks, one recipe
#
# The dense network, a *multilayer perceptron*, has a weight for each pixel and unit: 784 × 512 in its first layer. A
# stroke that moves by one pixel meets other weights, and has to be learnt again at each place. A convolution has the
# same few weights everywhere in the picture, so what it learns in one place it knows in all of them: the second
# network has less than a quarter of the first one's weights.
#
# Both train as the tutorial does, by RMSprop, 5 epochs in batches of 64. To draw their curves a tenth of the digits
# is held out; nothing is chosen by it.

# %%
runs = {
    name: train([f"experiment={recipe}", "data.validation=0.1", *words])
    for name, recipe in {"dense": "mlp", "convolutional": "conv32_64_64"}.items()
}

# %%
for name, run in runs.items():
    print(f"{name:<14} {run.metrics['parameters']:>8,} weights, test accuracy {run.metrics['test/accuracy']:.2%}")
picture = Path("outputs/tutorials/004_curves.png")
save(learning_curves({name: run.history for name, run in runs.items()}), picture)
Image.open(picture)

# %% [markdown]
# ## What each has learnt
#
# A unit of the dense network looks at the whole picture at once: its weights are a blurred mixture of digits and
# noise.

# %%
Image.open(runs["dense"].folder / "plots" / "first_weights.png")

# %% [markdown]
# A filter of the convolutional network is small, and looks for a stroke, an edge or a corner wherever it may be.

# %%
Image.open(runs["convolutional"].folder / "plots" / "first_weights.png")

# %% [markdown]
# The second block puts strokes together, the third one larger parts of a digit.

# %%
Image.open(runs["convolutional"].folder / "plots" / "feature_maps_1.png")

# %%
Image.open(runs["convolutional"].folder / "plots" / "feature_maps_3.png")

# %% [markdown]
# ## A digit that is moved
#
# The test digits, three pixels to the right: the dense network has lost more of them.

# %%
data = MNISTDataModule("digits" if "data=digits" in words else "mnist")
data.setup()
moved = data.test.images.roll(3, dims=3)
for name, run in runs.items():
    right = (run.classifier.logits(moved).argmax(1) == data.test.labels).double().mean().item()
    print(f"{name:<14} {run.metrics['test/accuracy']:.2%}, moved {right:.2%}")
