"""The PyTorch source: transformers' own class, built from the config, hooked at three seams."""

from mla_deploy.source.latent_attention import latent_attention
from mla_deploy.source.model import empty_model, model_weights, module_from_checkpoint

__all__ = ["empty_model", "latent_attention", "model_weights", "module_from_checkpoint"]
