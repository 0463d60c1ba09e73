"""From a checkpoint file to a model spec and its weights under canonical names: `load_checkpoint`.

file.py         what kind of file it is, and what may safely be read from it
weights.py      which of its state dicts, and that its tensors are sound
config.py       what it says about itself
key_formats.py  from timm's, MIT's and Microsoft's names to the canonical ones
detect.py       from shapes to hyperparameters
spec.py         which model that is, at which image size
match.py        nothing missing, nothing unused
load.py         all of it, in this order
"""

from evit_deploy.checkpoint.config import CONFIG_KEY
from evit_deploy.checkpoint.load import SPEC_METADATA_KEY, Checkpoint, load_checkpoint

__all__ = ["CONFIG_KEY", "SPEC_METADATA_KEY", "Checkpoint", "load_checkpoint"]
