"""The names that the three families' weights carry in published checkpoints, and their canonical names.

Canonical are the keys of the reference module: timm's for `mit` and `msra`, our own module's for `msa`. A format is a
list of rules, each a prefix in the file and the canonical prefix; block numbers stand as {} and may be shifted. Rules
work in both directions, so that an error can name a missing tensor as the file would have named it.

Source: MIT github.com/mit-han-lab/efficientvit, efficientvit/models (the names have not changed since the first
release; the L models have no `input_stem`, their stem is stage 0). Microsoft github.com/microsoft/Cream,
EfficientViT/classification/model/efficientvit.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

_NUMBER = r"(0|[1-9]\d{0,3})"


@dataclass(frozen=True)
class Rule:
    """One prefix and its canonical counterpart; canonical number = number in the file + shift."""

    file_prefix: str
    canonical_prefix: str
    shift: int = 0  # of the last number

    @cached_property
    def _file_pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.file_prefix).replace(r"\{\}", _NUMBER))

    @cached_property
    def _canonical_pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.canonical_prefix).replace(r"\{\}", _NUMBER))

    def to_canonical(self, key: str) -> str | None:
        return self._rename(key, self._file_pattern, self.canonical_prefix, self.shift)

    def to_file(self, key: str) -> str | None:
        return self._rename(key, self._canonical_pattern, self.file_prefix, -self.shift)

    @staticmethod
    def _rename(key: str, pattern: re.Pattern[str], template: str, shift: int) -> str | None:
        match = pattern.match(key)
        if match is None:
            return None
        numbers = [int(n) for n in match.groups()]
        if numbers:
            numbers[-1] += shift
            if numbers[-1] < 0:
                return None
        return template.format(*numbers) + key[match.end() :]


@dataclass(frozen=True)
class KeyFormat:
    """One way of naming one family's weights.

    Attributes:
        name: "timm", "mit", "microsoft" or "evit-deploy", as recorded in a bundle.
        signature: matches the keys that this format has and no other.
        rules: the first that matches applies; none: the names are canonical already.
        leaves: last components of a name, in the file and canonical.
    """

    name: str
    family: str
    signature: re.Pattern[str]
    rules: tuple[Rule, ...] = ()
    leaves: tuple[tuple[str, str], ...] = ()

    def to_canonical(self, key: str) -> str | None:
        """The canonical name, or None when no rule knows the key."""
        if not self.rules:
            return key
        for rule in self.rules:
            renamed = rule.to_canonical(key)
            if renamed is not None:
                return self._rename_leaf(renamed, self.leaves)
        return None

    def to_file(self, key: str) -> str:
        """The name a file of this format gives to a canonical name."""
        for rule in self.rules:
            renamed = rule.to_file(key)
            if renamed is not None:
                return self._rename_leaf(renamed, tuple((canonical, file) for file, canonical in self.leaves))
        return key

    @staticmethod
    def _rename_leaf(key: str, leaves: tuple[tuple[str, str], ...]) -> str:
        for old, new in leaves:
            if key.endswith(f".{old}"):
                return key.removesuffix(old) + new
        return key


_MIT_HEAD = (
    Rule("head.op_list.0.", "head.in_conv."),
    Rule("head.op_list.2.linear.", "head.classifier.0."),
    Rule("head.op_list.2.norm.", "head.classifier.1."),
    Rule("head.op_list.3.linear.", "head.classifier.4."),
)
_MIT_BASE = (
    Rule("backbone.input_stem.op_list.0.", "stem.in_conv."),
    Rule("backbone.input_stem.op_list.{}.", "stem.res{}.", shift=-1),
    Rule("backbone.stages.{}.op_list.{}.", "stages.{}.blocks.{}."),
    *_MIT_HEAD,
)
_MIT_LARGE = (
    Rule("backbone.stages.0.op_list.0.", "stem.in_conv."),
    Rule("backbone.stages.0.op_list.{}.", "stem.res{}.", shift=-1),
    *(Rule(f"backbone.stages.{i + 1}.op_list.{{}}.", f"stages.{i}.blocks.{{}}.") for i in range(4)),
    *_MIT_HEAD,
)
_MICROSOFT = (
    *(Rule(f"patch_embed.{2 * i}.", f"patch_embed.conv{i + 1}.") for i in range(4)),
    Rule("blocks1.{}.", "stages.0.blocks.{}."),
    *(
        rule
        for stage in (1, 2)
        for rule in (
            Rule(f"blocks{stage + 1}.0.", f"stages.{stage}.downsample.res1."),
            Rule(f"blocks{stage + 1}.1.", f"stages.{stage}.downsample.patchmerge."),
            Rule(f"blocks{stage + 1}.2.", f"stages.{stage}.downsample.res2."),
            Rule(f"blocks{stage + 1}.{{}}.", f"stages.{stage}.blocks.{{}}.", shift=-3),
        )
    ),
    Rule("head.", "head."),
)

KEY_FORMATS = (
    KeyFormat(
        "evit-deploy",
        "msa",
        re.compile(
            r"pos_embed$|stem\.\d\.|norm\.|head\.(weight|bias)$"
            r"|stages\.\d+\.(transition\.|blocks\.\d+\.(local|attn|ffn|norm[12])\.)"
        ),
    ),
    KeyFormat(
        "timm",
        "mit",
        re.compile(
            r"stem\.(in_conv|res\d+)\.|stages\.\d+\.blocks\.\d+\.(main|context_module|local_module)\."
            r"|head\.(in_conv|classifier\.\d)\."
        ),
    ),
    KeyFormat(
        "timm",
        "msra",
        re.compile(
            r"patch_embed\.conv\d\.|stages\.\d+\.(downsample\.|blocks\.\d+\.(dw[01]|ffn[01]|mixer)\.)"
            r"|head\.(bn|linear)\."
        ),
    ),
    KeyFormat(
        "mit",
        "mit",
        re.compile(r"backbone\.(input_stem|stages\.\d+)\.op_list\.|head\.op_list\."),
        _MIT_BASE,
    ),
    KeyFormat(
        "microsoft",
        "msra",
        re.compile(r"patch_embed\.\d\.(c|bn)\.|blocks[123]\.\d+\.|head\.(bn|l)\."),
        _MICROSOFT,
        (("c.weight", "conv.weight"), ("l.weight", "linear.weight"), ("l.bias", "linear.bias")),
    ),
)
_MIT_LARGE_FORMAT = KeyFormat("mit", "mit", re.compile(r"backbone\.stages\.\d+\.op_list\.|head\.op_list\."), _MIT_LARGE)

# Published checkpoints of the same networks that are no classifiers.
_OTHER_TASKS = (
    (re.compile(r"head\.(input_ops|middle|output_ops)\."), "a segmentation model"),
    (re.compile(r"(image_encoder|prompt_encoder|mask_decoder)\."), "a SAM model"),
    (re.compile(r"(bbox_head|rpn_head|roi_head|mask_head|neck)\."), "a detection model"),
    (re.compile(r"(encoder|decoder)\.(project_in|project_out|stages\.\d+\.op_list)\."), "an autoencoder"),
)

_WRAPPER_COMPONENT = "_orig_mod."  # torch.compile puts it before a compiled module's name, at any depth
_WRAPPER_PREFIXES = ("module.", "model.")  # DataParallel and averaged models; Lightning modules


def strip_wrapper_prefixes(keys: Iterable[str]) -> dict[str, str]:
    """Each key and what is left of it without the prefixes of DataParallel, torch.compile and the like.

    Raises:
        ValueError: two keys become the same; the message has both.
    """
    stripped = {key: re.sub(rf"(^|(?<=\.)){re.escape(_WRAPPER_COMPONENT)}", "", key) for key in keys}
    shortened = True
    while shortened and stripped:
        shortened = False
        for prefix in _WRAPPER_PREFIXES:
            if all(name.startswith(prefix) for name in stripped.values()):
                stripped = {key: name.removeprefix(prefix) for key, name in stripped.items()}
                shortened = True
    owners: dict[str, str] = {}
    for key, name in stripped.items():
        if name in owners:
            raise ValueError(f"{owners[name]!r} and {key!r} are the same weight")
        owners[name] = key
    return stripped


def other_task(keys: Iterable[str]) -> str | None:
    """What a checkpoint of one of these networks is when it is no classifier, such as "a segmentation model"."""
    names = list(keys)
    for pattern, task in _OTHER_TASKS:
        if any(pattern.match(name) for name in names):
            return task
    return None


def recognise_key_format(keys: Iterable[str]) -> KeyFormat | None:
    """The format whose signature most of the keys have, or None when no format has half of them."""
    names = list(keys)
    best = max(KEY_FORMATS, key=lambda key_format: _matches(key_format, names))
    if 2 * _matches(best, names) < len(names) or not names:
        return None
    if best.name == "mit" and not any(name.startswith("backbone.input_stem.") for name in names):
        return _MIT_LARGE_FORMAT
    return best


def _matches(key_format: KeyFormat, names: list[str]) -> int:
    return sum(key_format.signature.match(name) is not None for name in names)
