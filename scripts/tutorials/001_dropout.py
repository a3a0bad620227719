# %% [markdown]
# # Two convolutions, and dropout against learning by heart
#
# After "MNIST classification with Keras", told with mnist_cnn. `python 001_dropout.py` runs it all, `data=digits`
# after that takes scikit-learn's small digits in place of MNIST.

# %%
import sys
from pathlib import Path

from PIL import Image

from mnist_cnn import train
from mnist_cnn.inference.plots import learning_curves, save

words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]

# %% [markdown]
# ## How large is a filter, and how many are there?
#
# A kernel of 28 × 28 would see the whole picture at once, one of 1 × 1 only a pixel: neither finds strokes and
# corners. 3 × 3 is the usual choice. The more difficult the task, the more filters: here 32, twice. Two convolutions
# follow each other before anything is pooled, so that the second one can put the first one's features together. It is
# `narrow`: it stays inside the picture, and 28 pixels become 26, then 24, which pooling halves to 12.

# %%
blocks = "[{filters:32,kernel:3},{filters:32,kernel:3,pool:2,dropout:0.25}]"
dense = "[{units:128,dropout:0.5}]"

# %% [markdown]
# ## Dropout
#
# In training, a quarter of the features and then half of the dense layer's units are set to zero, others at each
# step. No unit can rely on one other, so the network learns many weak reasons in place of a few strong ones. To see
# what that does, the same network is trained without it as well, and both are scored on digits held out from
# training.

# %%
without = ["architecture.blocks.1.dropout=0", "architecture.dense=[128]"]
compared = {}
for name, changes in {"with dropout": [], "without": without}.items():
    recipe = ["experiment=conv32_32_dropout", "data.validation=0.1", "epochs=6", "test=false", "plots=false"]
    compared[name] = train([*recipe, *words, *changes], verbose=False).history
    last = compared[name][-1]
    print(f"{name:<13} training {last['train/accuracy']:.2%}, validation {last['val/accuracy']:.2%}")

# %%
picture = Path("outputs/tutorials/001_dropout.png")
save(learning_curves(compared), picture)
Image.open(picture)

# %% [markdown]
# Training with dropout looks worse than it is, as its figures are those of the thinned network.
#
# ## The tutorial's own recipe
#
# Adam, two epochs in batches of 128, all digits in training, the network written out on the command line's words. The
# tutorial watches the test set while it trains; here that is looked at once, at the end.

# %%
run = train(["experiment=conv32_32_dropout", f"architecture.blocks={blocks}", f"architecture.dense={dense}", *words])
print(f"loss {run.metrics['test/loss']:.4f}, accuracy {run.metrics['test/accuracy']:.2%}")
