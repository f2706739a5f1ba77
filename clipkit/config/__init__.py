"""Configuration: YAML -> (one `extends:`) -> `key=value` overrides -> a frozen, fully checked `Config`."""

from clipkit.config.interval import Interval, parse_interval
from clipkit.config.problems import ConfigErrors
from clipkit.config.reading import read_options, read_values
from clipkit.config.root import Config, check_schedule, load_config, make_config
from clipkit.config.schema import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    TowerConfig,
)

__all__ = [
    "Config",
    "ConfigErrors",
    "DataConfig",
    "EvaluateConfig",
    "Interval",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RunConfig",
    "SourceConfig",
    "TowerConfig",
    "check_schedule",
    "load_config",
    "make_config",
    "parse_interval",
    "read_options",
    "read_values",
]
