"""What an example may end as: a result, or a user error."""

from mnist_cnn.config.schema import UserError
from mnist_cnn.data import datasets

DIGITS = datasets.load("digits", "")


def refusal_allowed(work):
    """What `work` returns; None where it ends as a user error, whose message is short."""
    try:
        return work()
    except UserError as error:
        message = str(error)
    assert 0 < len(message) < 3000
    return None
