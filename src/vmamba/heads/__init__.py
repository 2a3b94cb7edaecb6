"""Heads for dense tasks on any backbone of timm's."""

from vmamba.heads.features import Features
from vmamba.heads.upernet import UPerNet, upernet

__all__ = ["Features", "UPerNet", "upernet"]
