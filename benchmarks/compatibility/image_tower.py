"""A small image tower in place of those of the package timm, which the trial of model types does not install."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModel, Gemma3nConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

PATCH, CHANNELS = 8, 3
IMAGE_TOWER_CONFIG: type[PreTrainedConfig] = Gemma3nConfig.sub_configs["vision_config"]


class ImageTower(PreTrainedModel):
    """One convolution, whose features are returned as timm's are: ``[B, C, H, W]``."""

    config_class = IMAGE_TOWER_CONFIG
    main_input_name = "pixel_values"

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(CHANNELS, config.hidden_size, PATCH, PATCH)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: object) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=torch.tanh(self.patches(pixel_values)))


def register_image_tower() -> None:
    """Let Transformers build :class:`ImageTower` for Gemma 3n, in this process."""
    AutoModel.register(IMAGE_TOWER_CONFIG, ImageTower, exist_ok=True)
