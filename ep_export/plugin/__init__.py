"""The TensorRT plugin's library: where its sources are, and how to build it."""

from ep_export.plugin.build import LIBRARY, build_plugin, plugin_presets

__all__ = ["LIBRARY", "build_plugin", "plugin_presets"]
