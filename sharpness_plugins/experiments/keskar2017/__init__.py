"""Keskar et al. (2017), reproduced: networks, data, protocol and controls, from one command to one record."""

from __future__ import annotations
