"""Engines: a bundle compiled for a target, here or, from a kit, on the device itself."""
