"""The configuration of a run: `schema` says what may stand in it, `loading` reads it."""

from graf.config.loading import CONFIG_FOLDER, ConfigError, build_config, load_config
from graf.config.schema import (
    FRAMING_TERMS,
    PATCH_SIZES,
    Config,
    DataConfig,
    RefinedCameras,
    Section,
    batch_too_large,
    parse_bytes,
)

__all__ = [
    "CONFIG_FOLDER",
    "FRAMING_TERMS",
    "PATCH_SIZES",
    "Config",
    "ConfigError",
    "DataConfig",
    "RefinedCameras",
    "Section",
    "batch_too_large",
    "build_config",
    "load_config",
    "parse_bytes",
]
