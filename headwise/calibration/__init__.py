"""Calibrations: each writes an adapter, a plain PEFT folder that loads without Headwise."""
