"""Configurations: strictly validated models, filled from a YAML file, its `extends:` parents and dotted flags."""

from jaxtron.config.arguments import FILE_ENDINGS, split_arguments, take_file
from jaxtron.config.base import Config, ConfigType, FileName, NoEffect, UserError, expand_home, format_value, shown
from jaxtron.config.load import dump, gather, load
from jaxtron.config.settings import Setting, nearest, settings
from jaxtron.config.source import SettingsSource, read_file

__all__ = [
    "FILE_ENDINGS",
    "Config",
    "ConfigType",
    "FileName",
    "NoEffect",
    "Setting",
    "SettingsSource",
    "UserError",
    "dump",
    "expand_home",
    "format_value",
    "gather",
    "load",
    "nearest",
    "read_file",
    "settings",
    "shown",
    "split_arguments",
    "take_file",
]
