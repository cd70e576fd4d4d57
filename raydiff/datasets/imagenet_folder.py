"""``imagenet_folder``: photographs of any size in class folders: ``train/<class>/*`` and ``val/<class>/*``.

ImageNet itself, subsets of it, or any other photographs laid out like it. ``normal`` and ``anomalous`` name the classes
(see :mod:`raydiff.datasets._class_folders`): one normal class is the one-class protocol, several against others the
class-disjoint one.

Deng et al. 2009, "ImageNet: A Large-Scale Hierarchical Image Database".
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from raydiff.datasets._class_folders import ClassDataset, ClassOptions, chosen_classes, hold_out, list_folders

__all__ = ["PUBLISHED", "Options", "build"]

PUBLISHED = "Stanford and Princeton publish it as 'ImageNet' (ILSVRC 2012), to registered users"


class Options(ClassOptions):
    """Where the class folders lie."""

    name: Literal["imagenet_folder"] = "imagenet_folder"
    source: str = Field(description="the folder that holds train/<class> and val/<class> or test/<class>")


def build(options: Options) -> ClassDataset:
    """The data set in ``options.source``.

    Raises:
        DataError: there are no class folders, or a class that is asked for is empty.
        ConfigError: no class is normal, or one is not there.
    """
    root = Path.cwd() / Path(options.source).expanduser()
    classes = hold_out(list_folders(root))
    return ClassDataset(root, classes, *chosen_classes(options, root, classes))
