"""The artifact: a folder `NAME.evit` of model.onnx, weights.safetensors and the manifest that vouches for them.

manifest.py  what the manifest says, its own hash, and the checks that its form passes
reader.py    `Bundle`: opened with every hash checked, never read through a link or from outside
writer.py    `BundleWriter`: the whole new bundle or no trace
filelock.py  one writer per target, by a lock that dies with its holder
atomic.py    moving, exchanging and flushing folders
"""

from evit_deploy.bundle.reader import Bundle, hash_file

__all__ = ["Bundle", "hash_file"]
