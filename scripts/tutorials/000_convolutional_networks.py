# %% [markdown]
# # A first convolutional network
#
# After "Convolutional Neural Networks" by AbdElRhman ElMoghazy, told with mnist_cnn. Each `# %%` begins a cell: VS
# Code, Jupyter and jupytext open this file as a notebook, and `python 000_convolutional_networks.py` runs it.
# `data=digits` after the file's name takes scikit-learn's small digits in place of MNIST: nothing is downloaded, all
# is quick.

# %%
import sys

from PIL import Image

from mnist_cnn import MNISTDataModule, train
from mnist_cnn.models.convnet import ConvNet, summary

words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]

# %% [markdown]
# ## The digits
#
# MNIST has 60,000 digits to learn from and 10,000 to be tested on, 28 pixels high and wide. A pixel is a number from
# 0, the paper, to 255, the ink. The network itself divides by 255, so it takes pixels as they are.

# %%
data = MNISTDataModule("digits" if "data=digits" in words else "mnist")
data.setup()
print(data.shapes())

# %% [markdown]
# ## The network
#
# A *convolution* moves a small window, the kernel, over the picture. Where the pixels under it look like the kernel,
# the output is large: the output is a map of where one feature is. *Max pooling* keeps the largest of each 2 × 2
# outputs, so that a feature may lie a little elsewhere, and three quarters of the work are saved. As the maps get
# smaller there are more of them: 30, then 70. *Dense* layers at the end weigh all of them into ten numbers, one for
# each digit, and softmax makes probabilities of these.

# %%
blocks = [{"filters": 30, "kernel": 5, "pool": 2}, {"filters": 70, "kernel": 3, "pool": 2}]
network = ConvNet({"blocks": blocks, "dense": [100]})
print(summary(network))

# %% [markdown]
# ## Training
#
# The *loss*, here the cross entropy, is large where the network gives the right digit a small probability. The
# *optimizer*, here Adam, moves each weight a little in the direction that makes the loss of a batch of digits
# smaller. An *epoch* is once through all digits. The tutorial's whole recipe is an experiment: 10 epochs in batches
# of 200.

# %%
run = train(["experiment=conv30_70", *words])

# %% [markdown]
# ## How good is it?
#
# On digits that it has never seen, which is the only figure that counts. One run is one throw of the dice: the
# recipe's mean over seeds, and how far single runs lie apart, stand in scripts/README.md.

# %%
print(f"loss {run.metrics['test/loss']:.4f}, accuracy {run.metrics['test/accuracy']:.2%}")
print("where it left everything:", run.folder)

# %%
Image.open(run.folder / "plots" / "confusion_matrix.png")

# %%
Image.open(run.folder / "plots" / "learning_curves.png")
