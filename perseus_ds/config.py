"""The `perseus` block of a DeepSpeed config, as a model in DeepSpeed's own manner."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any

from pydantic import BaseModel, ConfigDict, create_model, model_validator

from perseus_core.errors import InputError
from perseus_core.runtime.settings import Settings
from perseus_ds.block import BLOCK


class _PerseusConfig(BaseModel):
    """Checked by `perseus_core.runtime.settings.Settings`: Megatron's face has the same keys and rules.

    Not a `DeepSpeedConfigModel`: older DeepSpeeds make that of pydantic 1, and all drop whatever is "auto".
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _check(cls, values: Any) -> Any:
        Settings.from_mapping(values, where=BLOCK)
        return values

    @property
    def settings(self) -> Settings:
        """The checked settings."""
        return Settings.from_mapping(self.model_dump(), where=BLOCK)


def _fields() -> dict[str, Any]:
    types = typing.get_type_hints(Settings)
    return {field.name: (types[field.name], field.default) for field in dataclasses.fields(Settings)}


PerseusConfig = create_model("PerseusConfig", __base__=_PerseusConfig, __module__=__name__, **_fields())


def read_block(block: Any) -> Settings:
    """The settings of a block.

    Raises:
        InputError: if it is not an object.
        pydantic.ValidationError: naming the key that is wrong, its value and the remedy.
    """
    if not isinstance(block, dict):
        raise InputError(
            f'config "{BLOCK}": {json.dumps(block, default=str)} is not an object; write {{"enabled": true}}'
        )
    settings: Settings = PerseusConfig(**block).settings
    return settings
