"""transformers' own Mamba-family models on `ophis.ops`: `accelerate_transformers()`.

families.py        which models, and what of each is replaced
functions.py       the functions that they share
mixers.py          the `forward` of their mixers
packing.py         the `forward` of their stacks, which takes packed sequences in any form
keywords.py        the methods between, which drop what is meant for the mixers
sequences.py       the sequences within a padded or packed batch
fingerprint.py     how a method that changed is told from the one that was known
acceleration.py    the switch, and its report
"""

from ophis.integrations.transformers.acceleration import Acceleration, accelerate_transformers

__all__ = ["Acceleration", "accelerate_transformers"]
