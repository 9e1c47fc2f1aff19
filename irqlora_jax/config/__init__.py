"""The configuration: frozen dataclasses, read from YAML and dotted overrides.

An unknown key or invalid value is an error that names the field, the value and the accepted values.
"""

from irqlora_jax.config.base import check_settings, quant_settings
from irqlora_jax.config.parse import parse_flags
from irqlora_jax.config.settings import (
    Config,
    EvaluateConfig,
    LogConfig,
    QuantizeConfig,
    RateRule,
    TrainConfig,
    TrainOptions,
    parse_config,
    read_stored_config,
    with_base_settings,
)

__all__ = [
    "Config",
    "EvaluateConfig",
    "LogConfig",
    "QuantizeConfig",
    "RateRule",
    "TrainConfig",
    "TrainOptions",
    "check_settings",
    "parse_config",
    "parse_flags",
    "quant_settings",
    "read_stored_config",
    "with_base_settings",
]
