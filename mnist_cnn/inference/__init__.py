"""From any picture to labels, and figures of a classifier."""
