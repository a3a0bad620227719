"""`python -m mnist_cnn.import`: the word is Python's own, so the command is in `keras_import`."""

from mnist_cnn.keras_import import main

if __name__ == "__main__":
    main()
