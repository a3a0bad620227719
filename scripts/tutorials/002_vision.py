# %% [markdown]
# # From pixels to a network that is saved, loaded, trained more and taught something new
#
# After "Convolutional Neural Networks for Vision", told with mnist_cnn. `python 002_vision.py` runs it all,
# `data=digits` after that takes scikit-learn's small digits in place of MNIST.

# %%
import sys
from pathlib import Path

from PIL import Image

from mnist_cnn import MNISTDataModule, load_classifier, train
from mnist_cnn.inference.plots import training_digits

words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
pictures = Path("outputs/tutorials")

# %% [markdown]
# ## Explore the data
#
# Look at the digits before any network does. Change `seed` and run the cell again: some 4s are 9s to you as well.

# %%
data = MNISTDataModule("digits" if "data=digits" in words else "mnist")
data.setup()
print(data.shapes())
training_digits(data.train.images, data.train.labels, data.classes, seed=1, path=pictures / "002_digits.png")
Image.open(pictures / "002_digits.png")

# %% [markdown]
# ## The network, and its training
#
# 64 filters of 3 × 3 make 26 × 26 × 64 = 43,264 features of 784 pixels; pooling leaves a quarter of them, which is
# also what keeps the network from learning digits by heart. 128 filters look for larger features in the first ones.
# 3,200 numbers are left for a dense layer of 128 units: nearly 500,000 weights for pictures smaller than an icon.
#
# The last tenth of the training digits is held out. Its accuracy tells how the training goes and which epoch to keep,
# so that nothing is chosen by the test set.

# %%
run = train(["experiment=conv64_128", *words])
run

# %%
Image.open(run.folder / "plots" / "learning_curves.png")

# %% [markdown]
# ## Predict
#
# The network says how sure it is of each digit.

# %%
classifier = run.classifier


def display_probabilities(index):
    print(f"test digit {index}, a {data.classes[int(data.test.labels[index])]}:")
    probabilities = classifier.probabilities(data.test.images[index])[0]
    for label, probability in zip(classifier.classes, probabilities, strict=True):
        print(f"  {label}: {probability:.10%}")


display_probabilities(0)

# %% [markdown]
# ## Where it is wrong
#
# The test digits that it gets wrong, those first of which it was most sure. Cover the labels: what would you have
# said?

# %%
Image.open(run.folder / "plots" / "incorrect_digits.png")

# %%
predicted = classifier.predict(data.test.images)
incorrect = [index for index, label in enumerate(data.test.labels) if predicted[index] != data.classes[int(label)]]
print(len(incorrect), "incorrect predictions")
for index in incorrect[:3]:
    display_probabilities(index)

# %% [markdown]
# ## Save, load, train more
#
# A run has saved its network already. The file describes itself: whoever loads it needs neither this script nor a
# copy of the architecture, and nothing in it is ever executed. `initialize` starts another training from its weights.

# %%
same = load_classifier(run.folder / "checkpoints" / "best.ckpt")
assert same.predict(data.test.images) == predicted
more = train([f"initialize={run.folder}", "optimizer.lr=0.0002", "epochs=2", "plots=false", *words])

# %% [markdown]
# ## Transfer
#
# What the blocks have learnt about strokes serves other tasks too. They are frozen, and only the dense layers learn
# which digits are which, from 500 digits alone; beside it the same network that has to begin with nothing.

# %%
held_out = 0.65 if "data=digits" in words else 59_500
few = [f"data.validation={held_out}", "epochs=5", "plots=false", *words]
known = train([f"initialize={run.folder}", "freeze=blocks", "seed=2", *few], verbose=False)
anew = train(["architecture=conv64_128", "seed=2", *few], verbose=False)
for name, each in (("transfer", known), ("from nothing", anew)):
    print(f"{name:<13} {each.metrics['test/accuracy']:.2%}")
